"""What cannot be measured is refused before the model runs, with what to do first."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.attribution.conftest import ADAPTER, rows, write

from allmend.attribution import subject as module
from allmend.attribution.settings import Settings
from allmend.attribution.subject import Subject, read_subject
from allmend.data.chat import Encoded, Encoder
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.events import Event
from allmend.meter import Meter
from allmend.recipe import Fields


@pytest.fixture(scope="module")
def place(adapt: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subject")
    write(folder / "north.jsonl", rows("north", 6))
    write(folder / "south.jsonl", rows("south", 4))
    write(folder / "test.jsonl", rows("test", 3))
    adapt(folder, "north", "south", rate=0.02, rounds=1)
    return folder


@pytest.fixture
def read(place: Path, tiny_folder: Path) -> Callable[..., Subject]:
    def run(**options: Any) -> Subject:
        settings = Settings(template="plain", **options.pop("settings", {}))
        given = {
            "model": str(tiny_folder),
            "adapter": place / ADAPTER,
            "train": [place / "north.jsonl", place / "south.jsonl"],
            "target": place / "test.jsonl",
            "fields": Fields(),
            "settings": settings,
        } | options
        model, adapter = given.pop("model"), given.pop("adapter")
        return read_subject(model, adapter, **given)  # type: ignore[arg-type]

    return run


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails."""

    def load(source: str) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load_model", load)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "is IA3, and influence is of the factors of a plain LoRA"),
        ({"use_dora": True}, "is DoRA, and influence"),
    ],
)
@pytest.mark.usefixtures("unloaded")
def test_an_adapter_that_is_no_lora_is_refused_with_the_step_before(
    change: dict[str, Any], words: str, read: Callable[..., Subject], place: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(place / ADAPTER, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=rf"{words}.*\n.*Train a LoRA .*`allmend tune`"):
        read(adapter=folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read"):
        read(adapter=folder)


@pytest.mark.parametrize("how", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {}])
@pytest.mark.usefixtures("unloaded")
def test_a_quantised_base_is_refused_with_the_step_before(
    how: dict[str, Any], read: Callable[..., Subject], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(UserError, match=r"the base is quantised.*\n.*dequantize\(\)") as raised:
        read(model=str(folder))
    assert ("(bitsandbytes)" in str(raised.value)) is bool(how)


class Silencing(Encoder):
    """An encoder that finds nothing to learn from in records named here."""

    silenced: ClassVar[set[str]] = set()

    def for_training(self, record: Record) -> Encoded:
        found = super().for_training(record)
        return replace(found, target=found.target & (record.id not in self.silenced))


def test_records_without_a_token_to_learn_from_are_set_aside(
    read: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Encoder", Silencing)
    monkeypatch.setattr(Silencing, "silenced", {"north-2", "south-0", "test-1"})
    found = read()
    assert [(owner, record.id) for owner, record in found.silent] == [("north", "north-2"), ("south", "south-0")]
    assert [one.id for one in found.encoded] == [record.id for record in found.records]
    assert len(found.records) == len(found.owners) == 8
    assert [record.id for record in found.asked] == [one.id for one in found.aim] == ["test-0", "test-2"]
    assert found.notes == (
        "2 training records are without a token to learn from, and without a score.",
        "1 target record is without a token to learn from, and left out.",
    )
    with pytest.raises(UserError, match="no training record has a token to learn from"):
        read(settings={"max_tokens": 1})


def test_a_record_of_two_clients_is_refused(read: Callable[..., Subject], place: Path, tmp_path: Path) -> None:
    made = rows("south", 3)
    made[2] |= {key: rows("north", 6)[4][key] for key in ("prompt", "response")}
    south = write(tmp_path / "south.jsonl", made)
    with pytest.raises(UserError, match="record 'south-2' of south has the same content as record 'north-4' of north"):
        read(train=[place / "north.jsonl", south])


def test_target_records_of_the_training_are_left_out_only_if_that_is_asked_for(
    read: Callable[..., Subject], place: Path, tmp_path: Path
) -> None:
    made = [*rows("test", 3), rows("north", 6)[4] | {"id": "mine"}]
    target = write(tmp_path / "both.jsonl", made)
    with pytest.raises(UserError, match=r"1 of 4 target records are training records too: mine \(north-4 there\)"):
        read(target=target)
    found = read(target=target, settings={"drop_overlap": True})
    assert [record.id for record in found.asked] == [one.id for one in found.aim] == ["test-0", "test-1", "test-2"]
    assert found.notes == ("1 target record is among the training records, and left out.",)
    assert len(found.records) == 10  # every training record keeps its score
    with pytest.raises(UserError, match="no target record is left"):
        read(target=place / "north.jsonl", settings={"drop_overlap": True})


def test_records_longer_than_the_model_looks_back_are_refused(read: Callable[..., Subject]) -> None:
    with pytest.raises(UserError, match="records may have 513 tokens, but the model looks back no more than 512"):
        read(settings={"max_tokens": 513})


def test_a_model_in_which_packed_records_see_each_other_is_refused(
    read: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "records_stay_apart", lambda model: False)
    with pytest.raises(UserError, match=r"records of this architecture \(llama\) cannot be told apart"):
        read()


def test_blocks_without_room_are_refused_before_anything_runs(
    read: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allmend.influence.block_memory.free_memory", lambda device: 100)
    events: list[Event] = []
    subject = read()
    with (
        subject.sources(Meter(events.append, "x", 1.0)) as (source, _),
        pytest.raises(UserError, match="Use --side rank, or leave it out with --modules"),
    ):
        subject.check_room(source)
    assert events == []
