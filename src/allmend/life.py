"""The life of a recipe: tune, evaluate, audit, report, in one run folder that can be stopped and resumed anywhere."""

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import allmend
from allmend.attribution.legs import codes_of
from allmend.attribution.legs import strategy_of as influence_of
from allmend.attribution.runs import TABLE as INFLUENCE
from allmend.attribution.runs import attribute_arms, read_aim
from allmend.audit_runs.guarantees import privacy_table
from allmend.audit_runs.learnt import NeverLearntError, write_learnt
from allmend.audit_runs.runs import VIEWS, audit_arms, design_digest, write_cards
from allmend.check import influenced
from allmend.collaborators import write_collaborators
from allmend.data.canaries import write_canaries
from allmend.events import (
    Event,
    RunFinished,
    RunStarted,
    Warned,
)
from allmend.federation.arm import Outcomes, save_outcomes, strategy_of, train_arm, trainable_of
from allmend.federation.privacy.layers import protected
from allmend.federation.privacy.ledger import NO_LEDGER, Ledger, open_ledger
from allmend.federation.privacy.vectors import codes_of_legs
from allmend.learn.compare import ModelScores, utility_table
from allmend.learn.evaluate import score
from allmend.learn.loop import DivergedError
from allmend.learn.scores import read_scores, write_scores
from allmend.meter import Meter
from allmend.mixtures.routing import write_routing
from allmend.models.load import LoadedModel
from allmend.models.tensors import Tensors, nbytes, write_tensors
from allmend.personalised import write_personalised
from allmend.prepare import Prepared, checkpoints_of, differs, prepare, read_frozen, threads
from allmend.recipe import Arm, Recipe
from allmend.results import BASE, InfluenceByMember
from allmend.run import EventLog, RunFolder
from allmend.session import machine, reported, sessions
from allmend.strategy import Declaration, Strategy, Turn, whole_layout
from allmend.versions import versions
from allmend.workload import work_ahead

Listener = Callable[[Event], None]


def tune(
    recipe: Recipe,
    out: Path | str,
    *,
    base: Path | str = ".",
    model: LoadedModel | None = None,
    listeners: Sequence[Listener] = (),
) -> RunFolder:
    """Carry out a recipe in a new run folder.

    Args:
        recipe: what to do.
        out: the run folder; absent or empty.
        base: folder that the recipe's relative paths start from.
        model: the recipe's model, where the caller has it in memory already.
        listeners: told every event.

    Raises:
        UserError: the recipe, the data or the folder are at fault, or training diverged; the run can be resumed.
    """
    run = RunFolder(Path(out))
    run.check_free()
    prepared = prepare(recipe, Path(base), model=model)
    with run.lock(), threads(recipe):
        RunFolder.create(run.path, recipe.to_toml(), _facts(prepared))
        _live(run, prepared, listeners, resumed=False)
    return run


def resume(out: Path | str, *, model: LoadedModel | None = None, listeners: Sequence[Listener] = ()) -> RunFolder:
    """Go on with a run where it stopped; a finished run is left as it is.

    Raises:
        UserError: there is no run, it is in use, or its recipe, data or model are not those it was started with.
    """
    run = RunFolder.open(Path(out))
    with run.lock():
        facts = run.facts
        recipe = read_frozen(run)
        if _finished(run, recipe):
            return run
        prepared = prepare(recipe, Path(str(facts["base"])), model=model)
        for key, now in _facts(prepared).items():
            # the recipe is what was frozen; a later version's has keys more
            if key in _FACTS and facts.get(key) != now:
                raise differs(_FACTS[key], run)
        with threads(recipe):
            _live(run, prepared, listeners, resumed=True)
    return run


@dataclass(frozen=True)
class Disclosure:
    """What an arm would let leave a member: its strategy's words, and the size of what it trains.

    Attributes:
        arm: name.
        declaration: in the strategy's words.
        trainable: parameters that learn.
        message: bytes of one set of them.
        sent: bytes that the coordinator sends a member in the first leg; of one set where that is not known before.
        sizes: bytes of each group of tensors that is summed.
        simulated_only: True if the arm needs all records in one place.
        ledger: its guarantees.
        layers: its layers of protection, in words.
        masked: bytes of what a member sends behind masks in a leg; None where sums are formed in sight.
    """

    arm: str
    declaration: Declaration
    trainable: int
    message: int
    sent: int
    sizes: Mapping[str, int]
    simulated_only: bool
    ledger: Ledger
    layers: tuple[str, ...] = ()
    masked: int | None = None


