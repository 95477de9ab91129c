"""Methods side by side: figures against what can be had otherwise, and a comparison that stops and goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tests.attribution.conftest import ADAPTER, rows, write

from allmend.attribution import scored
from allmend.attribution.comparison import compare_methods
from allmend.attribution.comparison_plan import METHODS, Plan
from allmend.attribution.folders import attribute_folder
from allmend.attribution.method_figures import MethodComparison
from allmend.attribution.retraining import Retraining, checkpoint_rates
from allmend.attribution.settings import Settings
from allmend.errors import UserError
from allmend.events import Event, PhaseDone, Stopped, WorkDone, WorkPlanned
from allmend.influence.inverses import NotInvertedError
from allmend.influence.methods import Lissa
from allmend.influence.quality import chance_lds, linear_datamodeling_score

Compare = Callable[..., MethodComparison]

RETRAINING = Retraining(learning_rate=0.02, epochs=2, batch_size=4)


@pytest.fixture(scope="module")
def place(adapt: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients, five target records that are not all alike, and an adapter."""
    folder = tmp_path_factory.mktemp("comparison")
    write(folder / "north.jsonl", rows("north", 7))
    write(folder / "south.jsonl", rows("south", 6, "The sun is warm today."))
    write(folder / "test.jsonl", rows("other", 2) + rows("test", 3, "The sun is warm today."))
    adapt(folder, "north", "south", rate=0.02, rounds=2)
    return folder


@pytest.fixture(scope="module")
def compare(place: Path, tiny_folder: Path) -> Compare:
    def run(*, out: Path | None = None, listeners: Any = (), adapter: Path | None = None, **plan: Any) -> Any:
        return compare_methods(
            str(tiny_folder),
            adapter or place / ADAPTER,
            train=[place / "north.jsonl", place / "south.jsonl"],
            target=place / "test.jsonl",
            plan=Plan(**{"retraining": RETRAINING} | plan),
            out=out,
            settings=Settings(template="plain", inverse="cholesky"),
            listeners=listeners,
        )

    return run


def timeless(found: MethodComparison) -> dict[str, Any]:
    """Everything but seconds."""
    content = found.model_dump()
    del content["pass_seconds"]
    for one in content["methods"]:
        del one["seconds"]
    return content


def each_target(place: Path, tiny_folder: Path, method: Any) -> "np.ndarray":
    """Scores [n, q] as the command for single methods gives them."""
    found = attribute_folder(
        str(tiny_folder),
        place / ADAPTER,
        train=[place / "north.jsonl", place / "south.jsonl"],
        target=place / "test.jsonl",
        settings=Settings(method=method, targets="each", template="plain", inverse="cholesky"),
    )
    targets = sorted({row.target for row in found.rows})
    return np.array([[row.score for row in found.rows if row.target == target] for target in targets]).T


