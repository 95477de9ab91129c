"""Influence on a model and adapter made elsewhere: what was learnt from a record is found at that record."""

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from tests.attribution.conftest import ADAPTER, rows, write
from tests.attribution.test_subject import Silencing
from tests.report.conftest import body_of, charts, part, said, table_of, tips

from allmend.attribution import subject
from allmend.attribution.folders import attribute_folder
from allmend.attribution.pages import PAGE
from allmend.attribution.settings import Settings
from allmend.errors import UserError
from allmend.events import PhaseDone, WorkPlanned
from allmend.influence.gradients import OfRecords
from allmend.influence.methods import Gfim
from allmend.influence.table import ABOUT, ROWS, InfluenceTable, read_scores
from allmend.report import numbers


@pytest.fixture(scope="module")
def place(adapt: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients, a target that is like the second one's records, and an adapter that was trained on both."""
    folder = tmp_path_factory.mktemp("attribution")
    write(folder / "north.jsonl", rows("north", 10))
    write(folder / "south.jsonl", rows("south", 10, "The sun is warm today."))
    write(folder / "test.jsonl", rows("test", 6, "The sun is warm today."))
    adapt(folder, "north", "south", rate=0.02, rounds=3)
    return folder


@pytest.fixture
def attribute(place: Path, tiny_folder: Path) -> Callable[..., Any]:
    def run(**options: Any) -> Any:
        settings = Settings(template="plain", **options.pop("settings", {}))
        given = {
            "train": [place / "north.jsonl", place / "south.jsonl"],
            "target": place / "test.jsonl",
            "settings": settings,
        }
        adapter = options.pop("adapter", place / ADAPTER)
        return attribute_folder(str(tiny_folder), adapter, **given | options)

    return run


@pytest.mark.parametrize("method", ["gfim", "exact", "datainf", "lissa", "hessian_free"])
def test_records_like_the_target_help_more(method: str, attribute: Callable[..., Any]) -> None:
    found = attribute(settings={"method": method})
    mean = {one.client: one.mean.value for one in found.table.clients}
    assert mean["south"] > mean["north"]
    (best, *_) = sorted(found.rows, key=lambda row: row.rank)
    assert best.client == "south"
    assert sorted(row.rank for row in found.rows) == list(range(1, 21))


def test_figures_and_files_say_the_same(attribute: Callable[..., Any], tmp_path: Path) -> None:
    events: list[Any] = []
    found = attribute(out=tmp_path / "out", listeners=[events.append])
    assert read_scores(tmp_path / "out" / ROWS) == found.rows
    table = InfluenceTable.model_validate_json((tmp_path / "out" / ABOUT).read_bytes())
    assert table == found.table
    assert (table.records, table.target_records) == (20, 6)
    assert "lowers the target's loss" in table.sign
    for one in table.clients:
        scores = torch.tensor([row.score for row in found.rows if row.client == one.client])
        assert one.mean.value == pytest.approx(float(scores.mean()))
        assert one.harmful.value == pytest.approx(float((scores < 0).float().mean()))
    assert table.reliability["mean"].value > 0.5
    assert type(events[0]) is WorkPlanned
    assert type(events[-1]) is PhaseDone


def test_the_page_says_the_same_as_the_table(attribute: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    odd = write(tmp_path / "<b>odd.jsonl", rows("odd", 6, "<script>alert(1)</script> " + "and so on " * 20))
    train = [place / "south.jsonl", odd]
    found = attribute(out=tmp_path / "out", train=train, settings={"targets": "kind", "sweep": True})
    path = tmp_path / "out" / PAGE
    assert path.stat().st_mode & 0o077 == 0, "records are on it"
    body = body_of(path)
    (chart,) = charts(part(body, "clients"))
    expected = []
    for one in sorted(found.table.clients, key=lambda one: (one.client != "south", one.target)):
        unit = fmean(abs(row.score) for row in found.rows if row.target == one.target)
        expected.append(f"{one.client} for {one.target}\nmean score {numbers.signed(one.mean.value / unit)}")
    assert [tip.split(",")[0] for tip in tips(chart)] == expected
    for place_of, target in enumerate(("a", "b")):
        section = part(body, f"target-{place_of}")
        ranks = {(row.client, row.record_id): row.rank for row in found.rows if row.target == target}
        shown = [row for caption in ("Most helpful", "Most harmful") for row in table_of(section, caption)[1:]]
        assert shown
        for text, record, client, score, _, rank in shown:
            assert rank == f"{ranks[client, record]}of 16"
            assert "?" in score, "few records: with care"
            assert len(text) <= 80
    assert "<script>alert(1)</script>" in said(body)
    measured = said(part(body, "measured"))
    for words in ("gfim, wide side, solved by cholesky", "0.1 of each block’s mean eigenvalue", "Under other dampings"):
        assert words in measured
    for caution in found.table.cautions:
        assert caution in said(part(body, "summary"))


def test_a_single_target_has_the_name_of_its_file(attribute: Callable[..., Any], tmp_path: Path) -> None:
    found = attribute(out=tmp_path / "out", settings={"method": "hessian_free"})
    body = body_of(tmp_path / "out" / PAGE)
    assert "For test.jsonl" in said(part(body, "target-0"))
    assert not body.findall(".//section[@id='clients']")
    assert f"{found.table.reliability['mean'].value:.2f}" in said(part(body, "summary"))
    assert "there is no curvature" in said(part(body, "measured"))


def test_each_block_has_its_figures_and_what_is_off_stands_beside_every_score(attribute: Callable[..., Any]) -> None:
    found = attribute()
    table = found.table
    assert table.blocks.keys() == table.lambdas.keys()
    for name, one in table.blocks.items():
        assert one.damping == table.lambdas[name]
        assert one.fit is not None
        assert 0 < one.fit <= 1
        assert one.condition is not None
        assert 1 <= one.condition <= one.size * 11  # d (1 + c) / c
        assert one.residual < 1e-3
        assert (one.rows, one.dtype) == (40, "float32")
    assert "20 records, fewer than 32" in table.cautions[0]
    assert "known along few directions" in table.cautions[1]
    assert {row.caution for row in found.rows} == {" ".join(table.cautions)}
    plain = attribute(settings={"method": "hessian_free"})
    assert (plain.table.blocks, plain.table.cautions) == ({}, ())
    assert {row.caution for row in plain.rows} == {""}


@pytest.mark.parametrize("method", ["gfim", "datainf"])
def test_other_dampings_are_compared_with_the_one_asked_for(method: str, attribute: Callable[..., Any]) -> None:
    found = attribute(settings={"method": method, "sweep": True, "damping": 0.5})
    assert [one.damping for one in found.table.sweep] == [0.001, 0.01, 0.1, 0.5, 1.0, 10.0]
    plain = attribute(settings={"method": method, "damping": 0.5})
    assert [row.score for row in found.rows] == pytest.approx([row.score for row in plain.rows], rel=1e-4, abs=1e-7)
    for one in found.table.sweep:
        assert one.agreement is not None
        assert one.reliability is not None
        other = attribute(settings={"method": method, "damping": one.damping})
        expected = spearmanr([row.score for row in other.rows], [row.score for row in plain.rows]).statistic
        assert one.agreement == pytest.approx(expected, abs=0.01)
        assert one.reliability.value == pytest.approx(other.table.reliability["mean"].value, abs=0.02)
        if one.damping == 0.5:
            assert one.agreement == pytest.approx(1)


def test_records_without_a_token_to_learn_from_have_no_score_and_come_last(
    attribute: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = attribute()
    monkeypatch.setattr(subject, "Encoder", Silencing)
    monkeypatch.setattr(Silencing, "silenced", {"north-3", "south-0"})
    found = attribute(out=tmp_path / "out")
    assert found.table.silent == {"north": ("north-3",), "south": ("south-0",)}
    assert found.table.records == 18
    assert [(row.record_id, row.loss, row.rank) for row in found.rows if row.score is None] == [
        ("north-3", None, 19),
        ("south-0", None, 20),
    ]
    assert sorted(row.rank for row in found.rows) == list(range(1, 21))
    assert read_scores(tmp_path / "out" / ROWS) == found.rows
    assert {one.client: one.mean.n for one in found.table.clients} == {"north": 9, "south": 9}
    assert found.texts.keys() == whole.texts.keys()


def test_blocks_without_room_are_refused_where_a_method_has_blocks(
    attribute: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allmend.influence.block_memory.free_memory", lambda device: 100)
    with pytest.raises(UserError, match="blocks take"):
        attribute()
    attribute(settings={"method": "hessian_free"})


def test_an_untrained_adapter_is_noted(attribute: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    assert not any("untrained" in note for note in attribute().table.notes)
    folder = shutil.copytree(place / ADAPTER, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = {name: one * ("lora_A" in name) for name, one in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    found = attribute(adapter=folder)
    assert "The adapter is untrained (all its factors B are 0): only the B side has gradients." in found.table.notes
    assert {name.split(".")[-2] for name in found.table.skipped} == {"lora_A"}
    assert {name.split(".")[-2] for name in found.table.blocks} == {"lora_B"}


def test_a_target_for_each_label_or_record(attribute: Callable[..., Any]) -> None:
    by_kind = attribute(settings={"targets": "kind"})
    assert sorted({row.target for row in by_kind.rows}) == ["a", "b"]
    each = attribute(settings={"targets": "each"})
    assert sorted({row.target for row in each.rows}) == [f"test-{i}" for i in range(6)]
    assert each.table.reliability == {}
    # the mean target's score is the mean of the targets' scores
    whole = attribute()
    for row in whole.rows:
        parts = [other.score for other in each.rows if other.record_id == row.record_id]
        assert row.score == pytest.approx(sum(parts) / 6, rel=1e-4, abs=1e-7)


def test_removing_what_hurts_most_helps_more_than_chance(attribute: Callable[..., Any]) -> None:
    """Scores are what one gradient step would do: the loss after a step on the helpful half is lower."""
    found = attribute()
    half = [row for row in found.rows if row.rank <= 10]
    assert sum(row.score for row in half) > 0
    assert isinstance(Settings().build(), Gfim)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "magic"}, "there is no method 'magic'"),
        ({"inverse": "magic"}, "there is no inverse 'magic'"),
        ({"damping": 0.0}, "damping must be above 0"),
        ({"modules": "k_proj"}, "no weight that learns matches 'k_proj'"),
    ],
)
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], words: str, attribute: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=words):
        attribute(settings=settings)


@pytest.mark.parametrize("method", ["gfim", "exact", "lissa"])
def test_the_work_that_is_announced_with_a_cache_is_what_goes_through_the_model(
    method: str, attribute: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through: list[int] = []
    form = OfRecords.batch

    def counted(self: OfRecords, row: Any) -> Any:
        through.append(row.tokens)
        return form(self, row)

    monkeypatch.setattr(OfRecords, "batch", counted)
    events: list[Any] = []
    attribute(settings={"method": method, "cache": tmp_path / "kept"}, listeners=[events.append])
    (planned,) = (event.work for event in events if isinstance(event, WorkPlanned))
    assert sum(planned.values()) == sum(through)


def test_files_that_cannot_be_used_are_told(
    attribute: Callable[..., Any], place: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no such file"):
        attribute(target=tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="no adapter is here"):
        attribute_folder(str(tiny_folder), tmp_path, train=[place / "north.jsonl"], target=place / "test.jsonl")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        attribute(out=place / "north.jsonl")
    with pytest.raises(UserError, match="is named twice"):
        attribute(train=[place / "north.jsonl", place / "north.jsonl"])
    write(tmp_path / "plain.jsonl", [{"id": "1", "prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match="no label"):
        attribute(target=tmp_path / "plain.jsonl", settings={"targets": "kind"})
    assert not (tmp_path / "out").exists()
