"""What programs get: JSON and nothing beside it, the same figures as the run folder has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
from tests.cli.conftest import CANARIES

from allmend.cli import app
from allmend.cli.as_json import print_json
from allmend.events import read_events

Allmend = Callable[..., Any]

NOISE = """
[compare.noise.privacy.record]
noise_multiplier = 1.0
delta = 1e-2
"""


def test_a_run_from_its_dry_run_to_its_audit(allmend: Allmend, workplace: Path) -> None:
    with Path("recipe.toml").open("a") as file:
        file.write(CANARIES + NOISE)
    plan = allmend("tune", "recipe.toml", "--dry-run", "--json")
    assert (plan.code, plan.err) == (0, "")
    found = json.loads(plan.out)
    assert [member["name"] for member in found["members"]] == ["north", "south"]
    fedavg, noise = found["arms"]
    assert {one["name"] for one in fedavg["summed"]} == {"update", "weight", "loss"}
    assert fedavg["guarantees"] == {}
    assert (fedavg["layers"], fedavg["masked_bytes"]) == ([], None)
    assert {"north", "south"} == noise["guarantees"].keys()
    assert all(one["epsilon"] > 0 for one in noise["guarantees"].values())
    assert not Path("runs").exists()

    run = allmend("tune", "recipe.toml", "--json")
    assert (run.code, run.err) == (0, "")
    lines = [json.loads(line) for line in run.out.splitlines()]
    logged = [event.type for event in read_events(Path("runs/tiny/events.jsonl"))]
    assert [line["type"] for line in lines] == logged
    assert logged[-1] == "run.finished"

    status = allmend("status", "runs/tiny", "--json")
    assert (status.code, status.err) == (0, "")
    assert json.loads(status.out)["state"] == "finished"
    assert [arm["round"] for arm in json.loads(status.out)["arms"]] == [2, 2]
    assert allmend("status", "runs/tiny", "--json", "--page", "0").code == 2

    audit = allmend("audit", "runs/tiny", "--json")
    assert (audit.code, audit.err) == (0, "")
    assert json.loads(audit.out) == json.loads(Path("runs/tiny/results/audit.json").read_text())

    compared = allmend("audit", "compare", "runs/tiny", "--json")
    assert (compared.code, compared.err) == (0, "")
    assert json.loads(compared.out).keys() >= {"models"}

    own = allmend("audit", "mine", "runs/tiny", "--data", "north.jsonl", "--json")
    assert (own.code, own.err) == (0, "")
    assert json.loads(own.out)["records"]


def test_plan_keys_check_and_doctor(allmend: Allmend, workplace: Path) -> None:
    numbers = ("--clients", "100", "--rounds", "10", "--target-epsilon", "4", "--delta", "1e-3")
    plan = allmend("privacy", "plan", *numbers, "--json")
    assert plan.code == 0
    assert json.loads(plan.out)["plan"]["need"]["noise_multiplier"] > 0
    assert json.loads(plan.out)["on_the_run"] is None
    keys = json.loads(allmend("recipe", "keys", "train", "--json").out)
    assert {key["section"] for key in keys} == {"[train]"}
    assert json.loads(allmend("recipe", "check", "recipe.toml", "--json").out) == {"problems": []}
    with Path("recipe.toml").open("a") as file:
        file.write("\n[trian]\n")
    shown = allmend("recipe", "check", "recipe.toml", "--json")
    assert shown.code == 2
    assert [problem["key"] for problem in json.loads(shown.out)["problems"]] == [["trian"]]
    assert {"what", "found", "problem"} == json.loads(allmend("doctor", "--json").out)["rows"][0].keys()


def test_what_json_has_no_word_for_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"epsilon": float("inf"), "found": (1, None)})
    assert json.loads(capsys.readouterr().out) == {"epsilon": None, "found": [1, None]}


def commands(group: Any, path: tuple[str, ...] = ()) -> Any:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize(
    ("path", "command"),
    commands(typer.main.get_command(app)),
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_the_help_of_a_command_says_what_each_argument_is(
    path: tuple[str, ...], command: Any, allmend: Allmend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = " ".join(allmend(*path, "--help").out.split())
    for parameter in command.params:
        words = getattr(parameter, "help", None)
        assert words, f"{parameter.name} has no words"
        assert " ".join(words.split()) in shown


def test_completion_is_offered(allmend: Allmend) -> None:
    assert "--install-completion" in allmend("--help").out
