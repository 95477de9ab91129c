"""Checkpoints: the newest, whole, of this recipe, or none."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend.errors import UserError
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.strategy import State


def checkpoint(round: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(round)

    def state() -> State:
        tensors = {
            "model/a": torch.randn(40, 50, generator=generator),
            "model/b": torch.randn(3, generator=generator, dtype=torch.float64),
            "model/half": torch.randn(4, generator=generator).bfloat16(),
            "step": torch.tensor(round),
        }
        return State(tensors, {"steps": round, "share": 0.1, "name": "ä", "flag": True})

    took_part = {"north": round, "a.b-c_d": 1}
    return Checkpoint(round, state(), {"north": state(), "a.b-c_d": state(), "south": State()}, took_part)


def same(first: Checkpoint | None, second: Checkpoint) -> bool:
    assert first is not None

    def equal(a: State, b: State) -> bool:
        tensors = a.tensors.keys() == b.tensors.keys() and all(
            torch.equal(a.tensors[n], b.tensors[n]) and a.tensors[n].dtype == b.tensors[n].dtype for n in a.tensors
        )
        return tensors and a.facts == b.facts

    return (
        (first.round, first.took_part) == (second.round, second.took_part)
        and equal(first.server, second.server)
        and first.members.keys() == second.members.keys()
        and all(equal(first.members[name], second.members[name]) for name in second.members)
    )


def test_the_newest_wins_and_older_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "id")
    assert checkpoints.newest() is None
    for round in (1, 2, 3):
        checkpoints.save(checkpoint(round))
        assert same(checkpoints.newest(), checkpoint(round))
        assert [path.name for path in tmp_path.iterdir()] == [f"round-{round:06d}"]


def test_a_kill_before_the_older_one_is_deleted_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, "id")
    checkpoints.save(checkpoint(9))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        checkpoints.save(checkpoint(10))
    assert len(list(tmp_path.glob("round-*"))) == 2
    assert same(checkpoints.newest(), checkpoint(10))
    checkpoints.save(checkpoint(11))
    assert len(list(tmp_path.glob("round-*"))) == 1


def test_other_files_beside_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "id")
    checkpoints.save(checkpoint(1))
    (tmp_path / ".round-000002.77.partial").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "round-000003").touch()
    assert same(checkpoints.newest(), checkpoint(1))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "one").save(checkpoint(1))
    with pytest.raises(UserError, match=r"round-000001.*belongs to another recipe") as raised:
        Checkpoints(tmp_path, "other").newest()
    assert "new run" in str(raised.value)


@pytest.mark.parametrize("file", ["server.safetensors", "members/north.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "gone"])
def test_a_damaged_checkpoint_is_told(damage: str, file: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "id")
    checkpoints.save(checkpoint(1))
    path = tmp_path / "round-000001" / file
    whole = path.read_bytes()
    match damage:
        case "truncated":
            for keep in (7, 8, len(whole) // 2, len(whole) - 1):
                path.write_bytes(whole[:keep])
                with pytest.raises(UserError, match=str(path)):
                    checkpoints.newest()
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(bytes(range(256)) * 9)
        case "gone":
            path.unlink()
    with pytest.raises(UserError, match="round-000001"):
        checkpoints.newest()


def test_a_checkpoint_without_its_marks_is_refused(tmp_path: Path) -> None:
    """A safetensors file made by somebody else is no checkpoint."""
    from safetensors.torch import save_file

    checkpoints = Checkpoints(tmp_path, "id")
    checkpoints.save(checkpoint(1))
    save_file({"model/a": torch.zeros(1)}, tmp_path / "round-000001" / "server.safetensors")
    with pytest.raises(UserError, match="another recipe"):
        checkpoints.newest()


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_keeps_the_checkpoint_before(
    at: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, "id")
    checkpoints.save(checkpoint(1))
    calls = 0
    real: Any = os.fsync if call == "os.fsync" else Path.replace

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, "full")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(UserError, match="no space left"):
            checkpoints.save(checkpoint(2))
    assert calls == at  # there are four files: the failure came at the one that was meant
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]
    assert same(checkpoints.newest(), checkpoint(1))
    checkpoints.save(checkpoint(2))
    assert same(checkpoints.newest(), checkpoint(2))


def test_members_states_can_be_had_with_a_few_tensors_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "recipe/arm")
    assert checkpoints.members(("model/b",)) == {}
    for number in (1, 2):
        checkpoints.save(checkpoint(number))
    found, whole = checkpoints.members(("model/b", "step", "nothing")), checkpoint(2).members
    assert found.keys() == whole.keys()
    for name, state in found.items():
        assert state.facts == whole[name].facts
        assert state.tensors.keys() == whole[name].tensors.keys() & {"model/b", "step"}
        assert all(torch.equal(tensor, whole[name].tensors[key]) for key, tensor in state.tensors.items())
    with pytest.raises(UserError, match="another recipe"):
        Checkpoints(tmp_path, "other/arm").members(())
    file = tmp_path / "round-000002" / "members" / "north.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="truncated"):
        checkpoints.members(())
