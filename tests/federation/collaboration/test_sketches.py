import pytest
import torch

from allmend.federation.collaboration.graph import pair_of
from allmend.federation.collaboration.sketches import gradient_sketch, nearest, sketch_groups


def gradient(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(*size, generator=generator) for name, size in (("b", (3, 7)), ("a", (11,)))}


def inner(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(sum((one[name].double() * other[name]).sum() for name in one))


def test_products_are_right_on_average_and_as_far_off_as_they_should_be() -> None:
    g, h = gradient(1), gradient(2, 2.0)
    size, seeds = 32, 400

    found = torch.tensor(
        [float(gradient_sketch(g, size, seed) @ gradient_sketch(h, size, seed)) / size for seed in range(seeds)]
    )

    variance = (inner(g, g) * inner(h, h) + inner(g, h) ** 2) / size
    assert float(found.mean()) == pytest.approx(inner(g, h), abs=4 * (variance / seeds) ** 0.5)
    assert float(found.var()) == pytest.approx(variance, rel=0.3)


def test_a_sketch_is_linear_and_follows_from_its_seed() -> None:
    g, h = gradient(1), gradient(2)
    both = {name: g[name] - 3 * h[name] for name in g}

    assert torch.equal(gradient_sketch(g, 16, 5), gradient_sketch(dict(reversed(g.items())), 16, 5))
    expected = gradient_sketch(g, 16, 5) - 3 * gradient_sketch(h, 16, 5)
    assert torch.allclose(gradient_sketch(both, 16, 5), expected, atol=1e-4)
    assert not torch.allclose(gradient_sketch(g, 16, 5), gradient_sketch(g, 16, 6))


def test_groups_that_pull_apart_are_found() -> None:
    """Members of a group agree, and all gradients sum to zero, as they do where one model suits all on average."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 64, generator=generator)
    members = torch.tensor([0, 1, 0, 2, 3, 1, 2, 3, 0, 1, 2, 3])
    sketches = centres[members] + 0.3 * torch.randn(12, 64, generator=generator)
    sketches -= sketches.mean(0)

    assert sketch_groups(sketches).tolist() == members.tolist()
    # lengths do not matter
    assert sketch_groups(sketches * torch.rand(12, 1, generator=generator)).tolist() == members.tolist()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_members_are_one_group(n: int) -> None:
    assert sketch_groups(torch.randn(n, 8)).tolist() == [0] * n


@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize("first", [0, 9])
def test_neighbours_are_those_of_the_largest_cosines(rows: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allmend.federation.collaboration.sketches.ROWS", rows)
    sketches = torch.randn(12, 20, generator=torch.Generator().manual_seed(1)) * torch.rand(12, 1)
    sketches[3] = 0

    found = {(i, j) for i, j in pair_of(nearest(sketches, 3, first=first)).T.tolist()}

    expected = set()
    for one in range(first, 12):
        near = [
            (float(torch.cosine_similarity(sketches[one], sketches[other], dim=0)), other)
            for other in range(12)
            if other not in (one, 3)
        ]
        if one != 3:
            expected |= {(min(one, other), max(one, other)) for _, other in sorted(near)[-3:]}
    assert found == expected


def test_more_neighbours_than_there_are_members_are_all_of_them() -> None:
    assert len(nearest(torch.randn(4, 8), 9)) == 6
    assert len(nearest(torch.randn(1, 8), 9)) == 0
    assert len(nearest(torch.zeros(3, 8), 2)) == 0
    assert len(nearest(torch.zeros(0, 8), 2)) == 0
