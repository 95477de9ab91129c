"""A decoder of six layers with a tokenizer of bytes, as a folder, and two texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Six layers: `conftest.tiny_folder` has two."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=256,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("deep") / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """To search on and to report on: 1,100 and 2,600 bytes."""
    folder = tmp_path_factory.mktemp("texts")
    for name, words, count in (
        ("search.txt", "a text of few words, over and over. ", 31),
        ("report.txt", "another. ", 290),
    ):
        (folder / name).write_text("".join(f"{place}{words}" for place in range(count)))
    return folder / "search.txt", folder / "report.txt"
