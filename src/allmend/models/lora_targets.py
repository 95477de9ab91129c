"""The layers that a LoRA goes on: what of a recipe's targets and rank a model cannot have."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

ALL_LINEAR = "all-linear"
"""Targets every linear layer but the output embedding."""


def check_lora(
    layers: Mapping[str, tuple[int, int]], *, rank: int, targets: Sequence[str] | Literal["all-linear"]
) -> list[str]:
    """What is wrong with a LoRA for a model with these layers, as messages; empty if nothing is.

    A target matches a layer by PEFT's rule: it is the layer's name, or the end of it after a full stop.

    Args:
        layers: names and shapes (out, in), as `linear_layers` gives them.
        rank: r.
        targets: as in `add_lora`.
    """
    problems = []
    if rank < 1:
        problems.append(f"rank {rank} is not positive")
    matched: set[str] = set()
    if targets == ALL_LINEAR:
        matched = set(layers)
        if not layers:
            problems.append("the model has no linear layers")
    elif isinstance(targets, str):
        problems.append(f"targets {targets!r} is neither a list of layer names nor {ALL_LINEAR!r}")
    elif not targets:
        problems.append(f"no targets are given; name some layers, or {ALL_LINEAR!r}")
    else:
        for target in targets:
            found = {name for name in layers if name == target or name.endswith(f".{target}")}
            matched |= found
            if not found:
                problems.append(_no_match(target, layers))
    narrow = {name: layers[name] for name in matched if min(layers[name]) < rank}
    if narrow:
        name, (rows, columns) = min(narrow.items(), key=lambda layer: (min(layer[1]), layer[0]))
        others = f" (and {len(narrow) - 1} more layers)" if len(narrow) > 1 else ""
        problems.append(
            f"rank {rank} is larger than the smaller dimension of {name}, whose shape is {rows} × {columns}{others}; "
            f"choose at most {min(rows, columns)}"
        )
    return problems


def _no_match(target: str, layers: Mapping[str, Any]) -> str:
    suffixes = sorted({name.rpartition(".")[2] for name in layers})
    near = difflib.get_close_matches(target, [*suffixes, *layers], n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"target {target!r} matches no linear layer{meant} (the model has: {', '.join(suffixes)})"
