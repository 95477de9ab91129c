"""Kept gradients give the same bits; whoever is stopped goes on; other gradients are refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.influence.conftest import MakeRecords

from allmend.errors import UserError
from allmend.influence.cache import Cached
from allmend.influence.gradients import OfRecords
from allmend.influence.methods import Exact, Gfim
from allmend.influence.scores import influence, self_influence
from allmend.models.adapters import Trainable

IDENTITY = {"model": "m", "adapter": "a"}


@pytest.fixture
def count() -> list[int]:
    return []


@pytest.fixture
def source(trainable: Trainable, make_records: MakeRecords, count: list[int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Twelve records in several rows, whose passes through the model are counted."""
    form = OfRecords.batch

    def counted(self: OfRecords, row: Any) -> Any:
        count.append(row.tokens)
        return form(self, row)

    monkeypatch.setattr(OfRecords, "batch", counted)
    return OfRecords(trainable, make_records(12, 0), tokens_per_pass=20)


@pytest.mark.parametrize("method", [Gfim(), Exact()])
def test_scores_are_the_same_bits_and_the_model_is_gone_through_once(
    method: Any, source: OfRecords, make_records: MakeRecords, count: list[int], tmp_path: Path
) -> None:
    aim = OfRecords(source.trainable, make_records(3, 1))
    plain, own = influence(source, aim, method), self_influence(source)
    before = len(count)
    cached = Cached(source, tmp_path / "kept", IDENTITY)
    found = influence(cached, aim, method)
    assert torch.equal(found.values, plain.values)
    assert torch.equal(found.losses, plain.losses)
    assert torch.equal(self_influence(cached), own)
    assert len(count) - before == len(list(source.rows())) + len(list(aim.rows()))
    again = Cached(source, tmp_path / "kept", IDENTITY)
    before = len(count)
    assert torch.equal(influence(again, aim, method).values, plain.values)
    assert len(count) - before == len(list(aim.rows()))


def test_who_is_stopped_goes_on_with_what_is_not_there(source: OfRecords, count: list[int], tmp_path: Path) -> None:
    def stopped(batches: Iterator[Any]) -> None:
        for _ in range(2):
            next(batches)

    stopped(iter(Cached(source, tmp_path, IDENTITY)))
    done = len(count)
    assert sum(1 for _ in Cached(source, tmp_path, IDENTITY)) == len(list(source.rows()))
    assert len(count) == len(list(source.rows()))
    assert 0 < done < len(list(source.rows()))


def test_it_is_told_how_far_it_is_also_for_what_is_read(source: OfRecords, tmp_path: Path) -> None:
    told: list[int] = []
    list(Cached(source, tmp_path, IDENTITY))
    list(Cached(replace(source, on_tokens=told.append), tmp_path, IDENTITY))
    assert sum(told) == sum(map(len, source.records))


def test_gradients_of_something_else_are_refused(source: OfRecords, tmp_path: Path) -> None:
    list(Cached(source, tmp_path, IDENTITY))
    with pytest.raises(UserError, match="of another adapter: a, now b"):
        Cached(source, tmp_path, IDENTITY | {"adapter": "b"})
    (tmp_path / "000000.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError):
        Cached(source, tmp_path, IDENTITY)


def test_a_disk_without_room_is_told_before(source: OfRecords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"12 records × 0\.00 MB of gradients need 0\.00 GB"):
        Cached(source, tmp_path / "new", IDENTITY)
    assert not (tmp_path / "new").exists()
