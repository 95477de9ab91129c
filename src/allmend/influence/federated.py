"""Influence across organisations: blocks and directions travel, records and their scores stay where they are.

Curvature is a sum over records, hence over members. In three legs members send the sizes of their Fisher blocks, then
the blocks in these units, of both of which only the sum is used; the coordinator solves for the target and sends the
directions; each member scores its own records and keeps the scores. What its scores come to in sum leaves a member
only where that is asked for. Federated scores are the pooled ones, up to rounding.

By Cauchy and Schwarz no entry ij of a member's block, nor of the sum of all, is larger than √(D_i D_j), with D the
diagonal of the sum. In units of that, each is a number in [−1, 1], and a fixed point serves small blocks as well as
large ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.influence.blocks import FisherBlocks, fisher_blocks
from allmend.influence.gradients import OfRecords, mean_gradient, names_of, wide_last
from allmend.influence.inverses import Inverse, cholesky
from allmend.influence.methods import DAMPING, Directions, Solved, solve
from allmend.influence.scores import score
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors
from allmend.strategy import Client, Declaration, Facts, Layout, Reply, Seen, State, Sums, Task, Turn, grouped, of_group

SIZES, BLOCKS, SCORES = range(3)
"""The legs."""

HELD_OUT = "held-out records"
"""Name of the target that members hold out."""

MOST_NEGATIVE = 1e-6
"""Of a summed block's trace: an eigenvalue further below 0 is no rounding, and some member's block was none."""

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
    """`gfim` on the wide side, as a strategy of one round with three legs.

    Attributes:
        held_out: whether the target is all members' held-out records; else the coordinator has a file of its own, and
            gives its gradients to `begin`.
        modules: a regular expression for names of weights; all that learn when None.
        damping: c of λ = c tr M / d.
        inverse: how M + λI is inverted.
        min_records: members with fewer records send zeros, since a block of few shows what went into the model for
            them; they score all the same, and nothing is told of their scores.
        reveal: `client_sums` lets the coordinator see what each member's scores come to; `none` nothing of a member.
        tokens_per_pass: that go through the model at once.
        step: by how much rounding may have made a member's sizes smaller.
        on_tokens: told the tokens of each pass, where members are in this process.
    """

    held_out: bool
    modules: str | None = None
    damping: float = DAMPING
    inverse: Inverse = cholesky
    min_records: int = 32
    reveal: Reveal = "none"
    tokens_per_pass: int = 512
    step: float = 0.0
    on_tokens: Callable[[int], None] = lambda tokens: None

    name = "influence"
    legs = 3
    pooled = False
    shares = True

    def declare(self) -> Declaration:
        """What leaves each member, who sees it and why."""
        summed = {
            "size": "the squared size of each input and output of the adapter's factors in the gradients",
            "block": "Σ gᵀg of each factor over the training records, in these sizes",
            "records": "number of training records in the blocks",
        }
        if self.held_out:
            summed |= {"target": "Σ g over the held-out records", "targets": "their number"}
        told = "to say whose data helped: number of records, sum, squares and signs of their scores"
        return Declaration(
            sent="the shared parameters, the summed sizes, and the directions that the target comes to",
            summed=summed,
            seen={"scores": told} if self.reveal == "client_sums" else {},
            kept="the scores of the member's records",
            numbers=frozenset({"records", "targets", "scores"}),
        )

    def layout(self, initial: Tensors) -> Layout:
        """Of all legs."""
        return {name: shape for leg in range(self.legs) for name, shape in self.layout_of(leg, initial).items()}

    def layout_of(self, leg: int, initial: Tensors) -> Layout:
        """Of one: diagonals and the target's gradient; upper triangles of blocks; nothing."""
        found: Layout = {}
        for name in names_of(initial, self.modules):
            r, d = wide_last(name, initial[name]).shape
            if leg == SIZES:
                found[f"size/{name}"] = torch.Size([d])
                if self.held_out:
                    found[f"target/{name}"] = torch.Size([1, r, d])
            elif leg == BLOCKS:
                found[f"block/{name}"] = torch.Size([d * (d + 1) // 2])
        return found

    def init(self, initial: Tensors) -> State:
        """The parameters at which influence is asked for; the target is what members hold out."""
        return State(grouped("model", initial), {"names": HELD_OUT})

    def begin(self, initial: Tensors, targets: Directions, names: Sequence[str]) -> State:
        """The same, with the mean gradients of the coordinator's own target records, by module [q, r, d], and the
        names of these q targets."""
        return State(grouped("model", initial) | grouped("target", dict(targets)), {"names": "\n".join(names)})

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        """The parameters; then the sizes; then the directions."""
        group = {BLOCKS: "size", SCORES: "direction"}.get(turn.leg)
        tensors = grouped("model", of_group("model", state.tensors))
        if group is not None:
            tensors |= grouped(group, of_group(group, state.tensors))
        facts = {"names": state.facts["names"]} if turn.leg == SCORES else {}
        return dict.fromkeys(members, Task(turn, tensors, dict(facts)))

    def work(self, task: Task, client: Client) -> Reply:
        """A member's sizes, its blocks, or its scores, which it keeps."""
        member = cast(ScoringClient, client)
        if task.turn.leg == BLOCKS:
            return self._blocks(of_group("size", task.tensors), client)
        member.trainable.load(of_group("model", task.tensors))
        source = OfRecords(member.trainable, member.records, self.modules, self.tokens_per_pass, self.on_tokens)
        if task.turn.leg == SIZES:
            return self._sizes(source, member)
        values, losses = score(source, of_group("direction", task.tensors))
        client.state.tensors = client.state.tensors | {"influence/scores": values, "influence/losses": losses}
        client.state.facts["names"] = task.facts["names"]
        if self.reveal == "none" or len(source) < self.min_records:
            return Reply()
        told: Facts = {"scores/records": len(source)}
        return Reply(seen_facts=told | _moments(values))

    def _sizes(self, source: OfRecords, client: ScoringClient) -> Reply:
        summed: Tensors = {}
        facts = {"records": 0.0}
        if len(source) >= self.min_records:
            blocks = fisher_blocks(source)
            facts["records"] = float(blocks.records)
            summed = {f"size/{name}": torch.diagonal(block).clone().cpu() for name, block in blocks.sums.items()}
            kept = {name: block.cpu() for name, block in blocks.sums.items()}
            client.state.tensors = client.state.tensors | grouped("influence/block", kept)
        if self.held_out:
            facts["targets"] = float(len(client.held_out))
            if client.held_out:
                held_out = OfRecords(client.trainable, client.held_out, self.modules, self.tokens_per_pass)
                _, means = mean_gradient(held_out)
                summed |= {f"target/{name}": mean.cpu() * len(held_out) for name, mean in means.items()}
        return Reply(summed, facts)

    def _blocks(self, sizes: Tensors, client: Client) -> Reply:
        blocks = of_group("influence/block", client.state.tensors)
        summed = {}
        for name, block in blocks.items():
            units = sizes[name].double().rsqrt()
            units[~units.isfinite()] = 0.0
            scaled = block.double() * units[:, None] * units
            upper = torch.triu_indices(*block.shape)
            summed[f"block/{name}"] = scaled[upper[0], upper[1]]
        others = {key: one for key, one in client.state.tensors.items() if not key.startswith("influence/block/")}
        client.state.tensors = others
        return Reply(summed, {"records": float(client.examples if blocks else 0)})

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        """Sizes of the sum; then the directions that the target comes to; then what members told of their scores.

        Raises:
            UserError: no member has enough records, a value was too large for the sum, or a summed block is none.
        """
        if sums.cut:
            raise UserError(
                f"{sums.cut} values were too large for the sum", hint="A gradient is infinite, or a member makes it so."
            )
        if turn.leg == SIZES:
            return self._measured(state, sums)
        if turn.leg == SCORES:
            told: Facts = {}
            for name, one in seen.items():
                told |= {f"{name}/{key.removeprefix('scores/')}": value for key, value in one.facts.items()}
            return State(state.tensors, state.facts | told)
        solved = self.solved(state, sums)
        like = of_group("target", state.tensors)
        directions = {name: one.to(like[name].dtype) for name, one in solved.directions.items()}
        return State(
            state.tensors | grouped("direction", directions),
            state.facts | {"skipped": "\n".join(solved.skipped), "records": int(sums.fact("records"))},
        )

    def _measured(self, state: State, sums: Sums) -> State:
        if not sums.fact("records"):
            raise UserError(
                f"no member has {self.min_records} records or more, so that no block may be summed",
                hint="Lower influence.min_records: a block of few records shows what goes into the model for them.",
            )
        sizes: Tensors = {}
        for name in names_of(of_group("model", state.tensors), self.modules):
            found = sums[f"size/{name}"]
            sizes[name] = found + sums.members * self.step if bool(found.any()) else found
        targets: Tensors = {}
        if self.held_out:
            if not (count := sums.fact("targets")):
                raise UserError("no member holds records out", hint="Name a file of target records.")
            like = of_group("model", state.tensors)
            targets = {
                name: (sums[f"target/{name}"] / count).to(torch.promote_types(like[name].dtype, torch.float32))
                for name in sizes
            }
        facts = {"targets": int(sums.fact("targets"))} if self.held_out else {}
        return State(state.tensors | grouped("size", sizes) | grouped("target", targets), state.facts | facts)

    def solved(self, state: State, sums: Sums) -> Solved:
        """Directions from summed blocks.

        Raises:
            UserError: a summed block is none.
        """
        targets, sizes = (of_group(group, state.tensors) for group in ("target", "size"))
        blocks = self.blocks(sizes, {name: targets[name].shape[1] for name in sizes}, sums)
        wide = {name: target.double() for name, target in targets.items()}
        return solve(blocks, wide, damping=self.damping, inverse=self.inverse)

    def blocks(self, sizes: Tensors, ranks: Mapping[str, int], sums: Sums) -> FisherBlocks:
        """Σ gᵀg of all members, from the sums of the second leg.

        Args:
            sizes: their diagonals, by module [d].
            ranks: r by module.
            sums: of the second leg.

        Raises:
            UserError: a summed block has a larger diagonal than was announced, or a negative eigenvalue.
        """
        found: Tensors = {}
        records = int(sums.fact("records"))
        for name, size in sizes.items():
            d = len(size)
            upper = torch.triu_indices(d, d)
            scaled = torch.zeros(d, d, dtype=torch.float64)
            if f"block/{name}" in sums:
                scaled[upper[0], upper[1]] = sums[f"block/{name}"]
            scaled = scaled + scaled.triu(1).mT
            if float(torch.diagonal(scaled).max()) > 1 + 1e-6:
                raise _no_block(name, "is larger than its members have announced")
            block = scaled * size.sqrt()[:, None] * size.sqrt()
            if bool(block.any()) and not _is_sum_of_squares(block):
                raise _no_block(name, "has a negative eigenvalue")
            found[name] = block
        return FisherBlocks(found, {name: records * ranks[name] for name in found}, records)

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        """No model."""
        return None

    def shared(self, state: State) -> Tensors | None:
        """The parameters, as they were."""
        return of_group("model", state.tensors)

    def personal(self, state: State, client: State) -> Tensors | None:
        """None: nobody has a model of its own."""
        return None


def _is_sum_of_squares(block: torch.Tensor) -> bool:
    """Whether no eigenvalue is below −1e-6 of the trace: Cholesky's factors say so in a tenth of the time."""
    trace = float(block.trace())
    if not trace > 0:
        return False
    shifted = block + MOST_NEGATIVE * trace * torch.eye(len(block), dtype=block.dtype)
    return not bool(torch.linalg.cholesky_ex(shifted).info)


def _no_block(name: str, how: str) -> UserError:
    return UserError(
        f"the summed block of {name} {how}: what some member sent is no sum of squares",
        hint="Find out which; under secure aggregation only leaving members out can tell.",
    )


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
