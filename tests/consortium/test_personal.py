"""A member's own folder after a run: its arms side by side, and a plain adapter in the place of its mixture."""

import json
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.consortium.conftest import Place
from tests.consortium.test_mixtures import MIXTURE
from typer.testing import CliRunner, Result

from allmend import tune
from allmend.cli import app
from allmend.consortium.own import MEMBER, is_own, open_own
from allmend.consortium.personal import PAGE, compare_own, export_own
from allmend.errors import UserError
from allmend.learn.scores import read_scores, write_scores
from allmend.mixtures.export import CARD, export
from allmend.personalised import compare_arms
from allmend.report.sections.personalised import paid_in_words
from allmend.results import BASE, PersonalisedTable


def allmend(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [*map(str, words)])


def test_each_member_sees_its_own_rows_of_the_simulation_and_the_base_model(make_place: Callable[..., Place]) -> None:
    place = make_place(canaries=None)
    place.coordinate()
    simulated = compare_arms(tune(place.recipe, place.folder / "simulated", base=place.folder))

    for name, side in place.sides.items():
        found = compare_own(open_own(side.folder))
        (row,), (known,) = found.members, [row for row in simulated.members if row.member == name]
        assert (found.against, row.member, row.together) == ("local", name, known.together)
        assert row.losses.keys() == {BASE, *known.losses}
        for arm, loss in known.losses.items():
            assert row.losses[arm].value == pytest.approx(loss.value, abs=1e-6)
        assert row.difference is not None
        assert known.difference is not None
        for end in ("value", "low", "high"):
            assert getattr(row.difference, end) == pytest.approx(getattr(known.difference, end), abs=1e-6)
        for arm in simulated.arms:
            (own,) = (one for one in found.arms if one.arm == arm.arm)
            assert (own.steps, own.passes) == ({name: arm.steps[name]}, {name: arm.passes[name]})
            assert own.trainable == arm.trainable
            assert own.alone is arm.alone


def test_the_page_is_the_members_alone_and_holds_nothing_of_the_others(make_place: Callable[..., Place]) -> None:
    place = make_place(canaries=None)
    run = place.coordinate()

    assert not list(run.path.rglob("personalised*"))
    for name, side in place.sides.items():
        own = open_own(side.folder)
        page = own.run.path / PAGE
        kept = own.run.path / "personalised.json"
        assert {stat.S_IMODE(path.stat().st_mode) for path in (page, kept, own.run.path / MEMBER)} == {0o600}
        table = PersonalisedTable.model_validate_json(kept.read_bytes())
        assert table == compare_own(own), "kept after the last arm"
        words = paid_in_words(table.members[0], table)
        assert words[1:] in page.read_text()
        assert not [other for other in place.sides if other != name and re.search(rf"\b{other}\b", page.read_text())]
        shown = allmend("personalise", "compare", side.folder)
        assert shown.exit_code == 0, shown.output
        assert words in " ".join(shown.output.split())
        assert "base model" in shown.output
        assert "down" not in shown.output.split(), "bytes are not counted at a member"
        told = json.loads(allmend("personalise", "compare", own.run.path, "--against", BASE, "--json").output)
        assert told["against"] == BASE


def test_one_arm_alone_is_compared_with_the_base_model_and_that_is_said(make_place: Callable[..., Place]) -> None:
    place = make_place(**MIXTURE)
    place.coordinate()

    side = place.sides["north"]
    found = compare_own(open_own(side.folder))
    assert found.against == BASE
    assert [arm.arm for arm in found.arms] == [BASE, "comigs"]
    (row,) = found.members
    assert row.difference is not None
    assert row.difference.value == pytest.approx(row.losses["comigs"].value - row.losses[BASE].value)
    shown = " ".join(allmend("personalise", "compare", side.folder).output.split())
    assert "Better than the base model?" in shown
    assert "it cannot be told whether working together paid" in shown
    assert "Did working together pay" not in shown
    assert "Better than the base model?" in (open_own(side.folder).run.path / PAGE).read_text()


@pytest.mark.parametrize("how", ["generalist", "mean-gates"])
def test_a_members_export_is_that_of_the_simulation(how: str, make_place: Callable[..., Place], tmp_path: Path) -> None:
    place = make_place(**MIXTURE)
    place.coordinate()
    simulated = tune(place.recipe, place.folder / "simulated", base=place.folder)

    out = tmp_path / "out"
    found = export_own(open_own(place.sides["north"].folder), out, how=how)  # type: ignore[arg-type]
    known = export(simulated.path, tmp_path / "known", member="north", how=how)  # type: ignore[arg-type]

    assert (found.arm, found.member, found.rank) == ("comigs", "north", known.rank)
    assert (out / CARD).read_text() == (tmp_path / "known" / CARD).read_text()
    assert (out / "adapter_config.json").read_text() == (tmp_path / "known" / "adapter_config.json").read_text()
    mine, theirs = (load_file(one / "adapter_model.safetensors") for one in (out, tmp_path / "known"))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].allclose(theirs[name], atol=1e-6) for name in mine)