def rehearse(recipe: Recipe, base: Path | str = ".") -> tuple[Prepared, list[Disclosure]]:
    """Load and check all that a run needs, and tell what would leave whom; nothing is written or trained.

    Raises:
        UserError: whatever `tune` would refuse before it starts.
    """
    prepared = prepare(recipe, Path(base))
    disclosures = []
    for arm in recipe.arms().values():
        strategy = strategy_of(arm, seed=recipe.seed)
        parties, whole = prepared.parties(arm)
        members, layers = protected(parties, arm.privacy)
        ledger = open_ledger(whole, members)
        with trainable_of(prepared.model, arm.adapter, seed=recipe.seed) as trainable:
            initial = trainable.state()
            disclosures.append(
                Disclosure(
                    arm.name,
                    strategy.declare(),
                    trainable.count,
                    nbytes(initial),
                    _sent(strategy, initial, [member.name for member in members]),
                    _sizes(strategy, initial),
                    simulated_only=strategy.pooled,
                    ledger=ledger,
                    layers=layers,
                    masked=None
                    if arm.privacy.secure_aggregation is None
                    else max(
                        code.nbytes
                        for code in codes_of_legs(strategy, initial, arm.privacy.secure_aggregation, len(members))
                    ),
                )
            )
    if recipe.influence is not None:
        disclosures += [_of_influence(prepared, name) for name in influenced(recipe)]
    return prepared, disclosures


def _of_influence(prepared: Prepared, name: str) -> Disclosure:
    """What would leave a member when influence is measured in an arm."""
    recipe = prepared.recipe
    assert recipe.influence is not None
    arm = recipe.arms()[name]
    hidden = arm.privacy.secure_aggregation is not None
    aim = read_aim(recipe.influence, recipe, prepared.base, prepared.encoder)
    strategy = influence_of(recipe.influence, hidden=hidden, targets=aim.targets)
    with trainable_of(prepared.model, arm.adapter, seed=recipe.seed) as trainable:
        initial = trainable.state()
        codes = codes_of(strategy, initial, len(prepared.members))
        return Disclosure(
            f"{name}, influence",
            strategy.declare(),
            trainable.count,
            nbytes(initial),
            nbytes(initial),
            _sizes(strategy, initial, double=() if hidden or strategy.curvature is None else strategy.curvature.double),
            simulated_only=False,
            ledger=NO_LEDGER,
            masked=sum(code.nbytes for code in codes) if hidden else None,
        )


def _sent(strategy: Strategy, initial: Tensors, members: Sequence[str]) -> int:
    """Bytes that a member gets at first; one set of what learns where nothing goes out then, or nobody is drawn."""
    tasks = strategy.plan(strategy.init(initial), Turn(1, 0, 1, len(members)), members)
    return max((nbytes(task.tensors) for task in tasks.values()), default=0) or nbytes(initial)


def _sizes(strategy: Strategy, initial: Tensors, *, double: Collection[str] = ()) -> dict[str, int]:
    """Bytes of each group that is summed; members send float32, and the groups of `double` float64."""
    sizes: dict[str, int] = {}
    for tensor, shape in whole_layout(strategy, initial).items():
        group = tensor.partition("/")[0]
        sizes[group] = sizes.get(group, 0) + (8 if group in double else 4) * shape.numel()
    return sizes


_FACTS = {
    "model": "the base model",
    "data": "the clients' data",
    "audit": "the audit's design",
}


def _facts(prepared: Prepared) -> dict[str, object]:
    """What a run is bound to, for `run.json`."""
    return {
        "allmend": allmend.__version__,
        "base": str(prepared.base.resolve()),
        "recipe": prepared.recipe.digest(),
        "model": prepared.model.digest,
        "data": prepared.data_digests,
        "audit": design_digest(prepared.recipe.audit, prepared.canaries) if prepared.canaries else None,
    }


def _live(run: RunFolder, prepared: Prepared, listeners: Sequence[Listener], *, resumed: bool) -> None:
    began = time.perf_counter()
    earlier = sessions(run)
    with run.log(listeners) as log, reported(run, log, resumable=_may_end_otherwise):
        started = _started(run, prepared, resumed=resumed)
        log.emit(started)
        if earlier and earlier[-1].threads != started.threads:
            log.emit(Warned(message=_OTHER_THREADS.format(earlier[-1].threads, started.threads)))
        for warning in prepared.warnings if not resumed else ():
            log.emit(Warned(message=warning))
        if prepared.canaries and not run.canaries.exists():
            write_canaries(run.canaries, prepared.canaries)
        scores = _evaluate(run, prepared, log, BASE, prepared.model.model, {None: None})
        for arm in prepared.recipe.arms().values():
            scores += _arm(run, prepared, log, arm)
        main = prepared.recipe.strategy.name
        run.write_table("utility", utility_table(scores, main=main, seed=prepared.recipe.seed))
        run.write_table("privacy", privacy_table(run, prepared))
        write_collaborators(run, prepared.recipe)
        write_personalised(run, prepared.recipe)
        write_routing(run, prepared, log)
        if prepared.canaries:
            audit_arms(run, prepared, log, prepared.recipe.audit)
        if prepared.recipe.influence is not None and run.read_table(INFLUENCE, InfluenceByMember) is None:
            attribute_arms(run, prepared, log)
        write_cards(run, prepared.recipe)
        before = sum(session.seconds for session in earlier)
        log.emit(RunFinished(seconds=before + time.perf_counter() - began))


