"""Decoding in turns: what is decoded, in what order, and what is said of it. No time is tested."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.depth.conftest import MakeDecoder

from allmend.depth import bench
from allmend.depth.apply import apply_plan
from allmend.depth.bench import GreedyDecoder, Speed, comparable, compare_speed, decode_rates, random_prompts
from allmend.depth.plan import stretch_plan
from allmend.depth.spread import ratio, spread
from allmend.errors import UserError


@pytest.fixture(scope="module")
def pair(make_decoder: MakeDecoder) -> dict[str, Any]:
    model = make_decoder(dtype=torch.float32)
    return {"paired": apply_plan(model, stretch_plan(6, 1, 5)), "sequential": model}


def test_what_is_decoded_is_what_generate_does(decoder: Any, ids: torch.Tensor) -> None:
    expected = decoder.generate(ids, max_new_tokens=7, do_sample=False)[:, ids.shape[1] :]
    one = GreedyDecoder(decoder, ids, 6)

    for _ in range(2):  # a run leaves nothing behind
        first = one.prefill()
        assert torch.equal(torch.cat([first, one.steps(first)], dim=1), expected)


@pytest.mark.slow
def test_compiled_steps_decode_the_same(pair: dict[str, Any], ids: torch.Tensor) -> None:
    for model in pair.values():
        eager, compiled = (GreedyDecoder(model, ids, 6, compiled=way) for way in (False, True))
        first = eager.prefill()
        expected = eager.steps(first)
        for _ in range(2):
            assert torch.equal(compiled.prefill(), first)
            assert torch.equal(compiled.steps(first), expected)


def test_models_take_turns_after_a_warm_up(pair: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    turns, waits, shares = [], [], []
    own, own_steps, own_prefill = GreedyDecoder.seconds, GreedyDecoder.steps, GreedyDecoder.prefill

    now = [0.0]

    def seconds(self: GreedyDecoder, clock: Callable[[], float]) -> tuple[float, float]:
        turns.append(next(name for name, model in pair.items() if model is self.model))
        return own(self, clock)

    def steps(self: GreedyDecoder, token: torch.Tensor) -> torch.Tensor:
        now[0] += len(turns)
        return own_steps(self, token)

    def prefill(self: GreedyDecoder) -> torch.Tensor:
        now[0] += 0.5
        return own_prefill(self)

    for name, instead in (("seconds", seconds), ("steps", steps), ("prefill", prefill)):
        monkeypatch.setattr(GreedyDecoder, name, instead)
    found = decode_rates(
        pair,
        batch=2,
        prompt_tokens=3,
        tokens=4,
        runs=3,
        clock=lambda: now[0],
        before_run=lambda: waits.append(1),
        on_run=shares.append,
    )

    a, b = pair
    assert turns == [b, a, a, b, b, a, a, b]
    assert found[a].rates == (2 * 4 / 3, 2 * 4 / 6, 2 * 4 / 7)  # the warm-up is not among them
    assert found[b].rates == (2 * 4 / 4, 2 * 4 / 5, 2 * 4 / 8)
    assert found[a].prefill == (0.5,) * 3
    assert len(waits) == len(turns)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_more_tokens_than_positions_are_refused(pair: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="paired: prompt and tokens come to 257, and the model has 256 positions"):
        decode_rates(pair, prompt_tokens=200, tokens=56)


def test_prompts_depend_on_the_seed_alone(pair: dict[str, Any]) -> None:
    one, same, other = (random_prompts(pair["paired"], 2, 40, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.max() < 97


def test_a_comparison_of_a_pair_says_what_it_is(pair: dict[str, Any]) -> None:
    sources = {"paired": "here", "sequential": "there"}
    found = compare_speed(pair, sources, prompt_tokens=3, tokens=4, runs=2)

    assert Speed.model_validate_json(found.model_dump_json()) == found
    assert found.models["paired"].widths == (1, 2, 2, 1)
    assert found.models["sequential"].widths == (1,) * 6
    assert found.models["sequential"].source == "there"
    parameters = found.models["sequential"].parameters - found.models["paired"].parameters
    assert parameters == 2 * 2 * 32  # two norms of each pair
    rates = [one.decoded["eager"].rates for one in found.models.values()]
    assert found.ratio == {"eager": ratio(*rates)}
    assert found.prediction is not None
    assert found.prediction.times.layers.keys() == {1, 2}
    assert (found.prediction.times.batch, found.prediction.times.length) == (1, 3 + 2)
    assert {"device", "name", "threads", "dtype", "torch"} <= found.machine.keys()
    assert found.machine["dtype"] == "float32"
    notes = " ".join(found.notes)
    assert "do the same arithmetic and read the same weights" in notes
    assert "1.2 times as fast is no figure of a CPU" in notes


def test_of_models_that_are_not_paired_nothing_is_said_about_pairs(pair: dict[str, Any]) -> None:
    found = compare_speed({"model": pair["sequential"]}, {"model": "it"}, prompt_tokens=3, tokens=2, runs=1)
    assert not any("side by side" in note or "1.2" in note for note in found.notes)
    assert (found.ratio, found.prediction) == ({}, None)


def test_models_of_other_sizes_are_not_foretold(pair: dict[str, Any], make_decoder: MakeDecoder) -> None:
    assert comparable(*pair.values())
    other = make_decoder("llama", dtype=torch.float32)
    other.config.intermediate_size = 41
    assert not comparable(pair["paired"], other)
    assert not comparable(pair["paired"], torch.nn.Linear(2, 2))
    other = make_decoder("qwen2", dtype=torch.float32)
    assert not comparable(pair["paired"], other)
    found = compare_speed({"a": pair["paired"], "b": other}, {"a": "", "b": ""}, prompt_tokens=3, tokens=2, runs=1)
    assert found.prediction is None
    assert found.ratio.keys() == {"eager"}


def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    for load, told in ((0.3, False), (1.9, False), (7.0, True)):
        monkeypatch.setattr(bench.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert any("load 7.0 on 2 cores" in note for note in bench.busy(1)) == told
        assert any("wait for each other" in note for note in bench.busy(2)) == told
        assert not any("wait for each other" in note for note in bench.busy(1))


def test_spreads() -> None:
    found = spread([3.0, 1.0, 2.0, 9.0])
    assert (found.low, found.median, found.high, found.n) == (1, 2.5, 9, 4)
    # what a run has in common cancels
    assert ratio([2.0, 20.0], [1.0, 10.0]) == spread([2.0, 2.0])
