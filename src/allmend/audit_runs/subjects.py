"""Which models of a run are audited, and for which clients' records membership is inferred in each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from allmend.audit.memorisation import RecordGroup
from allmend.check import audited_members
from allmend.data.records import Record
from allmend.data.splits import uniform
from allmend.federation.arm import at_member
from allmend.federation.strategies.comigs import CoMiGS
from allmend.prepare import Prepared
from allmend.recipe import Arm, Audit
from allmend.results import BASE


@dataclass(frozen=True)
class Subject:
    """A model that is audited.

    Attributes:
        arm: its name, or `base`.
        member: whose own model of the arm it is; None for one that all share.
    """

    arm: str
    member: str | None = None

    @property
    def name(self) -> str:
        """In the tables."""
        return self.arm if self.member is None else f"{self.arm}/{self.member}"

    @property
    def phase(self) -> str:
        """Of the run; one for all models of an arm."""
        return f"audit {self.arm}"


def subjects_of(prepared: Prepared, models: Sequence[str], settings: Audit) -> list[Subject]:
    """The models of `base` and arms that are audited, with one for each member that is asked for.

    Args:
        prepared: of the run.
        models: `base` and arms.
        settings: which name arms and members.
    """
    recipe = prepared.recipe.model_copy(update={"audit": settings})
    clients = [member.name for member in prepared.members]
    found = []
    for arm in models:
        members = [] if arm == BASE else audited_members(recipe, arm, clients)
        found += [Subject(arm, member) for member in members] or [Subject(arm)]
    return found


def records_of(prepared: Prepared, settings: Audit, subjects: Sequence[Subject]) -> dict[str, list[RecordGroup]]:
    """The groups of records that each model is asked for, by its name; the base model is asked for all of them.

    All models are asked for as many training as held-out records of each client. Those of a member's mixture are asked
    besides for the records that its router alone has learnt from, which are few and may be learnt by heart.
    """
    common = list(_trained_on(prepared, settings))
    validated = {
        one.name: list(_validated(prepared, settings, prepared.recipe.arms()[one.arm], one.member))
        for one in subjects
        if one.member is not None
    }
    every = [*common, *(group for groups in validated.values() for group in groups)]
    return {one.name: every if one.arm == BASE else [*common, *validated.get(one.name, [])] for one in subjects}


def _trained_on(prepared: Prepared, settings: Audit) -> Iterator[RecordGroup]:
    """Each client's training and held-out records."""
    for client, records in prepared.train.items():
        if group := _group(client, records, prepared, settings):
            yield group


def _validated(prepared: Prepared, settings: Audit, arm: Arm, name: str) -> Iterator[RecordGroup]:
    """A client's records that its router alone learnt from, where these are set apart from what it trains on."""
    options, member = arm.strategy.options, next(one for one in prepared.members if one.name == name)
    most = arm.adapter.specialists if member.specialists is None else member.specialists
    if arm.strategy.name != CoMiGS.name or member.target or arm.adapter.generalists + most < 2:
        return
    if not options.get("router_steps", CoMiGS.router_steps) or options.get("router", CoMiGS.router) == "train":
        return
    trained, _ = at_member(member, arm)
    apart = {one.id for one in trained.validation(options.get("validation", CoMiGS.validation))}
    records = [record for record in prepared.train[name] if record.id in apart]
    if group := _group(name, records, prepared, settings, what=f"validation records ({arm.name})"):
        yield group


def _group(
    client: str, records: Sequence[Record], prepared: Prepared, settings: Audit, *, what: str = "records"
) -> RecordGroup | None:
    """As many of a client's records, the first by hash of their id, as of those that it holds out."""
    held_out = prepared.held_out[client]
    n = min(settings.membership_records, len(records), len(held_out))
    trained, others = (sorted(some, key=lambda record: uniform(record.id))[:n] for some in (records, held_out))
    return RecordGroup(client, trained, others, what) if n else None
