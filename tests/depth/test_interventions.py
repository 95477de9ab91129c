import copy
from typing import Any

import pytest
import torch

from allmend.depth.architectures import layers_of
from allmend.depth.interventions import intervene
from allmend.depth.plan import Prune, Shuffle, Stretch, pairs_plan, stretch_plan
from allmend.errors import UserError


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(
    "change", [stretch_plan(6, 3, 3), Shuffle(2, 3), Prune(4, 4), Stretch(1, 2, "parallel"), Stretch(1, 2, "merge")]
)
def test_a_stretch_of_no_layer_or_one_changes_no_bit(decoder: Any, ids: torch.Tensor, change: Any) -> None:
    assert torch.equal(logits(intervene(decoder, change), ids), logits(decoder, ids))


def test_pruning_is_a_model_without_these_layers(decoder: Any, ids: torch.Tensor) -> None:
    shorter = copy.deepcopy(decoder)
    del shorter.model.layers[2:4]

    assert torch.equal(logits(intervene(decoder, Prune(2, 4)), ids), logits(shorter, ids))


def test_a_shuffle_runs_the_layers_in_its_order(decoder: Any, ids: torch.Tensor) -> None:
    change = Shuffle(1, 5, seed=3)
    other = copy.deepcopy(decoder)
    order = [step.layers[0] for step in change.steps(6)]
    other.model.layers = torch.nn.ModuleList([other.model.layers[layer] for layer in order])

    assert torch.equal(logits(intervene(decoder, change), ids), logits(other, ids))


def test_a_merged_layer_has_the_mean_weights(decoder: Any, ids: torch.Tensor) -> None:
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        for name, parameter in other.model.layers[2].named_parameters():
            parameter.copy_((parameter + decoder.model.layers[3].get_parameter(name)) / 2)
    del other.model.layers[3]

    found = logits(intervene(decoder, Stretch(2, 4, "merge")), ids)

    assert torch.allclose(found, logits(other, ids), atol=1e-12)


def test_equal_layers_merge_into_one_of_them(make_decoder: Any, ids: torch.Tensor) -> None:
    model = make_decoder()
    model.model.layers[3].load_state_dict(model.model.layers[2].state_dict())

    assert torch.equal(
        logits(intervene(model, Stretch(2, 4, "merge")), ids), logits(intervene(model, Prune(3, 4)), ids)
    )


@pytest.mark.parametrize("together", ["parallel", "parallel_sum"])
def test_side_by_side_differs_at_second_order(decoder: Any, ids: torch.Tensor, together: Any) -> None:
    """Halving what both layers add to the stream quarters the difference."""
    gaps = []
    for part in (1 / 64, 1 / 128):
        model = copy.deepcopy(decoder)
        with torch.no_grad():
            for layer in model.model.layers[2:4]:
                for name, parameter in layer.named_parameters():
                    if any(out in name for out in ("o_proj", "down_proj", "dense", "fc2", "c_proj")):
                        parameter.mul_(part)
        # the stream itself, before the last norm and without the layers behind, which bend it, too
        del model.model.layers[4:]
        model.config.num_hidden_layers = 4
        model.model.norm = model.model.final_layernorm = torch.nn.Identity()
        with torch.no_grad():
            ends = [model.model(ids), intervene(model, Stretch(2, 4, together)).model(ids)]
        gaps.append(float((ends[0].last_hidden_state - ends[1].last_hidden_state).norm()))

    assert 3.9 < gaps[0] / gaps[1] < 4.1


def test_weights_are_shared_and_the_model_stays_as_it_is(make_decoder: Any, ids: torch.Tensor) -> None:
    model = make_decoder()
    before = logits(model, ids)
    changed = intervene(model, stretch_plan(6, 0, 6))

    assert {p.data_ptr() for p in changed.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert torch.equal(logits(model, ids), before)
    assert len(model.model.layers) == 6


def test_layers_that_attend_differently_are_no_group(make_decoder: Any, ids: torch.Tensor) -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = make_decoder("qwen2", layers=5, layer_types=kinds, use_sliding_window=True, sliding_window=4)

    with pytest.raises(UserError, match=r"\[1, 2\].*attend differently.*1 full_attention, 2 sliding_attention"):
        intervene(model, pairs_plan(5, [1]))
    shorter = copy.deepcopy(model)
    del shorter.model.layers[0]
    shorter.config.layer_types = shorter.model.config.layer_types = kinds[1:]
    shorter.config.use_cache = shorter.model.config.use_cache = False
    assert torch.equal(logits(intervene(model, Prune(0, 1)), ids), logits(shorter, ids))


def test_models_that_cannot_be_rearranged(make_decoder: Any) -> None:
    model = make_decoder()
    model.config.layer_widths = [1] * 6
    with pytest.raises(UserError, match="side by side already"):
        layers_of(model)
    model = make_decoder()
    model.config.quantization_config = {"bits": 4}
    with pytest.raises(UserError, match=r"quantised.*\n.*Fold first"):
        layers_of(model)
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*\n.*Llama, Mistral"):
        layers_of(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))
