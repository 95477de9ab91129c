"""What is missing or damaged in a model folder is told."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from allmend.errors import UserError
from allmend.models.folder import weight_files
from allmend.models.sources import resolve

MakeFolder = Callable[..., Path]


def test_a_complete_folder_is_itself(make_folder: MakeFolder) -> None:
    folder, sharded = make_folder("whole"), make_folder("sharded", shard="20KB")
    assert resolve(str(folder)) == folder
    assert resolve(str(sharded)) == sharded
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert len(weight_files(sharded)) > 1


def without(*names: str) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return break_it


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def cut_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50)


def empty_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 0)


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (without("config.json"), "config.json"),
        (adapter, "adapter"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (without("tokenizer.json"), "tokenizer.json"),
        (without("model.safetensors"), "no weights"),
        (pickled, "pytorch_model.bin"),
        (cut_weights, r"model\.safetensors: is truncated: it has \d+ bytes, and its header describes \d+"),
        (cut_header, r"model\.safetensors: is truncated or not a safetensors file: it has 50 bytes"),
        (empty_weights, "has 0 bytes"),
        (garble, "not a safetensors file"),
    ],
)
def test_a_broken_folder_is_refused(make_folder: MakeFolder, break_it: Callable[[Path], None], message: str) -> None:
    folder = make_folder()
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        resolve(str(folder))
    assert str(folder) in str(caught.value)
    assert caught.value.hint


def test_a_missing_shard_is_named(make_folder: MakeFolder) -> None:
    folder = make_folder(shard="20KB")
    weight_files(folder)[1].unlink()
    with pytest.raises(UserError, match=r"1 of .* weight files are missing: model-00002"):
        resolve(str(folder))
