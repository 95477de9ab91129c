"""A disk that is full, at a member and at the coordinator: one message, and the run goes on when there is room."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.consortium.processes import Federation, Machine

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "x", str(path)], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("a small disk can be made by root alone")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room; gives the file to delete."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return filler


def test_at_a_member(
    disk: Path, machine: Machine, make_federation: Callable[..., Federation], tell: Callable[..., None]
) -> None:
    it = make_federation(rounds=6)
    (disk / "allmend-north").mkdir()
    (it.folder / "allmend-north").symlink_to(disk / "allmend-north")
    it.coordinate(fewest=3)
    for name in it.names:
        it.join(name)
    it.machine.until("coordinator", "round 2:")
    filler = fill(disk)
    it.machine.until("coordinator", "no space left")
    assert it.machine.done("coordinator") == 2
    said = it.machine.said("coordinator", r"no space left[^\n]*")
    filler.unlink()
    it.machine.again("coordinator")
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated()
    tell("a member's disk full", "the coordinator stopped, since the member was needed; with room, it went on", said)


def test_at_the_coordinator(
    disk: Path, machine: Machine, make_federation: Callable[..., Federation], tell: Callable[..., None]
) -> None:
    it = make_federation(rounds=6)
    (it.folder / "run").symlink_to(disk / "run")
    (disk / "run").mkdir()
    it.coordinate(fewest=3)
    for name in it.names:
        it.join(name)
    it.machine.until("coordinator", "round 2:")
    filler = fill(disk)
    assert it.machine.done("coordinator") == 2, it.machine.log("coordinator")
    said = it.machine.said("coordinator", r"Error [^\n]*\n?[^\n]*")
    filler.unlink()
    it.machine.again("coordinator")
    assert it.machine.all_done() == 0
    assert it.outcome == it.simulated()
    tell("the coordinator's disk full", "exit code 2; with room, the same command went on; the same adapter", said)
