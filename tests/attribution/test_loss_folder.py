"""Kept losses: read as they were written, refused where they are of something else, and told where damaged."""

from pathlib import Path

import pytest
import torch

from allmend.attribution.loss_folder import LossFolder, digest
from allmend.data.chat import Encoded
from allmend.errors import UserError

IDENTITY = {"model": "abc", "learning_rate": 0.001, "adapter_shape": {"r": [2, 3]}}


def test_losses_come_back_to_the_last_bit(tmp_path: Path) -> None:
    folder = LossFolder.open(tmp_path / "kept", IDENTITY)
    losses = [0.1 + 0.2, 1e-300, 12345.678901234567]
    folder.write(3, ["a/1", "b/2"], losses)
    again = LossFolder.open(tmp_path / "kept", IDENTITY)
    assert again.read(3, ["a/1", "b/2"], 3) == losses
    assert again.read(2, ["a/1"], 3) is None


def test_losses_of_something_else_are_refused_and_the_difference_named(tmp_path: Path) -> None:
    LossFolder.open(tmp_path / "kept", IDENTITY)
    with pytest.raises(UserError, match=r"another learning rate: 0\.001, now 0\.01") as told:
        LossFolder.open(tmp_path / "kept", IDENTITY | {"learning_rate": 0.01})
    assert "--out" in str(told.value)
    with pytest.raises(UserError, match="another adapter shape"):
        LossFolder.open(tmp_path / "kept", IDENTITY | {"adapter_shape": {"r": [2, 4]}})


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no comparison"):
        LossFolder.open(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    LossFolder.open(tmp_path, IDENTITY, others=("notes.txt",))


@pytest.mark.parametrize("content", ["{", "[]", '{"losses": [1.0, 2.0]}', '{"records": ["a"], "losses": ["x", 1]}'])
def test_a_damaged_file_is_told_with_its_name(tmp_path: Path, content: str) -> None:
    folder = LossFolder.open(tmp_path, IDENTITY)
    folder.write(0, ["a"], [1.0, 2.0])
    path = tmp_path / "retrained" / "000.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"000\.json.*\n.*Delete it"):
        folder.read(0, ["a"], 2)


def test_losses_of_another_half_or_target_are_no_losses(tmp_path: Path) -> None:
    folder = LossFolder.open(tmp_path, IDENTITY)
    folder.write(0, ["a", "b"], [1.0, 2.0])
    for records, targets in ((["a", "c"], 2), (["a", "b"], 3)):
        with pytest.raises(UserError, match="no losses of this half"):
            folder.read(0, records, targets)


def test_the_digest_tells_records_apart() -> None:
    def record(*ids: int, target: int = 1) -> Encoded:
        place = torch.arange(len(ids))
        return Encoded("x", torch.tensor(ids), place >= target, torch.zeros_like(place), place)

    one = [record(1, 2, 3), record(4, 5)]
    assert digest(one) == digest(list(one))
    others = [
        digest(one[::-1]),
        digest(one[:1]),
        digest([record(1, 2, 4), record(4, 5)]),
        digest([record(1, 2, 3, target=2), record(4, 5)]),
        digest(one, ["a", "b"]),
        digest(one, ["b", "a"]),
    ]
    assert len({digest(one), *others}) == 7
