"""The life of a recipe: all files are made, others can load them, and no interruption changes a bit."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import allmend
from allmend import life
from allmend.audit_runs.runs import audit_run
from allmend.data.canaries import read_canaries
from allmend.errors import UserError
from allmend.events import Event, PhaseDone, RoundDone, RunFinished, RunStarted, StepDone, Stopped, Warned
from allmend.federation import checkpoint
from allmend.learn import loop
from allmend.models import adapters
from allmend.recipe import Recipe, parse_recipe
from allmend.results import BASE, AuditTable, PrivacyTable, UtilityTable
from allmend.run import RunFolder
from allmend.strategy import of_group

RECIPE = """
name = "tiny"
seed = 3
[model]
source = "{model}"
[data]
held_out = 0.3
max_tokens = 256
[[clients]]
name = "north"
data = "north.jsonl"
[[clients]]
name = "south"
data = "south.jsonl"
[adapter]
rank = 2
[train]
learning_rate = 0.01
batch_size = 4
[strategy]
name = "fedavg"
rounds = 3
[compare.local.strategy]
name = "local"
[canaries]
copies = [2]
count = 3
[audit]
exposure = []
membership_records = 2
prefix_tokens = [5]
[engine]
threads = 1
"""


def write_data(folder: Path) -> None:
    for client, count in (("north", 8), ("south", 12)):
        rows = [
            {"id": f"{client}-{i}", "prompt": f"{client}: {i} plus {i}?", "choices": [f"{2 * i}", "none"], "answer": 0}
            for i in range(count)
        ]
        (folder / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with a recipe and two clients' data."""
    folder = tmp_path_factory.mktemp("work")
    write_data(folder)
    (folder / "recipe.toml").write_text(RECIPE.format(model=tiny_folder))
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(workplace: Path) -> Recipe:
    return parse_recipe((workplace / "recipe.toml").read_text())


@pytest.fixture(scope="module")
def whole(workplace: Path, recipe: Recipe) -> RunFolder:
    """A run without interruption. Read it only."""
    return life.tune(recipe, workplace / "whole", base=workplace)


def outcomes(run: Path) -> dict[str, str]:
    """SHA-256 of all adapters and scores of a run."""
    found = [*run.glob("arms/**/adapter_model.safetensors"), *run.glob("scores/*.json"), *run.glob("results/*.json")]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(found)}


def contents(run: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(run)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.name != "lock"
    }


# --- the whole chain


def test_everything_is_there(whole: RunFolder, recipe: Recipe) -> None:
    files = {str(path.relative_to(whole.path)) for path in whole.path.rglob("*") if path.is_file()}
    adapters = ("arms/fedavg/adapter", "arms/local/members/north/adapter", "arms/local/members/south/adapter")
    assert files == {
        *("lock", "recipe.toml", "run.json", "events.jsonl", "canaries.jsonl", "report.html"),
        *(
            f"results/{name}"
            for name in ("utility.json", "audit.json", "audit.parquet", "privacy.json", "personalised.json")
        ),
        *(f"arms/{arm}/learnt.json" for arm in ("fedavg", "local")),
        "arms/fedavg/adapter/README.md",
        *(f"scores/{name}.json" for name in ("base", "fedavg", "local")),
        *(f"{folder}/{name}" for folder in adapters for name in ("adapter_config.json", "adapter_model.safetensors")),
        *(
            f"arms/{arm}/round-000003/{name}.safetensors"
            for arm in ("fedavg", "local")
            for name in ("server", "members/north", "members/south")
        ),
    }
    assert parse_recipe(whole.recipe.read_text()) == recipe


