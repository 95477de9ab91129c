"""The table of methods of influence side by side."""

from allmend.results import Estimate, Table

LOSS = "loss"
"""Name of the baseline that takes a record for harmful if its loss per token is high."""


class MethodFigures(Table):
    """What a method is worth and what it costs.

    Attributes:
        method: its name, or `loss`.
        lds: linear datamodeling score, over target records; None without retraining, and of a method left out.
        passes: over the gradients of the training records; None for the baseline.
        seconds: that the method would take alone, without loading the model; None for the baseline.
        notes: of the method, in sentences.
    """

    method: str
    lds: Estimate | None = None
    passes: int | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()


class Pair(Table):
    """Two methods.

    Attributes:
        first, second: which.
        spearman: correlation of their scores over records, for a target record; the mean over these.
    """

    first: str
    second: str
    spearman: Estimate


class RetrainingFigures(Table):
    """What methods are judged by.

    Attributes:
        subsets: halves of the records that an adapter was trained on.
        learning_rate, epochs, batch_size: of these trainings.
        losses: of the target after each of them, nats a token.
        chance: LDS of random scores, with the middle 95 % of draws.
    """

    subsets: int
    learning_rate: float
    epochs: int
    batch_size: int
    losses: tuple[float, ...]
    chance: Estimate


class MethodComparison(Table):
    """Methods side by side.

    Attributes:
        methods: in the order asked for, then those that stand beside them, then the baseline.
        pairs: their agreement.
        retraining: None where no method is judged.
        records, target_records: scored, and scored for.
        trained_here: whether the adapter that is scored was trained with the settings of the retrainings.
        loss: of the target under the adapter that is scored, nats a token.
        pass_seconds: of one pass of the training records' gradients through the model.
        damping, side, inverse, modules: as asked for.
        weights, adapter: SHA-256 of the base model and of the adapter that is scored.
        seed: of the retrainings and of chance.
        notes: what a reader should know of the records, in sentences.
        versions: of Python and packages.
    """

    methods: tuple[MethodFigures, ...]
    pairs: tuple[Pair, ...]
    retraining: RetrainingFigures | None
    records: int
    target_records: int
    trained_here: bool
    loss: float
    pass_seconds: float
    damping: float
    side: str
    inverse: str
    modules: str | None
    weights: str
    adapter: str
    seed: int
    notes: tuple[str, ...] = ()
    versions: dict[str, str]

    def agreement(self, first: str, second: str) -> Estimate | None:
        """Of two methods, in either order; None where one is missing."""
        for pair in self.pairs:
            if {pair.first, pair.second} == {first, second}:
                return pair.spearman
        return None
