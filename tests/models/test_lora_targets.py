"""What a model cannot have of a LoRA, by the names and shapes of its layers, against PEFT's own matching."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from allmend.models.lora_targets import check_lora

LAYERS = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.self_attn.v_proj": (8, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
    "proj": (16, 16),
}


def test_a_sound_lora_has_no_problems() -> None:
    assert check_lora(LAYERS, rank=8, targets=["q_proj", "v_proj"]) == []
    assert check_lora(LAYERS, rank=8, targets="all-linear") == []
    assert check_lora(LAYERS, rank=32, targets=["self_attn.q_proj"]) == []


def test_a_rank_too_large_names_the_layer() -> None:
    (problem,) = check_lora(LAYERS, rank=16, targets="all-linear")
    assert "model.layers.0.self_attn.v_proj" in problem
    assert "8 × 32" in problem
    assert check_lora(LAYERS, rank=16, targets=["q_proj"]) == []


def test_an_unknown_target_offers_near_names() -> None:
    (problem,) = check_lora(LAYERS, rank=2, targets=["q_prjo", "v_proj"])
    assert "'q_prjo'" in problem
    assert "did you mean q_proj" in problem
    assert "down_proj, proj, q_proj, v_proj" in problem


@pytest.mark.parametrize(("rank", "targets"), [(0, ["q_proj"]), (2, []), (2, "q_proj"), (2, ["mlp"]), (2, ["lm_head"])])
def test_other_mistakes(rank: int, targets: list[str] | str) -> None:
    assert len(check_lora(LAYERS, rank=rank, targets=targets)) == 1  # type: ignore[arg-type]


@given(st.sampled_from(["proj", "q_proj", "self_attn.q_proj", "_proj", "attn", "model.layers.0.self_attn.q_proj"]))
def test_matching_is_that_of_peft(target: str) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=[target])
    ours = not check_lora(LAYERS, rank=1, targets=[target])
    assert ours == any(check_target_module_exists(config, name) for name in LAYERS)