def test_figures_are_those_of_the_methods_and_the_kept_losses(
    compare: Compare, place: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    methods = ("gfim", "exact", "datainf", "lissa", "hessian_free")
    found = compare(methods=methods, subsets=4, out=tmp_path / "out")
    assert MethodComparison.model_validate_json((tmp_path / "out" / "comparison.json").read_bytes()) == found
    assert [one.method for one in found.methods] == [*methods, "hessian_free_scaled", "loss"]
    assert (found.records, found.target_records) == (13, 5)
    files = sorted((tmp_path / "out" / "retrained").iterdir())
    kept = [json.loads(path.read_bytes()) for path in files]
    assert [path.name for path in files] == ["000.json", "001.json", "002.json", "003.json"]
    names = [f"north/north-{i}" for i in range(7)] + [f"south/south-{i}" for i in range(6)]
    subsets = [[names.index(name) for name in one["records"]] for one in kept]
    losses = np.array([one["losses"] for one in kept])
    scores = {name: each_target(place, tiny_folder, name) for name in methods}
    for one in found.methods:
        if one.method in scores:
            expected = linear_datamodeling_score(scores[one.method], subsets, losses)
            assert one.lds is not None
            assert one.lds.value == pytest.approx(expected.value, abs=1e-9), one.method
            assert one.seconds is not None
            assert one.passes is not None
            assert one.seconds > one.passes * found.pass_seconds
    for pair in found.pairs:
        if pair.first in scores and pair.second in scores:
            a, b = scores[pair.first], scores[pair.second]
            each = [stats.spearmanr(a[:, q], b[:, q]).statistic for q in range(5)]
            assert pair.spearman.value == pytest.approx(np.mean(each), abs=0.01)
    assert found.retraining is not None
    assert found.retraining.chance == chance_lds(13, subsets, losses)


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_what_was_stopped_goes_on_and_comes_to_the_same(compare: Compare, tmp_path: Path, stop_after: int) -> None:
    plan: dict[str, Any] = {"methods": ("gfim", "tracin"), "subsets": 4, "train_first": True}
    whole = compare(**plan, out=tmp_path / "whole")
    out, told = tmp_path / "stopped", list[Event]()

    def stop(event: Event) -> None:
        told.append(event)
        if isinstance(event, WorkDone) and event.phase == "retraining" and len(kept(out)) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(**plan, out=out, listeners=[stop])
    assert isinstance(told[-1], Stopped)
    done = kept(out)
    assert len(done) == stop_after
    assert not (out / "comparison.json").exists()
    events = list[Event]()
    found = compare(**plan, out=out, listeners=[events.append])
    assert timeless(found) == timeless(whole)
    assert kept(out).items() >= done.items()  # not written again
    (planned,) = (event for event in events if isinstance(event, WorkPlanned))
    assert planned.work.keys() == {"scores", "retraining"}
    shares = [event.share for event in events if isinstance(event, WorkDone) and event.phase == "retraining"]
    assert shares[-1] == pytest.approx(1, abs=0.02)
    assert [event.phase for event in events if isinstance(event, PhaseDone)] == ["scores", "retraining"]


def kept(out: Path) -> dict[str, tuple[int, bytes]]:
    """Retrainings on the disk, with the times at which they were written."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("retrained/0*.json")}


def test_more_retrainings_go_on_from_fewer(compare: Compare, tmp_path: Path) -> None:
    compare(methods=("gfim",), subsets=3, out=tmp_path / "out")
    before = kept(tmp_path / "out")
    found = compare(methods=("hessian_free",), subsets=5, out=tmp_path / "out")
    after = kept(tmp_path / "out")
    assert len(after) == 5
    assert after.items() >= before.items()
    assert timeless(found) == timeless(compare(methods=("hessian_free",), subsets=5, out=tmp_path / "at once"))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"learning_rate": 0.01}, "another learning rate"),
        ({"epochs": 1}, "another epochs"),
        ({"batch_size": 3}, "another batch size"),
        ({"seed": 1}, "another seed"),
    ],
)
def test_kept_retrainings_of_other_settings_are_refused(
    compare: Compare, tmp_path: Path, other: dict[str, Any], words: str
) -> None:
    given = {"learning_rate": 0.02, "epochs": 2, "batch_size": 4, "seed": 0}
    compare(methods=("gfim",), subsets=3, out=tmp_path / "out", retraining=Retraining(**given))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        compare(methods=("gfim",), subsets=3, out=tmp_path / "out", retraining=Retraining(**given | other))


def test_an_adapter_trained_here_owes_nothing_to_the_one_given(compare: Compare, place: Path, tmp_path: Path) -> None:
    """But its shape; and it is the last of the two checkpoints."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(place / ADAPTER, other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: 2 * one for name, one in weights.items()}, other / "adapter_model.safetensors")
    plan: dict[str, Any] = {"methods": ("gfim", "hessian_free", "tracin"), "train_first": True}
    first = compare(**plan, out=tmp_path / "first")
    second = compare(**plan, out=tmp_path / "second", adapter=other)
    assert timeless(first) == timeless(second)
    assert first.trained_here
    assert first.retraining is None
    assert sorted(path.name for path in (tmp_path / "first" / "trained").iterdir()) == ["half", "whole"]
    half, whole = (
        load_file(tmp_path / f"first/trained/{name}/adapter_model.safetensors") for name in ("half", "whole")
    )
    assert half.keys() == whole.keys() == weights.keys()
    assert any(not torch.equal(half[name], whole[name]) for name in half)
    # with two checkpoints tracin is another method than with one
    assert first.agreement("tracin", "hessian_free").value < 1  # type: ignore[union-attr]
    whole_folder = tmp_path / "first/trained/whole"
    by_hand: dict[str, Any] = {"methods": plan["methods"], "checkpoints": (whole_folder.parent / "half", whole_folder)}
    rates = tuple(checkpoint_rates(13, RETRAINING, (0.5, 1.0)))
    assert compare(**by_hand, rates=rates, adapter=whole_folder).pairs == first.pairs
    assert compare(**by_hand, adapter=whole_folder).pairs != first.pairs
    again = compare(methods=("hessian_free",), adapter=whole_folder)
    assert again.adapter == first.adapter
    assert again.loss == first.loss


def test_tracin_of_the_adapter_alone_is_hessian_free_and_of_two_is_weighted(compare: Compare, place: Path) -> None:
    alone = compare(methods=("hessian_free", "tracin"))
    assert alone.agreement("tracin", "hessian_free").value == pytest.approx(1)  # type: ignore[union-attr]
    assert {one.method: one.passes for one in alone.methods} == {"hessian_free": 1, "tracin": 1, "loss": None}
    twice = (place / ADAPTER, place / ADAPTER)
    both = compare(methods=("tracin", "hessian_free"), checkpoints=twice, rates=(0.5, 3.0))
    assert both.agreement("tracin", "hessian_free").value == pytest.approx(1)  # type: ignore[union-attr]
    assert {one.method: one.passes for one in both.methods}["tracin"] == 2
    assert both.notes == alone.notes == ()


def test_datainf_stands_beside_both_that_it_is_like(compare: Compare) -> None:
    found = compare(methods=("datainf",))
    assert [one.method for one in found.methods] == ["datainf", "hessian_free", "hessian_free_scaled", "loss"]
    assert found.agreement("hessian_free_scaled", "datainf") is not None
    assert found.agreement("gfim", "datainf") is None
    assert all(one.lds is None for one in found.methods)


def test_gradients_that_do_not_fit_come_to_the_same(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = compare(methods=METHODS)
    events = list[Event]()
    monkeypatch.setattr("allmend.attribution.comparison.gradients_fit", lambda subject: False)
    streamed = compare(methods=METHODS, listeners=[events.append])
    assert {one.method: one.passes for one in streamed.methods} == {one.method: one.passes for one in kept.methods}
    for one, other in zip(kept.pairs, streamed.pairs, strict=True):
        assert one.spearman.value == pytest.approx(other.spearman.value, abs=0.02)


def test_memory_decides_whether_gradients_are_kept(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[bool]()
    original = scored.keep
    monkeypatch.setattr(scored, "keep", lambda source: (asked.append(True), original(source))[1])
    compare(methods=("hessian_free",))
    assert asked == [True]
    monkeypatch.setattr(scored.psutil, "virtual_memory", type("Memory", (), {"available": 1000}))
    compare(methods=("hessian_free",))
    assert asked == [True]


def test_a_method_that_cannot_be_applied_is_left_out_alone(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Lissa, train: Any, targets: Any) -> Any:
        raise NotInvertedError("the recursion diverges")

    monkeypatch.setattr(Lissa, "solve", fail)
    found = compare(methods=("lissa", "gfim"))
    (lissa, *_) = found.methods
    assert lissa.notes == ("left out: the recursion diverges",)
    assert (lissa.passes, lissa.lds) == (None, None)
    assert [(pair.first, pair.second) for pair in found.pairs] == [("gfim", "loss")]
    with pytest.raises(UserError, match=r"no method could be applied \(left out: the recursion diverges\)"):
        compare(methods=("lissa",))


def test_too_many_targets_are_drawn_from_and_it_is_said(compare: Compare) -> None:
    found = compare(methods=("gfim",), most_targets=3)
    assert found.target_records == 3
    assert "3 of 5 target records" in found.notes[0]


def test_what_halves_truly_do_foretells_other_halves(compare: Compare, tmp_path: Path) -> None:
    """A linear model of losses, fitted to retrainings on many halves, has an LDS near 1 on halves it has not seen."""
    # all records in each batch: the order, which no score can foretell, is out of play
    whole = Retraining(learning_rate=0.01, epochs=20, batch_size=13)
    compare(methods=("hessian_free",), subsets=60, retraining=whole, out=tmp_path / "out")
    content = [json.loads(path.read_bytes()) for path in sorted(tmp_path.glob("out/retrained/*.json"))]
    names = sorted({name for one in content for name in one["records"]})
    within = np.array([[float(name in one["records"]) for name in names] for one in content])
    losses = np.array([one["losses"] for one in content])
    judged, seen = slice(0, 12), slice(12, 60)
    effects, *_ = np.linalg.lstsq(
        within[seen] - within[seen].mean(0), -(losses[seen] - losses[seen].mean(0)), rcond=1e-6
    )
    subsets = [np.flatnonzero(row).tolist() for row in within[judged]]
    assert linear_datamodeling_score(effects, subsets, losses[judged]).value > 0.8
    generator = np.random.default_rng(0)
    random = [linear_datamodeling_score(generator.normal(size=(13, 5)), subsets, losses[judged]) for _ in range(50)]
    assert abs(np.mean([one.value for one in random])) < 0.1


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"methods": ()}, "no method is named"),
        ({"methods": ("magic",)}, "there is no method 'magic'"),
        ({"methods": ("gfim", "gfim")}, "named twice"),
        ({"subsets": 2}, "a correlation over 2 retrainings says nothing"),
        ({"subsets": -1}, "a correlation over -1 retrainings says nothing"),
        ({"methods": ("gfim",), "checkpoints": (Path("a"),)}, "tracin, which is not asked for"),
        ({"checkpoints": (Path("a"),), "train_first": True}, "has checkpoints of its own"),
        ({"checkpoints": (Path("a"),), "rates": (1.0, 2.0)}, "2 rates and 1 checkpoints"),
        ({"rates": (1.0,)}, "1 rates and 0 checkpoints"),
        ({"checkpoints": (Path("a"),), "rates": (-1.0,)}, "a rate is a number above 0"),
        ({"most_targets": 0}, "must be 1 or more, got 0"),
    ],
)
def test_what_does_not_go_together_is_told(plan: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Plan(**plan)


def test_what_cannot_be_used_is_told(compare: Compare, place: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="retraining needs a folder"):
        compare(subsets=3)
    with pytest.raises(UserError, match="no adapter is here"):
        compare(methods=("tracin",), checkpoints=(tmp_path / "nothing",))
    write(tmp_path / "few.jsonl", rows("few", 3))
    with pytest.raises(UserError, match="3 training records have no halves"):
        compare_methods(
            str(tiny_folder),
            place / ADAPTER,
            train=[tmp_path / "few.jsonl"],
            target=place / "test.jsonl",
            plan=Plan(subsets=3),
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