def test_the_tables_hold_what_the_recipe_asked_for(whole: RunFolder) -> None:
    utility = whole.read_table("utility", UtilityTable)
    audit = whole.read_table("audit", AuditTable)
    assert utility is not None
    assert audit is not None
    models = {(row.model, row.member) for row in utility.rows}
    assert models == {("base", None), ("fedavg", None), ("local", "north"), ("local", "south")}
    assert {row.held_out for row in utility.rows} == {"north", "south", "pooled"}
    perplexity = {
        (r.model, r.member): r.perplexity.value for r in utility.rows if r.held_out == "pooled" and r.perplexity
    }
    assert perplexity["fedavg", None] < perplexity["base", None]  # it learns
    inserted = sum(canary.inserted for canary in read_canaries(whole.canaries))
    assert (audit.canaries, audit.controls) == (inserted, 6 - inserted)
    assert audit.design_changed is False
    assert {(row.model, row.copies) for row in audit.learnt} == {("fedavg", 2)}
    assert {row.model for row in audit.gaps} == {"base", "fedavg"}  # `local` shares no model


def test_canaries_are_trained_on_as_often_as_they_say_and_controls_never(whole: RunFolder, workplace: Path) -> None:
    (started,) = (event for event in whole.history() if isinstance(event, RunStarted))
    for client in ("north", "south"):
        lines = len((workplace / f"{client}.jsonl").read_text().splitlines())
        inserted = sum(one.inserted for one in read_canaries(whole.canaries) if one.client == client)
        assert started.clients[client] + started.held_out[client] == lines + 2 * inserted


def test_threads_are_the_recipes_while_it_runs(recipe: Recipe, workplace: Path, tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), set[int]()
    engine = recipe.engine.model_copy(update={"threads": before + 1})
    changed = recipe.model_copy(update={"engine": engine, "compare": {}, "canaries": None})
    run = life.tune(changed, tmp_path / "run", base=workplace, listeners=[lambda e: seen.add(torch.get_num_threads())])
    assert seen == {before + 1}
    assert torch.get_num_threads() == before
    assert {event.threads for event in run.history() if isinstance(event, RunStarted)} == {before + 1}


def test_events_tell_the_run(whole: RunFolder) -> None:
    events = whole.history()
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunFinished)
    assert [(e.arm, e.round) for e in events if isinstance(e, RoundDone)] == [
        (arm, number) for arm in ("fedavg", "local") for number in (1, 2, 3)
    ]
    assert {e.phase for e in events if isinstance(e, PhaseDone)} == set(events[0].work)
    for arm in ("fedavg", "local"):
        for client in ("north", "south"):
            steps = [e for e in events if isinstance(e, StepDone) and (e.arm, e.client) == (arm, client)]
            assert [e.step for e in steps] == list(range(1, len(steps) + 1))
    assert [e.time for e in events] == sorted(e.time for e in events)


def test_the_seed_decides_everything(whole: RunFolder, workplace: Path, recipe: Recipe, tmp_path: Path) -> None:
    again = life.tune(recipe, tmp_path / "again", base=workplace)
    assert outcomes(again.path) == outcomes(whole.path)
    other = recipe.model_copy(update={"seed": 4, "compare": {}, "canaries": None})
    assert outcomes(life.tune(other, tmp_path / "other", base=workplace).path).keys() < outcomes(whole.path).keys()


# --- what others make of the artefacts


