"""Whole models: that inputs are the dense model's, that what is done stays, and what is in the way is named."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from allmend.compress import whole as module
from allmend.compress.calibration import input_products
from allmend.compress.layers import Inputs, Option, compress_weight
from allmend.compress.masks import NofM, Unstructured
from allmend.compress.parts import FACTS, Parts, Row
from allmend.compress.whole import applied, compress_layers, uniform, weight_of
from allmend.errors import UserError
from allmend.models.formats import format_named, quantize
from allmend.models.load import linear_layers_of

INT4 = format_named("int4", group=0)
FACTS_NOW = {"model": "abc", "plan": "int4"}


@pytest.fixture
def model(tiny_model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(tiny_model).float().eval()


@pytest.fixture
def windows(model: PreTrainedModel) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (8, 32), generator=torch.Generator().manual_seed(0))


def plan_of(model: PreTrainedModel, option: Option) -> dict[str, Option]:
    return dict.fromkeys(linear_layers_of(model), option)


def weight(model: PreTrainedModel, name: str) -> torch.Tensor:
    found: torch.Tensor = model.get_submodule(name).weight.detach()
    return found


@pytest.mark.parametrize(
    "option", [Option(INT4), Option(INT4, Unstructured(0.5)), Option(None, NofM(2, 4)), Option(None)], ids=str
)
@pytest.mark.parametrize("room", [1, 2**30])
def test_each_weight_goes_its_way_with_the_dense_model_s_inputs(
    option: Option, room: int, model: PreTrainedModel, windows: torch.Tensor, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[Row] = []
    parts = Parts(tmp_path / "parts", FACTS_NOW)
    rows = compress_layers(model, plan_of(model, option), windows, parts, room=room, on_layer=told.append)

    assert [row.layer for row in rows] == list(linear_layers_of(model))
    assert [row.layer for row in told] == [row.layer for row in rows]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    held_out = torch.arange(8) % 4 == 3
    layers = list(linear_layers_of(model))
    seen, other = input_products(model, windows[~held_out], layers), input_products(model, windows[held_out], layers)
    for row in rows[:5]:
        expected = compress_weight(weight(model, row.layer), option, Inputs(seen[row.layer], other[row.layer]))
        found, packed = parts.get(row.layer)
        assert torch.equal(weight_of(packed, option), expected.weight)
        assert found == row or math.isnan(row.damping)
        assert row.method == expected.method
        assert row.bytes == option.bytes((row.rows, row.columns)) == packed.bytes
        assert row.held_out == expected.held_out or math.isnan(row.held_out)
        assert row.zeros == pytest.approx(0.0 if option.pattern is None else 0.5)


def test_whoever_is_stopped_goes_on_at_the_next(
    model: PreTrainedModel, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(model, Option(INT4))
    whole = compress_layers(model, plan, windows, Parts(tmp_path / "whole", FACTS_NOW))

    class StoppedError(Exception):
        pass

    def stop(row: Row) -> None:
        if row.layer == whole[4].layer:
            raise StoppedError

    with pytest.raises(StoppedError):
        compress_layers(model, plan, windows, Parts(tmp_path / "parts", FACTS_NOW), on_layer=stop)
    asked: list[str] = []
    again = compress_weight

    def counted(some: torch.Tensor, *args: object, **options: object) -> object:
        asked.append("one")
        return again(some, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "compress_weight", counted)
    rows = compress_layers(model, plan, windows, parts := Parts(tmp_path / "parts", FACTS_NOW))
    assert len(asked) == len(whole) - 5
    assert [replace(row, seconds=0) for row in rows] == [replace(row, seconds=0) for row in whole]
    for row in whole:
        one, other = parts.get(row.layer)[1], Parts(tmp_path / "whole", FACTS_NOW).get(row.layer)[1]
        assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())


def test_weights_stand_in_for_a_model_s_own_for_a_while(model: PreTrainedModel, tmp_path: Path) -> None:
    plan = plan_of(model, Option(INT4))
    parts = Parts(tmp_path / "parts", FACTS_NOW)
    compress_layers(model, plan, None, parts)
    name = next(iter(plan))
    before = weight(model, name).clone()
    with applied(model, plan, parts):
        assert torch.equal(weight(model, name), quantize(before, INT4))
    assert torch.equal(weight(model, name), before)
    with pytest.raises(ZeroDivisionError), applied(model, plan, parts):
        raise ZeroDivisionError
    assert torch.equal(weight(model, name), before)


def test_one_option_for_all_or_by_their_width() -> None:
    found = uniform({"a": (2, 64), "b": (2, 32)}, lambda columns: format_named("int4", group=columns), NofM(2, 4))
    assert found == {
        "a": Option(format_named("int4", group=64), NofM(2, 4)),
        "b": Option(format_named("int4", group=32), NofM(2, 4)),
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named_before_anything_is_done(
    bad: float, model: PreTrainedModel, tmp_path: Path
) -> None:
    last = list(linear_layers_of(model))[-1]
    with torch.no_grad():
        model.get_submodule(last).weight[0, 0] = bad
    parts = Parts(tmp_path / "parts", FACTS_NOW)
    with pytest.raises(ValueError, match=rf"{last}\.weight has a value that is not finite"):
        compress_layers(model, plan_of(model, Option(INT4)), None, parts)
    assert [path.name for path in parts.folder.iterdir()] == [FACTS]


def test_parts_of_another_plan_are_refused(tmp_path: Path) -> None:
    Parts(tmp_path, FACTS_NOW)
    Parts(tmp_path, FACTS_NOW)
    with pytest.raises(UserError, match=r"begun with another plan \(int4, now int8\)"):
        Parts(tmp_path, FACTS_NOW | {"plan": "int8"})
    (tmp_path / FACTS).write_text("{")
    with pytest.raises(UserError, match="cannot be gone on from"):
        Parts(tmp_path, FACTS_NOW)


def test_a_damaged_part_is_named(model: PreTrainedModel, tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", FACTS_NOW)
    compress_layers(model, plan_of(model, Option(INT4)), None, parts)
    layer = next(iter(linear_layers_of(model)))
    path = parts.folder / f"{layer}.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="is damaged"):
        parts.get(layer)
