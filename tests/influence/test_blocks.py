"""Sums over records: how they add up, and their file."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.influence.test_methods import made

from allmend.errors import UserError
from allmend.influence.blocks import FisherBlocks, Side, fisher_blocks
from allmend.influence.gradients import Given

SIDES = pytest.mark.parametrize("side", ["wide", "rank"])


def parts(train: Given, cuts: list[int]) -> list[Given]:
    edges = [0, *cuts, len(train)]
    return [Given({key: g[low:high] for key, g in train.gradients.items()}) for low, high in pairwise(edges)]


@SIDES
def test_blocks_of_members_add_up_to_those_of_all(side: Side) -> None:
    train = made(17)
    whole = fisher_blocks(train, side=side)
    one, two, three = (fisher_blocks(part, side=side) for part in parts(train, [4, 9]))
    for total in (one + two + three, one + (two + three), three + one + two, FisherBlocks() + one + two + three):
        assert total.records == 17
        assert total.count == whole.count
        for name in whole.sums:
            assert torch.allclose(total.sums[name], whole.sums[name], rtol=1e-10)


def test_the_mean_eigenvalue_is_the_mean_square_of_a_gradient_s_entries() -> None:
    train = made(11, r=3)
    for side in ("wide", "rank"):
        blocks = fisher_blocks(train, side=side)  # type: ignore[arg-type]
        for name, g in train.gradients.items():
            assert blocks.mean_eigenvalue(name) == pytest.approx(float(g.square().mean()), rel=1e-10)
            values = torch.linalg.eigvalsh(blocks.matrix(name))
            assert float(values.mean()) == pytest.approx(blocks.mean_eigenvalue(name), rel=1e-9)


def test_what_does_not_belong_together_is_not_added_and_both_values_are_told() -> None:
    train = made(5)
    one = fisher_blocks(train, weights="x")
    for other, words in (
        (fisher_blocks(train, weights="y"), "of other weights, x and y"),
        (fisher_blocks(train, side="rank", weights="x"), "of other sides, wide and rank"),
        (fisher_blocks(Given({"a": train.gradients["a"]}), weights="x"), "first alone has b, the second alone no mod"),
        (fisher_blocks(made(5, d=4), weights="x"), "a is 5 × 5 and 4 × 4"),
    ):
        with pytest.raises(UserError, match=words):
            one + other


def test_gradients_of_low_precision_are_summed_in_single() -> None:
    train = made(64)
    low = Given({key: g.bfloat16() for key, g in train.gradients.items()})
    found, whole = fisher_blocks(low), fisher_blocks(train)
    for name in whole.sums:
        assert found.sums[name].dtype == torch.float32
        assert torch.allclose(found.sums[name].double(), whole.sums[name], rtol=0.05, atol=0.3)


def test_they_come_back_from_their_file(tmp_path: Path) -> None:
    blocks = fisher_blocks(made(5), side="rank", weights="x")
    blocks.save(tmp_path / "blocks.safetensors")
    again = FisherBlocks.load(tmp_path / "blocks.safetensors")
    assert (again.count, again.records, again.side, again.weights) == (blocks.count, 5, "rank", "x")
    assert all(torch.equal(again.sums[name], blocks.sums[name]) for name in blocks.sums)
    data = (tmp_path / "blocks.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[:-9])
    with pytest.raises(UserError):
        FisherBlocks.load(tmp_path / "short.safetensors")
    from allmend.models.tensors import write_tensors

    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(2)}, {"kind": "else"})
    with pytest.raises(UserError, match="holds no Fisher blocks"):
        FisherBlocks.load(tmp_path / "other.safetensors")
