"""Influence across organisations: sums and directions travel, records and their scores stay where they are.

Curvature is a sum over records, hence over members. In three legs members send the sizes of what their method sums,
then that in these units, of both of which only the sum is used (`summed_curvature.py`); the coordinator solves for the
target and sends the directions; each member scores its own records and keeps the scores. What its scores come to in sum
leaves a member only where that is asked for. A method without curvature has no more legs than its target needs.
Federated scores are the pooled ones, up to rounding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.influence.clipping import Clipped
from allmend.influence.gradients import OfRecords, mean_gradient, names_of, wide_last
from allmend.influence.methods import Directions, HessianFree, Solved
from allmend.influence.scores import score
from allmend.influence.summed_curvature import SummedBlocks, SummedCurvature, no_sum
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors
from allmend.strategy import Client, Declaration, Facts, Layout, Reply, Seen, State, Sums, Task, Turn, grouped, of_group

SIZES, TARGET, SCORES = "sizes", "target", "scores"
"""Names of legs; that of a curvature's parts is theirs."""

HELD_OUT = "held-out records"
"""Name of the target that members hold out."""

ROUNDING = 1e-3
"""By how much of a bound gradients that were scaled down to it may come out above it."""

Reveal = Literal["none", "client_sums"]


class ScoringClient(Client, Protocol):
    """A member whose records' gradients can be taken, under parameters that are put into `trainable`."""

    trainable: Trainable

    @property
    def records(self) -> Sequence[Encoded]: ...
    @property
    def held_out(self) -> Sequence[Encoded]: ...


