"""Layers timed alone: what is timed, and what it adds up to. No time is tested."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.depth.conftest import MakeDecoder

from allmend.depth.apply import apply_plan
from allmend.depth.layer_times import LayerTimes, layer_times, predicted_speedup, token_seconds, widths_of
from allmend.depth.plan import Plan, stretch_plan

TIMES = LayerTimes(
    batch=1, length=8, layers={1: (1.0, 2.0, 1.0), 2: (2.0, 3.0, 1.0), 3: (3.0, 9.0, 9.0)}, outside=(4.0, 6.0, 5.0)
)


def test_a_token_is_all_layers_and_what_is_outside_them() -> None:
    assert token_seconds(TIMES, [1, 2, 1]) == (4 + 1 + 2 + 1, 6 + 2 + 3 + 2, 5 + 1 + 1 + 1)
    assert token_seconds(TIMES, []) == TIMES.outside


def test_a_speedup_is_taken_round_by_round() -> None:
    found = predicted_speedup(TIMES, [1, 2, 1], [1] * 4)

    rounds = sorted([(4 + 4) / (4 + 4), (6 + 8) / (6 + 7), (5 + 4) / (5 + 3)])
    assert (found.low, found.median, found.high, found.n) == (*rounds, 3)
    assert predicted_speedup(TIMES, [1] * 4, [1, 2, 1]).high == 1 / rounds[0]


@given(st.lists(st.sampled_from([1, 2, 3]), max_size=8))
def test_nothing_is_gained_on_oneself(widths: list[int]) -> None:
    found = predicted_speedup(TIMES, widths, widths)
    assert (found.low, found.high) == (1, 1)


def test_widths_that_were_not_timed_are_refused() -> None:
    with pytest.raises(ValueError, match="width 4"):
        token_seconds(TIMES, [1, 4])


def test_every_width_of_the_models_is_timed_once(make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    paired, tripled = apply_plan(model, stretch_plan(6, 1, 5)), apply_plan(model, Plan(((0,), (1, 2, 3), (4,), (5,))))

    found = layer_times([paired, model, tripled], batch=2, length=5, rounds=3)

    assert sorted(found.layers) == [1, 2, 3]
    assert {len(some) for some in (*found.layers.values(), found.outside)} == {3}
    assert all(seconds > 0 for some in found.layers.values() for seconds in some)
    assert min(predicted_speedup(found, widths_of(paired), widths_of(model)).low, 0) == 0


def test_layers_are_timed_on_a_full_cache_and_left_as_they_are(
    decoder: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = decoder(ids).logits
    lengths = []
    attention = type(decoder.model.layers[0].self_attn)
    own = attention.forward

    def listen(self: Any, *given: Any, **named: Any) -> Any:
        found = own(self, *given, **named)
        lengths.append(named["past_key_values"].get_seq_length(self.layer_idx))
        return found

    monkeypatch.setattr(attention, "forward", listen)
    layer_times([decoder], batch=1, length=5, rounds=2)
    monkeypatch.undo()

    filling, steps = lengths[:6], lengths[6:]
    assert set(filling) == {5}
    assert set(steps) == {6}  # every turn starts from the same cache
    assert len(steps) == 6 + 3 * 6  # listening, then three rounds
    assert torch.equal(decoder(ids).logits, before)
    assert not any(layer._forward_pre_hooks for layer in decoder.model.layers)
