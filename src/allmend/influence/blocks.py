"""Fisher blocks: Σ gᵀg of every module over records, which add up over batches, processes and organisations.

Source: the generalised Fisher information of Zhou, Fan, Jaggi, "HyperINF", arXiv 2410.05090: a matrix d × d for each
LoRA factor, whatever the rank, in place of a block of all its rd parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, TypeAlias, get_args

import torch

from allmend.errors import UserError
from allmend.influence.gradients import Source
from allmend.models.tensors import JSON, read_tensors, write_tensors

Side: TypeAlias = Literal["wide", "rank"]


@dataclass(frozen=True)
class FisherBlocks:
    """Sums over n records. `+` merges the sums of other records; a `FisherBlocks` without modules is neutral.

    Attributes:
        sums: by module, Σ_i g_iᵀ g_i [d, d] (`wide`), or Σ_i g_i g_iᵀ [r, r] (`rank`).
        count: by module, what the sum is divided by: Σ_i r, or Σ_i d.
        records: n.
        side: which side of the gradients the blocks are of.
        weights: digest of the model that the gradients are of; empty where it is not known.
    """

    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    count: Mapping[str, int] = field(default_factory=dict)
    records: int = 0
    side: Side = "wide"
    weights: str = ""

    def __add__(self, other: Self) -> "FisherBlocks":
        """Of both sets of records.

        Raises:
            UserError: they are of different models, modules, sides or sizes; the message has both values.
        """
        if not self.sums or not other.sums:
            return other if not self.sums else self
        if differs := self._difference(other):
            raise UserError(
                f"blocks cannot be added: {differs}", hint="Make both with the same model, adapter and settings."
            )
        return FisherBlocks(
            {name: one + other.sums[name] for name, one in self.sums.items()},
            {name: one + other.count[name] for name, one in self.count.items()},
            self.records + other.records,
            self.side,
            self.weights,
        )

    def _difference(self, other: "FisherBlocks") -> str:
        """What keeps two from being added, with both values; empty where nothing does."""
        for what, one, two in (("weights", self.weights, other.weights), ("sides", self.side, other.side)):
            if one != two:
                return f"of other {what}, {one or '(unknown)'} and {two or '(unknown)'}"
        if self.sums.keys() != other.sums.keys():
            only = [sorted(a.keys() - b.keys()) for a, b in ((self.sums, other.sums), (other.sums, self.sums))]
            one, two = (f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names) for names in only)
            return f"the first alone has {one or 'no module'}, the second alone {two or 'no module'}"
        for name, tensor in self.sums.items():
            if (shape := tensor.shape) != (theirs := other.sums[name].shape):
                return f"{name} is {shape[0]} × {shape[1]} and {theirs[0]} × {theirs[1]}"
        return ""

    def matrix(self, module: str) -> torch.Tensor:
        """M of a module: the sum over what it is divided by, symmetric."""
        found = self.sums[module] / self.count[module]
        return (found + found.mT) / 2

    def mean_eigenvalue(self, module: str) -> float:
        """tr M / d, in double precision: what damping is relative to."""
        trace = float(torch.diagonal(self.sums[module]).double().sum())
        return trace / self.count[module] / self.sums[module].shape[0]

    @property
    def silent(self) -> list[str]:
        """Modules whose gradients are all zero, as those of A are while B is: they have no block to invert."""
        return [name for name in self.sums if self.mean_eigenvalue(name) == 0]

    def save(self, path: Path) -> None:
        """Write as safetensors, the whole file or nothing.

        Raises:
            UserError: the operating system refused.
        """
        facts: dict[str, JSON] = {
            "count": dict(self.count),
            "records": self.records,
            "side": self.side,
            "weights": self.weights,
            "kind": _KIND,
        }
        write_tensors(path, dict(self.sums), facts)

    @classmethod
    def load(cls, path: Path) -> "FisherBlocks":
        """What `save` has written.

        Raises:
            UserError: the file is none, or is damaged.
        """
        sums, facts = read_tensors(path)
        try:
            if facts["kind"] != _KIND or facts["side"] not in get_args(Side):
                raise KeyError
            count = {name: int(facts["count"][name]) for name in sums}
            return cls(sums, count, int(facts["records"]), facts["side"], str(facts["weights"]))
        except (KeyError, TypeError, ValueError):
            raise UserError("holds no Fisher blocks", where=path, hint="Make it with `allmend attribute`.") from None


_KIND = "fisher-blocks"


def fisher_blocks(source: Source, *, side: Side = "wide", weights: str = "") -> FisherBlocks:
    """The blocks of records, in one pass; nothing per record is kept.

    Sums are in single precision at least, whatever the gradients are in.

    Args:
        source: the records' gradients.
        side: `wide` for d × d, `rank` for r × r.
        weights: digest of the model.
    """
    sums: dict[str, torch.Tensor] = {}
    count: dict[str, int] = {}
    records = 0
    for batch in source:
        records += len(batch.places)
        for name, g in batch.gradients.items():
            wide = torch.promote_types(g.dtype, torch.float32)
            rows = (g if side == "wide" else g.mT).to(wide).flatten(0, 1)  # [(n r), d] or [(n d), r]
            if name in sums:
                sums[name].addmm_(rows.T, rows)
            else:
                sums[name] = rows.T @ rows
            count[name] = count.get(name, 0) + len(rows)
    return FisherBlocks(sums, count, records, side, weights)
