"""The files in `deploy/` say what the command line understands; nothing is built or started here."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

from allmend.cli import app

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def commands() -> Iterator[tuple[str, list[str]]]:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        yield f"compose.yaml: {name}", shlex.split(service["command"].replace("${OFFER:-}", "0" * 64))
    for unit in UNITS:
        (line,) = re.findall(r"^ExecStart=(.*?[^\\])$", unit.read_text(), re.MULTILINE | re.DOTALL)
        yield unit.name, shlex.split(line.replace("\\\n", " "))[1:]
    for number, line in enumerate((DEPLOY / "prepare.sh").read_text().splitlines(), start=1):
        if found := re.search(r"\ballmend ([^)]*)", line):
            yield f"prepare.sh:{number}", shlex.split(found[1])


@pytest.mark.parametrize(("where", "words"), list(commands()), ids=[where for where, _ in commands()])
def test_each_command_is_one(where: str, words: list[str]) -> None:
    command = typer.main.get_command(app)
    with command.make_context("allmend", words, resilient_parsing=False) as context:
        while True:
            name, inner, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
            assert inner is not None
            context = inner.make_context(name, rest, parent=context)
            if not hasattr(inner, "resolve_command"):
                break


def test_each_member_has_what_it_needs() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    members = {name: service for name, service in services.items() if name.startswith("member")}
    assert len(members) == 3
    for name, service in members.items():
        mounted = {volume.split(":")[1] for volume in service["volumes"]}
        assert {"/work/ca.pem", "/work/me.key", "/work/my.jsonl"} <= mounted, name
        assert all(":ro" in volume for volume in service["volumes"] if volume.startswith("./")), name
        assert "ports" not in service, name  # members open no door


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_understands_the_units(unit: Path) -> None:
    found = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    complaints = [line for line in found.stderr.splitlines() if unit.name in line and "not executable" not in line]
    assert complaints == []
