"""All weights of a model, one after the other."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from allmend.compress.calibration import ROOM, input_products, portions
from allmend.compress.layers import DAMPINGS, METHODS, Compressed, Inputs, Method, Option, Order, compress_weight
from allmend.compress.masks import NofM, Pattern, Unstructured
from allmend.compress.parts import Parts, Row
from allmend.models.formats import Format
from allmend.models.load import linear_layers_of
from allmend.models.packing import Packed, decode, decode_sparse, encode, encode_sparse, encode_two_of_four

HELD_OUT = 4
"""Every so many windows, one is held out from sweeps."""


def compress_layers(
    model: Any,
    plan: Mapping[str, Option],
    calibration: torch.Tensor | None,
    parts: Parts,
    *,
    methods: Sequence[Method] = METHODS,
    dampings: Sequence[float] = DAMPINGS,
    order: Order = "sq",
    room: int = ROOM,
    on_window: Callable[[], None] = lambda: None,
    on_layer: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Compress the weights of a plan; those that are done already are left as they are.

    Inputs are those of the model before: it stays as it is.

    Args:
        model: of transformers.
        plan: what each linear layer's weight is to become, by name.
        calibration: int64 [windows, tokens], of which every fourth window is held out; none where weights are rounded.
        parts: where weights are kept.
        methods, dampings, order: as of `compress_weight`.
        room: bytes of inputs' products that are kept at a time; a pass over the windows is made for each portion.
        on_window: called for each window of each pass.
        on_layer: told of each weight.

    Raises:
        ValueError: a weight or an input is not finite, with its layer's name; or as `compress_weight`.
        UserError: the operating system refused; what is done is kept.
    """
    shapes = {name: shape for name, shape in linear_layers_of(model).items() if name in plan}
    for name in shapes:
        if not bool(model.get_submodule(name).weight.isfinite().all()):
            raise ValueError(f"{name}.weight has a value that is not finite")
    left = {name: shape for name, shape in shapes.items() if name not in parts}
    for some in portions(left, room=room // 2):
        known = {} if calibration is None else _inputs(model, calibration, some, on_window)
        for name in some:
            start = time.perf_counter()
            weight = model.get_submodule(name).weight.detach().cpu().float()
            found = compress_weight(
                weight, plan[name], known.get(name), methods=methods, dampings=dampings, order=order
            )
            packed = packed_of(found, plan[name])
            row = _row(name, plan[name], found, packed, time.perf_counter() - start)
            parts.put(row, packed)
            on_layer(row)
    return [parts.get(name)[0] for name in shapes]


def _inputs(
    model: Any, calibration: torch.Tensor, layers: Sequence[str], on_window: Callable[[], None]
) -> dict[str, Inputs]:
    held_out = torch.arange(len(calibration)) % HELD_OUT == HELD_OUT - 1
    seen, other = (
        input_products(model, calibration[some], layers, on_window=on_window) for some in (~held_out, held_out)
    )
    return {name: Inputs(seen[name], other[name]) for name in layers}


def packed_of(found: Compressed, option: Option) -> Packed:
    """A weight's bits."""
    if found.keep is not None:
        to_bits = encode_two_of_four if option.pattern == NofM(2, 4) else encode_sparse
        return to_bits(found.weight, found.keep, option.fmt, scale=found.scale)
    if option.fmt is None:
        return Packed({"weight": found.weight.bfloat16()}, tuple(found.weight.shape), found.weight.dtype)
    return encode(found.weight, option.fmt, scale=found.scale)


def weight_of(packed: Packed, option: Option) -> torch.Tensor:
    """What a weight's bits stand for."""
    if option.pattern is not None:
        return decode_sparse(packed, option.fmt)
    return packed.tensors["weight"].to(packed.dtype) if option.fmt is None else decode(packed, option.fmt)


@contextmanager
def applied(model: Any, plan: Mapping[str, Option], parts: Parts) -> Iterator[None]:
    """With the weights that are done in the places of a model's own, which come back afterwards."""
    before = {}
    try:
        for name in plan:
            parameter = model.get_submodule(name).weight
            before[name] = parameter.data
            parameter.data = weight_of(parts.get(name)[1], plan[name]).to(parameter)
        yield
    finally:
        for name, data in before.items():
            model.get_submodule(name).weight.data = data


def uniform(
    shapes: Mapping[str, tuple[int, int]], fmt: Callable[[int], Format | None], pattern: Pattern | None
) -> dict[str, Option]:
    """One option for all layers; the format may depend on the columns."""
    return {name: Option(fmt(columns), pattern) for name, (_, columns) in shapes.items()}


def _row(name: str, option: Option, found: Compressed, packed: Packed, seconds: float) -> Row:
    rows, columns = packed.shape
    return Row(
        layer=name,
        rows=rows,
        columns=columns,
        format="bfloat16" if option.fmt is None else option.fmt.name,
        pattern=_in_words(option.pattern),
        method=found.method,
        damping=math.nan if found.damping is None else found.damping,
        bytes=packed.bytes,
        zeros=0.0 if found.keep is None else float((~found.keep).double().mean()),
        seen=math.nan if found.seen is None else found.seen,
        held_out=math.nan if found.held_out is None else found.held_out,
        dead=found.dead,
        seconds=seconds,
    )


def _in_words(pattern: Pattern | None) -> str:
    match pattern:
        case None:
            return ""
        case NofM(n, m):
            return f"{n}:{m}"
        case Unstructured(share, _):
            return f"{share:g}"
