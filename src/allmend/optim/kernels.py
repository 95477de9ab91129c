"""The arithmetic of a step on one tensor: in blocks that stay in a CPU's cache, or compiled, in a pass or two."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from allmend.optim.blocks import blocks

LEAST_GAIN = 0.05
"""A gain does not fall below, since a row of norm 0 has no direction."""

LEAST_TANGENT = 1e-6
"""Over √C: a direction that is closer than that to the weight's own turns it nowhere."""


@dataclass(frozen=True)
class Toward:
    """Which way a step goes.

    Attributes:
        beta: β of m ← βm + (1−β)g.
        nesterov: whether the direction is sign(βm + (1−β)g), not sign(m).
        climb: whether g counts with the opposite sign.
    """

    beta: float
    nesterov: bool
    climb: bool

    def follow(self, momentum: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the momentum in place; the gradient as it counts, and the direction's signs."""
        gradient = gradient.to(momentum.dtype)
        gradient = -gradient if self.climb else gradient
        momentum.lerp_(gradient, 1 - self.beta)
        return gradient, torch.sign(momentum.lerp(gradient, 1 - self.beta) if self.nesterov else momentum)


def sign_step(
    weight: torch.Tensor,
    momentum: torch.Tensor,
    gradient: torch.Tensor,
    toward: Toward,
    *,
    keep: float,
    length: float,
    lazy: bool = False,
    compiled: bool = False,
) -> None:
    """w ← keep · w − length · signs, in place, and the momentum with it.

    Args:
        weight: w, any shape.
        momentum: in single precision at least.
        gradient: g.
        toward: the direction.
        keep: what weight decay leaves.
        length: of the step in each element.
        lazy: whether rows without a gradient stand still.
        compiled: whether to take the compiled kernel, where there is one: for contiguous tensors, not for lazy rows.
    """
    tensors = (weight, momentum, gradient)
    if compiled and not lazy and all(tensor.is_contiguous() for tensor in tensors):
        scalars = _scalars(momentum, 1 - toward.beta, -1.0 if toward.climb else 1.0, keep, length)
        _compiled(_sign_pass)(*(tensor.view(-1) for tensor in tensors), *scalars, toward.nesterov)
        return
    for w, m, g in blocks(*tensors):
        g, signs = toward.follow(m, g)
        if lazy:
            w.copy_(torch.where(_moving_rows(g), w * keep - signs * length, w))
            continue
        if keep != 1:
            w.mul_(keep)
        w.add_(signs.to(w.dtype), alpha=-length)


@dataclass(frozen=True)
class Turn:
    """How far rows turn, and what those do that cannot.

    Attributes:
        angle: θ (radians).
        length: of a sign step in each element, of weights that cannot turn and of gains.
        keep: what weight decay leaves of weights that cannot turn.
        learns_gain: whether a row's norm follows its gradient.
    """

    angle: float
    length: float
    keep: float
    learns_gain: bool

    def coefficients(
        self,
        rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        size: torch.Tensor,
        along: torch.Tensor,
        count: torch.Tensor,
        pull: torch.Tensor | None,
        *,
        beta: float,
        elements: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b of w ← a w − b s for each row [R, 1]; gain and its momentum are updated in place.

        Args:
            rows: norm r (0 where a row cannot turn), gain γ and its momentum [R, 1].
            size: ‖w‖.
            along: ⟨s, w⟩ of the signs s.
            count: ‖s‖².
            pull: ⟨g, w⟩; None where gains are fixed.
            beta: β.
            elements: C of a row.
        """
        norm, gain, radial = rows
        turns = norm > 0
        safe = torch.where(size > 0, size, 1.0)
        along = along / safe
        tangent = (count - along.square()).clamp_min_(0).sqrt_()
        moves = turns & (size > 0) & (tangent > LEAST_TANGENT * math.sqrt(elements))
        tangent = torch.where(moves, tangent, 1.0)
        if pull is not None:
            radial.lerp_(pull / safe, 1 - beta)
            gain.sub_(torch.sign(radial) * turns * self.length).clamp_min_(LEAST_GAIN)
        radius = norm * gain
        sine = torch.where(moves, radius * math.sin(self.angle) / tangent, 0.0)
        cosine = torch.where(moves, radius * math.cos(self.angle), radius)
        kept = (cosine + sine * along) / safe
        return torch.where(turns, kept, self.keep), torch.where(turns, sine, self.length)


def turn_step(
    weight: torch.Tensor,
    momentum: torch.Tensor,
    gradient: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    toward: Toward,
    turn: Turn,
    *,
    compiled: bool = False,
) -> None:
    """w ← r (x cos θ − d sin θ) of each row, in place, and momentum and gain with it.

    Since ‖s‖² counts the signs that are not 0, a row needs ⟨s, w⟩ and ‖w‖ only: w ← a w − b s.

    Args:
        weight: w [..., R, C], rows in the last dimension.
        momentum: in single precision at least.
        gradient: g.
        rows: norm (0 where a row cannot turn), gain and its momentum [..., R, 1].
        toward: the direction.
        turn: how far.
        compiled: whether to take the compiled kernels.
    """
    elements, beta = weight.shape[-1], toward.beta
    if compiled:
        scalars = _scalars(momentum, 1 - beta, -1.0 if toward.climb else 1.0)
        flat = [tensor.flatten(0, -2) if tensor.dim() > 2 else tensor for tensor in (weight, momentum, gradient)]
        found = _compiled(_row_sums)(*flat, *scalars, toward.nesterov)
        size, along, count, pull = (tensor.view_as(rows[0]) for tensor in found)
        a, b = turn.coefficients(
            rows, size, along, count, pull if turn.learns_gain else None, beta=beta, elements=elements
        )
        shape = (-1, 1) if weight.dim() > 1 else a.shape
        _compiled(_turn_pass)(*flat, *scalars, a.reshape(shape), b.reshape(shape), toward.nesterov)
        return
    for w, m, g, *some in blocks(weight, momentum, gradient, *rows):
        g, signs = toward.follow(m, g)
        now = w.to(m.dtype)
        pull = _products(g, now) if turn.learns_gain else None
        a, b = turn.coefficients(
            (some[0], some[1], some[2]),
            torch.linalg.vector_norm(now, dim=-1, keepdim=True),
            _products(signs, now),
            torch.linalg.vector_norm(signs, dim=-1, keepdim=True).square_(),  # to count them takes ten times as long
            pull,
            beta=beta,
            elements=elements,
        )
        if now is w:
            w.mul_(a).addcmul_(signs, b, value=-1)
        else:
            w.copy_(now * a - signs * b)


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """⟨a, b⟩ of each row [..., R, 1]."""
    return (a * b).sum(-1, keepdim=True)


def _moving_rows(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.dim() < 2:
        return gradient != 0
    return (gradient != 0).flatten(1).any(1).view(-1, *[1] * (gradient.dim() - 1))


# --- compiled


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True)


def _scalars(like: torch.Tensor, *values: float) -> list[torch.Tensor]:
    """As tensors, so that another value is no other kernel."""
    return [torch.tensor(value, dtype=like.dtype, device=like.device) for value in values]


def _signs(
    m: torch.Tensor, g: torch.Tensor, new: torch.Tensor, climb: torch.Tensor, nesterov: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = g.to(m.dtype) * climb
    m = torch.lerp(m, g, new)
    return g, m, torch.sign(torch.lerp(m, g, new) if nesterov else m)


def _sign_pass(
    w: torch.Tensor,
    m: torch.Tensor,
    g: torch.Tensor,
    new: torch.Tensor,
    climb: torch.Tensor,
    keep: torch.Tensor,
    length: torch.Tensor,
    nesterov: bool,
) -> None:
    _, after, signs = _signs(m, g, new, climb, nesterov)
    m.copy_(after)
    w.copy_(w * keep - signs * length)


# in one function, the reductions and what follows from them in place are more than inductor can do on a CPU (2.13)
def _row_sums(
    w: torch.Tensor, m: torch.Tensor, g: torch.Tensor, new: torch.Tensor, climb: torch.Tensor, nesterov: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g, _, signs = _signs(m, g, new, climb, nesterov)
    w = w.to(m.dtype)
    sums = (w * w, signs * w, signs * signs, g * w)
    size, along, count, pull = (one.sum(-1, keepdim=True) for one in sums)
    return size.sqrt(), along, count, pull


def _turn_pass(
    w: torch.Tensor,
    m: torch.Tensor,
    g: torch.Tensor,
    new: torch.Tensor,
    climb: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    nesterov: bool,
) -> None:
    _, after, signs = _signs(m, g, new, climb, nesterov)
    m.copy_(after)
    w.copy_(w * a - signs * b)
