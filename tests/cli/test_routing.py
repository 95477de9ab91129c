"""`allmend routing` and `allmend personalise export` on the terminal."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.mixtures.conftest import NAMES, made, write_records
from typer.testing import CliRunner, Result

from allmend import tune
from allmend.cli import app
from allmend.cli.routing import BARS, show_routing, strip
from allmend.errors import UserError
from allmend.results import ArmRouting, Estimate, MemberRouting
from allmend.run import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("work")
    write_records(folder)
    return tune(made(tiny_folder), folder / "run", base=folder)


def allmend(*words: object, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [*map(str, words)])


def test_a_line_for_each_client_and_files_beside_it(run: RunFolder, tmp_path: Path) -> None:
    shown = allmend("routing", run.path, "--svg", tmp_path / "map.svg", "--html", tmp_path / "map.html")
    assert shown.exit_code == 0, shown.output
    known = json.loads(allmend("routing", f"{run.path}:comigs", "--json").output)
    for one in known["members"]:
        (line,) = (line for line in shown.output.splitlines() if line.startswith(one["member"]))
        assert f"{one['overall']['value']:.2f}" in line
        assert any(bar in line for bar in BARS)
    assert (tmp_path / "map.svg").read_text().startswith("<svg")
    page = (tmp_path / "map.html").read_text()
    assert all(f">{name}</h2>" in page for name in NAMES)


def test_one_layer(run: RunFolder) -> None:
    known = json.loads(allmend("routing", run.path, "--json").output)["members"][0]
    shown = allmend("routing", run.path, "--layer", 1).output
    (line,) = (line for line in shown.splitlines() if line.startswith(known["member"]))
    assert line.split()[1] == f"{known['mass'][1]['value']:.2f}" != f"{known['overall']['value']:.2f}"
    assert "(layer 1)" in shown


def test_one_client_has_a_column_for_each_expert(run: RunFolder) -> None:
    shown = allmend("routing", run.path, "--member", "east").output
    known = json.loads(allmend("routing", run.path, "--member", "east", "--json").output)
    assert "specialist 2" in shown
    for place, gates in enumerate(known["gates"]):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{place} "))
        assert line.split()[-3:] == [f"{gate:.2f}" for gate in gates]


@pytest.mark.parametrize("columns", [80, 100])
def test_lines_fit_the_terminal(run: RunFolder, columns: int) -> None:
    shown = allmend("routing", run.path, columns=columns).output
    assert all(len(line) <= columns for line in shown.splitlines())
    assert all(sum(line.startswith(name) for line in shown.splitlines()) == 1 for name in NAMES)


@pytest.mark.parametrize("columns", [80, 100, 140])
def test_many_layers_and_long_names_fit_the_terminal(columns: int) -> None:
    share = Estimate(value=0.5, low=0.4, high=0.6, n=9)
    members = [
        MemberRouting(
            member=letter * 27, records=1, shared=1, own=1, mass=(share,) * 48, overall=share, gates=((0.5, 0.5),) * 48
        )
        for letter in "ab"
    ]
    console = Console(width=columns, record=True, file=io.StringIO())
    show_routing(console, ArmRouting(arm="comigs", layers=tuple(range(48)), members=tuple(members)))
    lines = console.export_text().splitlines()
    assert all(len(line) <= columns for line in lines)
    for letter in "ab":
        (line,) = (line for line in lines if line.startswith(letter * 10))
        assert "0.50 (0.40 to 0.60)" in line
        assert line.count("▅") == min(48, columns - min(27, columns - 55) - 41)
        assert (letter * 27 in line) == (columns >= 100)


def test_a_text_for_each_client_or_one(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("a ward, a note")
    files = ("--svg", tmp_path / "note.svg", "--html", tmp_path / "note.html")
    shown = allmend("routing", run.path, "--text", tmp_path / "note.txt", *files)
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("a ward, a note") == 3
    assert "mean over layers" in shown.output
    assert (tmp_path / "note.svg").read_text().startswith("<svg")
    assert "Who answers in note.txt" in (tmp_path / "note.html").read_text()
    told = allmend("routing", run.path, "--text", tmp_path / "note.txt", "--member", "north", "--layer", 0, "--json")
    (one,) = json.loads(told.output)
    assert (one["title"], one["layer"]) == ("north", 0)
    assert "".join(piece["text"] for piece in one["pieces"]) == "a ward, a note"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--member", "west"], "no client 'west'"),
        (["--layer", "9"], "layer 9 has no experts"),
        (["--text", "absent.txt"], "cannot be read"),
    ],
)
def test_mistakes_are_told(run: RunFolder, options: list[str], words: str) -> None:
    found = allmend("routing", run.path, *options)
    assert isinstance(found.exception, UserError)
    assert words in str(found.exception)


def test_a_text_that_is_none(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_bytes(b"na\xefve")
    found = allmend("routing", run.path, "--text", tmp_path / "note.txt", "--html", tmp_path / "note.html")
    assert isinstance(found.exception, UserError)
    assert "not UTF-8" in str(found.exception)
    assert not (tmp_path / "note.html").exists()


def test_bars_are_as_high_as_values() -> None:
    assert strip([0.0, 0.49, 0.51, 1.0], 10) == "▁▄▅█"
    assert strip([0.0, 0.0, 1.0, 1.0], 2) == "▁█"
    assert strip([0.0, 1.0, 1.0, 0.0], 2) == "▅▅"
    assert len(strip([0.5] * 31, 24)) == 24


def test_an_export_tells_what_it_costs(run: RunFolder, tmp_path: Path) -> None:
    words = ("personalise", "export", run.path, "--member", "east", "--how", "mean-gates", "--out", tmp_path / "out")
    shown = allmend(*words)
    assert shown.exit_code == 0, shown.output
    known = json.loads(allmend(*words, "--json").output)
    for one in known["compared"]:
        (line,) = (line for line in shown.output.splitlines() if line.startswith(f"{one['count']} {one['records']}"))
        assert f"{one['mixture']['value']:.3f}" in line
        assert f"{one['export']['value']:.3f}" in line
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert allmend(*words[:-3], "other", "--out", tmp_path / "out").exit_code == 2
