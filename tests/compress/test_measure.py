"""Losses of windows against transformers' own, and differences in words."""

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from allmend.compress.measure import added, in_words, interplay, window_losses
from allmend.data.windows import Windows
from allmend.errors import UserError
from allmend.results import Estimate


def windows(model: PreTrainedModel) -> Windows:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (4, 19), generator=torch.Generator().manual_seed(0))
    return Windows(ids, "text", "digest")


def test_losses_are_transformers_own(tiny_model: PreTrainedModel) -> None:
    some, told = windows(tiny_model), []
    found = window_losses(tiny_model, some, on_window=lambda: told.append(1))
    assert len(told) == 4
    for loss, ids in zip(found, some.ids, strict=True):
        with torch.no_grad():
            expected = tiny_model(ids[None], labels=ids[None]).loss
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_is_no_number_is_refused(make_tiny_model: object, tiny_model: PreTrainedModel) -> None:
    weight = tiny_model.get_input_embeddings().weight
    before = weight.detach().clone()
    try:
        weight.data[:] = math.nan
        with pytest.raises(UserError, match="is no number"):
            window_losses(tiny_model, windows(tiny_model))
    finally:
        weight.data[:] = before


def test_differences_are_paired() -> None:
    dense = np.array([1.0, 2.0, 3.0, 4.0])
    gap = added(dense + 0.1, dense)
    assert gap.value == pytest.approx(0.1)
    noisy = added(dense + np.array([0.1, 0.2, 0.1, 0.2]), dense)
    assert noisy.low is not None
    assert 0 < noisy.low < noisy.value == pytest.approx(0.15)
    found = interplay(dense + 0.5, dense + 0.1, dense + 0.3, dense)
    assert found.value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (Estimate(value=0.1, low=0.05, high=0.15, n=8), "S is better by 0.100 nats a token"),
        (Estimate(value=-0.1, low=-0.15, high=-0.05, n=8), "Q is better by 0.100 nats a token"),
        (Estimate(value=0.1, low=-0.05, high=0.25, n=8), "no difference shown"),
        (Estimate(value=0.1, n=1), "no difference shown"),
    ],
)
def test_what_is_shown_is_said(difference: Estimate, expected: str) -> None:
    assert in_words(difference, "Q", "S") == expected
