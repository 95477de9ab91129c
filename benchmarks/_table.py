"""Runs the benchmarks of speed and memory one after the other, and makes one table of their figures.

    python benchmarks/_table.py [--quick] [--write docs/performance.md] [--only optimizer_step.py ...]

With `--quick`, in their short forms. What a failing one printed is shown, and the others go on. With `--only`, those
that are named: their rows are put in the places of those that the page has of them.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from _measure import FIGURES, machine

HERE = Path(__file__).parent

DATA = os.environ.get("ALLMEND_DATA", "../shared/data")

RUNS = (
    "tune_throughput.py --runs 3",
    f"tune_throughput.py --data {DATA}/medquad --runs 2",
    "round_profile.py",
    "optimizer_step.py",
    "choice_evaluation.py",
    "client_memory.py",
    "private_step.py",
    "mixture_step.py",
    "audit_probes.py --runs 1",
    f"influence_peers.py --data {DATA} --threads 1 --records 16 --targets 8 --runs 1",
    "influence_memory.py",
    "depth_speed.py",
    "secure_sum.py",
    "federation_load.py",
    "federation_server.py --rounds 10",
)

LIBRARIES = ("torch", "transformers", "peft", "flwr")

BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"


def figures(command: str, *, quick: bool) -> list[tuple[str, str]] | None:
    """What was measured and what came out; None where the benchmark failed."""
    script, *options = command.split()
    with tempfile.NamedTemporaryFile("r") as file:
        arguments = [sys.executable, str(HERE / script), *options, *(["--quick"] if quick else [])]
        done = subprocess.run(arguments, check=False, env=os.environ | {FIGURES: file.name})
        if done.returncode:
            return None
        return [(row["what"], row["value"]) for row in map(json.loads, file)]


def head() -> list[str]:
    """Date, machine and versions, and the table's head."""
    known = ", ".join(f"{name} {version(name)}" for name in LIBRARIES if find_spec(name))
    return [
        f"{datetime.date.today():%d %B %Y}, on {machine()}; {known}. Medians, and in brackets the range over runs.",
        "",
        "| what | figure | command |",
        "| --- | --- | --- |",
    ]


def table(*, quick: bool, only: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Rows in Markdown, and the commands that failed."""
    lines, failed = list[str](), list[str]()
    for command in RUNS:
        if only and command.split()[0] not in only:
            continue
        if "--data" in command and not Path(f"{DATA}/medquad").is_dir():
            print(f"==> {command} is left out: no folder {DATA}/medquad (ALLMEND_DATA names another)", flush=True)
            continue
        print(f"==> {command}", flush=True)
        rows = figures(command, quick=quick)
        if rows is None:
            failed.append(command)
        for what, value in rows or ():
            shown = re.sub(r"--data \S+/", "--data ", command) + (" --quick" if quick else "")
            lines.append(f"| {what} | {value} | `python benchmarks/{shown}` |")
    return lines, failed


def replaced(page: list[str], new: list[str]) -> list[str]:
    """A page's lines with the rows of some commands in the places of those that it had of them, or at the end."""
    for script in dict.fromkeys(_script(line) for line in new):
        some = [line for line in new if _script(line) == script]
        at = next((place for place, line in enumerate(page) if _script(line) == script), len(page))
        page = [*page[:at], *some, *(line for line in page[at:] if _script(line) != script)]
    return page


def _script(row: str) -> str:
    """The script that made a row."""
    found = re.search(r"`python benchmarks/(\S+\.py)", row)
    return found[1] if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short forms")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    parser.add_argument("--only", nargs="+", default=[], help="scripts")
    options = parser.parse_args()
    rows, failed = table(quick=options.quick, only=options.only)
    print("\n" + "\n".join([*head(), *rows]))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if options.write:
        before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
        old, _, after = rest.partition(END)
        lines = replaced(old.strip().splitlines(), rows) if options.only else [*head(), *rows]
        options.write.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
