"""A tiny Llama with a byte-level tokenizer, made on the spot, and a cache of its own for every test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MakeFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test; slow tests use the user's, which holds the real model."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("ALLMEND_WHEELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(BPE(vocab=letters, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>")


def _tiny(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def make_model() -> Callable[..., LlamaForCausalLM]:
    return _tiny


@pytest.fixture
def model() -> LlamaForCausalLM:
    return _tiny()


@pytest.fixture
def make_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> MakeFolder:
    def make(name: str = "model", *, tied: bool = True, shard: str | None = None) -> Path:
        folder = tmp_path / name
        _tiny(tied=tied).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) * 7 % 256
