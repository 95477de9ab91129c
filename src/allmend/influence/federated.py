"""Influence across organisations: blocks and directions travel, records and their scores stay where they are.

Curvature is a sum over records, hence over members. Two legs: members send their Fisher blocks, of which only the sum
is used; the coordinator solves for the target and sends the directions; each member scores its own records and keeps
the scores. What a member's records come to in sum leaves it only if it is asked to say so. Federated scores are the
pooled ones, up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from allmend.errors import UserError
from allmend.influence.blocks import FisherBlocks, fisher_blocks
from allmend.influence.gradients import Source
from allmend.influence.methods import DAMPING, Directions, Solved, solve
from allmend.influence.scores import score
from allmend.models.tensors import Tensors
from allmend.strategy import Client, Declaration, Layout, Reply, Seen, State, Sums, Task, Turn, grouped, of_group

BLOCKS, SCORES = 0, 1
"""The legs."""

MOST_NEGATIVE = 1e-6
"""Of a summed block's trace: an eigenvalue further below 0 is no rounding, and some member's block was none."""

Reveal = Literal["none", "client_sums"]


class ScoringClient(Client, Protocol):
    """A member that can go through the gradients of its own records."""

    def gradients(self, start: Tensors) -> Source:
        """Of its training records, under the shared parameters."""
        ...


@dataclass(frozen=True, kw_only=True)
class FederatedInfluence:
    """`gfim` on the wide side, as a strategy of one round with two legs.

    Attributes:
        targets: mean gradients of the coordinator's target records, by module [q, r, d].
        damping: c of λ = c tr M / d.
        min_records: members with fewer records send zeros, since a block of few shows their inputs; they score all
            the same.
        reveal: `client_sums` lets the coordinator see each member's number of records, sum and sum of squares of its
            scores; `none` nothing of a member.
    """

    targets: Directions
    damping: float = DAMPING
    min_records: int = 32
    reveal: Reveal = "none"

    name = "influence"
    legs = 2
    pooled = False
    shares = True

    def declare(self) -> Declaration:
        """What leaves each member, who sees it and why."""
        sums = "to say whose data helped: number of records, sum and sum of squares of their scores"
        return Declaration(
            sent="the shared parameters, and the directions that the target comes to",
            summed={
                "block": "Σ gᵀg of each factor of the adapter over the training records",
                "rows": "what the blocks are divided by",
                "records": "number of training records in the blocks",
            },
            seen={"sums": sums} if self.reveal == "client_sums" else {},
            kept="the scores of the member's records",
            numbers=frozenset({"records"}),
        )

    def layout(self, initial: Tensors) -> Layout:
        """Upper triangles of the blocks, one after the other, and their counts."""
        found: Layout = {}
        for name, target in self.targets.items():
            d = target.shape[-1]
            found[f"block/{name}"] = torch.Size([d * (d + 1) // 2])
            found[f"rows/{name}"] = torch.Size([1])
        return found

    def init(self, initial: Tensors) -> State:
        """The parameters at which influence is asked for."""
        return State(grouped("model", initial))

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        """The parameters; in the second leg the directions, too."""
        tensors = grouped("model", of_group("model", state.tensors))
        if turn.leg == SCORES:
            tensors |= grouped("direction", of_group("direction", state.tensors))
        return dict.fromkeys(members, Task(turn, tensors))

    def work(self, task: Task, client: Client) -> Reply:
        """A member's blocks, or its scores, which it keeps."""
        source = client.gradients(of_group("model", task.tensors))  # type: ignore[attr-defined]  # a ScoringClient
        if task.turn.leg == BLOCKS:
            return self._blocks(source)
        values, losses = score(source, of_group("direction", task.tensors))
        client.state.tensors = client.state.tensors | {"influence/scores": values, "influence/losses": losses}
        if self.reveal == "none":
            return Reply(summed_facts={"records": float(len(source))})
        sums = torch.stack([values.sum(0), values.square().sum(0), torch.full((values.shape[1],), float(len(source)))])
        return Reply(summed_facts={"records": float(len(source))}, seen={"sums/scores": sums})

    def _blocks(self, source: Source) -> Reply:
        if len(source) < self.min_records:
            return Reply(summed_facts={"records": 0.0})
        blocks = fisher_blocks(source)
        summed: Tensors = {}
        for name in self.targets:
            block = blocks.sums[name]
            upper = torch.triu_indices(*block.shape)
            summed[f"block/{name}"] = block[upper[0], upper[1]].cpu()
            summed[f"rows/{name}"] = torch.tensor([float(blocks.count[name])])
        return Reply(summed, {"records": float(blocks.records)})

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        """Solve for the target's directions; after the second leg, what members told of their scores.

        Raises:
            UserError: no member has enough records, or a summed block is none.
        """
        if turn.leg == SCORES:
            told = {f"sums/{name}": one.tensors["sums/scores"] for name, one in seen.items() if one.tensors}
            return State(state.tensors | told, state.facts)
        solved = self.solved(sums)
        return State(
            state.tensors | grouped("direction", dict(solved.directions)),
            state.facts | {"records": sums.fact("records"), "skipped": len(solved.skipped)},
        )

    def solved(self, sums: Sums) -> Solved:
        """Directions from summed blocks.

        Raises:
            UserError: no member has enough records, or a summed block is none.
        """
        if not sums.fact("records"):
            raise UserError(
                f"no member has {self.min_records} records or more, so that no block may be summed",
                hint="Lower influence.min_records: a block of few records shows what goes into the model for them.",
            )
        blocks: dict[str, torch.Tensor] = {}
        count: dict[str, int] = {}
        for name, target in self.targets.items():
            d = target.shape[-1]
            upper = torch.triu_indices(d, d)
            block = torch.zeros(d, d, dtype=torch.float64)
            block[upper[0], upper[1]] = sums[f"block/{name}"]
            block = block + block.triu(1).mT
            trace = float(block.trace())
            if float(torch.linalg.eigvalsh(block)[0]) < -MOST_NEGATIVE * abs(trace) or trace < 0:
                raise UserError(
                    f"the summed block of {name} has a negative eigenvalue: what some member sent is no sum of squares",
                    hint="Find out which; under secure aggregation only leaving members out can tell.",
                )
            blocks[name], count[name] = block, int(sums[f"rows/{name}"])
        whole = FisherBlocks(blocks, count, int(sums.fact("records")))
        wide = {name: target.double() for name, target in self.targets.items()}
        return solve(whole, wide, damping=self.damping)

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        """No model."""
        return None

    def shared(self, state: State) -> Tensors | None:
        """The parameters, as they were."""
        return of_group("model", state.tensors)

    def personal(self, state: State, client: State) -> Tensors | None:
        """None: nobody has a model of its own."""
        return None


def play(strategy: FederatedInfluence, clients: Mapping[str, Client], initial: Tensors) -> State:
    """Both legs with clients in this process.

    Raises:
        UserError: as of `FederatedInfluence.combine`.
    """
    state = strategy.init(initial)
    check: Callable[[Reply], list[str]] = strategy.declare().undeclared
    for leg in (BLOCKS, SCORES):
        turn, sums, seen = Turn(1, leg, 1, len(clients)), Sums(), dict[str, Seen]()
        tasks = strategy.plan(state, turn, sorted(clients))
        for name in sorted(tasks):
            reply = strategy.work(tasks[name], clients[name])
            if undeclared := check(reply):
                raise TypeError(f"influence returns what it did not declare: {undeclared}")
            sums.add(reply)
            seen[name] = Seen(reply.seen, reply.seen_facts)
        state = strategy.combine(state, turn, sums, seen)
    return state