def test_targets_and_held_out_records_of_ones_own_are_what_is_measured(make_place: Callable[..., Place]) -> None:
    place = make_place(**MIXTURE)
    side = place.sides["north"]
    for kind, count in (("target", 6), ("held_out", 7)):
        rows = [{"id": f"{kind}{i}", "prompt": f"{kind} {i}?", "response": f"{i}"} for i in range(count)]
        path = place.folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(side, kind, path)
    place.coordinate()

    shown = allmend(
        *("personalise", "export", side.folder, "--how", "mean-gates", "--out", place.folder / "out", "--json")
    )
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.output)
    assert [(one["records"], one["count"]) for one in told["compared"]] == [("validation", 6), ("held-out", 7)]
    (arm,) = (arm for arm in compare_own(open_own(side.folder)).arms if arm.arm == "comigs")
    assert arm.loss.value == pytest.approx(told["compared"][1]["mixture"]["value"], abs=1e-6)


def test_what_cannot_be_had_is_told_and_nothing_is_written(make_place: Callable[..., Place]) -> None:
    place = make_place(**MIXTURE | {"compare": {"alone": {"adapter": {"kind": "lora"}, "strategy": {"name": "local"}}}})
    place.coordinate()
    side, out = place.sides["north"], place.folder / "out"
    own = open_own(side.folder)

    with pytest.raises(UserError, match=r"'alone' is a plain adapter already.*\n.*as it is"):
        export_own(own, out, how="generalist", arm="alone")
    with pytest.raises(UserError, match="no arm 'cobo'"):
        export_own(own, out, how="generalist", arm="cobo")
    with pytest.raises(UserError, match="no arm 'cobo'"):
        compare_own(own, "cobo")
    assert compare_own(own).against == "alone", "whatever the arm is called"
    words = ["personalise", "export", str(side.folder), "--member", "east", "--how", "generalist", "--out", str(out)]
    with pytest.raises(UserError, match="this is the folder of 'north'"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    lines = side.data.read_text().splitlines(keepends=True)
    side.data.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="records differ from those that this run was begun with"):
        export_own(own, out, how="generalist")
    side.data.unlink()
    with pytest.raises(UserError, match="no such file"):
        export_own(own, out, how="generalist")
    assert not out.exists()
    assert not is_own(place.folder)
    with pytest.raises(UserError, match="no run is in this folder"):
        open_own(place.folder / "members")
    (own.run.path / MEMBER).write_text("{}")
    with pytest.raises(UserError, match="is not what a member keeps of a run"):
        open_own(side.folder)


def test_the_base_model_is_no_arm_that_works_together_or_alone(make_place: Callable[..., Place]) -> None:
    """Even where nothing is as good as it."""
    place = make_place(canaries=None)
    place.coordinate()
    own = open_own(place.sides["north"].folder)
    (scores,) = read_scores(own.run.scores(BASE))
    lowest = [replace(score, nll=0.01 * score.tokens) for score in scores.by_client["north"]]
    write_scores(own.run.scores(BASE), [replace(scores, by_client={"north": lowest})])

    found = compare_own(own)
    (row,) = found.members
    assert (found.against, row.together, row.best) == ("local", "fedavg", BASE)
    assert row.losses[BASE].value == pytest.approx(0.01)
    own.run.scores("local").unlink()
    with pytest.raises(UserError, match="'local' was not scored at this member"):
        compare_own(own, "local")
    assert compare_own(own).against == BASE
    assert compare_own(own).unfinished == ("local",)
    own.run.scores("fedavg").unlink()
    with pytest.raises(UserError, match="no arm has been scored at this member"):
        compare_own(own)


def test_records_are_found_again_from_any_folder(
    make_place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = make_place(**MIXTURE)
    side = place.sides["north"]
    monkeypatch.chdir(place.folder)
    side.data = Path("north.jsonl")
    place.coordinate()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)

    found = export_own(open_own(side.folder), elsewhere / "out", how="generalist")
    assert [one.records for one in found.compared] == ["validation", "held-out"]


def test_who_declines_keeps_nothing_of_the_run(make_place: Callable[..., Place]) -> None:
    place = make_place(agree=False)
    with pytest.raises(UserError, match="declined"):
        place.coordinate()
    assert not any(is_own(side.folder) for side in place.sides.values())


def test_of_several_runs_one_must_be_named(make_place: Callable[..., Place]) -> None:
    place = make_place(canaries=None)
    place.coordinate("first")
    other = make_place(canaries=None, seed=4)
    other.keys, other.sides, other.post = place.keys, place.sides, place.post
    other.coordinate("second")

    folder = place.sides["north"].folder
    with pytest.raises(UserError, match="2 runs are in this member's folder") as caught:
        open_own(folder)
    for run in folder.glob("runs/*"):
        assert str(run) in str(caught.value)
        assert compare_own(open_own(run)).against == "local"
