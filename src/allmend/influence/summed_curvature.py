"""Curvature as sums over members: what a method needs of their records, in numbers that a fixed point can carry.

A method sums in two legs: sizes, which are of any magnitude, and then parts, which come in units of these sizes, so
that every member's part and the total of all lie in [−1, 1]. Directions are made of the totals alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from allmend.errors import UserError
from allmend.influence.blocks import FisherBlocks, fisher_blocks
from allmend.influence.gradients import Source
from allmend.influence.inverses import Inverse, cholesky
from allmend.influence.methods import DAMPING, Solved, corrections, solve
from allmend.models.tensors import Tensors
from allmend.strategy import Facts, State, Sums, Task, grouped, of_group

MOST_NEGATIVE = 1e-6
"""Of a summed block's trace, or of a summed correction's unit: further below 0 is no rounding."""


class SummedCurvature(Protocol):
    """A method's two legs. The coordinator's state has `target` [q, r, d] and `size` by module, and the fact
    `records`, the number of records that sizes are of."""

    @property
    def method(self) -> str:
        """The method's name."""
        ...

    @property
    def part(self) -> str:
        """Name of the tensors of the second leg, which is called by their plural."""
        ...

    @property
    def double(self) -> frozenset[str]:
        """Which of `size` and the part travel in double precision where they are not masked."""
        ...

    @property
    def words(self) -> Mapping[str, str]:
        """What `size` and the part are, for whoever is asked to send them."""
        ...

    @property
    def sent(self) -> str:
        """What the coordinator sends before the second leg, in words."""
        ...

    def shapes(self, r: int, d: int) -> tuple[torch.Size, torch.Size]:
        """Of a module's size and of its part."""
        ...

    def measure(self, source: Source) -> tuple[Tensors, Tensors]:
        """At a member, in the first leg: sizes by module, which sum to Σ‖g‖², and what it keeps for the second."""
        ...

    def units(self, sizes: Tensors, error: float) -> Tensors:
        """Sizes that no sum exceeds, of ones that rounding may have made smaller by `error`."""
        ...

    def given(self, state: State) -> tuple[Tensors, Facts]:
        """What members are sent for the second leg, beside the parameters."""
        ...

    def work(self, task: Task, kept: Tensors, source: Source) -> Tensors:
        """At a member, in the second leg: its part by module."""
        ...

    def solved(self, state: State, sums: Sums) -> Solved:
        """Directions, from the sums of the second leg.

        Raises:
            UserError: a total is none that records can come to; the module is named.
        """
        ...


