"""The commands on good input, and interruptions of a real process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import CANARIES

import allmend as package
from allmend.cli.recipe import packaged
from allmend.events import Stopped
from allmend.recipe import Recipe, parse_recipe
from allmend.results import Comparison, OwnTable
from allmend.run import RunFolder

Allmend = Callable[..., Any]

AUDITED = (
    CANARIES
    + """
[compare.local.strategy]
name = 'local'
"""
)


def test_from_recipe_to_report(allmend: Allmend, workplace: Path) -> None:
    with Path("recipe.toml").open("a") as file:
        file.write(AUDITED)
    shown = allmend("recipe", "check", "recipe.toml")
    assert (shown.code, shown.err) == (0, "")
    shown = allmend("tune", "recipe.toml")
    assert (shown.code, shown.err) == (0, "")
    for words in ("Starting tiny", "round 2: training loss", "Finished in", "runs/tiny/arms/fedavg/adapter"):
        assert words in shown.out
    report = Path("runs/tiny/report.html").resolve()
    assert f"Report  {report}" in shown.out
    before = {p: p.read_bytes() for p in Path("runs/tiny").rglob("*") if p.is_file() and p.name != "lock"}
    shown = allmend("tune", "--resume", "runs/tiny")
    assert (shown.code, shown.err) == (0, "")
    assert f"Report  {report}" in shown.out
    assert before == {p: p.read_bytes() for p in Path("runs/tiny").rglob("*") if p.is_file() and p.name != "lock"}
    shown = allmend("audit", "runs/tiny", "--prefix", "3", "--prefix", "4")
    assert (shown.code, shown.err) == (0, "")
    assert "after a prefix of 4 tokens" in shown.out
    report.unlink()
    assert allmend("report", "runs/tiny").code == 0
    assert report.is_file()


LAYERS = """
[privacy.record]
noise_multiplier = 1.0
delta = 1e-2
[compare.members.privacy.member]
epsilon = 9.0
quantile = 0.5
[compare.plain.privacy]
"""


def test_guarantees_are_told_before_during_and_after(
    allmend: Allmend, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with Path("recipe.toml").open("a") as file:
        file.write(LAYERS)
    words = " ".join(allmend("tune", "recipe.toml", "--dry-run").out.split())
    for phrase in ("each record of north: ε = ", "each record of south: ε = ", "each client as a whole: ε = "):
        assert words.count(phrase) == 1
    assert "after all rounds; clip 1, noise multiplier 1;" in words
    assert "whether the change was within the clip" in words
    assert words.count("Noise and draws come from the recipe's seed: a simulation") == 2
    promised = float(words.split("each record of north: ε = ")[1].split()[0])
    shown = allmend("tune", "recipe.toml")
    assert (shown.code, shown.err) == (0, "")
    lines = [line for line in shown.out.splitlines() if line.startswith("  round 2:")]
    assert len(lines) == 3
    assert "training loss" not in lines[0]
    assert "training loss" not in lines[1]
    assert "training loss" in lines[2]
    assert [("so far" in line) for line in lines] == [True, True, False]
    budgets = json.loads(Path("runs/tiny/results/privacy.json").read_text())["budgets"]
    (north,) = (budget["epsilon"] for budget in budgets["fedavg"] if budget["client"] == "north")
    assert north == pytest.approx(promised, abs=0.005)
    assert f"ε {max(budget['epsilon'] for budget in budgets['fedavg']):.2f} so far" in lines[0]


def test_audits_of_a_run_a_model_and_ones_own_records(
    allmend: Allmend, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with Path("recipe.toml").open("a") as file:
        file.write(AUDITED.replace("local'", "centralised'").replace("compare.local", "compare.pooled"))
    assert allmend("tune", "recipe.toml").code == 0
    run = {path: path.read_bytes() for path in Path("runs/tiny").rglob("*") if path.is_file() and path.name != "lock"}

    # `audit RUN` is short for `audit run RUN`, and both do it again
    plain, named = allmend("audit", "runs/tiny"), allmend("audit", "run", "runs/tiny", "--canaries", CANARY_FILE)
    for shown in (plain, named):
        assert (shown.code, shown.err) == (0, "")
        for words in ("Memorisation of canaries", "base", "fedavg", "pooled", "after a prefix of 5 tokens", "Report"):
            assert words in shown.out
        assert "design was changed" not in shown.out
    assert "design was changed" in allmend("audit", "runs/tiny", "--prefix", 6).out
    assert allmend("audit", "runs/tiny").code == 0
    changed = {path for path, content in run.items() if path.read_bytes() != content}
    assert changed <= {Path("runs/tiny") / name for name in ("events.jsonl", "report.html")}

    # a model made elsewhere, with an adapter
    shutil.copytree("runs/tiny/arms/fedavg/adapter", "elsewhere")
    arguments = ("--canaries", CANARY_FILE, "--adapter", "elsewhere", "--prefix", 5, "--out", "found")
    shown = allmend("audit", "model", *arguments)
    assert (shown.code, shown.err) == (0, "")
    assert "adapter" in shown.out
    assert {path.name for path in Path("found").rglob("*")} == {
        *("results", "audit.json", "audit.parquet", "report.html"),
    }

    # side by side
    shown = allmend("audit", "compare", "runs/tiny:fedavg", "runs/tiny:pooled", "--out", "compared.json")
    assert (shown.code, shown.err) == (0, "")
    for words in ("Side by side", "fedavg", "pooled", "(×1)", "paired by canary", "95 %"):
        assert words in shown.out
    compared = Comparison.model_validate_json(Path("compared.json").read_bytes())
    assert [model.label for model in compared.models] == ["fedavg", "pooled"]
    assert compared.pairs[0].words in " ".join(shown.out.split())

    # one's own records
    before = {path: path.stat().st_mtime_ns for path in Path("runs/tiny").rglob("*")}
    shown = allmend(
        "audit", "mine", "runs/tiny", "--data", "north.jsonl", "--controls", "south.jsonl", "--out", "o.json"
    )
    assert (shown.code, shown.err) == (0, "")
    for words in ("Your records", "controls", "0 of ", "completes none of your records", "does not show"):
        assert words in shown.out
    assert "with --controls to tell" not in shown.out
    own = OwnTable.model_validate_json(Path("o.json").read_bytes())
    assert {row.record for row in own.rows} == {
        json.loads(line)["id"] for line in Path("north.jsonl").read_text().splitlines()
    }
    assert "with --controls to tell" in " ".join(
        allmend("audit", "mine", "runs/tiny", "--data", "north.jsonl").out.split()
    )
    assert {path: path.stat().st_mtime_ns for path in Path("runs/tiny").rglob("*")} == before


CANARY_FILE = "runs/tiny/canaries.jsonl"


def test_a_dry_run_shows_what_leaves_and_writes_nothing(allmend: Allmend, workplace: Path) -> None:
    with Path("recipe.toml").open("a") as file:
        file.write(AUDITED.replace("local", "centralised"))
    before = sorted(workplace.rglob("*"))
    shown = allmend("tune", "recipe.toml", "--dry-run")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    for words in (
        "what leaves a member",
        "only summed",
        "whoever sums could see each",
        "one by one",
        "Work: about",
        "Everything fits",
        "a simulation",
    ):
        assert words in text
    assert sorted(workplace.rglob("*")) == before


def test_clients_own_models_are_audited_where_they_are_asked_for(allmend: Allmend, workplace: Path) -> None:
    """And the dry run tells how, and what that costs."""
    with Path("recipe.toml").open("a") as file:
        file.write(AUDITED)
    text = " ".join(allmend("tune", "recipe.toml", "--dry-run").out.split())
    assert 'Not audited: local. To audit clients\' own models, name arms: [audit] models = ["fedavg", "local"].' in text
    assert "for each arm." in text
    assert allmend("tune", "recipe.toml").code == 0
    shown = allmend("audit", "runs/tiny", "--arm", "local/north", "--arm", "fedavg")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    assert "Members' own models" in text
    assert "local: none of 1 models is shown to know another member's planted canaries." in text
    assert "The audit's design was changed after training." in text
    assert "what passed between members" in Path("runs/tiny/report.html").read_text()


def test_a_dry_run_names_each_layer_and_what_masks_make_of_the_size(allmend: Allmend, workplace: Path) -> None:
    Path("west.jsonl").write_text(Path("north.jsonl").read_text())
    with Path("recipe.toml").open("a") as file:
        file.write("[[clients]]\nname = 'west'\ndata = 'west.jsonl'\n" + HIDDEN)
    assert allmend("recipe", "check", "recipe.toml").code == 0
    shown = allmend("tune", "recipe.toml", "--dry-run")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    for words in (
        "Deduplication within each client",
        "Goldfish loss (k = 3",
        "tokens left out of the loss.",
        "Weight noise: Gaussian, standard deviation 0.001",
        "Secure aggregation: changes cut to",
        "Behind masks, a member sends",
    ):
        assert words in text
    (arm,) = json.loads(allmend("tune", "recipe.toml", "--dry-run", "--json").out)["arms"]
    assert len(arm["layers"]) == 4
    # each parameter in 64 bits, and weight, loss and the number of cut values beside them
    assert arm["masked_bytes"] == 8 * (arm["trainable"] + 3)


HIDDEN = """
[privacy]
weight_noise = 0.001
[privacy.deduplicate]
[privacy.goldfish]
k = 3
[privacy.secure_aggregation]
"""


def test_a_recipe_between_machines_is_checked_with_its_members(allmend: Allmend, workplace: Path) -> None:
    lines = Path("recipe.toml").read_text()
    head, _, rest = lines.partition("[[clients]]")
    Path("recipe.toml").write_text(head + rest[rest.index("[adapter]") :])
    shown = allmend("recipe", "check", "recipe.toml")
    assert shown.code == 2
    assert "there are none: add [[clients]]" in shown.err
    for name in ("a", "b"):
        assert allmend("member", "key", "--out", name).code == 0
    Path("members.toml").write_text("[members]\na = 'x'\nb = 'y'\n")
    shown = allmend("recipe", "check", "recipe.toml", "--members", "members.toml")
    assert shown.code == 2
    assert "2 of the 2 members cannot be used" in shown.err
    public = {name: allmend("member", "key", "--public", name).out.strip() for name in ("a", "b")}
    Path("members.toml").write_text("[members]\n" + "".join(f"{name} = '{key}'\n" for name, key in public.items()))
    shown = allmend("recipe", "check", "recipe.toml", "--members", "members.toml")
    assert (shown.code, shown.err) == (0, "")


def test_tensorboard_is_a_reader_too(allmend: Allmend, workplace: Path) -> None:
    pytest.importorskip("tensorboard")
    assert allmend("tune", "recipe.toml", "--tensorboard").code == 0
    names = {path.name for path in Path("runs/tiny/tensorboard").glob("fedavg/*")}
    assert {"north", "south"} <= names


def test_the_commented_recipe_is_a_recipe_at_its_defaults(allmend: Allmend, workplace: Path) -> None:
    assert allmend("recipe", "init", "new.toml").code == 0
    text = Path("new.toml").read_text()
    recipe = parse_recipe(text)
    bare = Recipe(name=recipe.name, clients=recipe.clients)
    assert recipe.model_dump(exclude={"canaries", "compare", "name"}) == bare.model_dump(
        exclude={"canaries", "compare", "name"}
    )
    Path("new.toml").write_text("mine")
    assert allmend("recipe", "init", "new.toml").code == 2
    assert Path("new.toml").read_text() == "mine"
    assert allmend("recipe", "init", "new.toml", "--force").code == 0
    assert Path("new.toml").read_text() == text


@pytest.mark.parametrize("name", ["demo.toml", "thorough.toml", "template.toml"])
def test_packaged_recipes_are_valid(name: str) -> None:
    recipe = parse_recipe(packaged(name))
    assert parse_recipe(recipe.to_toml()) == recipe
    assert recipe.arms()


def test_the_schema_is_json_and_knows_the_template(allmend: Allmend) -> None:
    shown = allmend("recipe", "schema")
    schema = json.loads(shown.out)
    assert set(tomllib.loads(packaged("template.toml"))) <= set(schema["properties"])


def test_small_commands(allmend: Allmend, workplace: Path) -> None:
    assert package.__version__ in allmend("--version").out
    shown = allmend("model", "fetch", "model")
    assert shown.code == 0
    assert str(Path("model").resolve()) in shown.out
    for command in ("tune", "audit", "privacy", "report", "demo", "doctor", "recipe", "model"):
        assert command in allmend("--help").out
        assert allmend(command, "--help").code == 0


def test_doctor_says_what_to_mend(allmend: Allmend, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMEND_CACHE", str(workplace / "cache"))
    shown = allmend("doctor")
    assert "allmend model fetch" in " ".join(shown.out.split())
    assert shown.code == (2 if "to mend" in shown.out else 0)
    monkeypatch.setattr("allmend.cli.doctor._memory", lambda: 10**9)
    shown = allmend("doctor")
    assert shown.code == 2
    assert "1.0 GB" in shown.out


# --- a real process


class Process:
    """`allmend` in a process of its own, whose run's log can be waited for."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-c", "from allmend.cli import main; main()", *arguments]
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.pid = self._popen.pid

    def wait_for_lines(self, log: Path, lines: int) -> None:
        end = time.monotonic() + 60
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            assert self._popen.poll() is None, self._popen.communicate()
            assert time.monotonic() < end
            time.sleep(0.002)

    def end(self, how: signal.Signals) -> tuple[int, str, str]:
        os.kill(self.pid, how)
        out, err = self._popen.communicate(timeout=60)
        return self._popen.returncode, out, err


