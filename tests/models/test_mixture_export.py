"""The LoRA that a mixture leaves to plain PEFT."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from allmend.models.adapters import learning_adapter
from allmend.models.mixture import PRESENT, Mixture, apply_mixture, of_ranks, role
from allmend.models.mixture_export import export_mixture
from allmend.models.mixture_layers import MixtureConfig, routing
from allmend.models.tensors import Tensors

MakeModel = Callable[..., LlamaForCausalLM]
CONFIG = MixtureConfig(generalists=1, specialists=2, rank=4, specialist_rank=3, scale=1.5)


def mixture_of(model: LlamaForCausalLM, config: MixtureConfig = CONFIG) -> Mixture:
    return apply_mixture(model, config, seed=3, specialist_seed=4, digest="")


def noisy(mixture: Mixture, ranks: tuple[int, ...], *, routers: float) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    state = mixture.state()
    for name, tensor in state.items():
        if name != PRESENT:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor *= routers if role(name) == "router" else 1
    return of_ranks(state, mixture.config, ranks)


def in_peft(model: LlamaForCausalLM, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = PeftModel.from_pretrained(model, str(folder)).eval()(ids).logits
    return logits


@pytest.mark.parametrize("ranks", [(4, 3, 3), (4, 2, 0), (0, 3, 1)])
def test_mean_gates_are_the_mixture_where_gates_are_constant(
    make_model: MakeModel, tmp_path: Path, ids: torch.Tensor, ranks: tuple[int, ...]
) -> None:
    mixture = mixture_of(make_model())
    state = noisy(mixture, ranks, routers=0)
    mixture.load(state)
    gates = routing(mixture.model, {"input_ids": ids}).mean(1)
    export_mixture(mixture, tmp_path / "lora", state, how="mean-gates", base="the base", gates=gates)
    found = in_peft(make_model(), tmp_path / "lora", ids)
    assert (found - mixture.model(ids).logits).abs().max() <= 1e-6
    facts = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert facts["r"] == sum(most for r, most in zip(ranks, CONFIG.ranks, strict=True) if r)
    assert facts["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert facts["base_model_name_or_path"] == "the base"
    with learning_adapter(make_model(), tmp_path / "lora") as again:
        assert len(again.parameters()) == 12
    # where they are not, it is something else
    mixture.load(noisy(mixture, ranks, routers=30))
    assert (found - mixture.model(ids).logits).abs().max() > 1e-3


def test_the_generalist_alone_is_the_mixture_of_who_has_nothing_else(
    make_model: MakeModel, tmp_path: Path, ids: torch.Tensor
) -> None:
    for number, config in enumerate((CONFIG, replace(CONFIG, generalists=2))):
        ranks = (*config.generalist_ranks, 0, 0)
        mixture = mixture_of(make_model(), config)
        state = noisy(mixture, ranks, routers=0)
        mixture.load(state)
        shared = {name: tensor for name, tensor in state.items() if role(name) == "generalist"}
        export_mixture(mixture, tmp_path / f"{number}", shared, how="generalist", base="the base")
        found = in_peft(make_model(), tmp_path / f"{number}", ids)
        assert (found - mixture.model(ids).logits).abs().max() <= 1e-6


def test_names_that_others_share_are_written_out(make_model: MakeModel, tmp_path: Path) -> None:
    layer = "model.layers.1.mlp.up_proj"
    mixture = mixture_of(make_model(), replace(CONFIG, targets=[layer]))
    export_mixture(mixture, tmp_path / "lora", mixture.state(), how="generalist", base="the base")
    facts = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert facts["target_modules"] == [layer]


def test_fused_matrices_are_exported_too(tmp_path: Path, ids: torch.Tensor) -> None:
    facts = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Phi3Config(vocab_size=260, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **facts)
    model = Phi3ForCausalLM(config).eval()
    weights = model.state_dict()
    mixture = mixture_of(model)
    state = noisy(mixture, (4, 3, 3), routers=0)
    mixture.load(state)
    gates = torch.full((2, 3), 1 / 3)
    export_mixture(mixture, tmp_path / "lora", state, how="mean-gates", base="the base", gates=gates)
    plain = Phi3ForCausalLM(config).eval()
    plain.load_state_dict(weights)
    assert (in_peft(plain, tmp_path / "lora", ids) - mixture.model(ids).logits).abs().max() <= 1e-6


def test_what_cannot_be_exported_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    mixture = mixture_of(make_model())
    state = mixture.state()
    with pytest.raises(ValueError, match=r"mean gates are None instead of \[2, 3\]"):
        export_mixture(mixture, tmp_path / "lora", state, how="mean-gates", base="")
    with pytest.raises(ValueError, match=r"mean gates are \[2, 2\] instead of \[2, 3\]"):
        export_mixture(mixture, tmp_path / "lora", state, how="mean-gates", base="", gates=torch.ones(2, 2))
    alone = mixture_of(make_model(), MixtureConfig(0, 1))
    with pytest.raises(ValueError, match="no generalist"):
        export_mixture(alone, tmp_path / "lora", alone.state(), how="generalist", base="")
    assert not (tmp_path / "lora").exists()
