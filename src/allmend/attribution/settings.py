"""How influence is measured: the settings that all of `allmend attribute` shares."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from allmend.errors import UserError
from allmend.influence.blocks import Side
from allmend.influence.fastest_inverse import AUTO, fastest
from allmend.influence.inverses import INVERSES
from allmend.influence.methods import DAMPING, DataInf, Exact, Gfim, HessianFree, Lissa, Method
from allmend.models.load import usable_device

MethodName: TypeAlias = Literal["gfim", "exact", "datainf", "lissa", "hessian_free"]

PASSES = {"gfim": 3, "exact": 4, "datainf": 4, "lissa": 30, "hessian_free": 2}
"""Passes over the training records, about; for the time left."""


@dataclass(frozen=True)
class Settings:
    """How influence is measured.

    Attributes:
        method: which.
        damping: c of λ = c times the mean eigenvalue.
        side: `wide` or `rank`, of `gfim`.
        inverse: a name in `INVERSES`, of `gfim`; `auto` for what `allmend attribute inverse` found on this device.
        modules: a regular expression for names of weights; all when None.
        targets: `mean` for one target, `each` for one a record, `kind` for one a label of the records.
        max_tokens: longest record.
        template: `auto`, `chat` or `plain`, as in training.
        tokens_per_pass: that go through the model at once.
        seed: of the splits by which reliability is measured.
        drop_overlap: leave target records out that are training records too, instead of refusing them.
        sweep: whether scores under other dampings are compared.
        cache: a folder in which the training records' gradients are kept; none when None.
    """

    method: MethodName = "gfim"
    damping: float = DAMPING
    side: Side = "wide"
    inverse: str = AUTO
    modules: str | None = None
    targets: Literal["mean", "each", "kind"] = "mean"
    max_tokens: int = 512
    template: Literal["auto", "chat", "plain"] = "auto"
    tokens_per_pass: int = 512
    seed: int = 0
    drop_overlap: bool = False
    sweep: bool = False
    cache: Path | None = None

    @property
    def solver(self) -> str:
        """The name in `INVERSES` that `inverse` comes to.

        Raises:
            UserError: it is not known.
        """
        if self.inverse == AUTO:
            return fastest(usable_device(None))
        if self.inverse not in INVERSES:
            raise UserError(f"there is no inverse {self.inverse!r}", hint=f"There are {', '.join((AUTO, *INVERSES))}.")
        return self.inverse

    def passes(self, *, more: int = 0, dampings: int = 1) -> int:
        """How often the model goes through the training records, about; for the time left.

        Args:
            more: passes beside the method's.
            dampings: that the method is applied with; `gfim` takes one curvature for all.
        """
        if self.cache is not None:  # what is on disk is read again in no time
            return 1
        return PASSES[self.method] * (1 if self.method == "gfim" else dampings) + more

    def build(self) -> Method:
        """The method.

        Raises:
            UserError: a name is not known, or the damping is none.
        """
        if self.method not in get_args(MethodName):
            raise UserError(f"there is no method {self.method!r}", hint=f"There are {', '.join(get_args(MethodName))}.")
        solver = INVERSES[self.solver]
        if not 0 < self.damping < math.inf:
            raise UserError(
                f"damping must be above 0 and finite, got {self.damping}",
                where="damping",
                hint="It is times the mean eigenvalue of each block: 0.1 is usual, 0.001 to 10 is what a sweep shows.",
            )
        match self.method:
            case "gfim":
                return Gfim(self.damping, self.side, solver)
            case "exact":
                return Exact(self.damping)
            case "datainf":
                return DataInf(self.damping)
            case "lissa":
                return Lissa(self.damping)
        return HessianFree()
