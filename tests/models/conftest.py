"""Folders of the tiny model, and a cache of its own for every test."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MakeFolder = Callable[..., Path]
MakeModel = Callable[..., LlamaForCausalLM]


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test; slow tests use the user's, which holds the real model."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("ALLMEND_WHEELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def tokenizer(make_tiny_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Without a padding token."""
    return make_tiny_tokenizer()


@pytest.fixture
def make_model(make_tiny_model: MakeModel) -> MakeModel:
    return partial(make_tiny_model, vocab_size=260)


@pytest.fixture
def model(make_model: MakeModel) -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def make_folder(tmp_path: Path, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> MakeFolder:
    def make(name: str = "model", *, tied: bool = True, shard: str | None = None) -> Path:
        folder = tmp_path / name
        make_model(tied=tied).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) * 7 % 256