@pytest.mark.timeout(180)
def test_interruptions_of_a_real_process(allmend: Allmend, workplace: Path) -> None:
    """Two processes on one run, Ctrl-C, then `kill -9`, then on to the end: the same bits as in one go."""
    text = Path("recipe.toml").read_text()
    Path("recipe.toml").write_text(text.replace("rounds = 2", "rounds = 60"))
    assert allmend("tune", "recipe.toml", "--out", "whole").code == 0
    log = Path("run/events.jsonl")

    first = Process("tune", "recipe.toml", "--out", "run")
    first.wait_for_lines(log, 20)
    shown = allmend("tune", "--resume", "run")
    assert shown.code == 2
    assert f"in use by process {first.pid}" in shown.err
    assert "Wait for it" in shown.err
    code, out, err = first.end(signal.SIGINT)
    assert code == 130
    assert "allmend tune --resume run" in out
    assert "Traceback" not in err
    last = RunFolder.open(Path("run")).history()[-1]
    assert isinstance(last, Stopped)
    assert last.cause == "interrupted"

    lines = log.read_bytes().count(b"\n")
    second = Process("tune", "--resume", "run")
    second.wait_for_lines(log, lines + 20)
    code, out, err = second.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "Resuming tiny" in out or out == ""  # a pipe may not have been flushed

    shown = allmend("tune", "--resume", "run")
    assert shown.code == 0
    adapter = Path("arms/fedavg/adapter/adapter_model.safetensors")
    assert ("run" / adapter).read_bytes() == ("whole" / adapter).read_bytes()


