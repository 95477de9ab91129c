from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allmend.data.windows import Windows
from allmend.depth.choices import CONTEXT, CONTINUATION, answer, choices_of
from allmend.depth.decoder import Decoder
from allmend.depth.frontier import frontier
from allmend.depth.log import Log
from allmend.depth.measure import Candidate, measure, sequential
from allmend.depth.plan import Plan, pairs_plan, stretch_plan
from allmend.depth.searching import Search, least_depth, search
from allmend.errors import UserError


def windows_of(seed: int, count: int = 3, length: int = 20) -> Windows:
    ids = torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, f"random tokens {seed}", str(seed))


@pytest.fixture(scope="module")
def windows() -> Windows:
    return windows_of(2)


def losses(model: Any, windows: Windows, changes: list[Plan]) -> list[float]:
    found = measure(Decoder(model), windows, [Candidate("all", 0, 0, change) for change in changes])
    return [one.loss for one in found.values()]


def test_the_best_stretch_is_the_best_of_all(make_decoder: Any, windows: Windows) -> None:
    model = make_decoder()
    plans = [stretch_plan(6, start, start + 4) for start in range(3)]
    all_of_them = losses(model, windows, plans)

    one = Search(model, windows)
    found = one.contiguous("pairs", 4)

    assert found is not None
    assert found.plan == plans[int(np.argmin(all_of_them))]
    assert found.added.value == pytest.approx(min(all_of_them) - one.plain.loss, abs=1e-6)
    assert one.contiguous("triples", 5) is None  # threes leave 4 or 2


def test_single_costs(make_decoder: Any, windows: Windows) -> None:
    model = make_decoder()
    one = Search(model, windows)

    costs = one.costs(3)

    expected = losses(model, windows, [pairs_plan(6, [first]) for first in range(5)])
    assert costs == pytest.approx([loss - one.plain.loss for loss in expected], abs=1e-6)


def test_free_pairs_are_no_worse_than_what_they_began_with(make_decoder: Any, windows: Windows) -> None:
    for seed in range(3):
        model = make_decoder(layers=8, seed=seed)
        one = Search(model, windows)
        free, stretch = one.free(3), one.contiguous("pairs", 5)
        assert stretch is not None
        every = [
            pairs_plan(8, firsts) for firsts in combinations(range(7), 3) if all(b - a > 1 for a, b in pairwise(firsts))
        ]
        all_of_them = losses(model, windows, every)

        assert free.plan in every
        assert free.measured.loss >= min(all_of_them) - 1e-6
        assert free.predicted == pytest.approx(sum(one.costs(3)[group[0]] for group in free.plan.together), abs=1e-9)
        # local moves: among the better ones of all plans there are
        assert sum(loss < free.measured.loss for loss in all_of_them) <= len(every) // 4


def test_one_line_a_depth_down_to_the_depth(make_decoder: Any, windows: Windows) -> None:
    told: list[int] = []
    found = search(make_decoder(), windows, kind="free", depth=4, on_result=lambda one: told.append(one.depth))

    assert [one.depth for one in found] == told == [5, 4]
    for one in found:
        one.plan.check(6)


def test_as_far_as_the_loss_allows(make_decoder: Any, windows: Windows) -> None:
    model = make_decoder()
    every = search(model, windows, kind="prune", depth=1)
    first = every[0].added.value

    none = search(model, windows, kind="prune", max_loss=first - 1e-3)
    assert [one.depth for one in none] == [5]
    some = search(model, windows, kind="prune", max_loss=first + 1e-3)
    assert [one.depth for one in some][:2] == [5, 4]
    assert all(one.added.value <= first + 1e-3 for one in some[:-1])
    with pytest.raises(TypeError, match="no plan to fold"):
        print(some[0].plan)


@pytest.mark.parametrize(("kind", "depth"), [("pairs", 2), ("free", 6), ("triples", 1), ("prune", 0)])
def test_depths_that_cannot_be_reached(make_decoder: Any, windows: Windows, kind: Any, depth: int) -> None:
    with pytest.raises(UserError, match=f"a depth of {depth} cannot be reached: the model has 6 layers"):
        search(make_decoder(), windows, kind=kind, depth=depth)


def test_least_depths() -> None:
    assert [least_depth(layers, "pairs") for layers in (6, 7)] == [3, 4]
    assert [least_depth(layers, "triples") for layers in (6, 7, 8)] == [2, 3, 4]


def test_a_search_goes_on_where_it_was_stopped(make_decoder: Any, windows: Windows, tmp_path: Path) -> None:
    model, facts = make_decoder(), {"model": "m"}
    log = Log(tmp_path / "search.parquet", facts)
    whole = search(model, windows, kind="free", depth=4, log=log)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.model.layers[0].register_forward_hook(count)
    again = search(model, windows, kind="free", depth=4, log=Log(tmp_path / "search.parquet", facts))
    handle.remove()

    assert calls == 0
    assert [one.plan for one in again] == [one.plan for one in whole]
    assert [one.added for one in again] == [one.added for one in whole]


def test_choices_go_on_from_their_question(make_decoder: Any) -> None:
    report = windows_of(7, count=4, length=200)
    records, encoded = choices_of(report, 99)
    flat = report.ids.flatten().tolist()

    assert 10 < len(records) <= 800 // (CONTEXT + CONTINUATION)
    for number, (record, one) in enumerate(zip(records, encoded, strict=True)):
        start = number * (CONTEXT + CONTINUATION)
        assert record.answer is not None
        right = one.ids[one.branch == 1 + record.answer].tolist()
        assert one.ids[one.branch == 0].tolist() + right == flat[start : start + CONTEXT + CONTINUATION]
        assert all((one.branch == branch).sum() == CONTINUATION for branch in range(1, 5))
        assert one.position[one.branch == 3].tolist() == list(range(CONTEXT, CONTEXT + CONTINUATION))
    assert {record.answer for record in records} == {0, 1, 2, 3}
    assert choices_of(report, 3)[0] == records[:3]

    model = make_decoder(dtype=torch.float32)
    scores = answer(model, (records, encoded))
    ids = encoded[0].ids[(encoded[0].branch == 0) | (encoded[0].branch == 1 + (records[0].answer or 0))][None]
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)
    expected = -logits[0, CONTEXT - 1 : -1].gather(1, ids[0, CONTEXT:, None]).sum()
    assert scores[0].nll == pytest.approx(float(expected), rel=1e-4)


def test_the_frontier_is_of_the_other_text(make_decoder: Any, windows: Windows) -> None:
    model, report = make_decoder(dtype=torch.float32), windows_of(7, count=4, length=200)
    results = [*search(model, windows, kind="free", depth=5), *search(model, windows, kind="prune", depth=5)]

    found = frontier(model, results, windows, report, choices_of(report, 8))

    plain, free, prune = found.lines
    expected = losses(model, report, [sequential(6).change, free_plan := results[0].plan])  # type: ignore[list-item]
    assert (plain.depth, free.depth, prune.depth) == (6, 5, 5)
    assert free.groups == free_plan.groups
    assert prune.groups == ()
    assert plain.perplexity.value == pytest.approx(np.exp(expected[0]), rel=1e-5)
    assert free.added is not None
    assert free.added.value == pytest.approx(expected[1] - expected[0], abs=1e-6)
    assert free.accuracy is not None
    assert free.accuracy.n == found.questions == 8
    assert free.accuracy_change is not None
    assert prune.accuracy is None
    with pytest.raises(UserError, match="is that of the search"):
        frontier(model, results, windows, windows, ([], []))
