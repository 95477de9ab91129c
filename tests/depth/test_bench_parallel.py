"""The bench over several processes: what it counts and adds up, and what it refuses. No time is tested."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from allmend.depth.apply import apply_plan, save_paired
from allmend.depth.bench_parallel import (
    ParallelSpeed,
    check_sources,
    compare_in_parallel,
    compare_sources_in_parallel,
    load_sources,
)
from allmend.depth.plan import stretch_plan
from allmend.depth.spread import ratio
from allmend.errors import UserError


@pytest.fixture(scope="module")
def sources(tiny_folder: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of two layers, and the same with both in one."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="sdpa")
    plan = stretch_plan(2, 0, 2)
    folder = tmp_path_factory.mktemp("paired") / "model"
    save_paired(apply_plan(model, plan), tiny_tokenizer, folder, plan)
    return {"paired": str(folder), "sequential": str(tiny_folder)}


@pytest.fixture(scope="module")
def found(sources: dict[str, str]) -> ParallelSpeed:
    return compare_sources_in_parallel(sources, 2, device="cpu", prompt_tokens=4, tokens=3, runs=2)


def test_a_pair_sums_half_as_often(found: ParallelSpeed) -> None:
    assert {name: (one.depth, one.all_reduces) for name, one in found.models.items()} == {
        "paired": (1, 2),
        "sequential": (2, 4),
    }
    assert (found.world, found.backend, found.machine["threads"]) == (2, "gloo", 1)
    for one in found.models.values():
        assert len(one.decoded.rates) == len(one.all_reduce_seconds) == 2
        assert min(one.all_reduce_seconds) > 0


def test_weights_are_a_share_of_the_layers_and_the_whole_head(found: ParallelSpeed) -> None:
    layer = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 48
    for one in found.models.values():
        assert one.weights == 4 * (2 * layer // 2 + 300 * 32)
    assert found.message == 4 * 32


def test_the_prediction_is_the_sum_that_it_says_it_is(found: ParallelSpeed) -> None:
    for one in found.models.values():
        expected = one.weights / found.bandwidth.median + one.all_reduces * found.latency.median
        assert one.predicted == pytest.approx(expected)
    a, b = found.models.values()
    assert found.predicted_ratio == pytest.approx(b.predicted / a.predicted)
    assert found.ratio == ratio(a.decoded.rates, b.decoded.rates)
    assert found.all_reduce_ratio == ratio(a.all_reduce_seconds, b.all_reduce_seconds)


def test_what_processes_of_one_machine_cannot_show_is_said(found: ParallelSpeed) -> None:
    notes = " ".join(found.notes)
    assert "stand in for GPUs" in notes
    assert "leaves out" in notes
    assert ParallelSpeed.model_validate_json(found.model_dump_json()) == found


def test_models_that_cannot_be_shared_are_refused_before_anything_starts(sources: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"paired.*: the 4 key-value heads of layer 0 .* do not divide by 3") as refused:
        check_sources({"paired": sources["paired"]}, 3, 8)
    assert "2 or 4 processes" in str(refused.value)
    with pytest.raises(UserError, match="512 positions"):
        check_sources(sources, 2, 513)
    with pytest.raises(UserError, match="there is no model"):
        check_sources({"paired": "nowhere"}, 2, 8)


@pytest.mark.slow
def test_a_fault_in_the_processes_is_a_fault_here(sources: dict[str, str]) -> None:
    with pytest.raises(UserError, match="do not divide by 3"):
        compare_in_parallel(partial(load_sources, sources), 3, tokens=2, runs=1)


def test_devices_that_are_not_there_are_refused(sources: dict[str, str]) -> None:
    load = partial(load_sources, sources)
    with pytest.raises(UserError, match="not mps"):
        compare_in_parallel(load, 2, device="mps")
    many = torch.cuda.device_count() + 1
    with pytest.raises(UserError, match=f"{many} processes need {many} GPUs"):
        compare_in_parallel(load, many, device="cuda")