def test_an_adapter_loads_with_plain_peft_and_merges_with_plain_transformers(
    whole: RunFolder, tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = whole.arm("fedavg") / "adapter"
    tokens = AutoTokenizer.from_pretrained(tiny_folder)("3 plus 3?", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(tokens).logits
        loaded = peft.PeftModel.from_pretrained(base, adapter).eval()
        found = loaded(tokens).logits
    assert not torch.allclose(found, plain, atol=1e-3)
    # the run's own way: the adapter put on by `allmend`, set to the tensors of the last checkpoint
    model = allmend.load_model(str(tiny_folder), dtype=torch.float32)
    with contextlib.ExitStack() as stack:
        trainable = adapters.add_lora(model.model, rank=2, alpha=16.0, targets=["q_proj", "v_proj"], seed=0)
        digest = parse_recipe(whole.recipe.read_text()).digest()
        last = checkpoint.Checkpoints(whole.arm("fedavg"), f"{digest}/fedavg").newest()
        assert last is not None
        trainable.load(of_group("model", last.server.tensors))
        stack.enter_context(torch.no_grad())
        own = trainable.model.eval()(tokens).logits
    assert torch.equal(own, found)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    assert Path(config["base_model_name_or_path"]) == tiny_folder
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, found, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_leaves_a_model_folder_and_the_base_as_it_was(
    workplace: Path, recipe: Recipe, tmp_path: Path, tiny_folder: Path
) -> None:
    model = allmend.load_model(str(tiny_folder))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    text = RECIPE.format(model=tiny_folder).replace(
        'name = "local"', 'name = "local"\n[compare.all]\nadapter.kind = "full"'
    )
    full = parse_recipe(text.replace("rounds = 3", "rounds = 1"))
    run = life.tune(full, tmp_path / "run", base=workplace, model=model)
    after = model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    tuned = AutoModelForCausalLM.from_pretrained(run.arm("all") / "model").state_dict()
    assert tuned.keys() == before.keys()
    assert any(not torch.equal(tuned[name], before[name]) for name in before)
    AutoTokenizer.from_pretrained(run.arm("all") / "model")


def test_the_library_in_ten_lines(workplace: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """What the package's docstring says, on the tiny model."""
    from allmend import Recipe, load_model, make_recipe, tune

    model = load_model(str(tiny_folder))
    recipe = make_recipe(
        {
            "model": {"source": str(tiny_folder)},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in ("north", "south")],
            "strategy": {"rounds": 1},
            "canaries": {"copies": [1], "count": 4},
            "audit": {"exposure": [], "membership_records": 0},
        }
    )
    assert isinstance(recipe, Recipe)
    run = tune(recipe, str(tmp_path / "first"), base=str(workplace), model=model)
    table = allmend.audit_run(run.path, changes={"prefix_tokens": [4, 6]}, model=model)
    assert {row.prefix_tokens for row in table.extraction} == {4, 6}
    assert run.read_table("audit", AuditTable) == table
    assert allmend.write_report(run.path).is_file()
    assert allmend.resume(run.path).path == run.path
    assert not hasattr(allmend, "surprise")
    assert set(allmend.__all__) <= {*dir(allmend), *allmend._WHERE}


# --- stopped and resumed


def kill_at(when: str, workplace: Path, out: Path) -> None:
    # its children fork from a process that has imported everything and done nothing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["allmend.life"])
    script = str(Path(__file__).with_name("killed_run.py"))
    process = context.Process(target=runpy.run_path, args=(script, {"GIVEN": (workplace, out, when)}))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def lines_of(run: RunFolder) -> list[int]:
    """Lines of a run's log at which different things happen: in the first round, between rounds, between arms, …"""
    events = run.history()

    def first(kind: type, **values: object) -> int:
        return next(
            number
            for number, event in enumerate(events, start=1)
            if isinstance(event, kind) and all(getattr(event, k) == v for k, v in values.items())
        )

    return [
        first(RunStarted),
        first(StepDone, arm="fedavg", round=1),
        first(RoundDone, arm="fedavg", round=1),
        first(StepDone, arm="fedavg", round=3, client="south"),
        first(RoundDone, arm="fedavg", round=3),
        first(PhaseDone, phase="evaluate fedavg"),
        first(StepDone, arm="local", round=2, client="south"),
        first(PhaseDone, phase="evaluate local"),
        first(PhaseDone, phase="audit base"),
        first(RunFinished),
    ]


MOMENTS = [
    "while a checkpoint is written",
    "before the older checkpoint is deleted",
    "in the middle of a file",
    "while the adapter is saved",
    *(f"line {number}" for number in range(10)),
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_at_the_same_bits(moment: str, whole: RunFolder, workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    when = str(lines_of(whole)[int(moment.split()[1])]) if moment.startswith("line") else moment
    kill_at(when, workplace, out)
    assert outcomes(out) != outcomes(whole.path) or moment == "line 9"
    life.resume(out)
    assert outcomes(out) == outcomes(whole.path)
    assert not list(out.rglob("*.partial"))
    events = RunFolder.open(out).history()
    steps = [(e.arm, e.client, e.step) for e in events if isinstance(e, StepDone)]
    assert len(set(steps)) == len(steps)  # what was done twice is told once
    losses = {(e.arm, e.client, e.step): e.loss for e in whole.history() if isinstance(e, StepDone)}
    assert {(e.arm, e.client, e.step): e.loss for e in events if isinstance(e, StepDone)} == losses
    assert [(e.arm, e.round) for e in events if isinstance(e, RoundDone)] == [
        (e.arm, e.round) for e in whole.history() if isinstance(e, RoundDone)
    ]


# --- the same with guarantees

PRIVATE = """
[privacy.record]
noise_multiplier = 1.5
epsilon = 2.5
delta = 1e-2
[compare.members.strategy]
participation = 0.7
[compare.members.privacy.member]
noise_multiplier = 1.0
quantile = 0.5
[compare.kept.privacy]
weight_noise = 0.05
[compare.kept.privacy.goldfish]
k = 2
context = 3
[compare.kept.privacy.deduplicate]
"""


@pytest.fixture(scope="module")
def private_workplace(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A recipe whose own arm has a budget for two of its four rounds, and arms with the other layers."""
    folder = tmp_path_factory.mktemp("private")
    write_data(folder)
    text = RECIPE.format(model=tiny_folder).replace("rounds = 3", "rounds = 4")
    plain = text[: text.index("[compare.local")] + text[text.index("[engine]") :]
    (folder / "recipe.toml").write_text(plain + PRIVATE)
    return folder


@pytest.fixture(scope="module")
def private(private_workplace: Path) -> RunFolder:
    """Without interruption. Read it only."""
    recipe = parse_recipe((private_workplace / "recipe.toml").read_text())
    return life.tune(recipe, private_workplace / "whole", base=private_workplace)


def test_a_private_run_stops_within_its_budget_and_has_learnt(private: RunFolder, tiny_folder: Path) -> None:
    events = private.history()
    rounds = [e for e in events if isinstance(e, RoundDone) and e.arm == "fedavg"]
    assert [e.round for e in rounds] == [1, 2]
    assert [e.loss for e in rounds] == [None, None]
    warned = [e.message for e in events if isinstance(e, Warned) and "budget" in e.message]
    assert len(warned) == 1
    assert warned[0].startswith("fedavg: the privacy budget ends the training after round 2 of 4")
    table = private.read_table("privacy", PrivacyTable)
    assert table is not None
    assert set(table.budgets) == {"fedavg", "members"}
    for budget in table.budgets["fedavg"]:
        assert budget.client is not None
        assert budget.stopped == 2
        assert budget.by_round == tuple(event.epsilon[budget.client] for event in rounds)
        assert budget.epsilon == budget.by_round[-1]
        assert 0 < (budget.by_round[0] or 0) < (budget.by_round[1] or 0) <= 2.5
    (members,) = table.budgets["members"]
    assert (members.unit, members.client, members.stopped, members.steps) == ("member", None, None, 4)
    assert [len(table.layers[arm]) for arm in ("fedavg", "members", "kept")] == [0, 0, 3]
    # a peer's loss fell and its ε grew while the adapter that it saved was the initial one
    tokens = AutoTokenizer.from_pretrained(tiny_folder)("3 plus 3?", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(tokens).logits
        for arm in ("fedavg", "members", "kept"):
            tuned = peft.PeftModel.from_pretrained(base, private.arm(arm) / "adapter").eval()
            assert (tuned(tokens).logits - plain).abs().max() > 1e-3, arm
            base = tuned.unload()


@pytest.mark.parametrize("moment", ["while a checkpoint is written", "a step", "a member's round", "the budget's end"])
def test_a_killed_private_run_ends_at_the_same_bits_and_prices(
    moment: str, private: RunFolder, private_workplace: Path, tmp_path: Path
) -> None:
    out, events = tmp_path / "run", private.history()
    lines = {
        "a step": next(
            n for n, e in enumerate(events, start=1) if isinstance(e, StepDone) and (e.client, e.round) == ("south", 2)
        ),
        "a member's round": next(
            n for n, e in enumerate(events, start=1) if isinstance(e, RoundDone) and (e.arm, e.round) == ("members", 2)
        ),
        "the budget's end": next(n for n, e in enumerate(events, start=1) if isinstance(e, Warned)),
    }
    kill_at(str(lines.get(moment, moment)), private_workplace, out)
    life.resume(out)
    assert outcomes(out) == outcomes(private.path)
    resumed = RunFolder.open(out).history()
    assert [(e.arm, e.round, e.clients, e.epsilon) for e in resumed if isinstance(e, RoundDone)] == [
        (e.arm, e.round, e.clients, e.epsilon) for e in events if isinstance(e, RoundDone)
    ]
    assert not any(isinstance(e, RoundDone) and e.arm != "kept" and e.loss is not None for e in resumed)


def test_killed_again_and_again(whole: RunFolder, workplace: Path, tmp_path: Path) -> None:
    """A listener that ends the process's work at every third event; each resumption goes a little further."""
    out = tmp_path / "run"

    class Enough(BaseException):
        pass

    def impatient() -> Callable[[Event], None]:
        rounds = 0

        def listen(event: Event) -> None:
            nonlocal rounds
            rounds += isinstance(event, RoundDone)
            if rounds and isinstance(event, StepDone):
                raise Enough

        return listen

    recipe = parse_recipe((workplace / "recipe.toml").read_text())
    with pytest.raises(Enough):
        life.tune(recipe, out, base=workplace, listeners=[impatient()])
    tries = 0
    while True:
        tries += 1
        try:
            life.resume(out, listeners=[impatient()])
            break
        except Enough:
            assert tries < 9
    assert tries == 6 - 1  # six rounds, one in each session
    assert outcomes(out) == outcomes(whole.path)


def test_a_finished_run_is_left_as_it_is(whole: RunFolder) -> None:
    before = contents(whole.path)
    heard: list[Event] = []
    assert life.resume(whole.path, listeners=[heard.append]).path == whole.path
    assert contents(whole.path) == before
    assert heard == []


def stop_after(kind: type, run: Callable[..., Any], **values: object) -> None:
    """Run until an event, then Ctrl-C."""

    def listen(event: Event) -> None:
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in values.items()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(listeners=[listen])


def test_ctrl_c_is_told_reported_and_resumable(
    whole: RunFolder, workplace: Path, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop_after(StepDone, lambda **o: life.tune(recipe, out, base=workplace, **o), arm="fedavg", round=2)
    last = RunFolder.open(out).history()[-1]
    assert isinstance(last, Stopped)
    assert last.cause == "interrupted"
    assert (out / "report.html").is_file()
    life.resume(out)
    assert outcomes(out) == outcomes(whole.path)


def test_a_run_of_an_earlier_version_is_gone_on_from(
    whole: RunFolder, workplace: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that a recipe has since are in what it says today, and not in what was frozen."""
    out = stopped(workplace, recipe, tmp_path / "run")
    monkeypatch.setattr(Recipe, "digest", lambda self: "what it says today")
    life.resume(out)
    assert outcomes(out) == outcomes(whole.path)


@pytest.mark.timeout(180)
def test_a_worker_process_stopped_and_resumed_ends_at_the_same_bits(
    private: RunFolder, private_workplace: Path, tmp_path: Path
) -> None:
    """Where the members are makes no difference, to their noise neither."""
    recipe = parse_recipe((private_workplace / "recipe.toml").read_text())
    out, engine = tmp_path / "run", recipe.engine.model_copy(update={"workers": 1})
    many = recipe.model_copy(update={"engine": engine, "compare": {}})
    stop_after(StepDone, lambda **o: life.tune(many, out, base=private_workplace, **o), round=2)
    assert multiprocessing.active_children() == []
    life.resume(out)
    assert multiprocessing.active_children() == []
    for file in ("arms/fedavg/adapter/adapter_model.safetensors", "scores/fedavg.json"):
        assert (out / file).read_bytes() == (private.path / file).read_bytes()


def stopped(workplace: Path, recipe: Recipe, out: Path) -> Path:
    stop_after(RoundDone, lambda **o: life.tune(recipe, out, base=workplace, **o), arm="fedavg", round=2)
    return out


@pytest.mark.parametrize("change", ["data", "model", "recipe", "recipe gone", "checkpoint", "log", "facts"])
def test_a_run_whose_ground_has_changed_is_not_resumed(
    change: str, recipe: Recipe, tmp_path: Path, tiny_folder: Path, make_tiny_model: Callable[..., Any]
) -> None:
    write_data(tmp_path)
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", tiny_folder, model], check=True)
    out = stopped(tmp_path, parse_recipe(RECIPE.format(model=model)), tmp_path / "run")
    words = {
        "data": "the clients' data differs",
        "model": "the base model differs",
        "recipe": "the frozen recipe was changed",
        "recipe gone": "the frozen recipe cannot be read",
        "checkpoint": "belongs to another recipe",
        "log": "events.jsonl:2: not an event",
        "facts": "cannot be read as a run's facts",
    }[change]
    match change:
        case "data":
            (tmp_path / "south.jsonl").write_text((tmp_path / "south.jsonl").read_text().replace("11 plus", "12 plus"))
        case "model":
            make_tiny_model(seed=1).save_pretrained(model)
        case "recipe":
            (out / "recipe.toml").write_text((out / "recipe.toml").read_text().replace("rounds = 3", "rounds = 4"))
        case "recipe gone":
            (out / "recipe.toml").unlink()
        case "checkpoint":
            other = recipe.model_copy(update={"seed": 9})
            stranger = stopped(tmp_path, other, tmp_path / "other")
            subprocess.run(["rm", "-r", out / "arms"], check=True)
            subprocess.run(["cp", "-r", stranger / "arms", out / "arms"], check=True)
        case "log":
            lines = (out / "events.jsonl").read_bytes().splitlines(keepends=True)
            (out / "events.jsonl").write_bytes(b"".join([lines[0], b"{}\n", *lines[1:]]))
        case "facts":
            (out / "run.json").write_text("{")
    before = contents(out)
    with pytest.raises(UserError, match=words) as raised:
        life.resume(out)
    if change != "facts":
        assert raised.value.hint or change == "recipe gone"
    after = contents(out)
    told = {"events.jsonl", "report.html"} if change == "checkpoint" else set()
    assert {name for name in before if before[name] != after.get(name)} <= told
    assert after.keys() - before.keys() <= told


def test_training_that_diverges_stops_with_its_cause_and_keeps_the_last_whole_round(
    whole: RunFolder, workplace: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, calls = tmp_path / "run", loop.log_likelihood, []
    turning = sum(
        isinstance(e, StepDone) and e.arm == "fedavg" and e.round == 1 for e in whole.history()
    )  # steps of the first round

    def spoilt(model: Any, row: Any) -> torch.Tensor:
        calls.append(row)
        return real(model, row) * (torch.nan if len(calls) > 2 * turning else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "log_likelihood", spoilt)
        with pytest.raises(
            UserError, match=r"client '(north|south)', round \d: training diverged at step \d+: loss nan"
        ):
            life.tune(recipe, out, base=workplace)
    events = RunFolder.open(out).history()
    last = events[-1]
    assert isinstance(last, Stopped)
    assert "diverged" in last.cause
    done = [e.round for e in events if isinstance(e, RoundDone)]
    kept = [path.name for path in (out / "arms" / "fedavg").glob("round-*")]
    assert kept == [f"round-{max(done):06d}"]
    life.resume(out)  # what spoilt it is gone
    assert outcomes(out) == outcomes(whole.path)


def test_a_full_disk_while_checkpointing_loses_nothing(
    whole: RunFolder, workplace: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fsync = tmp_path / "run", os.fsync

    def full(number: int) -> None:
        if ".round-000002" in str(Path(f"/proc/self/fd/{number}").readlink()):
            raise OSError(28, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left"):
            life.tune(recipe, out, base=workplace)
    assert [path.name for path in (out / "arms" / "fedavg").iterdir()] == ["round-000001"]
    assert isinstance(RunFolder.open(out).history()[-1], Stopped)
    life.resume(out)
    assert outcomes(out) == outcomes(whole.path)


def test_a_log_that_takes_no_more_events_is_told_once(
    workplace: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when an event is written, and still full when the stop is to be told."""
    out, emit = tmp_path / "run", life.EventLog.emit

    def full(self: Any, event: Event) -> None:
        if isinstance(event, StepDone | Stopped):
            raise UserError("no space left", where=self.path)
        emit(self, event)

    monkeypatch.setattr(life.EventLog, "emit", full)
    with pytest.raises(UserError, match="no space left"):
        life.tune(recipe, out, base=workplace)
    monkeypatch.undo()
    life.resume(out)
    assert isinstance(RunFolder.open(out).history()[-1], RunFinished)


def test_a_run_in_use_is_refused(whole: RunFolder, workplace: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with RunFolder(out).lock():
        for start in (lambda: life.tune(recipe, out, base=workplace),):
            with pytest.raises(UserError, match="in use by process"):
                start()
    assert [path.name for path in out.iterdir()] == ["lock"]
    with whole.lock():
        before = contents(whole.path)
        for start in (lambda: life.resume(whole.path), lambda: audit_run(whole.path)):
            with pytest.raises(UserError, match="in use by process"):
                start()
        assert contents(whole.path) == before


# --- audits and rehearsals


def test_an_audit_needs_canaries_and_tuned_models(workplace: Path, recipe: Recipe, tmp_path: Path) -> None:
    plain = recipe.model_copy(update={"canaries": None, "compare": {}})
    run = life.tune(plain, tmp_path / "plain", base=workplace)
    with pytest.raises(UserError, match="no canaries"):
        audit_run(run.path)
    out = stopped(workplace, recipe, tmp_path / "stopped")
    with pytest.raises(UserError, match="no tuned model is here yet"):
        audit_run(out)


def test_an_audit_again_gives_the_same_figures(whole: RunFolder, workplace: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", whole.path, copy], check=True)
    card = copy / "arms" / "fedavg" / "adapter" / "README.md"
    card.write_text(f"{card.read_text()}\n## Ours\n\nWords of our own.\n")
    table = audit_run(copy)
    assert table == whole.read_table("audit", AuditTable)
    assert "Words of our own." in card.read_text()
    other = audit_run(copy, changes={"prefix_tokens": [3]})
    assert other.extraction[0].prefix_tokens == 3
    assert other.design_changed is True
    assert audit_run(copy).design_changed is False


def test_a_rehearsal_writes_nothing_and_tells_what_leaves(workplace: Path, recipe: Recipe) -> None:
    before = sorted(str(path) for path in workplace.rglob("*"))
    prepared, disclosures = life.rehearse(recipe, workplace)
    assert sorted(str(path) for path in workplace.rglob("*")) == before
    assert [d.arm for d in disclosures] == ["fedavg", "local"]
    # rank 2 on q (32 → 32) and v (32 → 16) of two layers
    count = 2 * (2 * (32 + 32) + 2 * (32 + 16))
    assert {d.trainable for d in disclosures} == {count}
    assert {d.message for d in disclosures} == {4 * count}
    assert {member.name for member in prepared.members} == {"north", "south"}


def test_damaged_scores_are_told(workplace: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop_after(PhaseDone, lambda **o: life.tune(recipe, out, base=workplace, **o), phase="evaluate fedavg")
    (out / "scores" / f"{BASE}.json").write_text('[{"member": null}]')
    with pytest.raises(UserError, match=r"base.json: these scores cannot be read"):
        life.resume(out)
    (out / "scores" / f"{BASE}.json").unlink()
    life.resume(out)
