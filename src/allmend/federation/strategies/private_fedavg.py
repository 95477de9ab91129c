"""Federated averaging with a guarantee for members: clipped updates, and noise on their sum.

Source: McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018 (the
estimator with a fixed denominator); for the clip that follows a quantile of the updates' norms, Andrew, Thakkar,
McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from allmend.learn.noise import NoiseSource, noise_source
from allmend.models.tensors import Tensors
from allmend.strategy import (
    Client,
    Declaration,
    Facts,
    Layout,
    Reply,
    Seen,
    State,
    Sums,
    Task,
    Turn,
    grouped,
    of_group,
    shapes,
)

CLIP_RATE = 0.2
"""η of adaptive clipping: C is multiplied by exp(−η (share within C − quantile))."""

QUANTILE_BUDGET = 0.1
"""Share of a round's budget (of 1/z²) that the count of updates within C costs, where the clip adapts."""


@dataclass(frozen=True, kw_only=True)
class PrivateFedAvg:
    """x ← x + (Σ Δᵢ min(1, C / ‖Δᵢ‖) + N(0, (z C)²)) / (q n) over the members sampled for the round.

    Every member counts the same, whatever it has; the denominator is the expected number of members, so that one more
    member moves the sum by C at most. Members are sampled independently of each other, each with probability q. No
    training loss is reported: it would be a second release.

    Args:
        clip: C, in the norm over all parameters that learn.
        noise_multiplier: z.
        participation: q, in (0, 1].
        quantile: which of the updates' norms C follows; fixed where it is None.
        randomness: `seeded` or `secure`, of the noise and the sampling.
        seed: of both, where they are seeded.
        distributed: whether members add shares of the noise to what they send, so that none is added here.
    """

    clip: float
    noise_multiplier: float
    participation: float = 1.0
    quantile: float | None = None
    randomness: Literal["seeded", "secure"] = "seeded"
    seed: int = 0
    distributed: bool = False

    name = "fedavg"
    legs = 1
    pooled = False
    shares = True

    def __post_init__(self) -> None:
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation must lie in (0, 1], got {self.participation}")

    def declare(self) -> Declaration:
        summed = {"update": f"change of the parameters, scaled down to the clip ({self.clip:g} at first)"}
        summed["update"] += (
            "; each member adds its share of noise" if self.distributed else "; the sum gets noise before it is used"
        )
        if self.quantile is not None:
            summed["within"] = "whether the change was within the clip; the sum gets noise"
        return Declaration(sent="the shared parameters and the clip", summed=summed, numbers=frozenset({"within"}))

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return shapes(grouped("update", initial))

    def init(self, initial: Tensors) -> State:
        return State(grouped("model", initial), _clip_fact(self.clip))

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        ordered = sorted(members)
        if self.participation < 1:
            drawn = self._source(turn, "members").uniform(len(ordered)) < self.participation
            ordered = [name for name, chosen in zip(ordered, drawn.tolist(), strict=True) if chosen]
        return dict.fromkeys(ordered, Task(turn, of_group("model", state.tensors), dict(state.facts)))

    def work(self, task: Task, client: Client) -> Reply:
        trained = client.train(task.tensors, task.turn)
        update = {name: tensor.double() - task.tensors[name].double() for name, tensor in trained.tensors.items()}
        norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in update.values()))
        clip = _clip(task.facts)
        # a rounding error above 1 would break the bound
        scale = min(1.0, clip / norm * (1 - 1e-12)) if norm > 0 else 1.0
        within = {} if self.quantile is None else {"within": float(norm <= clip) - 0.5}
        return Reply(grouped("update", {name: tensor * scale for name, tensor in update.items()}), within)

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        clip, expected = _clip(state.facts), self.participation * turn.members
        source = self._source(turn, "update")
        model: Tensors = {}
        for name, tensor in sorted(of_group("model", state.tensors).items()):  # a checkpoint may turn their order
            key = f"update/{name}"  # nobody sent it where nobody was drawn
            total = sums[key] if key in sums else torch.zeros_like(tensor, dtype=torch.float64)
            if self.noise_multiplier and not self.distributed:
                total = total + source.normal(tensor.shape) * (self._update_multiplier * clip)
            model[name] = (tensor + total / expected).to(tensor.dtype)
        return State(grouped("model", model), _clip_fact(self._next_clip(clip, expected, sums, turn)))

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        update = of_group("update", reply.summed)
        return {name: (tensor + update[name]).to(tensor.dtype) for name, tensor in task.tensors.items()}

    def shared(self, state: State) -> Tensors | None:
        return of_group("model", state.tensors)

    def personal(self, state: State, client: State) -> Tensors | None:
        return None

    @property
    def _update_multiplier(self) -> float:
        """z of the update's part: together with the count's, a round costs what one release with z would."""
        return self.noise_multiplier / math.sqrt(1 - (QUANTILE_BUDGET if self.quantile is not None else 0))

    def _next_clip(self, clip: float, expected: float, sums: Sums, turn: Turn) -> float:
        if self.quantile is None:
            return clip
        count = sums.fact("within")
        if self.noise_multiplier:
            # ±1/2 makes the count's sensitivity 1/2
            deviation = 0.5 * self.noise_multiplier / math.sqrt(QUANTILE_BUDGET)
            count += deviation * float(self._source(turn, "within").normal((1,)))
        share = 0.5 + count / expected
        return clip * math.exp(-CLIP_RATE * (min(1.0, max(0.0, share)) - self.quantile))

    def _source(self, turn: Turn, what: str) -> NoiseSource:
        return noise_source(self.randomness, self.seed, "fedavg", turn.round, what)


def _clip_fact(clip: float) -> Facts:
    """The clip as it is kept and sent: messages are JSON, which has no infinity."""
    return {"clip": clip} if math.isfinite(clip) else {}


def _clip(facts: Facts) -> float:
    return float(facts.get("clip", math.inf))
