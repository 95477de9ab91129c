"""What a comparison of methods of influence takes in, checked as a whole before anything is read."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from allmend.attribution.retraining import Retraining
from allmend.attribution.settings import MethodName
from allmend.errors import UserError
from allmend.influence.quality import FEWEST

TRACIN = "tracin"

METHODS = (*get_args(MethodName), TRACIN)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, and how it is judged.

    Attributes:
        methods: names in `METHODS`.
        subsets: halves of the records to train on; none when 0, and then no method is judged.
        retraining: how.
        train_first: train the adapter that is scored here, in the same way, and take no more than the shape of the one
            that is given.
        checkpoints: adapters that `tracin` sums over; the one that is scored when there are none.
        rates: a weight for each of them; 1 each when there are none.
        most_targets: target records to score for; where there are more, a random choice of them.

    Raises:
        UserError: these do not go together; it says what.
    """

    methods: tuple[str, ...] = METHODS
    subsets: int = 0
    retraining: Retraining = field(default_factory=Retraining)
    train_first: bool = False
    checkpoints: tuple[Path, ...] = ()
    rates: tuple[float, ...] = ()
    most_targets: int = 64

    def __post_init__(self) -> None:
        known = f"There are {', '.join(METHODS)}."
        if not self.methods:
            raise UserError("no method is named", where="--methods", hint=known)
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise UserError(f"there is no method {unknown[0]!r}", where="--methods", hint=known)
        if len(set(self.methods)) < len(self.methods):
            raise UserError("a method is named twice", where="--methods", hint="Name each once.")
        if self.subsets < 0 or 0 < self.subsets < FEWEST:
            raise UserError(
                f"a correlation over {self.subsets} retrainings says nothing",
                where="--retrain",
                hint=f"Take {FEWEST} or more, better 30; or 0 for none.",
            )
        if self.most_targets < 1:
            raise UserError(f"must be 1 or more, got {self.most_targets}", where="--most-targets")
        self._check_checkpoints()

    def _check_checkpoints(self) -> None:
        if self.checkpoints and TRACIN not in self.methods:
            raise UserError(
                "checkpoints are for tracin, which is not asked for", where="--checkpoint", hint="Add it to --methods."
            )
        if self.checkpoints and self.train_first:
            raise UserError(
                "an adapter that is trained here has checkpoints of its own",
                where="--checkpoint",
                hint="Leave out --checkpoint or --train-first.",
            )
        if self.rates and len(self.rates) != len(self.checkpoints):
            raise UserError(
                f"there are {len(self.rates)} rates and {len(self.checkpoints)} checkpoints",
                where="--checkpoint-rate",
                hint="Give one for each --checkpoint, in their order, or none.",
            )
        if strange := [rate for rate in self.rates if not 0 < rate < math.inf]:
            raise UserError(f"a rate is a number above 0, got {strange[0]}", where="--checkpoint-rate")
