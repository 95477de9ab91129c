from typing import Any

import numpy as np
import pytest
import torch

from allmend.data.windows import Windows
from allmend.depth.decoder import Decoder, common_prefix
from allmend.depth.interventions import intervene
from allmend.depth.measure import Candidate, Measured, added, behind, measure, perplexity, sequential
from allmend.depth.plan import Prune, Shuffle, Step, Stretch, pairs_plan, stretch_plan
from allmend.errors import UserError

CHANGES = [
    stretch_plan(6, 0, 6),
    pairs_plan(6, [3]),
    stretch_plan(6, 2, 5, 3),
    Prune(0, 1),
    Prune(4, 6),
    Shuffle(1, 5, 1),
    Stretch(2, 5, "parallel"),
    Stretch(2, 5, "parallel_sum"),
    Stretch(2, 5, "merge"),
]


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows(torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(2)), "random tokens", "0")


@pytest.mark.parametrize("change", CHANGES)
def test_losses_are_those_of_the_changed_model(decoder: Any, ids: torch.Tensor, change: Any) -> None:
    """From what its layers make of the trunk, or by the model that `intervene` gives: the same."""
    taken = Decoder(decoder)
    steps = change.steps(6)

    found = taken.losses(taken.trunk(ids), steps, taken.modules(steps))

    with torch.no_grad():
        logits = intervene(decoder, change)(ids, use_cache=False).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(found, expected, atol=1e-6)


def test_what_comes_before_a_change_is_not_computed_again(make_decoder: Any, ids: torch.Tensor) -> None:
    model = make_decoder()
    taken = Decoder(model)
    trunk, steps = taken.trunk(ids), pairs_plan(6, [4]).steps(6)
    calls: list[int] = []
    for place, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, place=place: calls.append(place))

    taken.losses(trunk, steps, taken.modules(steps))

    assert calls == []  # 4 and 5 run side by side, by their parts
    assert common_prefix(steps) == 4
    assert common_prefix([Step((0,)), Step((2,)), Step((2,))]) == 1
    assert common_prefix([Step((0,))]) == 1


def candidates(rivals: str = "") -> list[Candidate]:
    return [sequential(6), *(Candidate(str(place), 0, 6, change, rivals) for place, change in enumerate(CHANGES))]


def test_figures_by_hand() -> None:
    one = Measured((), [np.array([1.0, 2.0]), np.array([3.0, 6.0])])
    other = Measured((), [np.array([1.0, 1.0]), np.array([1.0, 1.0])])
    gap = np.array([0.0, 1.0, 2.0, 5.0])

    assert behind(one, other) == pytest.approx((gap.mean(), gap.std(ddof=1) / 2))
    assert added(one, other).value == pytest.approx(2.0)
    assert added(one, other).n == 2
    assert perplexity(one).value == pytest.approx(np.exp(3.0))
    assert perplexity(one).n == 4


def test_nobody_is_dropped_without_rivals(make_decoder: Any, windows: Windows) -> None:
    found = measure(Decoder(make_decoder()), windows, candidates())

    assert all(len(one.losses) == 3 and not one.dropped for one in found.values())
    assert found[sequential(6)].tokens == 3 * 19


def test_who_is_clearly_behind_is_dropped(make_decoder: Any, windows: Windows) -> None:
    """A bar of no standard error leaves the best alone; one that is never reached leaves all."""
    decoder = Decoder(make_decoder())
    whole = measure(decoder, windows, candidates())

    strict = measure(decoder, windows, candidates("all"), errors=0.0)
    kept = [one for key, one in strict.items() if key.rivals and not one.dropped]
    assert len(kept) == 1
    assert all(len(one.losses) == 3 for one in kept)
    first = min((one for key, one in whole.items() if key.kind != "sequential"), key=lambda one: one.losses[0].mean())
    assert kept[0].steps == first.steps

    several = measure(decoder, windows, candidates("all"), errors=0.0, keep=3)
    assert sum(not one.dropped for key, one in several.items() if key.rivals) <= 3
    lenient = measure(decoder, windows, candidates("all"), errors=1e9)
    assert not any(one.dropped for one in lenient.values())


def test_going_on_gives_the_same(make_decoder: Any, windows: Windows) -> None:
    decoder = Decoder(make_decoder())
    whole = measure(decoder, windows, candidates("all"))
    part = measure(decoder, Windows(windows.ids[:1], "", ""), candidates("all"))

    again = measure(decoder, windows, candidates("all"), known=part)

    for key, one in whole.items():
        assert one.dropped == again[key].dropped
        assert np.array_equal(np.concatenate(one.losses), np.concatenate(again[key].losses))


def test_it_tells_how_far_it_is(make_decoder: Any, windows: Windows) -> None:
    shares: list[float] = []
    done: list[int] = []
    measure(
        Decoder(make_decoder()),
        windows,
        candidates(),
        on_candidate=shares.append,
        after_window=lambda window, _: done.append(window),
    )

    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert done == [1, 2, 3]


def test_a_change_that_leaves_no_number_is_behind_all_others(
    make_decoder: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(make_decoder())
    spoilt = Candidate("spoilt", 0, 6, Prune(0, 1), "all")
    honest = Decoder.losses

    def losses(self: Decoder, trunk: Any, steps: Any, modules: Any) -> torch.Tensor:
        found = honest(self, trunk, steps, modules)
        return torch.full_like(found, torch.nan) if len(steps) == 5 and steps[0].layers == (1,) else found

    monkeypatch.setattr(Decoder, "losses", losses)
    found = measure(decoder, windows, [sequential(6), spoilt, Candidate("other", 2, 3, Prune(2, 3), "all")])

    assert found[spoilt].dropped
    assert found[spoilt].loss == np.inf
    assert len(found[spoilt].losses) == 1


def test_a_damaged_model_is_told_as_such(make_decoder: Any, windows: Windows) -> None:
    model = make_decoder()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = torch.nan

    with pytest.raises(UserError, match="random tokens: the model's loss on the text is no number"):
        measure(Decoder(model), windows, candidates())