def _may_end_otherwise(error: BaseException) -> bool:
    """Whether going on can meet another end."""
    return not isinstance(error, DivergedError | NeverLearntError)


_OTHER_THREADS = (
    "the run was begun with {} threads and goes on with {}: the result may differ in the last bits "
    "from that of a run without a break"
)


def _finished(run: RunFolder, recipe: Recipe) -> bool:
    """Whether all was done once and is still there."""
    scores = [run.scores(name) for name in (BASE, *recipe.arms())]
    names = ["utility", *(["audit"] if recipe.canaries else []), *([INFLUENCE] if recipe.influence else [])]
    tables = [run.path / "results" / f"{name}.json" for name in names]
    there = all(path.exists() for path in (*scores, *tables, run.path / "report.html"))
    return there and any(isinstance(event, RunFinished) for event in run.history())


def _started(run: RunFolder, prepared: Prepared, *, resumed: bool) -> RunStarted:
    return RunStarted(
        run=prepared.recipe.name,
        allmend=allmend.__version__,
        versions=versions(),
        machine=machine(prepared.model.model.device),
        threads=torch.get_num_threads(),
        model=prepared.recipe.model.source,
        clients={member.name: len(member.records) for member in prepared.members},
        held_out={name: len(records) for name, records in prepared.held_out.items()},
        notes=prepared.notes,
        work=work_ahead(prepared, run),
        resumed=resumed,
    )


def _arm(run: RunFolder, prepared: Prepared, log: EventLog, arm: Arm) -> list[ModelScores]:
    """Train an arm, as far as it is not trained, save its outcome, and score it."""
    if run.scores(arm.name).exists():
        return read_scores(run.scores(arm.name))
    recipe = prepared.recipe
    members, arm = prepared.parties(arm)
    checkpoints = checkpoints_of(run, arm.name)
    views = run.arm(arm.name) / VIEWS if recipe.audit.views and arm.adapter.kind == "lora" else None
    if views is not None:  # of a round that was broken off; its second try may be other members'
        for folder in views.glob("round-*"):
            if int(folder.name.removeprefix("round-")) > checkpoints.newest_round():
                shutil.rmtree(folder)
    with trainable_of(prepared.model, arm.adapter, seed=recipe.seed) as trainable:
        training = train_arm(
            arm,
            trainable,
            members,
            seed=recipe.seed,
            engine=recipe.engine,
            checkpoints=checkpoints,
            emit=log.emit,
            observe=None if views is None else partial(_keep_view, views),
        )
        save_outcomes(run.arm(arm.name), training.outcomes, trainable, base=str(prepared.model.folder))
        write_learnt(run, arm.name, prepared.canaries, training)
        return _evaluate(run, prepared, log, arm.name, trainable.model, training.outcomes, load=trainable.load)


def _keep_view(folder: Path, round: int, member: str | None, tensors: Tensors) -> None:
    """What a party sees of a round, for the audit; see `Observer`."""
    name = "broadcast" if member is None else f"update-{member}"
    path = folder / f"round-{round:06d}" / f"{name}.safetensors"
    write_tensors(path, tensors, {"round": round})


def _evaluate(
    run: RunFolder,
    prepared: Prepared,
    log: EventLog,
    name: str,
    module: torch.nn.Module,
    outcomes: Outcomes,
    *,
    load: Callable[[Tensors], None] | None = None,
) -> list[ModelScores]:
    """Score each outcome of an arm on all held-out records, and store the scores."""
    path = run.scores(name)
    if path.exists():
        return read_scores(path)
    clients = sorted(prepared.held_out)
    records = [record for client in clients for record in prepared.held_out[client]]
    encoded = [one for client in clients for one in prepared.held_out_encoded[client]]
    meter = Meter(log.emit, f"evaluate {name}", float(sum(len(one) for one in encoded) * len(outcomes)))
    found = []
    for member, tensors in outcomes.items():
        if load is not None:
            if tensors is None:  # a member that never took part has no model
                continue
            load(tensors)
        scores = iter(
            score(
                module,
                records,
                encoded,
                tokens_per_pass=prepared.recipe.evaluation.tokens_per_pass,
                on_tokens=meter.add,
            )
        )
        by_client = {client: [next(scores) for _ in prepared.held_out[client]] for client in clients}
        found.append(ModelScores(name, member, by_client))
    write_scores(path, found)
    meter.done()
    return found
