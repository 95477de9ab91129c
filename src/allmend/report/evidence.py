"""What a run left behind, sorted for the page. Everything may be missing: a run can stop anywhere."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from allmend.errors import UserError
from allmend.events import (
    ArmStarted,
    Event,
    Offered,
    PhaseDone,
    RoundDone,
    RunFinished,
    RunStarted,
    StepDone,
    Stopped,
    Warned,
    WorkDone,
    read_events,
)
from allmend.probes import Probe, read_probes
from allmend.results import (
    BASE,
    POOLED,
    AuditTable,
    CollaboratorsTable,
    DepthTable,
    Difference,
    InfluenceByMember,
    PersonalisedTable,
    PrivacyTable,
    RoutingTable,
    Utility,
    UtilityTable,
    member_of,
)
from allmend.run import RunFolder


class Audited(Protocol):
    """A row of the audit."""

    @property
    def model(self) -> str: ...


@dataclass(frozen=True)
class Evidence:
    """A run as its files tell it.

    Attributes:
        run: the folder.
        begun: when the first process started (seconds since the epoch).
        latest: when the last event was written.
        start: what the last process announced; None before any.
        sessions: how many processes worked on the run.
        end: how it ended; None while it runs or after a kill.
        arms: by name, in order.
        steps: by arm, then client.
        rounds: by arm.
        phases: seconds by phase that is not training.
        progress: share done by phase, for a run without end.
        warnings: each once.
        offered: members that the run was offered to, where they are on other machines.
        running: whether a process of this machine works on the run.
        audit: what models that all members share memorised; None when the file is not there.
        members_audit: what members' own models memorised; None where none was audited.
        utility, privacy, influence, depth, collaborators, personalised, routing, recipe: None when the
            file is not there.
        probes: of the audit, none when their file is not there.
    """

    run: Path
    begun: float | None = None
    latest: float | None = None
    start: RunStarted | None = None
    sessions: int = 0
    end: Stopped | RunFinished | None = None
    arms: dict[str, ArmStarted] = field(default_factory=dict)
    steps: dict[str, dict[str, list[StepDone]]] = field(default_factory=dict)
    rounds: dict[str, list[RoundDone]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    progress: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    running: bool = False
    utility: UtilityTable | None = None
    audit: AuditTable | None = None
    members_audit: AuditTable | None = None
    privacy: PrivacyTable | None = None
    influence: InfluenceByMember | None = None
    depth: DepthTable | None = None
    collaborators: CollaboratorsTable | None = None
    personalised: PersonalisedTable | None = None
    routing: RoutingTable | None = None
    probes: tuple[Probe, ...] = ()
    recipe: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether there is more than the audit of a model that was made elsewhere."""
        return self.audit is None or any((self.start, self.recipe, self.utility, self.privacy))

    @cached_property
    def clients(self) -> list[str]:
        """Members in their order: as announced, then any other that left a trace."""
        known = dict.fromkeys(self.start.clients if self.start else ())
        for by_client in self.steps.values():
            known |= dict.fromkeys(by_client)
        for row in self.utility.rows if self.utility else ():
            known |= dict.fromkeys(name for name in (row.held_out, row.member) if name and name != POOLED)
        return list(known)

    @cached_property
    def models(self) -> list[str]:
        """The base model and the arms, in the order of the results, then of the log."""
        rows = self.utility.rows if self.utility else ()
        layers = self.privacy.layers if self.privacy else ()
        own = (member_of(test.model)[0] for test in (self.members_audit.ranks if self.members_audit else ()))
        return list(dict.fromkeys([BASE, *(row.model for row in rows), *self.audited, *own, *self.arms, *layers]))

    @cached_property
    def audited(self) -> list[str]:
        """Tuned models that the audit says anything about: those that all members share first."""
        audit = self.audit
        if audit is None:
            return []
        by_copies = (audit.gaps, audit.extraction, audit.discoverable, audit.exposure)
        tables: tuple[Iterable[Audited], ...] = (*by_copies, audit.membership, audit.epsilon, audit.views, audit.learnt)
        known = dict.fromkeys(row.model for table in tables for row in table if row.model != BASE)
        return sorted(known, key=lambda model: model not in self.shared)

    @cached_property
    def shared(self) -> list[str]:
        """Tuned models that all members have in common, in order."""
        rows = self.utility.rows if self.utility else ()
        return list(dict.fromkeys(row.model for row in rows if row.model != BASE and row.member is None))

    @cached_property
    def personal(self) -> list[str]:
        """Arms in which each member has its own model, in order."""
        rows = self.utility.rows if self.utility else ()
        return list(dict.fromkeys(row.model for row in rows if row.member is not None))

    @cached_property
    def _rows(self) -> dict[tuple[str, str], dict[str | None, Utility]]:
        """Rows of utility by model and held-out set, then member."""
        index: dict[tuple[str, str], dict[str | None, Utility]] = {}
        for row in self.utility.rows if self.utility else ():
            index.setdefault((row.model, row.held_out), {})[row.member] = row
        return index

    def row(self, model: str, held_out: str, member: str | None = None) -> Utility | None:
        """What is known of one model on one held-out set."""
        return self._rows.get((model, held_out), {}).get(member)

    def members_rows(self, model: str, held_out: str) -> list[Utility]:
        """All personal models of an arm on one held-out set."""
        return [row for member, row in self._rows.get((model, held_out), {}).items() if member is not None]

    def difference(self, model: str, other: str, held_out: str = POOLED) -> Difference | None:
        """The paired difference between two models on one held-out set."""
        known = self.utility.differences if self.utility else ()
        same = (d for d in known if (d.model, d.other, d.held_out) == (model, other, held_out))
        return next(same, None)


