"""What a model loses on a text: its loss window by window, and differences with their intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from allmend.data.windows import Windows
from allmend.errors import UserError
from allmend.intervals import mean, paired_difference
from allmend.results import Estimate


def window_losses(model: Any, windows: Windows, *, on_window: Callable[[], None] = lambda: None) -> np.ndarray:
    """The mean loss of each window (nats a token), float64 [windows].

    Args:
        model: of transformers.
        windows: each by itself, from its second token on.
        on_window: called when a window is done.

    Raises:
        UserError: a loss is not finite: the weights or the precision do not hold it.
    """
    device = next(model.parameters()).device
    found = []
    for window in windows.ids:
        ids = window[None].to(device)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        found.append(float(losses.double().mean()))
        on_window()
    if not np.isfinite(found).all():
        raise UserError(
            "the model's loss on the text is no number",
            where=windows.source,
            hint="Load the model elsewhere and look at its weights, or use another one.",
        )
    return np.array(found)


def added(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> Estimate:
    """By how much `one` loses more than `other` on the same windows, with an interval over windows."""
    return paired_difference(list(one), list(other))


def interplay(both: np.ndarray, pruned: np.ndarray, quantized: np.ndarray, dense: np.ndarray) -> Estimate:
    """Δ of both steps beside the sum of Δ of each: above 0, they harm each other; an interval over windows."""
    return mean(list((both - dense) - (pruned - dense) - (quantized - dense)))


def in_words(difference: Estimate, first: str, second: str) -> str:
    """Which of two is better, where that is shown: `difference` is the first's loss beside the second's."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "no difference shown"
    return f"{second if difference.value > 0 else first} is better by {abs(difference.value):.3f} nats a token"
