"""Single layers of each width timed alone, and what a decoder made of them would take for a token."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allmend.depth.interventions import shallow
from allmend.depth.spread import finish, ratio
from allmend.results import Spread, Table

ROUNDS = 20
"""In which every width has a turn."""

SAMPLE = 8
"""Layers of a width that are timed in a turn, one after the other: a single one would stay in the processor's cache."""


class LayerTimes(Table):
    """Seconds of one decoding step's parts, by round.

    Attributes:
        batch: sequences.
        length: tokens in the cache before the step.
        layers: of one layer, by width.
        outside: of all that is not a layer: embeddings, positions, mask, last norm and head.
    """

    batch: int
    length: int
    layers: dict[int, tuple[float, ...]]
    outside: tuple[float, ...]


@dataclass(frozen=True)
class _Turn:
    """Layers of one width in one model, and what they are given."""

    layers: Sequence[nn.Module]
    hidden: torch.Tensor
    named: Sequence[Mapping[str, Any]]

    def seconds(self, cache: Any) -> float:
        hidden = self.hidden
        finish(hidden.device)
        start = time.perf_counter()
        for layer, given in zip(self.layers, self.named, strict=True):
            hidden = layer(hidden, **{**given, "past_key_values": cache})
        finish(hidden.device)
        return (time.perf_counter() - start) / len(self.layers)


def widths_of(model: Any) -> list[int]:
    """Layers of the original in each of a model's layers."""
    return list(getattr(model.config, "layer_widths", None) or [1] * model.config.num_hidden_layers)


@torch.no_grad()
def layer_times(
    models: Sequence[Any], *, batch: int = 1, length: int = 64, rounds: int = ROUNDS, seed: int = 0
) -> LayerTimes:
    """Time one layer of each width, and what is outside the layers, in turns.

    Args:
        models: whose layers are timed; a width is taken from the first model that has it. What is outside is the first
            one's, and should be the same in all.
        batch: sequences.
        length: tokens in the cache.
        rounds: turns of each width; one more goes before, to warm up.
        seed: of the tokens.
    """
    turns: dict[int, tuple[_Turn, int]] = {}
    caches = []
    for place, model in enumerate(models):
        ids = torch.randint(
            model.config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(seed)
        ).to(model.device)
        caches.append(model(input_ids=ids[:, :length], use_cache=True, logits_to_keep=1).past_key_values)
        widths = widths_of(model)
        for width in sorted(set(widths) - turns.keys()):
            some = [number for number, one in enumerate(widths) if one == width]
            chosen = some[:: -(-len(some) // SAMPLE)]
            turns[width] = _turn(model, ids[:, length:], copy.deepcopy(caches[-1]), chosen), place
    bare = shallow(models[0])
    bare.model = shallow(models[0].model)
    bare.model.layers = nn.ModuleList()
    step = torch.zeros(batch, 1, dtype=torch.int64, device=models[0].device)
    layers: dict[int, list[float]] = {width: [] for width in turns}
    outside: list[float] = []
    for number in range(rounds + 1):
        for width, (turn, place) in turns.items() if number % 2 else reversed(turns.items()):
            seconds = turn.seconds(copy.deepcopy(caches[place]))  # a step lengthens it
            if number:
                layers[width].append(seconds)
        finish(step.device)
        start = time.perf_counter()
        bare(input_ids=step, past_key_values=caches[0], use_cache=True, logits_to_keep=1).logits.argmax(-1)
        finish(step.device)
        if number:
            outside.append(time.perf_counter() - start)
    return LayerTimes(
        batch=batch,
        length=length,
        layers={width: tuple(seconds) for width, seconds in sorted(layers.items())},
        outside=tuple(outside),
    )


def _turn(model: Any, step: torch.Tensor, cache: Any, chosen: Sequence[int]) -> _Turn:
    """Some layers and what they are given in a step, found by listening to one."""
    hidden: list[torch.Tensor] = []
    named: list[Mapping[str, Any]] = []

    def listen(layer: nn.Module, given: tuple[torch.Tensor, ...], more: Mapping[str, Any]) -> None:
        hidden.append(given[0])
        named.append(more)

    layers = [model.model.layers[place] for place in chosen]
    hooks = [layer.register_forward_pre_hook(listen, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return _Turn(layers, hidden[0], named)


def token_seconds(times: LayerTimes, widths: Sequence[int]) -> tuple[float, ...]:
    """Seconds that a decoder with layers of these widths takes for a token of each sequence, by round.

    Raises:
        ValueError: a width was not timed.
    """
    if missing := set(widths) - times.layers.keys():
        raise ValueError(f"layers of width {min(missing)} were not timed")
    return tuple(
        outside + sum(times.layers[width][place] for width in widths) for place, outside in enumerate(times.outside)
    )


def predicted_speedup(times: LayerTimes, widths: Sequence[int], against: Sequence[int]) -> Spread:
    """How many times as fast a decoder with layers of these widths would be as another one.

    On one device a layer of width w has w times the arithmetic and the weights of one of width 1: what this comes to is
    measured, and usually little.

    Args:
        times: of layers alone.
        widths: of the decoder's layers (`Plan.widths`).
        against: of the other's; `[1] * 30` is 30 layers one after the other.

    Raises:
        ValueError: a width was not timed.
    """
    return ratio(token_seconds(times, against), token_seconds(times, widths))
