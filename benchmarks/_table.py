"""Runs the benchmarks of speed and memory one after the other, and makes one table of their figures.

    python benchmarks/_table.py [--quick] [--write docs/performance.md]

With `--quick`, in their short forms. What a failing one printed is shown, and the others go on.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
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
    "audit_probes.py --runs 1",
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


def table(*, quick: bool) -> tuple[str, list[str]]:
    """The table in Markdown, and the commands that failed."""
    known = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        f"{datetime.date.today():%d %B %Y}, on {machine()}; {known}. Medians, and in brackets the range over runs.",
        "",
    ]
    lines += ["| what | figure | command |", "| --- | --- | --- |"]
    failed = []
    for command in RUNS:
        if command.startswith("tune_throughput.py --data") and not Path(f"{DATA}/medquad").is_dir():
            print(f"==> {command} is left out: no folder {DATA}/medquad (ALLMEND_DATA names another)", flush=True)
            continue
        print(f"==> {command}", flush=True)
        rows = figures(command, quick=quick)
        if rows is None:
            failed.append(command)
        for what, value in rows or ():
            shown = re.sub(r"--data \S+/", "--data ", command) + (" --quick" if quick else "")
            lines.append(f"| {what} | {value} | `python benchmarks/{shown}` |")
    return "\n".join(lines) + "\n", failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short forms")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    options = parser.parse_args()
    made, failed = table(quick=options.quick)
    print(f"\n{made}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if options.write:
        before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
