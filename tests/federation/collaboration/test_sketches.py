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


def halves(members: torch.Tensor, seed: int, *, noise: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Members of a group agree but for noise, and gradients sum to zero, as where one model suits all on average."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(int(members.max()) + 1, 64, generator=generator)
    both = [centres[members] + noise * torch.randn(len(members), 64, generator=generator) for _ in range(2)]
    first, second = (one - one.mean(0) for one in both)
    return first, second


def test_groups_that_pull_apart_are_found() -> None:
    members = torch.tensor([0, 1, 0, 2, 3, 1, 2, 3, 0, 1, 2, 3])
    first, second = halves(members, 0)

    assert sketch_groups(first, second, most=6).tolist() == members.tolist()
    # lengths do not matter
    lengths = torch.rand(12, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert sketch_groups(first * lengths, second, most=6).tolist() == members.tolist()
    # nor does the order of members
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    turned = sketch_groups(first[order], second[order], most=6)
    same = members[order][:, None] == members[order]
    assert torch.equal(turned[:, None] == turned, same)


def test_no_more_groups_are_made_than_may_be() -> None:
    members = torch.arange(24) % 8
    first, second = halves(members, 3)
    assert len(sketch_groups(first, second, most=12).unique()) == 8
    assert len(sketch_groups(first, second, most=3).unique()) <= 3


def test_groups_that_one_half_has_and_the_other_has_not_are_none() -> None:
    members = torch.arange(16) % 4
    first = halves(members, 0)[0]
    others = [members[torch.randperm(16, generator=torch.Generator().manual_seed(seed))] for seed in (5, 6)]
    found = [
        len(sketch_groups(first, halves(other, seed)[1], most=8).unique())
        for seed, other in zip((5, 6), others, strict=True)
    ]
    assert sketch_groups(*halves(members, 0), most=8).max() == 3
    assert found == [1, 1]


@pytest.mark.parametrize("n", [8, 30])
def test_members_of_one_kind_are_mostly_one_group(n: int) -> None:
    """A test at a level of a tenth: of forty draws, at most a quarter."""
    generator = torch.Generator().manual_seed(0)
    draws = [[torch.randn(n, 64, generator=generator) for _ in range(2)] for _ in range(40)]
    cut = sum(bool(sketch_groups(first, second, most=n).any()) for first, second in draws)
    assert cut <= 10


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_members_are_one_group(n: int) -> None:
    assert sketch_groups(torch.randn(n, 8), torch.randn(n, 8), most=4).tolist() == [0] * n


@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize("first", [0, 9])
def test_neighbours_are_those_of_the_largest_cosines(rows: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allmend.federation.collaboration.sketches.ROWS", rows)
    sketches = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    sketches *= torch.arange(1, 13)[:, None]  # lengths do not matter
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
