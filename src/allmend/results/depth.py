"""What fewer steps one after the other cost a model."""

from allmend.results.figures import Estimate, Spread, Table

SEQUENTIAL = "sequential"
"""The model as it is, as a kind."""

KINDS_IN_WORDS: dict[str, str] = {
    "pairs": "pairs side by side",
    "triples": "threes side by side",
    "parallel": "all at once",
    "parallel_sum": "whole blocks at once",
    "merge": "one layer with the mean weights",
    "prune": "left out",
    "shuffle": "in a random order",
}
"""What is done to a stretch of layers."""


class DepthLine(Table):
    """A depth, or the model as it is.

    Attributes:
        kind: of search; `sequential` for the model as it is.
        depth: sequential steps.
        groups: of layers, one for each step; empty where layers are left out or merged.
        start, end: of the stretch that is changed.
        searched: added to the loss on the text of the search (nats a token), over its windows.
        predicted: the same as the sum of what single pairs add; None where they were not measured.
        perplexity: on the other text; n counts tokens.
        added: to the loss on the other text (nats a token), over its windows.
        accuracy: share of choices answered right, and `accuracy_change` against the model as it is, by question.
        speed: tokens a second of greedy decoding here, over those of the model as it is in the same run; `foretold` is
            what layers timed alone make of it.
    """

    kind: str
    depth: int
    groups: tuple[tuple[int, ...], ...]
    start: int
    end: int
    searched: Estimate | None = None
    predicted: float | None = None
    perplexity: Estimate
    added: Estimate | None = None
    accuracy: Estimate | None = None
    accuracy_change: Estimate | None = None
    speed: Spread | None = None
    foretold: Spread | None = None

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        """Groups of more than one layer."""
        return tuple(group for group in self.groups if len(group) > 1)


class Frontier(Table):
    """What depths cost.

    Attributes:
        lines: the model as it is, then each depth.
        searched_on, reported_on: the two texts.
        search_tokens, report_tokens: of them.
        questions: choices asked.
        machine: that speeds were measured on; empty where they were not.
        notes: what to know.
    """

    lines: tuple[DepthLine, ...]
    searched_on: str
    reported_on: str
    search_tokens: int
    report_tokens: int
    questions: int
    machine: str = ""
    notes: tuple[str, ...] = ()


class DepthSearch(Table):
    """`search.json`: a search, and what was chosen.

    Attributes:
        model: that was searched, as it was named.
        arm: of a run; empty for a model that was made elsewhere.
        weights: SHA-256 of the model, with its adapter where it has one.
        frontier: what each depth costs.
        chosen: groups of layers, one for each step, of the plan that was asked for.
        reached: whether it costs no more than it may.
    """

    model: str
    arm: str = ""
    weights: str
    frontier: Frontier
    chosen: tuple[tuple[int, ...], ...]
    reached: bool

    @property
    def line(self) -> DepthLine | None:
        """What the chosen depth costs."""
        return next((line for line in self.frontier.lines[1:] if line.depth == len(self.chosen)), None)


class DepthTable(Table):
    """`results/depth.json`: what fewer steps cost the models of a run, by arm."""

    searches: tuple[DepthSearch, ...]
