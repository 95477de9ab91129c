"""Kept gradients are those of the source, wherever its batches lie; passes are counted."""

import pytest
import torch
from tests.influence.conftest import MakeRecords

from allmend.influence.gradients import Given, OfRecords
from allmend.influence.kept import Counted, keep
from allmend.influence.methods import DataInf, Gfim, HessianFree
from allmend.influence.scores import influence
from allmend.models.adapters import Trainable


def test_scores_from_kept_gradients_are_those_from_the_model(trainable: Trainable, make_records: MakeRecords) -> None:
    train, target = (OfRecords(trainable, make_records(n, n), tokens_per_pass=20) for n in (9, 4))
    places = [batch.places for batch in train]
    assert [place for some in places for place in some] != list(range(9))  # so that the order is at stake
    kept = keep(train)
    assert len(kept) == 9
    for method in (HessianFree(), Gfim(), DataInf()):
        found, plain = influence(kept, target, method), influence(train, target, method)
        assert torch.allclose(found.values, plain.values, rtol=1e-5, atol=1e-6 * float(plain.values.abs().max()))
        assert torch.equal(found.losses, plain.losses)


def test_no_records_have_no_gradients() -> None:
    with pytest.raises(ValueError, match="no records"):
        keep(Given({"a": torch.zeros(0, 2, 3)}))


@pytest.mark.parametrize(("method", "passes"), [(HessianFree(), 1), (Gfim(), 2), (DataInf(), 3)])
def test_passes_are_counted(method: HessianFree | Gfim | DataInf, passes: int) -> None:
    train = Given({"a": torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}, batch=2)
    counted = Counted(train)
    influence(counted, train, method)
    assert counted.passes == passes
    assert len(counted) == 5