def read_evidence(run: Path) -> Evidence:
    """Read what there is of a run.

    Raises:
        UserError: the folder is not there or holds nothing of a run, or a file in it cannot be read as what it is.
    """
    log, recipe = run / "events.jsonl", run / "recipe.toml"
    results = [run / "results" / f"{name}.json" for name in ("utility", "audit", "privacy", "influence")]
    if not any(path.is_file() for path in (log, recipe, *results)):
        raise UserError(
            "no run is here" if run.is_dir() else "there is no such folder",
            where=run,
            hint="Give the folder of a run, or start one with `allmend tune RECIPE.toml`.",
        )
    try:
        events = list(read_events(log))
    except ValueError as error:
        raise UserError(str(error), hint="The log was changed or comes from another version of allmend.") from error
    folder = RunFolder(run)
    audit = folder.read_table("audit", AuditTable)
    return _sorted(
        events,
        Evidence(
            run=run,
            utility=folder.read_table("utility", UtilityTable),
            audit=audit and audit.of(None),
            members_audit=audit if audit and audit.ranks else None,
            privacy=folder.read_table("privacy", PrivacyTable),
            influence=folder.read_table("influence", InfluenceByMember),
            depth=folder.read_table("depth", DepthTable),
            collaborators=folder.read_table("collaborators", CollaboratorsTable),
            personalised=folder.read_table("personalised", PersonalisedTable),
            routing=folder.read_table("routing", RoutingTable),
            probes=read_probes(probes) if (probes := run / "results" / "audit.parquet").is_file() else (),
            recipe=recipe.read_text(errors="replace") if recipe.is_file() else None,
            running=folder.worked_on,
        ),
    )


def _sorted(events: list[Event], files: Evidence) -> Evidence:
    """The files' evidence together with that of the log."""
    steps: dict[str, dict[str, list[StepDone]]] = defaultdict(lambda: defaultdict(list))
    rounds: dict[str, list[RoundDone]] = defaultdict(list)
    arms: dict[str, ArmStarted] = {}
    phases: dict[str, float] = {}
    progress: dict[str, float] = {}
    starts = [event for event in events if isinstance(event, RunStarted)]
    times = [event.time for event in events if event.time > 0]
    end: Stopped | RunFinished | None = None
    for event in events:
        match event:
            case RunStarted():
                end = None
                progress = dict.fromkeys(event.work, 0.0) | progress
            case ArmStarted():
                arms[event.arm] = event
            case StepDone():
                steps[event.arm][event.client].append(event)
            case RoundDone():
                rounds[event.arm].append(event)
            case PhaseDone():
                phases[event.phase] = event.seconds
                progress[event.phase] = 1.0
            case WorkDone():
                progress[event.phase] = event.share
            case Stopped() | RunFinished():
                end = event
            case Warned():
                pass
    return Evidence(
        run=files.run,
        begun=min(times, default=None),
        latest=max(times, default=None),
        start=starts[-1] if starts else None,
        sessions=len(starts),
        end=end,
        arms=arms,
        steps={arm: dict(by_client) for arm, by_client in steps.items()},
        rounds=dict(rounds),
        phases=phases,
        progress=progress,
        warnings=tuple(dict.fromkeys(event.message for event in events if isinstance(event, Warned))),
        offered=tuple(dict.fromkeys(name for e in events if isinstance(e, Offered) for name in e.members)),
        running=files.running and end is None,
        utility=files.utility,
        audit=files.audit,
        members_audit=files.members_audit,
        privacy=files.privacy,
        influence=files.influence,
        depth=files.depth,
        collaborators=files.collaborators,
        personalised=files.personalised,
        routing=files.routing,
        probes=files.probes,
        recipe=files.recipe,
    )
