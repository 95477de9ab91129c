"""Tiny decoders of every architecture whose layers can run side by side, with weights that no initialisation gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ARCHITECTURES = {
    "llama": {},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "phi3": {"pad_token_id": 0},
    "phi": {},
    "starcoder2": {},
}
"""Names, and what each needs beside the common sizes."""

LAYERS = 6

MakeDecoder = Callable[..., Any]


@pytest.fixture(scope="session")
def make_decoder() -> MakeDecoder:
    """A decoder of an architecture; gains, shifts and biases are drawn, too."""

    def make(
        name: str = "llama", *, layers: int = LAYERS, dtype: torch.dtype = torch.float64, seed: int = 0, **other: Any
    ) -> Any:
        facts = {"model_type": name} | ARCHITECTURES[name] | other
        config = AutoConfig.for_model(
            facts.pop("model_type"),
            vocab_size=97,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
            **facts,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    # gains around 1, one of them negative and one near 0
                    parameter.add_(0.2 * torch.randn_like(parameter))
                for layer in model.model.layers:
                    layer.input_layernorm.weight[:2] = torch.tensor([-0.7, 1e-5])
        return model

    return make


@pytest.fixture(params=ARCHITECTURES)
def decoder(request: pytest.FixtureRequest, make_decoder: MakeDecoder) -> Any:
    """One of every architecture, in double precision."""
    return make_decoder(request.param)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Two sequences of 17 tokens."""
    return torch.randint(1, 97, (2, 17), generator=torch.Generator().manual_seed(1))
