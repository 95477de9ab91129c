"""Whose data helped in a run: federated influence at the weights that its arms came to."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from allmend import intervals
from allmend.attribution.legs import Legs, codes_of, play, scored, strategy_of
from allmend.attribution.own import keep_own
from allmend.check import influence_problems, influenced
from allmend.data.chat import Encoded, Encoder
from allmend.data.files import read_records
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.events import Event, WorkPlanned
from allmend.federation.engines.hiding import HidingEngine
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.privacy.layers import protected
from allmend.federation.privacy.vectors import rounding
from allmend.influence.federated import FederatedInfluence
from allmend.influence.gradients import OfRecords, mean_gradient
from allmend.influence.methods import Directions
from allmend.meter import Meter
from allmend.models.adapters import Trainable, learning_adapter
from allmend.models.load import LoadedModel
from allmend.prepare import Prepared, differs, prepare, read_frozen, threads
from allmend.recipe import HELD_OUT, Arm, Influence, Recipe, RecipeError
from allmend.recipe.problems import problems_of
from allmend.report.page import write_report
from allmend.results import ArmInfluence, InfluenceByMember, LegTraffic, MemberInfluence
from allmend.run import EventLog, RunFolder
from allmend.strategy import State

TABLE = "influence"
"""Name of the table in `results/`."""

PASSES = {"gfim": 2, "datainf": 3, "hessian_free": 1}
"""Over the members' training records: for the curvature, once or twice, and for the scores."""

FOLDER = "influence"
"""Folder in an arm's, with what each member keeps to itself."""


@dataclass(frozen=True)
class Aim:
    """What is to be helped.

    Attributes:
        name: `held_out`, or the file's.
        records: of the file; empty where members hold the target out.
        groups: of each record.
    """

    name: str
    records: tuple[Encoded, ...] = ()
    groups: tuple[str, ...] = ()

    @property
    def targets(self) -> int:
        """How many there are."""
        return len(set(self.groups)) or 1

    def gradients(self, trainable: Trainable, settings: Influence) -> tuple[list[str], Directions] | None:
        """Names of the targets and their mean gradients; None where members hold the target out."""
        if not self.records:
            return None
        return mean_gradient(OfRecords(trainable, self.records, settings.modules), [(one,) for one in self.groups])


def read_aim(settings: Influence, recipe: Recipe, base: Path, encoder: Encoder) -> Aim:
    """The target that `[influence]` names.

    Raises:
        UserError: the file cannot be read, or its records have no label where one is asked for.
    """
    if settings.target == HELD_OUT:
        return Aim(HELD_OUT)
    path = base / Path(settings.target).expanduser()
    records, _ = read_records(str(path), fields=recipe.data.fields)
    if settings.targets == "kind" and not any(record.kind for record in records):
        raise UserError("the target records have no label to group them by", where=path)
    groups = [_group(record) if settings.targets == "kind" else "all" for record in records]
    return Aim(path.name, tuple(encoder.for_training(record) for record in records), tuple(groups))


def _group(record: Record) -> str:
    return record.kind or "(none)"