@dataclass(frozen=True)
class SummedBlocks:
    """`gfim` on the wide side: Σ gᵀg, in units of its diagonal.

    By Cauchy and Schwarz no entry ij of a member's block, nor of the sum of all, is larger than √(D_i D_j), with D the
    diagonal of the sum. In units of that, each is a number in [−1, 1], and a fixed point serves small blocks as well as
    large ones.

    Attributes:
        damping: c of λ = c tr M / d.
        inverse: how M + λI is inverted.
    """

    damping: float = DAMPING
    inverse: Inverse = cholesky

    method = "gfim"
    part = "block"
    double = frozenset({"block"})
    sent = "the summed sizes"

    @property
    def words(self) -> Mapping[str, str]:
        """Of both legs."""
        return {
            "size": "the squared size of each input and output of the adapter's factors in the gradients",
            "block": "Σ gᵀg of each factor over the training records, in these sizes",
        }

    def shapes(self, r: int, d: int) -> tuple[torch.Size, torch.Size]:
        """A diagonal, and an upper triangle."""
        return torch.Size([d]), torch.Size([d * (d + 1) // 2])

    def measure(self, source: Source) -> tuple[Tensors, Tensors]:
        """Diagonals, and the blocks."""
        blocks = {name: block.cpu() for name, block in fisher_blocks(source).sums.items()}
        return {name: torch.diagonal(block).clone() for name, block in blocks.items()}, blocks

    def units(self, sizes: Tensors, error: float) -> Tensors:
        """Larger by the error, where there are gradients at all."""
        return {name: size + error if bool(size.any()) else size for name, size in sizes.items()}

    def given(self, state: State) -> tuple[Tensors, Facts]:
        """The sizes."""
        return grouped("size", of_group("size", state.tensors)), {}

    def work(self, task: Task, kept: Tensors, source: Source) -> Tensors:
        """Upper triangles of the kept blocks, in units of the sizes."""
        sizes, found = of_group("size", task.tensors), {}
        for name, block in kept.items():
            units = sizes[name].double().rsqrt()
            units[~units.isfinite()] = 0.0
            scaled = block.double() * units[:, None] * units
            upper = torch.triu_indices(*block.shape)
            found[name] = scaled[upper[0], upper[1]]
        return found

    def solved(self, state: State, sums: Sums) -> Solved:
        """V = v (M + λI)⁻¹."""
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
                raise no_sum(f"the summed block of {name} is larger than its members have announced")
            block = scaled * size.sqrt()[:, None] * size.sqrt()
            if bool(block.any()) and not is_sum_of_squares(block):
                raise no_sum(f"the summed block of {name} has a negative eigenvalue")
            found[name] = block
        return FisherBlocks(found, {name: records * ranks[name] for name in found}, records)


@dataclass(frozen=True)
class SummedCorrections:
    """`datainf`: S = Σ g ⟨g, v⟩ / (λ + ‖g‖²) for each target's gradient v, in units of n ‖v‖, and V = (v − S / n) / λ.

    A record's summand has no entry beyond ±‖v‖, so a member's sum and the total lie in [−1, 1] in these units.

    Attributes:
        damping: c of λ = c tr F / (rd), where n tr F = Σ‖g‖² is the size.
        targets: q.
    """

    damping: float = DAMPING
    targets: int = 1

    method = "datainf"
    part = "correction"
    double = frozenset({"size", "correction"})
    sent = "the target's gradients v and their damping λ"

    @property
    def words(self) -> Mapping[str, str]:
        """With the number of targets: each is a sum of its own."""
        each = "" if self.targets == 1 else f", for each of {self.targets} targets"
        return {
            "size": "Σ‖g‖² of each of the adapter's factors over the training records",
            "correction": f"Σ g⟨g, v⟩/(λ + ‖g‖²) of each factor over the training records{each}",
        }

    def shapes(self, r: int, d: int) -> tuple[torch.Size, torch.Size]:
        """A number, and a gradient for each target."""
        return torch.Size([1]), torch.Size([self.targets, r, d])

    def measure(self, source: Source) -> tuple[Tensors, Tensors]:
        """Σ‖g‖²; nothing is kept."""
        found: Tensors = {}
        for batch in source:
            for name, g in batch.gradients.items():
                found[name] = found.get(name, 0.0) + g.double().square().sum().cpu().view(1)
        return found, {}

    def units(self, sizes: Tensors, error: float) -> Tensors:
        """As they are: bounds do not depend on them."""
        return dict(sizes)

    def given(self, state: State) -> tuple[Tensors, Facts]:
        """Targets, λ, and how many records share the unit."""
        targets = of_group("target", state.tensors)
        lambdas = {name: torch.tensor([one], dtype=torch.float64) for name, one in self.lambdas(state).items()}
        return grouped("target", targets) | grouped("damping", lambdas), {"records": state.facts["records"]}

    def lambdas(self, state: State) -> dict[str, float]:
        """λ by module; 0 where there is no gradient."""
        sizes, n = of_group("size", state.tensors), int(state.facts["records"])
        return {
            name: self.damping * float(sizes[name]) / v[0].numel() / n
            for name, v in of_group("target", state.tensors).items()
        }

    def work(self, task: Task, kept: Tensors, source: Source) -> Tensors:
        """The member's corrections, in another pass over its records."""
        targets = of_group("target", task.tensors)
        lambdas = {name: float(one) for name, one in of_group("damping", task.tensors).items()}
        units = {name: _unit(v, int(task.facts["records"])) for name, v in targets.items()}
        return {
            # nothing is larger but for rounding
            name: torch.nan_to_num(total.cpu().double() / units[name]).clamp(-1, 1)
            for name, total in corrections(source, targets, lambdas).items()
        }

    def solved(self, state: State, sums: Sums) -> Solved:
        """V = (v − S / n) / λ."""
        lambdas, found = self.lambdas(state), {}
        targets = of_group("target", state.tensors)
        for name, v in targets.items():
            if not lambdas[name]:
                continue
            unit, wide = _unit(v, int(state.facts["records"])), v.double()
            total = sums[f"correction/{name}"] if f"correction/{name}" in sums else torch.zeros_like(wide)
            # S = P v with 0 ⪯ P ⪯ n I, so that ‖S‖² ≤ n ⟨v, S⟩
            along = (total * torch.nan_to_num(wide / _unit(v, 1))).flatten(1).sum(1)
            if bool((total.flatten(1).square().sum(1) - along > MOST_NEGATIVE).any()):
                raise no_sum(f"the summed correction of {name} is none that {int(sums.fact('records'))} records have")
            found[name] = (wide - total * unit / sums.fact("records")) / lambdas[name]
        return Solved(found, lambdas, tuple(sorted(targets.keys() - found.keys())))


def _unit(v: torch.Tensor, records: int) -> torch.Tensor:
    """n ‖v‖ of each target, [q, 1, 1]."""
    norms: torch.Tensor = torch.linalg.vector_norm(v.cpu().double().flatten(1), dim=1)
    return records * norms.view(-1, 1, 1)


def is_sum_of_squares(block: torch.Tensor) -> bool:
    """Whether no eigenvalue is below −1e-6 of the trace: Cholesky's factors say so in a tenth of the time."""
    trace = float(block.trace())
    if not trace > 0:
        return False
    shifted = block + MOST_NEGATIVE * trace * torch.eye(len(block), dtype=block.dtype)
    return not bool(torch.linalg.cholesky_ex(shifted).info)


def no_sum(what: str) -> UserError:
    """What was summed cannot be: some member sent what its records do not come to."""
    return UserError(
        f"{what}: what some member sent is no sum over records",
        hint="Find out which; under secure aggregation only leaving members out can tell.",
    )
