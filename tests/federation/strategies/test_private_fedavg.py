"""Private averaging against its formula: what one member can do to the sum, and what noise the sum gets."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from scipy import stats

from allmend.federation.strategies.private_fedavg import CLIP_RATE, QUANTILE_BUDGET, PrivateFedAvg
from allmend.models.tensors import Tensors
from allmend.strategy import Reply, State, Sums, Turn, of_group

MakeToy = Callable[..., Any]

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
updates = st.lists(numbers, min_size=3, max_size=3).map(lambda values: torch.tensor(values, dtype=torch.float64))
clips = st.floats(1e-6, 1e6)
START = {"x": torch.zeros(3, dtype=torch.float64)}


def client(make_toy: MakeToy, name: str, step: torch.Tensor) -> Any:
    toy = make_toy(name)
    toy.step = step
    return toy


def reply_to(make_toy: MakeToy, step: torch.Tensor, **options: Any) -> Reply:
    strategy = PrivateFedAvg(**{"noise_multiplier": 0.0} | options)
    task = strategy.plan(strategy.init(START), Turn(1, 0, 1, 1), ["a"])["a"]
    return strategy.work(task, client(make_toy, "a", step))


def total(replies: Sequence[Reply]) -> Sums:
    sums = Sums()
    for reply in replies:
        sums.add(reply)
    return sums


def norm(tensors: Tensors) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for tensor in tensors.values() for x in tensor.flatten()))


# --- one member


@given(updates, clips)
@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_reply_is_longer_than_the_clip_and_shorter_ones_are_whole(
    make_toy: MakeToy, step: torch.Tensor, clip: float
) -> None:
    update = reply_to(make_toy, step, clip=clip).summed["update/x"]
    length = float(step.norm())
    assert norm({"x": update}) <= clip
    if length <= clip * (1 - 1e-9):
        assert torch.equal(update, step)
    else:
        torch.testing.assert_close(update, step * (clip / length), rtol=1e-9, atol=0)


@given(st.lists(updates, min_size=1, max_size=5), clips, st.floats(0.05, 1))
@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_member_more_or_less_moves_the_sum_by_the_clip_at_most(
    make_toy: MakeToy, steps: list[torch.Tensor], clip: float, participation: float
) -> None:
    replies = [reply_to(make_toy, step, clip=clip) for step in steps]
    strategy = PrivateFedAvg(clip=clip, noise_multiplier=0.0, participation=participation)
    state, turn = strategy.init(START), Turn(1, 0, 1, len(steps))
    outcomes = []
    for chosen in (replies, replies[1:]):  # the first member is drawn, or not: the denominator stays
        shared = strategy.shared(strategy.combine(state, turn, total(chosen), {}))
        assert shared is not None
        outcomes.append(shared["x"])
    moved = float((outcomes[0] - outcomes[1]).norm()) * participation * len(steps)
    # adding in float64 rounds the sum, by its size and not by the member's
    assert moved <= clip * (1 + len(steps) * 1e-12)


def test_the_clip_is_over_all_parameters_together(make_toy: MakeToy) -> None:
    strategy = PrivateFedAvg(clip=1.0, noise_multiplier=0.0)
    start = {"a": torch.zeros(1), "b": torch.zeros(2)}

    class Two:
        def train(self, start: Tensors, turn: Turn) -> Any:
            toy = make_toy("a").train({"x": torch.zeros(3)}, turn)
            toy.tensors.clear()
            toy.tensors.update({"a": start["a"] + 3, "b": start["b"] + torch.tensor([0.0, 4.0])})
            return toy

    task = strategy.plan(strategy.init(start), Turn(1, 0, 1), ["a"])["a"]
    update = of_group("update", strategy.work(task, Two()).summed)  # type: ignore[arg-type]
    assert torch.cat([update["a"], update["b"]]).tolist() == pytest.approx([0.6, 0.0, 0.8])


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_what_is_returned_is_what_is_declared_and_no_loss_is(make_toy: MakeToy, quantile: float | None) -> None:
    reply = reply_to(make_toy, torch.ones(3), clip=1.0, quantile=quantile)
    declaration = PrivateFedAvg(clip=1.0, noise_multiplier=1.0, quantile=quantile).declare()
    assert declaration.undeclared(reply) == []
    assert {name.partition("/")[0] for name in reply.summed} | set(reply.summed_facts) == set(declaration.summed)
    assert declaration.numbers & set(declaration.summed) == set(reply.summed_facts)
    assert not reply.seen
    assert not reply.seen_facts
    assert not declaration.seen
    assert make_toy("a").train(START, Turn(1, 0, 1)).loss is not None  # there was one to tell
    assert not any("loss" in name for name in (*declaration.summed, *reply.summed_facts))


def test_how_many_records_a_member_has_does_not_count(make_toy: MakeToy) -> None:
    strategy = PrivateFedAvg(clip=9.0, noise_multiplier=0.0)
    task = strategy.plan(strategy.init(START), Turn(1, 0, 1), ["a"])["a"]
    few, many = (strategy.work(task, make_toy("a", examples)) for examples in (1, 1000))
    assert torch.equal(few.summed["update/x"], many.summed["update/x"])
    assert few.summed_facts == many.summed_facts


@given(updates, clips)
@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_reply_alone_reveals_the_start_and_the_clipped_update(
    make_toy: MakeToy, step: torch.Tensor, clip: float
) -> None:
    strategy = PrivateFedAvg(clip=clip, noise_multiplier=1.0)
    start = {"x": torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)}
    task = strategy.plan(strategy.init(start), Turn(1, 0, 1), ["a"])["a"]
    revealed = strategy.revealed(task, strategy.work(task, client(make_toy, "a", step)))
    assert revealed is not None
    scale = min(1.0, clip / length) if (length := float(step.norm())) else 1.0
    torch.testing.assert_close(revealed["x"], start["x"] + scale * step, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_cannot_be_summed(make_toy: MakeToy, bad: float) -> None:
    with pytest.raises(ValueError, match="NaN"):
        total([reply_to(make_toy, torch.tensor([1.0, bad, 0.0]), clip=1.0)])


# --- the sum


@given(st.lists(updates, min_size=1, max_size=5), st.sampled_from([1e9, math.inf]))
@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_without_clip_and_noise_it_is_the_unweighted_mean(
    make_toy: MakeToy, steps: list[torch.Tensor], clip: float
) -> None:
    strategy = PrivateFedAvg(clip=clip, noise_multiplier=0.0)
    state, turn = strategy.init(START), Turn(1, 0, 1, len(steps))
    names = [f"m{index}" for index in range(len(steps))]
    tasks = strategy.plan(state, turn, names)
    replies = [strategy.work(tasks[n], client(make_toy, n, step)) for n, step in zip(names, steps, strict=True)]
    shared = strategy.shared(strategy.combine(state, turn, total(replies), {}))
    assert shared is not None
    torch.testing.assert_close(shared["x"], torch.stack(steps).mean(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("participation", "members", "quantile"), [(1.0, 4, None), (0.25, 20, None), (0.5, 6, 0.5)])
def test_the_noise_is_normal_with_deviation_z_c_over_q_n(
    participation: float, members: int, quantile: float | None
) -> None:
    """Where the clip adapts, a tenth of the budget goes to the count: z is larger by √(1 / 0.9) for the update."""
    clip, z = 0.7, 1.3
    start = {"a": torch.zeros(30, 20), "b": torch.zeros(100)}
    noise = []
    for seed in range(20):
        strategy = PrivateFedAvg(
            clip=clip, noise_multiplier=z, participation=participation, quantile=quantile, seed=seed
        )
        shared = strategy.shared(strategy.combine(strategy.init(start), Turn(1, 0, 9, members), Sums(), {}))
        assert shared is not None
        noise += [tensor.flatten() for tensor in shared.values()]
    found = torch.cat(noise).double() / (clip / (participation * members))
    expected = z / math.sqrt(1 - (QUANTILE_BUDGET if quantile else 0))
    assert found.std().item() == pytest.approx(expected, rel=4.5 / math.sqrt(2 * len(found)))
    assert abs(found.mean().item()) < 4.5 * expected / math.sqrt(len(found))
    assert stats.kstest((found / expected).numpy(), "norm").pvalue > 1e-3


def test_the_two_releases_of_a_round_cost_what_one_would() -> None:
    """Gaussian releases together: 1 / z² adds up. The update has sensitivity C, the count ±1/2 has 1/2."""
    z, clip, counts, sums = 1.3, 2.0, [], Sums()
    strategies = [PrivateFedAvg(clip=clip, noise_multiplier=z, quantile=0.5, seed=seed) for seed in range(3000)]
    for strategy in strategies:
        # 1000 members' count is 0; the clip's logarithm tells the noisy one, as long as no end of [0, 1] is near
        state = strategy.combine(State({}, {"clip": clip}), Turn(1, 0, 9, 1000), sums, {})
        counts.append(-1000 / CLIP_RATE * math.log(float(state.facts["clip"]) / clip))
    deviation = torch.tensor(counts, dtype=torch.float64).std().item()
    of_update, of_count = strategies[0]._update_multiplier, deviation / 0.5
    assert 1 / of_update**2 + 1 / of_count**2 == pytest.approx(1 / z**2, rel=QUANTILE_BUDGET * 2 * 0.06)
    assert abs(sum(counts) / len(counts)) < 4.5 * deviation / math.sqrt(len(counts))


def test_where_nobody_is_drawn_only_noise_is_left() -> None:
    strategy = PrivateFedAvg(clip=1.0, noise_multiplier=2.0, participation=1e-9)
    state = strategy.init({"x": torch.ones(3)})
    assert strategy.plan(state, Turn(1, 0, 9, 50), [f"m{i}" for i in range(50)]) == {}
    noisy = strategy.shared(strategy.combine(state, Turn(1, 0, 9, 50), Sums(), {}))
    assert noisy is not None
    assert not torch.equal(noisy["x"], torch.ones(3))
    silent = PrivateFedAvg(clip=1.0, noise_multiplier=0.0, participation=1e-9)
    left = silent.shared(silent.combine(state, Turn(1, 0, 9, 50), Sums(), {}))
    assert left is not None
    assert torch.equal(left["x"], torch.ones(3))


def test_noise_repeats_by_seed_and_round_where_it_is_seeded_and_never_where_it_is_secure() -> None:
    def draw(seed: int = 0, round: int = 1, randomness: Any = "seeded") -> tuple[float, ...]:
        strategy = PrivateFedAvg(clip=1.0, noise_multiplier=1.0, quantile=0.5, seed=seed, randomness=randomness)
        state = strategy.combine(strategy.init({"x": torch.zeros(2)}), Turn(round, 0, 9, 1000), Sums(), {})
        return *state.tensors["model/x"].tolist(), float(state.facts["clip"])

    assert draw() == draw()
    different = [draw(), draw(seed=1), draw(round=2), draw(randomness="secure"), draw(randomness="secure")]
    assert len(set(different)) == 5
    assert len({x for values in different for x in values}) == 15


def test_the_order_of_the_parameters_decides_no_noise() -> None:
    """A state that comes back from a checkpoint may hold them in another one."""
    strategy = PrivateFedAvg(clip=1.0, noise_multiplier=1.0)
    state = strategy.init({"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(4)})
    turned = State(dict(reversed(state.tensors.items())), dict(state.facts))
    one, other = (strategy.combine(s, Turn(1, 0, 1, 5), Sums(), {}).tensors for s in (state, turned))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_type_of_the_parameters_stays(make_toy: MakeToy) -> None:
    strategy = PrivateFedAvg(clip=1.0, noise_multiplier=1.0)
    state = strategy.init({"x": torch.ones(3, dtype=torch.bfloat16)})
    task = strategy.plan(state, Turn(1, 0, 1), ["a"])["a"]
    reply = strategy.work(task, make_toy("a"))
    after = strategy.combine(state, Turn(1, 0, 1), total([reply]), {})
    assert after.tensors["model/x"].dtype == torch.bfloat16
    assert reply.summed["update/x"].dtype == torch.float64  # rounding it could lengthen it again


# --- the clip that adapts


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0.05, 0.95), st.floats(0.01, 100))
@settings_of_hypothesis(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_without_noise_the_clip_follows_its_formula(
    make_toy: MakeToy, lengths: list[float], quantile: float, clip: float
) -> None:
    options = {"clip": clip, "quantile": quantile, "noise_multiplier": 0.0}
    replies = [
        reply_to(make_toy, torch.tensor([0.0, 0.0, length], dtype=torch.float64), **options) for length in lengths
    ]
    strategy = PrivateFedAvg(**options)  # type: ignore[arg-type]
    state = strategy.combine(strategy.init(START), Turn(1, 0, 1, len(lengths)), total(replies), {})
    within = sum(length <= clip for length in lengths) / len(lengths)
    assert float(state.facts["clip"]) == pytest.approx(clip * math.exp(-0.2 * (within - quantile)), rel=1e-12)


def test_the_clip_comes_to_its_quantile_and_members_heed_it(make_toy: MakeToy) -> None:
    """Norms 1 to 9: half of them are within any clip between 4 and 5, nine tenths within one between 8 and 9."""
    names = [f"m{index}" for index in range(1, 10)]
    for start, (quantile, low, high) in product((0.1, 50.0), ((0.5, 4.8, 5.2), (0.85, 7.8, 8.2))):
        strategy = PrivateFedAvg(clip=start, noise_multiplier=0.0, quantile=quantile)
        state = strategy.init(START)
        for round in range(1, 200):
            turn = Turn(round, 0, 200, 9)
            tasks = strategy.plan(state, turn, names)
            toys = [client(make_toy, n, torch.tensor([0.0, 0.0, i]).double()) for i, n in enumerate(names, start=1)]
            replies = [strategy.work(tasks[toy.name], toy) for toy in toys]
            clip = float(state.facts["clip"])
            assert max(norm(reply.summed) for reply in replies) <= clip
            state = strategy.combine(state, turn, total(replies), {})
        assert low < clip < high


def test_a_fixed_clip_stays(make_toy: MakeToy) -> None:
    strategy = PrivateFedAvg(clip=3.0, noise_multiplier=1.0)
    state = strategy.combine(
        strategy.init(START), Turn(1, 0, 1, 1), total([reply_to(make_toy, torch.ones(3), clip=3.0)]), {}
    )
    assert state.facts == {"clip": 3.0}


# --- who takes part

MEMBERS = [f"m{index}" for index in range(8)]


def drawn(strategy: PrivateFedAvg, rounds: int, members: Sequence[str] = MEMBERS) -> list[tuple[str, ...]]:
    state = State({}, {"clip": 1.0})
    return [tuple(strategy.plan(state, Turn(n, 0, rounds, len(members)), members)) for n in range(1, rounds + 1)]


def test_every_member_is_drawn_by_a_coin_of_its_own() -> None:
    q, rounds = 0.3, 2000
    found = drawn(PrivateFedAvg(clip=1.0, noise_multiplier=1.0, participation=q, seed=5), rounds)
    counts = [sum(name in chosen for chosen in found) for name in MEMBERS]
    for count in counts:
        assert stats.binomtest(count, rounds, q).pvalue > 1e-4
    # how many are drawn is binomial, with rounds of none and of nearly all: no fixed number
    sizes = torch.tensor([len(chosen) for chosen in found], dtype=torch.float64)
    expected = stats.binom.pmf(range(9), 8, q) * rounds
    observed = [int((sizes == size).sum()) for size in range(9)]
    joined = [*observed[:5], sum(observed[5:])], [*expected[:5], sum(expected[5:])]
    assert stats.chisquare(*joined).pvalue > 1e-4
    both = sum(MEMBERS[0] in chosen and MEMBERS[1] in chosen for chosen in found)
    assert stats.binomtest(both, rounds, q * q).pvalue > 1e-4


def test_draws_repeat_by_seed_whatever_the_order_of_names_and_never_where_they_are_secure() -> None:
    def strategy(seed: int, randomness: Any = "seeded") -> PrivateFedAvg:
        return PrivateFedAvg(clip=1.0, noise_multiplier=1.0, participation=0.5, seed=seed, randomness=randomness)

    once = drawn(strategy(0), 20)
    assert drawn(strategy(0), 20, MEMBERS[::-1]) == once
    assert len(set(once)) > 10
    assert drawn(strategy(1), 20) != once
    assert drawn(strategy(0, "secure"), 20) != drawn(strategy(0, "secure"), 20)


def test_all_take_part_where_nobody_is_drawn() -> None:
    assert drawn(PrivateFedAvg(clip=1.0, noise_multiplier=1.0), 3) == [tuple(MEMBERS)] * 3


@pytest.mark.parametrize("participation", [0.0, -0.1, 1.0001, math.nan])
def test_impossible_shares_are_refused(participation: float) -> None:
    with pytest.raises(ValueError, match="participation"):
        PrivateFedAvg(clip=1.0, noise_multiplier=1.0, participation=participation)


def test_an_infinite_clip_is_not_sent(make_toy: MakeToy) -> None:
    """Messages and checkpoints are JSON, which has no infinity."""
    strategy = PrivateFedAvg(clip=math.inf, noise_multiplier=0.0)
    state = strategy.init(START)
    task = strategy.plan(state, Turn(1, 0, 1), ["a"])["a"]
    after = strategy.combine(state, Turn(1, 0, 1), total([strategy.work(task, make_toy("a"))]), {})
    assert all(
        math.isfinite(float(value)) for facts in (state.facts, task.facts, after.facts) for value in facts.values()
    )
