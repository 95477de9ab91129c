"""What every table is made of: figures with their sample size and, where one can be had, a 95 % interval."""

from pydantic import BaseModel, ConfigDict

POOLED = "pooled"
"""Name of the held-out set that joins those of all clients."""

BASE = "base"
"""Name of the model before any tuning."""

MEMBERS = "members"
"""Name of the account of the guarantee for members, among those of clients' records."""


class Table(BaseModel):
    """Base of all tables: unknown keys are an error, values do not change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(Table):
    """A figure: `value`, its 95 % interval `[low, high]` (None when there is none) and sample size `n`."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int


class Spread(Table):
    """Times of repeated runs of one thing, or what is made of them.

    Attributes:
        median, low, high: of the runs.
        n: how many they were.
    """

    median: float
    low: float
    high: float
    n: int
