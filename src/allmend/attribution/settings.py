"""How influence is measured: the settings that all of `allmend attribute` shares."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from allmend.errors import UserError
from allmend.influence.blocks import Side
from allmend.influence.inverses import INVERSES
from allmend.influence.methods import DAMPING, DataInf, Exact, Gfim, HessianFree, Lissa, Method

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
        inverse: a name in `INVERSES`, of `gfim`.
        modules: a regular expression for names of weights; all when None.
        targets: `mean` for one target, `each` for one a record, `kind` for one a label of the records.
        max_tokens: longest record.
        template: `auto`, `chat` or `plain`, as in training.
        tokens_per_pass: that go through the model at once.
        seed: of the splits by which reliability is measured.
    """

    method: MethodName = "gfim"
    damping: float = DAMPING
    side: Side = "wide"
    inverse: str = "cholesky"
    modules: str | None = None
    targets: Literal["mean", "each", "kind"] = "mean"
    max_tokens: int = 512
    template: Literal["auto", "chat", "plain"] = "auto"
    tokens_per_pass: int = 512
    seed: int = 0

    def build(self) -> Method:
        """The method.

        Raises:
            UserError: a name is not known, or the damping is none.
        """
        if self.method not in get_args(MethodName):
            raise UserError(f"there is no method {self.method!r}", hint=f"There are {', '.join(get_args(MethodName))}.")
        if self.inverse not in INVERSES:
            raise UserError(f"there is no inverse {self.inverse!r}", hint=f"There are {', '.join(INVERSES)}.")
        if not self.damping > 0:
            raise UserError(f"damping must be above 0, got {self.damping}")
        match self.method:
            case "gfim":
                return Gfim(self.damping, self.side, INVERSES[self.inverse])
            case "exact":
                return Exact(self.damping)
            case "datainf":
                return DataInf(self.damping)
            case "lissa":
                return Lissa(self.damping)
        return HessianFree()
