"""The table of faults: each test adds the rows that it has seen, and `--chaos-table FILE` writes them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HEAD = """# Faults

What was done to runs among organisations, what came of it, and what somebody saw. Each row is a test with processes of
its own, over TLS, whose adapter was compared bit for bit with that of a simulation. `make chaos` tries all of them and
writes this page.
"""


@dataclass(frozen=True)
class Row:
    fault: str
    came: str
    seen: str


ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-table", type=Path, help="write the table of faults to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path: Path | None = session.config.getoption("--chaos-table", None)
    if path is None or exitstatus != 0:
        return
    lines = [HEAD, "| what was done | what came of it | what was to be seen |", "| --- | --- | --- |"]
    lines += [f"| {row.fault} | {row.came} | {row.seen} |" for row in session.config.stash[ROWS]]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a row. Words of the program are quoted as code."""

    def add(fault: str, came: str, *seen: str) -> None:
        quoted = "; ".join(f"`{' '.join(words.replace('`', '').replace('|', '/').split())}`" for words in seen)
        request.config.stash[ROWS].append(Row(fault, came, quoted))

    return add
