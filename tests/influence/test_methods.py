"""Methods against brute force on gradients that are given, and the algebra between them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from allmend.influence import methods
from allmend.influence.blocks import fisher_blocks
from allmend.influence.gradients import Given, mean_gradient
from allmend.influence.inverses import NotInvertedError, hyperpower
from allmend.influence.kept import Counted
from allmend.influence.methods import DataInf, Exact, Gfim, HessianFree, Lissa, solve, times_fisher
from allmend.influence.scores import influence, score, self_influence

METHODS: dict[str, Callable[[], Any]] = {
    "hessian_free": HessianFree,
    "gfim": Gfim,
    "rank": lambda: Gfim(side="rank"),
    "datainf": DataInf,
    "exact": Exact,
    "lissa": lambda: Lissa(steps=400),
}
EACH = pytest.mark.parametrize("name", sorted(METHODS))


def made(n: int, r: int = 2, d: int = 5, seed: int = 0, batch: int = 4) -> Given:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (r, d), "b": (r, d + 2)}
    scale = torch.linspace(0.3, 2.0, d + 2, dtype=torch.float64)
    gradients = {
        name: torch.randn(n, *shape, generator=generator, dtype=torch.float64) * scale[: shape[1]]
        for name, shape in shapes.items()
    }
    return Given(gradients, batch=batch)


def brute(name: str, train: Given, target: Given, damping: float = 0.1) -> torch.Tensor:
    """Scores with every matrix written out."""
    total = torch.zeros(len(train), dtype=torch.float64)
    for module, g in train.gradients.items():
        n, r, d = g.shape
        flat, v = g.flatten(1), target.gradients[module].mean(0)
        f = flat.T @ flat / n
        lam = damping * float(f.trace()) / (r * d)
        if name == "hessian_free":
            direction = v.flatten()
        elif name in ("exact", "lissa"):
            direction = torch.linalg.inv(f + lam * torch.eye(r * d, dtype=torch.float64)) @ v.flatten()
        elif name == "datainf":
            inverses = [
                torch.linalg.inv(torch.outer(one, one) + lam * torch.eye(r * d, dtype=torch.float64)) for one in flat
            ]
            direction = torch.stack(inverses).mean(0) @ v.flatten()
        elif name == "gfim":
            m = sum(one.T @ one for one in g) / (n * r)
            direction = (v @ torch.linalg.inv(m + lam * torch.eye(d, dtype=torch.float64))).flatten()
        else:
            m = sum(one @ one.T for one in g) / (n * d)
            direction = (torch.linalg.inv(m + lam * torch.eye(r, dtype=torch.float64)) @ v).flatten()
        total += flat @ direction
    return total


@EACH
def test_it_is_what_brute_force_makes(name: str) -> None:
    train, target = made(20), made(7, seed=1)
    found = influence(train, target, METHODS[name]()).values[:, 0]
    expected = brute(name, train, target)
    tolerance = 1e-3 if name == "lissa" else 1e-10
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@EACH
def test_how_records_are_batched_and_ordered_does_not_matter(name: str) -> None:
    train, target = made(13), made(5, seed=1)
    whole = influence(train, target, METHODS[name]()).values
    one = influence(Given(train.gradients, batch=1), target, METHODS[name]()).values
    assert torch.allclose(whole, one, rtol=1e-9)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    turned = Given({key: g[order] for key, g in train.gradients.items()}, batch=3)
    assert torch.allclose(influence(turned, target, METHODS[name]()).values, whole[order], rtol=1e-9)


@EACH
def test_several_targets_at_once_are_each_by_itself(name: str) -> None:
    train, target = made(12), made(6, seed=1)
    groups = ["x", "y", "x", "y", "y", "x"]
    found = influence(train, target, METHODS[name](), groups=[(one,) for one in groups])
    assert found.targets == ("x", "y")
    for place, group in enumerate(found.targets):
        chosen = torch.tensor([one == group for one in groups])
        alone = Given({key: g[chosen] for key, g in target.gradients.items()})
        assert torch.allclose(found.values[:, place], influence(train, alone, METHODS[name]()).values[:, 0], rtol=1e-9)


@EACH
def test_the_target_itself_helps_and_its_opposite_hurts(name: str) -> None:
    train = made(12)
    target = Given({key: g[3:4] for key, g in train.gradients.items()})
    values = influence(train, target, METHODS[name]()).values[:, 0]
    assert values[3] > 0
    opposite = Given({key: -g for key, g in train.gradients.items()})
    assert influence(opposite, target, METHODS[name]()).values[3, 0] < 0


@EACH
@pytest.mark.parametrize("factor", [7.0, 1e-3])
def test_the_scale_of_the_loss_changes_no_order(name: str, factor: float) -> None:
    train, target = made(15), made(4, seed=1)
    before = influence(train, target, METHODS[name]()).values[:, 0]
    scaled, aim = (Given({k: factor * g for k, g in one.gradients.items()}) for one in (train, target))
    after = influence(scaled, aim, METHODS[name]()).values[:, 0]
    assert torch.equal(before.argsort(), after.argsort())


@EACH
def test_duplicated_data_leave_the_scores(name: str) -> None:
    train, target = made(9), made(4, seed=1)
    twice = Given({key: torch.cat([g, g]) for key, g in train.gradients.items()})
    before = influence(train, target, METHODS[name]()).values
    assert torch.allclose(influence(twice, target, METHODS[name]()).values, torch.cat([before, before]), rtol=1e-8)


@EACH
def test_a_module_without_gradients_is_left_out_and_named(name: str) -> None:
    train, target = made(8), made(4, seed=1)
    gradients = {**train.gradients, "b": torch.zeros_like(train.gradients["b"])}
    found = influence(Given(gradients), target, METHODS[name]())
    assert found.solved.skipped == (() if name == "hessian_free" else ("b",))
    alone = Given({"a": train.gradients["a"]})
    only = Given({"a": target.gradients["a"]})
    assert torch.allclose(found.values, influence(alone, only, METHODS[name]()).values, rtol=1e-9)


# --- algebra


@given(st.integers(0, 99))
def test_for_rank_one_gfim_is_exact(seed: int) -> None:
    train, target = made(10, r=1, seed=seed), made(3, r=1, seed=seed + 100)
    gfim, exact = (influence(train, target, method).values for method in (Gfim(), Exact()))
    assert torch.allclose(gfim, exact, rtol=1e-8, atol=1e-10)


def test_gfim_s_block_is_the_nearest_of_its_form() -> None:
    """M is the partial trace of F over r, and any other I ⊗ M is farther from F."""
    g = made(30, r=3, d=4).gradients["a"]
    n, r, d = g.shape
    flat = g.flatten(1)
    f = flat.T @ flat / n
    m = fisher_blocks(Given({"a": g})).matrix("a")
    assert torch.allclose(m, torch.einsum("idie->de", f.view(r, d, r, d)) / r, atol=1e-12)
    assert r * float(m.trace()) == pytest.approx(float(f.trace()))
    nearest = torch.linalg.matrix_norm(f - torch.kron(torch.eye(r, dtype=f.dtype), m))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = m + 0.1 * torch.randn(d, d, generator=generator, dtype=f.dtype)
        assert torch.linalg.matrix_norm(f - torch.kron(torch.eye(r, dtype=f.dtype), other)) > nearest


def test_datainf_is_exact_for_one_record_and_for_equal_ones() -> None:
    target = made(3, seed=1)
    for train in (made(1), Given({key: g.expand(5, -1, -1) for key, g in made(1).gradients.items()})):
        found, exact = (influence(train, target, method).values for method in (DataInf(), Exact()))
        assert torch.allclose(found, exact, rtol=1e-9)


def test_datainf_s_inverse_is_above_the_exact_one() -> None:
    g = made(8).gradients["a"].flatten(1)
    lam = 0.1 * float(g.square().mean())
    eye = torch.eye(g.shape[1], dtype=g.dtype)
    exact = torch.linalg.inv(g.T @ g / len(g) + lam * eye)
    mean = torch.stack([torch.linalg.inv(torch.outer(one, one) + lam * eye) for one in g]).mean(0)
    assert torch.linalg.eigvalsh(mean - exact).min() > -1e-9


def test_another_basis_of_the_adapter_leaves_gfim() -> None:
    """B A = (B Qᵀ)(Q A): gradients turn with Q on their short side."""
    train, target = made(12, r=3), made(4, r=3, seed=1)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    turned, aim = (Given({key: q @ g for key, g in one.gradients.items()}) for one in (train, target))
    before, after = influence(train, target, Gfim()).values, influence(turned, aim, Gfim()).values
    assert torch.allclose(before, after, rtol=1e-9)


def test_a_block_that_is_too_large_moves_a_score_by_no_more_than_its_bound() -> None:
    train, target = made(20), made(5, seed=1)
    _, means = mean_gradient(target)
    blocks, g = fisher_blocks(train), train.gradients["a"]
    matrix = blocks.matrix("a")
    lam = 0.1 * blocks.mean_eigenvalue("a")
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    delta, damped = root @ root.T, matrix + lam * torch.eye(5, dtype=torch.float64)
    inverse, other = torch.linalg.inv(damped), torch.linalg.inv(damped + delta)
    v = means["a"][0]
    e = float(torch.linalg.eigvals(inverse @ delta).real.max())
    for one in g:
        moved = abs(float((v @ other * one).sum() - (v @ inverse * one).sum()))
        size = float((v @ inverse * v).sum() * (one @ inverse * one).sum()) ** 0.5
        assert moved <= e / (1 + e) * size + 1e-12
    assert e <= float(delta.trace()) / lam


@pytest.mark.parametrize("steps", [1, 10, 400])
def test_a_recursion_that_diverges_is_no_score_however_soon_it_is_broken_off(steps: int) -> None:
    train, target = made(10), made(3, seed=1)
    f = {key: g.flatten(1).T @ g.flatten(1) / 10 for key, g in train.gradients.items()}
    largest = max(float(torch.linalg.eigvalsh(one)[-1] + 0.1 * one.diagonal().mean()) for one in f.values())
    with pytest.raises(NotInvertedError, match="the recursion diverges"):
        influence(train, target, Lissa(steps=steps, alpha=2.2 / largest))
    influence(train, target, Lissa(steps=steps, alpha=1.8 / largest))


def test_a_residual_that_grows_is_seen_where_the_eigenvalue_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allmend.influence.methods._largest_eigenvalues", lambda source, like: dict.fromkeys(like, 0.0))
    with pytest.raises(NotInvertedError, match="the recursion diverges"):
        influence(made(10), made(3, seed=1), Lissa(steps=3, alpha=1.0))


def test_exact_is_what_conjugate_gradients_come_to() -> None:
    train, target = made(20), made(7, seed=1)
    _, means = mean_gradient(target)
    found = Exact().solve(train, means)
    for name, v in means.items():

        def apply(x: torch.Tensor, name: str = name) -> torch.Tensor:
            return times_fisher(train, {name: x})[name] + found.damping[name] * x

        x = torch.zeros_like(v)
        left = direction = v
        for _ in range(2 * v.numel()):
            curved = apply(direction)
            step = left.square().sum() / (direction * curved).sum()
            x, rest = x + step * direction, left - step * curved
            direction, left = rest + rest.square().sum() / left.square().sum() * direction, rest
            if float(left.norm()) < 1e-13 * float(v.norm()):
                break
        assert torch.allclose(found.directions[name], x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("room", "passes"), [(2**30, 1), (20 * 10 * 8, 2), (1, 2)])
def test_exact_takes_as_few_passes_as_memory_allows(room: int, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "HELD_BYTES", room)
    train, target = Counted(made(20)), made(4, seed=1)
    found = influence(train, target, Exact()).values
    assert train.passes == 2 + passes  # damping, and scores
    assert torch.allclose(found[:, 0], brute("exact", train.source, target), rtol=1e-9)  # type: ignore[arg-type]


@EACH
def test_the_order_of_modules_does_not_matter(name: str) -> None:
    train, target = made(13), made(5, seed=1)
    turned, aim = (Given(dict(reversed(one.gradients.items()))) for one in (train, target))
    found = influence(turned, aim, METHODS[name]()).values
    assert torch.allclose(found, influence(train, target, METHODS[name]()).values, rtol=1e-10)


def test_gradients_of_sixteen_bits_leave_the_order() -> None:
    train, target = made(200), made(20, seed=1)
    low, aim = (Given({key: g.bfloat16() for key, g in one.gradients.items()}) for one in (train, target))
    found, whole = influence(low, aim, Gfim()).values[:, 0], influence(train, target, Gfim()).values[:, 0]
    assert stats.spearmanr(found, whole).statistic >= 0.999


@pytest.mark.parametrize("absolute", [False, True])
def test_the_scale_of_the_loss_changes_ranks_under_an_absolute_damping_alone(absolute: bool) -> None:
    train, target = made(30), made(4, seed=1)
    lambdas = {key: 0.1 * fisher_blocks(train).mean_eigenvalue(key) for key in train.gradients}
    orders = []
    for factor in (1.0, 1 / 7):
        scaled, aim = (Given({key: factor * g for key, g in one.gradients.items()}) for one in (train, target))
        blocks, (_, means) = fisher_blocks(scaled), mean_gradient(aim)
        directions = {
            key: solve(
                blocks, {key: v}, damping=lambdas[key] / blocks.mean_eigenvalue(key) if absolute else 0.1
            ).directions[key]
            for key, v in means.items()
        }
        orders.append(score(scaled, directions)[0][:, 0].argsort())
    assert torch.equal(*orders) is not absolute


@pytest.mark.parametrize(("damping", "dtype"), [(0.1, torch.float32), (1e-5, torch.float64)])
def test_small_dampings_are_solved_in_double_precision(damping: float, dtype: torch.dtype) -> None:
    """The condition number may be d (1 + c) / c, and in single precision 1e7 leaves no digit."""
    single = [Given({key: g.float() for key, g in made(n, r=1).gradients.items()}) for n in (3, 2)]
    (train, (_, means)) = single[0], mean_gradient(single[1])
    found = Gfim(damping).solve(train, means)
    for name, one in found.figures.items():
        assert found.directions[name].dtype == dtype
        assert one.dtype == str(dtype).removeprefix("torch.")
        assert one.condition is not None
        assert one.condition <= one.size * (1 + damping) / damping
        assert one.residual < 1e-5


def test_a_block_that_cannot_be_inverted_is_named_with_its_smallest_eigenvalue() -> None:
    _, means = mean_gradient(made(3, seed=1))
    blocks = fisher_blocks(made(10))
    sums = {**blocks.sums, "b": blocks.sums["b"] - 100 * torch.eye(7, dtype=torch.float64)}
    with pytest.raises(NotInvertedError, match=r"^b: not positive definite: the smallest eigenvalue is -"):
        solve(replace(blocks, sums=sums), means)


def test_a_solver_that_gives_up_is_replaced_and_noted() -> None:
    train, target = made(10), made(3, seed=1)
    _, means = mean_gradient(target)
    found = solve(fisher_blocks(train), means, inverse=hyperpower(max_steps=1))
    assert all("Cholesky's factors were taken" in note for note in found.notes)
    plain = solve(fisher_blocks(train), means)
    assert all(torch.equal(found.directions[name], plain.directions[name]) for name in means)
    assert plain.notes == ()


def test_self_influence_is_that_of_each_record_as_its_own_target() -> None:
    train = made(6)
    found = self_influence(train)
    for place in range(6):
        own = Given({key: g[place : place + 1] for key, g in train.gradients.items()})
        assert found[place] == pytest.approx(float(influence(train, own, Gfim()).values[place, 0]), rel=1e-9)


def test_the_score_of_a_group_is_that_of_its_summed_gradient() -> None:
    train, target = made(9), made(3, seed=1)
    solved = Gfim().solve(train, mean_gradient(target)[1])
    each, _ = score(train, solved.directions)
    whole, _ = score(Given({key: g.sum(0, keepdim=True) for key, g in train.gradients.items()}), solved.directions)
    assert torch.allclose(each.sum(0), whole[0], rtol=1e-10)


def test_the_product_with_fisher_s_matrix_is_formed_without_it() -> None:
    train, target = made(9), made(2, seed=1)
    x = dict(target.gradients)
    for name, found in times_fisher(train, x).items():
        flat = train.gradients[name].flatten(1)
        assert torch.allclose(found.flatten(1), x[name].flatten(1) @ (flat.T @ flat / 9), rtol=1e-10)


def test_what_makes_no_score_is_refused() -> None:
    train, target = made(4), made(2, seed=1)
    _, means = mean_gradient(target)
    with pytest.raises(ValueError, match="damping must be 0 or more"):
        solve(fisher_blocks(train), means, damping=-1)
    with pytest.raises(ValueError, match="there is no block for b"):
        solve(fisher_blocks(Given({"a": train.gradients["a"]})), means)
    with pytest.raises(ValueError, match="damping must be above 0"):
        influence(train, target, Exact(damping=0.0))
    with pytest.raises(ValueError, match="no target record"):
        mean_gradient(Given({"a": torch.zeros(0, 2, 3)}))
