"""What guarantees have cost."""

from pydantic import Field

from allmend.results.figures import Table


class Budget(Table):
    """What one unit of protection has cost.

    Attributes:
        unit: `record` or `member`.
        client: whose records; None for the unit `member`.
        epsilon: at `delta`, after all rounds.
        delta: of the guarantee.
        noise_multiplier: standard deviation of the noise over the clip.
        clip: the largest norm; the first one where it adapts.
        sampling: `poisson` with its rate in words, or why no amplification is counted.
        steps: noisy releases.
        by_round: ε after each round.
        simulated: whether the noise came from the recipe's seed: the guarantee is that of a run with secret noise.
        stopped: the round after which the budget ended training; None where it did not.
    """

    unit: str
    client: str | None
    epsilon: float | None
    delta: float
    noise_multiplier: float
    clip: float
    sampling: str
    steps: int
    by_round: tuple[float | None, ...] = ()
    simulated: bool = True
    stopped: int | None = None


class PrivacyTable(Table):
    """`results/privacy.json`: by arm, the layers in words and what the guarantees came to."""

    layers: dict[str, tuple[str, ...]]
    budgets: dict[str, tuple[Budget, ...]] = Field(default_factory=dict)
