"""Who answers in the mixtures that members keep: measured when a run ends, or of any mixture afterwards.

Only a member has its mixture and its records. In a simulation both are here; in a run among organisations each member
measures its own (`own`), and the coordinator cannot.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from allmend import intervals
from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.events import Warned
from allmend.federation.arm import FOLDERS
from allmend.federation.member import Member
from allmend.federation.strategies.comigs import CoMiGS
from allmend.learn.routing import first_records, layers_with_experts, usage
from allmend.meter import Meter
from allmend.mixtures.collapse import collapsed
from allmend.models.load import LoadedModel
from allmend.models.mixture import Mixture, mixed
from allmend.outcomes import members_with_outcome, place_of
from allmend.prepare import Prepared, differs, prepare, read_frozen, threads
from allmend.recipe import Recipe
from allmend.results import ArmRouting, Estimate, MemberRouting, RoutingTable
from allmend.run import EventLog, RunFolder

TABLE = "routing"

PHASE = "routing "
"""Begins the name of a run's phase, which its arm ends."""


def mixing(recipe: Recipe) -> list[str]:
    """Names of a recipe's arms whose members have mixtures."""
    return [name for name, arm in recipe.arms().items() if arm.strategy.name == CoMiGS.name]


def write_routing(run: RunFolder, prepared: Prepared, log: EventLog) -> None:
    """Measure who answers in all arms that have mixtures, keep it as a table of the run, and warn where one side does.

    Raises:
        UserError: a mixture cannot be read, or the operating system refused.
    """
    if not mixing(prepared.recipe) or run.read_table(TABLE, RoutingTable) is not None:
        return
    found: list[ArmRouting] = []
    for phase, tokens in planned_routing(prepared).items():
        meter = Meter(log.emit, phase, tokens)
        found.append(routing_of_arm(run, prepared, phase.removeprefix(PHASE), on_tokens=meter.add))
        meter.done()
    for arm in found:
        for warning in arm.warnings:
            log.emit(Warned(message=warning))
    run.write_table(TABLE, RoutingTable(arms=tuple(found)))


def planned_routing(prepared: Prepared) -> dict[str, float]:
    """The phases and what each reads, in tokens."""
    read = sum(len(one) for member in prepared.members for one in first_records(_read_of(member)))
    return {f"{PHASE}{name}": float(read) for name in mixing(prepared.recipe)}


def read_routing(out: Path | str, name: str | None = None, *, model: LoadedModel | None = None) -> ArmRouting:
    """Who answers in an arm of a run: as its table has it, or measured now where the run has none.

    Args:
        out: the run, finished or not.
        name: of the arm; the recipe's first one with mixtures when None.
        model: the recipe's model, where the caller has it in memory already.

    Raises:
        UserError: no arm has mixtures, or not this one; none is here yet; model or records are not the run's.
    """
    run = RunFolder.open(Path(out))
    recipe = read_frozen(run)
    arm = arm_with_mixtures(run, recipe, name)
    if (table := run.read_table(TABLE, RoutingTable)) is not None:
        for known in table.arms:
            if known.arm == arm:
                return known
    prepared = prepare(recipe, Path(str(run.facts["base"])), model=model)
    if prepared.model.digest != run.facts.get("model"):
        raise differs("the base model", run)
    if prepared.data_digests != run.facts.get("data"):
        raise differs("the clients' data", run)
    with threads(recipe):
        return routing_of_arm(run, prepared, arm)


def arm_with_mixtures(run: RunFolder, recipe: Recipe, name: str | None) -> str:
    """An arm of a run whose members have mixtures here.

    Raises:
        UserError: there is no such arm, or its mixtures are not here.
    """
    arms = mixing(recipe)
    if not arms or (name is not None and name not in arms):
        raise UserError(
            f"arm {name!r} has no mixtures" if name else "no arm has mixtures of experts",
            where=run.path,
            hint=f"Arms that do: {', '.join(arms)}." if arms else "The strategy comigs makes them.",
        )
    arm = name or arms[0]
    if not folders(run, arm):
        raise UserError(
            f"no mixture of arm {arm!r} is here",
            where=run.arm(arm),
            hint=f"Finish the run: `allmend tune --resume {run.path}`. In a run among organisations mixtures stay with "
            "the members, and each has a page of its own.",
        )
    return arm


def folders(run: RunFolder, arm: str) -> dict[str, Path]:
    """Where each member's mixture is, by member."""
    return {name: place_of(run, arm, name) / FOLDERS["mixture"] for name in members_with_outcome(run, arm)}


def routing_of_arm(
    run: RunFolder, prepared: Prepared, arm: str, *, on_tokens: Callable[[int], None] = lambda tokens: None
) -> ArmRouting:
    """Who answers in an arm, on records that each member holds out, or those of its target where it holds out none."""
    members = {member.name: member for member in prepared.members}
    layers: list[int] = []
    found: list[MemberRouting] = []
    for name, folder in folders(run, arm).items():
        with mixed(prepared.model, folder) as mixture:
            layers = layers_with_experts(mixture)
            if (one := routing_of_member(mixture, members[name], on_tokens=on_tokens)) is not None:
                found.append(one)
    return as_arm(arm, layers, found)


def as_arm(arm: str, layers: Sequence[int], members: Sequence[MemberRouting]) -> ArmRouting:
    """Members' routing together, with what is to be told of it."""
    warnings = [words for member in members for words in collapsed(arm, member, layers)]
    return ArmRouting(arm=arm, layers=tuple(layers), members=tuple(members), warnings=tuple(warnings))


def _read_of(member: Member) -> Sequence[Encoded]:
    return member.held_out or member.target


def routing_of_member(
    mixture: Mixture, member: Member, *, on_tokens: Callable[[int], None] = lambda tokens: None
) -> MemberRouting | None:
    """Who answers in a mixture on records that its member holds out, or else on its target; None without either.

    Args:
        mixture: with the member's state.
        member: its records.
        on_tokens: told the tokens of each record that is read.
    """
    used = usage(mixture, _read_of(member), on_tokens=on_tokens)
    if used is None:
        return None
    there = mixture.present.cpu().bool()
    shared = int(there[: mixture.config.generalists].sum())
    gates = used.gates[:, :, there]
    mass = gates[:, :, :shared].sum(-1)  # [records, layers]
    return MemberRouting(
        member=member.name,
        records=len(used.tokens),
        target=not member.held_out,
        shared=shared,
        own=int(there.sum()) - shared,
        mass=tuple(_share(column.tolist(), used.tokens) for column in mass.T),
        overall=_share(mass.mean(1).tolist(), used.tokens),
        gates=tuple(tuple(row) for row in used.mean[:, there].tolist()),
    )


def _share(sums: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """A mean weight over tokens, which lies in [0, 1], and its interval over records."""
    found = intervals.ratio(sums, tokens)
    low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (found.low, found.high))
    return found.model_copy(update={"value": min(max(found.value, 0.0), 1.0), "low": low, "high": high})