def attribute_run(
    out: Path | str,
    *,
    changes: Mapping[str, object] | None = None,
    model: LoadedModel | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> InfluenceByMember:
    """Whose data helped, in a finished simulation; writes the table, the members' own scores, and the report.

    Args:
        out: the run.
        changes: keys of the recipe's `[influence]` and their values for this time; a `target` starts from here.
        model: the recipe's model, where the caller has it in memory already.
        listeners: told every event.

    Raises:
        UserError: there is no run, it is among organisations, or influence cannot be measured in it.
    """
    run = RunFolder.open(Path(out))
    with run.lock():
        frozen = read_frozen(run)
        if run.facts.get("members") is not None:
            raise UserError(
                "is a run among organisations, and its records are with its members",
                where=run.path,
                hint=f"Ask them: `allmend attribute {run.path} --members members.toml`.",
            )
        recipe = with_influence(frozen, changes or {})
        base = Path(str(run.facts["base"]))
        if problems := influence_problems(recipe, base):
            raise RecipeError(problems)
        prepared = replace(prepare(frozen, base, model=model), recipe=recipe)
        if prepared.model.digest != run.facts.get("model"):
            raise differs("the base model", run)
        with threads(recipe), run.log(listeners) as log:
            table = attribute_arms(run, prepared, log)
        write_report(run.path)
    return table


def with_influence(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """A run's recipe with its `[influence]`, changed for this time; with all defaults where it has none.

    Raises:
        RecipeError: a value is none that the section takes.
    """
    before = recipe.influence.model_dump() if recipe.influence else {"reveal": "client_sums"}
    try:
        settings = Influence.model_validate(before | dict(changes))
        return Recipe.model_validate(recipe.model_dump() | {"influence": settings.model_dump()})
    except ValidationError as error:
        raise RecipeError(problems_of(error, Recipe, prefix=("influence",))) from None


def measured_arms(run: RunFolder, recipe: Recipe) -> list[str]:
    """Arms of a run whose influence can be measured.

    Raises:
        UserError: one has no adapter yet.
    """
    arms = influenced(recipe)
    for name in arms:
        if not (run.arm(name) / "adapter").is_dir():
            raise UserError(
                f"arm {name!r} has no adapter yet",
                where=run.arm(name),
                hint=f"Finish the run: `allmend tune --resume {run.path}`.",
            )
    return arms


def planned_influence(prepared: Prepared) -> dict[str, float]:
    """The phases and what each reads, in tokens."""
    recipe = prepared.recipe
    if recipe.influence is None:
        return {}
    tokens = PASSES[recipe.influence.method] * sum(len(one) for member in prepared.members for one in member.records)
    if recipe.influence.target == HELD_OUT:
        tokens += sum(len(one) for member in prepared.members for one in member.held_out)
    return {f"influence {name}": GRADIENT_COST * tokens for name in influenced(recipe)}


GRADIENT_COST = 2.7
"""What a token costs whose gradient is taken, in tokens read; used for times only."""


def attribute_arms(run: RunFolder, prepared: Prepared, log: EventLog) -> InfluenceByMember:
    """Measure the arms that the recipe's `[influence]` names, with members in this process."""
    recipe = prepared.recipe
    assert recipe.influence is not None
    arms = recipe.arms()
    aim = read_aim(recipe.influence, recipe, prepared.base, prepared.encoder)
    work = planned_influence(prepared)
    log.emit(WorkPlanned(work=work))
    found = []
    for name in measured_arms(run, recipe):
        meter = Meter(log.emit, f"influence {name}", work[f"influence {name}"] / GRADIENT_COST)
        found.append(_attribute_arm(run, prepared, arms[name], recipe.influence, aim, meter))
        meter.done()
    table = InfluenceByMember(arms=tuple(found))
    run.write_table(TABLE, table)
    return table


def _attribute_arm(
    run: RunFolder, prepared: Prepared, arm: Arm, settings: Influence, aim: Aim, meter: Meter
) -> ArmInfluence:
    layer = arm.privacy.secure_aggregation
    members = [scored(member) for member in protected(prepared.members, arm.privacy)[0]]
    strategy = strategy_of(settings, hidden=layer is not None, targets=aim.targets, on_tokens=meter.add)
    with learning_adapter(prepared.model.model, run.arm(arm.name) / "adapter") as trainable:
        initial = trainable.state()
        inner = InProcessEngine(trainable, members, arm.train, lambda name, turn, step: None)
        engine = (
            inner
            if layer is None
            else HidingEngine(
                inner,
                codes_of(strategy, initial, len(members)),
                lambda turn, name: rounding(arm.privacy.randomness, prepared.recipe.seed, FOLDER, turn, name),
                layer.fewest,
            )
        )
        legs = play(strategy, engine, initial, aim.gradients(trainable, settings))
    states = inner.states()
    for member in members:
        texts = {record.id: " ".join(record.texts) for record in prepared.train[member.name]}
        folder = run.arm(arm.name) / FOLDER / member.name
        keep_own(folder, member, states[member.name], texts, arm=arm.name, method=settings.method)
    return arm_influence(run, arm.name, settings, aim, strategy, legs, [member.name for member in members])


def arm_influence(
    run: RunFolder,
    arm: str,
    settings: Influence,
    aim: Aim,
    strategy: FederatedInfluence,
    legs: Legs,
    members: Sequence[str],
) -> ArmInfluence:
    """What the legs came to, as a table."""
    facts = legs.state.facts
    names = tuple(str(facts["names"]).split("\n"))
    told = {name for name in members if f"{name}/records" in facts}
    adapter = run.arm(arm) / "adapter" / "adapter_model.safetensors"
    return ArmInfluence(
        arm=arm,
        weights=hashlib.sha256(adapter.read_bytes()).hexdigest(),
        target=aim.name,
        target_records=len(aim.records) or int(facts.get("targets", 0)),
        targets=names,
        method=settings.method,
        records=int(facts.get("records", 0)),
        damping=settings.damping,
        modules=settings.modules,
        min_records=settings.min_records,
        clip=settings.clip,
        clipped=int(facts.get("clipped", 0)),
        gradients=int(facts.get("gradients", 0)),
        reveal=settings.reveal,
        members=tuple(
            _member(name, target, place, legs.state)
            for place, target in enumerate(names)
            for name in members
            if name in told
        ),
        silent=tuple(name for name in members if name not in told) if settings.reveal == "client_sums" else (),
        legs=tuple(
            LegTraffic(name=leg.name, members=leg.members, sent=leg.sent, received=leg.received) for leg in legs.legs
        ),
        hidden=strategy.step > 0,
        error=legs.error,
        skipped=tuple(filter(None, str(facts["skipped"]).split("\n"))),
    )


def _member(name: str, target: str, place: int, state: State) -> MemberInfluence:
    total, squares, absolute, below = (
        float(state.facts[f"{name}/{place}/{part}"]) for part in ("sum", "squares", "absolute", "below")
    )
    n = int(state.facts[f"{name}/records"])
    return MemberInfluence(
        client=name,
        target=target,
        mean=intervals.mean_of_sums(total, squares, n),
        below=intervals.share(round(below), n),
        size=absolute / n,
        balance=total / absolute if absolute else 0.0,
    )
