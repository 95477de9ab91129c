"""Sums that members send against sums over all records written out; totals that no records come to."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmend.errors import UserError
from allmend.influence.blocks import fisher_blocks
from allmend.influence.gradients import Given
from allmend.influence.summed_curvature import SummedBlocks, SummedCorrections, SummedCurvature, is_sum_of_squares
from allmend.models.tensors import Tensors
from allmend.strategy import Reply, State, Sums, Task, Turn, grouped

R, D, Q = 2, 5, 3


def made(seed: int, n: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 3, n, dtype=torch.float64).view(-1, 1, 1)
    return torch.randn(n, R, D, generator=generator, dtype=torch.float64) * scale


def targets(seed: int) -> Tensors:
    return {"a": made(seed + 1000, Q), "b": made(seed + 2000, Q), "c": torch.zeros(Q, R, D, dtype=torch.float64)}


def summed(it: SummedCurvature, seed: int, cuts: tuple[int, ...] = (0, 5, 12)) -> tuple[State, Sums, Tensors]:
    """Both legs by members that have the records between cuts; module b has no gradients, and c no target."""
    whole = {"a": made(seed), "b": torch.zeros(12, R, D, dtype=torch.float64), "c": made(seed + 1)}
    sources = [Given({name: g[low:high] for name, g in whole.items()}) for low, high in pairwise(cuts)]
    first = [it.measure(source) for source in sources]
    sizes = {name: sum(sizes[name] for sizes, _ in first) for name in whole}
    state = State(grouped("target", targets(seed)) | grouped("size", it.units(sizes, 0.0)), {"records": 12})
    given_, facts = it.given(state)
    task, sums = Task(Turn(1, 1, 1), given_, facts), Sums()
    for source, (_, kept) in zip(sources, first, strict=True):
        parts = it.work(task, kept, source)
        assert all(float(part.abs().max()) <= 1 + 1e-12 for part in parts.values())
        sums.add(Reply(grouped(it.part, parts), {"records": float(len(source))}))
    return state, sums, whole


@pytest.mark.parametrize("it", [SummedBlocks(), SummedCorrections(targets=Q)], ids=["gfim", "datainf"])
def test_what_is_sent_has_the_declared_names_and_shapes(it: SummedCurvature) -> None:
    state, sums, _ = summed(it, 0)
    size, part = it.shapes(R, D)
    assert set(it.words) == {"size", it.part}
    assert state.tensors["size/a"].shape == size
    assert sums[f"{it.part}/a"].shape == part
    assert float(state.tensors["size/a"].sum()) == pytest.approx(float(made(0).square().sum()), rel=1e-12)


@given(seed=st.integers(0, 50))
def test_summed_blocks_are_those_of_all_records(seed: int) -> None:
    it = SummedBlocks()
    state, sums, whole = summed(it, seed)
    sizes = {name: state.tensors[f"size/{name}"] for name in whole}
    found, expected = it.blocks(sizes, dict.fromkeys(whole, R), sums), fisher_blocks(Given(whole))
    assert (found.records, dict(found.count)) == (expected.records, dict(expected.count))
    for name, block in expected.sums.items():
        assert torch.allclose(found.sums[name], block, rtol=1e-9, atol=1e-15)
    assert it.solved(state, sums).skipped == ("b",)


@given(seed=st.integers(0, 50), damping=st.floats(1e-4, 10))
def test_directions_of_summed_corrections_are_means_of_inverses(seed: int, damping: float) -> None:
    it = SummedCorrections(damping, Q)
    state, sums, whole = summed(it, seed)
    solved = it.solved(state, sums)
    assert solved.skipped == ("b",)
    flat = whole["a"].flatten(1)
    lam = damping * float((flat.T @ flat / 12).trace()) / (R * D)
    assert solved.damping["a"] == pytest.approx(lam, rel=1e-12)
    eye = torch.eye(R * D, dtype=torch.float64)
    mean = torch.stack([torch.linalg.inv(torch.outer(one, one) + lam * eye) for one in flat]).mean(0)
    expected = (targets(seed)["a"].flatten(1) @ mean).view(Q, R, D)
    assert torch.allclose(solved.directions["a"], expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
    assert not solved.directions["c"].any(), "no target, no direction"


@pytest.mark.parametrize("factor", [-1.0, 20.0])
def test_corrections_that_no_records_come_to_are_refused(factor: float) -> None:
    it = SummedCorrections(targets=Q)
    state, sums, _ = summed(it, 0)
    lie = {name: sums[name].clone() for name in sums}
    lie["correction/a"][1] *= factor  # of one target alone
    with pytest.raises(UserError, match="summed correction of a is none that 12 records have"):
        it.solved(state, Sums.of(lie, {"records": 12.0}, 2))


def test_sizes_are_raised_by_what_rounding_may_have_taken() -> None:
    sizes = {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2)}
    raised = SummedBlocks().units(sizes, 0.5)
    assert (raised["a"].tolist(), raised["b"].tolist()) == ([1.5, 0.5], [0.0, 0.0])
    assert SummedCorrections().units(sizes, 0.5) == sizes


@pytest.mark.parametrize(("least", "fine"), [(0.0, True), (-5e-7, True), (-2e-6, False), (-0.5, False)])
def test_an_eigenvalue_below_rounding_is_told_from_one_within(least: float, fine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(0.01, 1, 12, dtype=torch.float64)
    values[0] = 0
    values /= values.sum()
    values[0] = least  # of a trace of about 1
    assert is_sum_of_squares(basis @ torch.diag(values) @ basis.T) is fine
    assert not is_sum_of_squares(-torch.eye(3, dtype=torch.float64))