@dataclass(frozen=True, kw_only=True)
class FederatedInfluence:
    """A method of influence as a strategy of one round.

    Attributes:
        held_out: whether the target is all members' held-out records; else the coordinator has a file of its own, and
            gives its gradients to `begin`.
        curvature: what the method sums of training records; None for none, whose directions are the target's gradients.
        modules: a regular expression for names of weights; all that learn when None.
        clip: norm that members scale a record's gradient of a module down to, where it enters the curvature; None
            leaves all as they are.
        min_records: members with fewer records send zeros, since a sum over few shows what went into the model for
            them; they score all the same, and nothing is told of their scores.
        reveal: `client_sums` lets the coordinator see what each member's scores come to; `none` nothing of a member.
        tokens_per_pass: that go through the model at once.
        step: by how much rounding may have made a member's sizes smaller.
        on_tokens: told the tokens of each pass, where members are in this process.
    """

    held_out: bool
    curvature: SummedCurvature | None = field(default_factory=SummedBlocks)
    modules: str | None = None
    clip: float | None = None
    min_records: int = 32
    reveal: Reveal = "none"
    tokens_per_pass: int = 512
    step: float = 0.0
    on_tokens: Callable[[int], None] = lambda tokens: None

    name = "influence"
    pooled = False
    shares = True

    @property
    def method(self) -> str:
        """Name of the method."""
        return HessianFree.name if self.curvature is None else self.curvature.method

    @property
    def names(self) -> tuple[str, ...]:
        """Of the legs, in their order."""
        if self.curvature is None:
            return (TARGET, SCORES) if self.held_out else (SCORES,)
        return (SIZES, f"{self.curvature.part}s", SCORES)

    @property
    def legs(self) -> int:
        """How many there are."""
        return len(self.names)

    def declare(self) -> Declaration:
        """What leaves each member, who sees it and why."""
        summed: dict[str, str] = {}
        sent = ["the shared parameters", "the target's gradients"]
        if self.curvature is not None:
            summed = {**self.curvature.words, "records": "number of training records in these sums"}
            sent[1:] = [self.curvature.sent, "the directions that the target comes to"]
            if self.clip is not None:
                summed["clipped"] = f"number of records' gradients that were scaled down to norm {self.clip:g} for them"
        if self.held_out:
            summed |= {"target": "Σ g over the held-out records", "targets": "their number"}
        told = "to say whose data helped: number of records, sum, squares and signs of their scores"
        return Declaration(
            sent=", ".join(sent[:-1]) + ", and " + sent[-1],
            summed=summed,
            seen={"scores": told} if self.reveal == "client_sums" else {},
            kept="the scores of the member's records",
            numbers=frozenset({"records", "clipped", "targets", "scores"}),
        )

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        """Sizes and the target's gradient; the curvature's parts; nothing."""
        found: Layout = {}
        for name in names_of(initial, self.modules):
            r, d = wide_last(name, initial[name]).shape
            if self.curvature is not None and self.names[leg] != SCORES:
                size, part = self.curvature.shapes(r, d)
                found |= {f"size/{name}": size} if leg == 0 else {f"{self.curvature.part}/{name}": part}
            if self.held_out and leg == 0:
                found[f"target/{name}"] = torch.Size([1, r, d])
        return found

    def init(self, initial: Tensors) -> State:
        """The parameters at which influence is asked for; the target is what members hold out."""
        return State(grouped("model", initial), {"names": HELD_OUT})

    def begin(self, initial: Tensors, targets: Directions, names: Sequence[str]) -> State:
        """The same, with the mean gradients of the coordinator's own target records, by module [q, r, d], and the
        names of these q targets."""
        state = State(grouped("model", initial) | grouped("target", dict(targets)), {"names": "\n".join(names)})
        return state if self.curvature else _directed(state, Solved(targets, {}))

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        """The parameters; with what the curvature's parts need; with the directions."""
        tensors, facts, name = grouped("model", of_group("model", state.tensors)), Facts(), self.names[turn.leg]
        if name == SCORES:
            tensors |= grouped("direction", of_group("direction", state.tensors))
            facts = {"names": state.facts["names"]}
        elif turn.leg and self.curvature:
            given, facts = self.curvature.given(state)
            tensors |= given
        return {member: Task(turn, tensors, dict(facts)) for member in members}

    def work(self, task: Task, client: Client) -> Reply:
        """A member's sizes, its part of the curvature, or its scores, which it keeps."""
        member = cast(ScoringClient, client)
        name = self.names[task.turn.leg]
        if name not in (SIZES, TARGET, SCORES):
            return self._part(task, member)
        source = self._source(task, member)
        if name != SCORES:
            return self._first(source, member)
        values, losses = score(source, of_group("direction", task.tensors))
        client.state.tensors = client.state.tensors | {"influence/scores": values, "influence/losses": losses}
        client.state.facts["names"] = task.facts["names"]
        if self.reveal == "none" or len(source) < self.min_records:
            return Reply()
        told: Facts = {"scores/records": len(source)}
        return Reply(seen_facts=told | _moments(values))

    def _source(self, task: Task, member: ScoringClient) -> OfRecords:
        member.trainable.load(of_group("model", task.tensors))
        return OfRecords(member.trainable, member.records, self.modules, self.tokens_per_pass, self.on_tokens)

    def _first(self, source: OfRecords, client: ScoringClient) -> Reply:
        summed: Tensors = {}
        facts: dict[str, float] = {}
        if self.curvature is not None:
            summed, facts = self._sizes(self.curvature, source, client)
        if self.held_out:
            facts["targets"] = float(len(client.held_out))
            if client.held_out:
                held_out = OfRecords(client.trainable, client.held_out, self.modules, self.tokens_per_pass)
                _, means = mean_gradient(held_out)
                summed |= {f"target/{name}": mean.cpu() * len(held_out) for name, mean in means.items()}
        return Reply(summed, facts)

    def _sizes(
        self, curvature: SummedCurvature, source: OfRecords, client: ScoringClient
    ) -> tuple[Tensors, dict[str, float]]:
        summed: Tensors = {}
        facts = {"records": 0.0} | ({} if self.clip is None else {"clipped": 0.0})
        if len(source) >= self.min_records:
            short = source if self.clip is None else Clipped(source, self.clip)
            sizes, kept = curvature.measure(short)
            summed, facts["records"] = grouped("size", sizes), float(len(source))
            if isinstance(short, Clipped):
                facts["clipped"] = float(short.count)
            client.state.tensors = client.state.tensors | grouped(KEPT, kept)
            client.state.facts["influence/records"] = len(source)
        return summed, facts

    def _part(self, task: Task, client: ScoringClient) -> Reply:
        assert self.curvature is not None
        kept = of_group(KEPT, client.state.tensors)
        others = {key: one for key, one in client.state.tensors.items() if not key.startswith(f"{KEPT}/")}
        client.state.tensors = others
        # who is not in the sizes has no part that is in units of them
        if not (records := client.state.facts.pop("influence/records", 0)):
            return Reply({}, {"records": 0.0})
        source = self._source(task, client)
        parts = self.curvature.work(task, kept, source if self.clip is None else Clipped(source, self.clip))
        return Reply(grouped(self.curvature.part, parts), {"records": float(records)})

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        """Sizes of the sum; then the directions that the target comes to; then what members told of their scores.

        Raises:
            UserError: no member has enough records, a value was too large for the sum, or a sum is none of records.
        """
        if sums.cut:
            raise UserError(
                f"{sums.cut} values were too large for the sum", hint="A gradient is infinite, or a member makes it so."
            )
        if self.names[turn.leg] == SCORES:
            told: Facts = {}
            for name, one in seen.items():
                told |= {f"{name}/{key.removeprefix('scores/')}": value for key, value in one.facts.items()}
            return State(state.tensors, state.facts | told)
        if turn.leg == 0:
            if self.curvature is not None:
                state = self._measured(self.curvature, state, sums)
            if self.held_out:
                like = of_group("model", state.tensors)
                targets = {
                    name: mean.to(torch.promote_types(like[name].dtype, torch.float32))
                    for name, mean in self._held_out(state, sums).items()
                }
                facts: Facts = {"targets": int(sums.fact("targets"))}
                state = State(state.tensors | grouped("target", targets), state.facts | facts)
        if (solved := self.solved(state, turn, sums)) is None:
            return state
        if self.curvature is not None:
            state = State(state.tensors, state.facts | {"records": int(sums.fact("records"))})
        return _directed(state, solved)

    def solved(self, state: State, turn: Turn, sums: Sums) -> Solved | None:
        """Directions, from the sums of the leg that they come from; None in others.

        Raises:
            UserError: a sum is none of records.
        """
        if self.curvature is None:
            return Solved(self._held_out(state, sums), {}) if self.names[turn.leg] == TARGET else None
        if turn.leg == 0:
            return None
        self._enough(sums)
        return self.curvature.solved(state, sums)

    def _enough(self, sums: Sums) -> None:
        if not sums.fact("records"):
            raise UserError(
                f"no member has {self.min_records} records or more, so that nothing may be summed",
                hint="Lower influence.min_records: a sum over few records shows what goes into the model for them.",
            )

    def _measured(self, curvature: SummedCurvature, state: State, sums: Sums) -> State:
        self._enough(sums)
        records, error = int(sums.fact("records")), sums.members * self.step
        found = {name: sums[f"size/{name}"] for name in names_of(of_group("model", state.tensors), self.modules)}
        for name, size in found.items():
            if float(size.min()) < 0:
                raise no_sum(f"the summed size of {name} is below 0")
            if self.clip is None:
                continue
            trace, bound = float(size.sum()), records * self.clip**2
            if trace > bound * (1 + ROUNDING) + len(size) * error:
                raise no_sum(
                    f"Σ‖g‖² of {name} is {trace:.4g}, and {records:,} records whose gradients are clipped to "
                    f"{self.clip:g} come to {bound:.4g} at most"
                )
        facts: Facts = {"records": records}
        if self.clip is not None:
            facts |= {"clipped": int(sums.fact("clipped")), "gradients": records * len(found)}
        sizes = curvature.units(found, error)
        return State(state.tensors | grouped("size", sizes), state.facts | facts)

    def _held_out(self, state: State, sums: Sums) -> Tensors:
        """Mean gradients of the held-out records."""
        if not (count := sums.fact("targets")):
            raise UserError("no member holds records out", hint="Name a file of target records.")
        names = names_of(of_group("model", state.tensors), self.modules)
        return {name: sums[f"target/{name}"] / count for name in names}

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        """No model."""
        return None

    def shared(self, state: State) -> Tensors | None:
        """The parameters, as they were."""
        return of_group("model", state.tensors)

    def personal(self, state: State, client: State) -> Tensors | None:
        """None: nobody has a model of its own."""
        return None


KEPT = "influence/kept"
"""Group of what a member keeps of its first leg for the second."""


def _directed(state: State, solved: Solved) -> State:
    """The state with the directions, in the precision of the target."""
    like = of_group("target", state.tensors)
    directions = {name: one.to(like[name].dtype) for name, one in solved.directions.items()}
    return State(state.tensors | grouped("direction", directions), state.facts | {"skipped": "\n".join(solved.skipped)})


def _moments(values: torch.Tensor) -> Facts:
    """By target: sum of a member's scores, of their squares, of their absolute values, and how many are below 0."""
    found: Facts = {}
    for place, column in enumerate(values.unbind(1)):
        parts = {
            "sum": math.fsum(column.tolist()),
            "squares": math.fsum(column.square().tolist()),
            "absolute": math.fsum(column.abs().tolist()),
            "below": float((column < 0).sum()),
        }
        found |= {f"scores/{place}/{part}": value for part, value in parts.items()}
    return found