def test_a_dry_run_counts_what_looks_like_personal_data_and_does_not_show_it(
    allmend: Allmend, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "has the form of personal data" in allmend("tune", "recipe.toml", "--dry-run").out
    rows = [json.loads(line) for line in Path("north.jsonl").read_text().splitlines()]
    secrets = [f"{row['id']}@hospital.org, born 3 May 1950" for row in rows]
    changed = [row | {"response": secret} for row, secret in zip(rows, secrets, strict=True)]
    Path("north.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    shown = allmend("tune", "recipe.toml", "--dry-run")
    assert (shown.code, shown.err) == (0, "")
    (line,) = (line for line in shown.out.splitlines() if "e-mail address" in line)
    north = next(line for line in shown.out.splitlines() if "│ north" in line)
    training = int(north.split("│")[2])
    assert f"e-mail address {training}, date {training} " in line
    assert "north" in line
    assert "hospital.org" not in shown.out


def test_keys_of_one_section_are_found_by_its_whole_name_too(allmend: Allmend, workplace: Path) -> None:
    shown = allmend("recipe", "keys", "privacy.goldfish")
    assert (shown.code, shown.err) == (0, "")
    assert "context" in shown.out
    assert "noise_multiplier" not in shown.out
    assert "noise_multiplier" in allmend("recipe", "keys", "privacy").out
    assert allmend("recipe", "keys", "privacy.nothing").code == 2
