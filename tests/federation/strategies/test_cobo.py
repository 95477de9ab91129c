"""CoBo on members that pull towards points of their own, where all has a closed form, and in real training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.collaboration.graph import laplacian
from allmend.federation.collaboration.state import graph_of_state, members_of
from allmend.federation.member import Member
from allmend.federation.strategies import build_strategy
from allmend.federation.strategies.cobo import PROBE, TRAIN, CoBo
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.models.tensors import Tensors, dump, parse
from allmend.recipe import Train
from allmend.strategy import Seen, State, Sums, Task, Trained, Turn, of_group

RATE = 0.2


@dataclass
class Bowl:
    """A member whose loss is ½ |x − a|²; it takes one step of gradient descent a round."""

    name: str
    a: torch.Tensor
    examples: int = 1
    initial: Tensors = field(default_factory=dict)
    state: State = field(default_factory=State)
    asked: list[Tensors] = field(default_factory=list)

    def train(self, start: Tensors, turn: Turn, *, optimizer: Tensors | None = None, proximal: float = 0.0) -> Trained:
        found = {"x": start["x"] - RATE * (start["x"] - self.a)}
        return Trained(found, float((start["x"] - self.a).square().sum()) / 2, 1, 1, {"steps": torch.ones(())})

    def gradient(self, at: Tensors, turn: Turn, *, records: int | None = None, held_out: bool = False) -> Tensors:
        self.asked.append(at)
        return {"x": at["x"] - self.a}


def bowls(points: Mapping[str, Sequence[float]]) -> dict[str, Bowl]:
    made = {name: torch.tensor(point, dtype=torch.float64) for name, point in points.items()}
    return {name: Bowl(name, a, initial={"x": torch.zeros_like(a)}) for name, a in made.items()}


def rounds(
    strategy: CoBo, clients: Mapping[str, Bowl], count: int, *, state: State | None = None, first: int = 1
) -> State:
    state = state or strategy.init(next(iter(clients.values())).initial)
    for round in range(first, first + count):
        for leg in (TRAIN, PROBE):
            turn = Turn(round, leg, count)
            seen, sums = {}, Sums()
            for name, task in strategy.plan(state, turn, list(clients)).items():
                reply = strategy.work(Task(turn, *parse(dump(task.tensors, task.facts))), clients[name])
                assert strategy.declare().undeclared(reply) == []
                sums.add(reply)
                seen[name] = Seen(reply.seen, reply.seen_facts)
            state = strategy.combine(state, turn, sums, seen)
            state = State(*parse(dump(state.tensors, state.facts)))
        w = weights(state)
        assert torch.equal(w, w.T)
        assert not w.diagonal().any()
        assert bool(((w >= 0) & (w <= 1)).all())
    return state


def weights(state: State) -> torch.Tensor:
    """w [n, n] as the coordinator has it."""
    graph = graph_of_state(state)
    return graph.matrix(range(graph.n))


def visits(state: State) -> dict[tuple[int, int], int]:
    graph = graph_of_state(state)
    return dict(zip(map(tuple, graph.pairs.T.tolist()), graph.visits.tolist(), strict=True))


def models(strategy: CoBo, state: State, clients: Mapping[str, Bowl]) -> torch.Tensor:
    found = [strategy.personal(state, clients[name].state) for name in sorted(clients)]
    return torch.stack([one["x"] for one in found if one is not None])


FOUR = {"a": (1.0, 0.0), "b": (1.1, 0.2), "c": (-1.0, 0.1), "d": (-0.9, -0.3)}
FACTORS: dict[str, Any] = {"geometry": "factors"}


def test_without_a_pull_members_are_alone() -> None:
    clients, strategy = bowls(FOUR), CoBo(rho=0.0, **FACTORS)
    state = rounds(strategy, clients, 3)

    for name, client in clients.items():
        expected = client.a * (1 - (1 - RATE) ** 3)
        found = strategy.personal(state, client.state)
        assert found is not None
        assert torch.allclose(found["x"], expected), name


def test_a_graph_that_stays_as_it_is_leads_to_the_linear_system() -> None:
    """x ← (I + ρL)⁻¹ ((1 − η) x + η a) rests at ((I + ρL) − (1 − η) I)⁻¹ η a."""
    clients = bowls(FOUR)
    strategy = CoBo(rho=0.3, initial_graph=0.5, pairs_per_member=0.0, **FACTORS)
    state = rounds(strategy, clients, 400)

    one = torch.eye(4, dtype=torch.float64)
    pulled = one + 0.3 * laplacian(torch.full((4, 4), 0.5, dtype=torch.float64).fill_diagonal_(0))
    a = torch.stack([clients[name].a for name in sorted(clients)])
    expected = torch.linalg.solve(pulled - (1 - RATE) * one, RATE * a)
    assert torch.allclose(models(strategy, state, clients), expected, atol=1e-9, rtol=0)


def test_members_that_agree_find_each_other() -> None:
    """While models are young: both optima of a pair lie in one direction, those of strangers in opposite ones."""
    clients = bowls(FOUR)
    strategy = CoBo(rho=0.0, initial_graph=0.5, graph_step=0.5, pairs_per_member=4.0, freeze_after_visits=3, **FACTORS)
    state = rounds(strategy, clients, 4)

    w = weights(state)
    assert members_of(state) == ["a", "b", "c", "d"]
    assert w[0, 1] == w[2, 3] == 1
    assert w[:2, 2:].max() == 0


def test_the_product_changes_its_sign_once_both_have_fitted_their_own() -> None:
    """It is positive exactly where the midpoint lies outside the ball between the two optima; at the optima −¼ |δ|²."""
    clients = bowls({"a": (1.0, 0.0), "b": (1.1, 0.2)})
    strategy = CoBo(rho=0.0, pairs_per_member=2.0, freeze_after_visits=0, graph_step=0.1, **FACTORS)
    state = rounds(strategy, clients, 200)

    log = state.tensors["log"]
    delta = clients["b"].a - clients["a"].a
    assert log[0, 4] > 0
    assert float(log[-1, 4]) == pytest.approx(-float(delta.square().sum()) / 4, rel=1e-6)
    for row in log[:20]:
        z = (clients["a"].a + clients["b"].a) / 2 * (1 - (1 - RATE) ** float(row[0]))
        outside = float((z - (clients["a"].a + clients["b"].a) / 2).norm()) > float(delta.norm()) / 2
        assert (float(row[4]) > 0) == outside


def test_a_frozen_graph_asks_nobody() -> None:
    clients = bowls(FOUR)
    strategy = CoBo(pairs_per_member=4.0, freeze_after_visits=2, graph_step=0.3, **FACTORS)
    state = rounds(strategy, clients, 2)
    assert set(visits(state).values()) == {2}
    before, asked = weights(state), [len(client.asked) for client in clients.values()]

    state = rounds(strategy, clients, 3, state=state, first=3)

    assert torch.equal(weights(state), before)
    assert [len(client.asked) for client in clients.values()] == asked


def test_both_members_of_a_pair_are_asked_at_the_same_point() -> None:
    clients = bowls({"a": (0.3, 0.7), "b": (-0.2, 0.9)})
    state = rounds(CoBo(rho=0.1, graph_step=0.1, **FACTORS), clients, 3)

    assert len(clients["a"].asked) == 3
    for one, other in zip(clients["a"].asked, clients["b"].asked, strict=True):
        assert torch.equal(one["x"], other["x"])
    mine = [of_group("model", clients[name].state.tensors)["x"] for name in ("a", "b")]
    assert torch.equal(clients["a"].asked[-1]["x"], (mine[0] + mine[1]) / 2)
    assert visits(state) == {(0, 1): 3}


def test_names_and_their_order_change_nothing_else() -> None:
    strategy = CoBo(rho=0.2, graph_step=0.4, pairs_per_member=8.0, **FACTORS)
    clients = bowls(FOUR)
    expected = models(strategy, rounds(strategy, clients, 5), clients)
    # d, c, b, a
    turned = bowls({name: FOUR[other] for name, other in zip("wxyz", "dcba", strict=True)})

    found = models(strategy, rounds(strategy, turned, 5), turned)

    assert torch.allclose(found, expected.flip(0), atol=1e-12)


def test_identical_members_are_one_member() -> None:
    strategy = CoBo(rho=5.0, graph_step=0.4, **FACTORS)
    clients = bowls(dict.fromkeys("abc", (0.4, -1.0)))
    state = rounds(strategy, clients, 4)

    expected = torch.tensor((0.4, -1.0), dtype=torch.float64) * (1 - (1 - RATE) ** 4)
    assert torch.allclose(models(strategy, state, clients), expected.expand(3, 2))


def test_who_is_absent_keeps_model_and_row_and_who_comes_late_begins_with_the_mean() -> None:
    strategy = CoBo(rho=0.3, graph_step=0.4, pairs_per_member=8.0, **FACTORS)
    clients = bowls(FOUR)
    state = rounds(strategy, {name: clients[name] for name in "abc"}, 2)
    before, kept = state, of_group("model", clients["c"].state.tensors)["x"].clone()

    state = rounds(strategy, {name: clients[name] for name in "ab"}, 2, state=state, first=3)

    assert torch.equal(of_group("model", clients["c"].state.tensors)["x"], kept)
    assert torch.equal(state.tensors["adapter/2/x"], before.tensors["adapter/2/x"])
    assert torch.equal(weights(state)[2], weights(before)[2])
    assert all(visits(state)[pair] == count for pair, count in visits(before).items() if 2 in pair)

    task = strategy.plan(state, Turn(5, TRAIN, 9), list("abcd"))["d"]
    everyone = torch.stack([state.tensors[f"adapter/{place}/x"] for place in range(3)])
    assert torch.allclose(task.tensors["model/x"], everyone.mean(0), atol=1e-5)
    state = rounds(strategy, clients, 1, state=state, first=5)
    assert members_of(state) == ["a", "b", "c", "d"]
    assert torch.equal(weights(state)[:3, :3].diagonal(), torch.zeros(3))


def test_of_members_that_are_named_only_the_pairs_that_are_named_work_together() -> None:
    strategy = CoBo(rho=0.3, graph="b a 0.75, d b 0.25, c", pairs_per_member=8.0, graph_step=1e-3, **FACTORS)
    clients = bowls(FOUR)
    state = rounds(strategy, {name: clients[name] for name in "abc"}, 2)
    assert visits(state) == {(0, 1): 2}
    assert weights(state)[0, 1] == pytest.approx(0.75, abs=0.01)
    alone = clients["c"].a * (1 - (1 - RATE) ** 2)
    assert torch.allclose(of_group("model", clients["c"].state.tensors)["x"], alone)

    task = strategy.plan(state, Turn(3, TRAIN, 9), list("abcd"))["d"]
    assert torch.allclose(task.tensors["model/x"], state.tensors["adapter/1/x"])  # its one partner's
    state = rounds(strategy, clients, 1, state=state, first=3)
    assert visits(state) == {(0, 1): 3, (1, 3): 1}


def test_who_has_no_partner_begins_as_everybody_does() -> None:
    strategy = CoBo(graph="a b 1, c", **FACTORS)
    clients = bowls({name: FOUR[name] for name in "abc"})
    state = rounds(strategy, {name: clients[name] for name in "ab"}, 1)

    assert strategy.plan(state, Turn(2, TRAIN, 9), list("abc"))["c"].tensors == {}


def test_a_graph_of_other_clients_is_refused() -> None:
    CoBo(graph="a b 1, c").check(["c", "b", "a"])
    CoBo().check(["a"])
    with pytest.raises(ValueError, match="graph names z, and there are the clients a, b"):
        CoBo(graph="a z 1, b").check(["a", "b"])
    with pytest.raises(ValueError, match="graph does not name b: a name alone"):
        CoBo(graph="a c 1").check(["a", "b", "c"])


def test_a_step_is_found_from_the_first_products() -> None:
    """And all that waited for it moves the graph then: the usual one goes from one end to the other in four visits."""
    clients = bowls(FOUR)
    strategy = CoBo(rho=0.0, pairs_per_member=8.0, initial_graph=0.5, freeze_after_visits=1, **FACTORS)
    state = rounds(strategy, clients, 1)

    products = state.tensors["log"][:, 4].abs()
    assert float(state.facts["step"]) * float(products.sort().values[2:4].mean()) == pytest.approx(1 / 4)
    by_hand = rounds(replace(strategy, graph_step=float(state.facts["step"])), bowls(FOUR), 1)
    assert torch.equal(weights(state), weights(by_hand))
    assert torch.equal(state.tensors["log"], by_hand.tensors["log"])


def test_a_gradient_that_is_no_number_is_passed_over_and_counted() -> None:
    clients = bowls(FOUR)
    clients["b"].gradient = lambda *_, **__: {"x": torch.tensor([math.nan, 0.0], dtype=torch.float64)}  # type: ignore[method-assign]
    strategy = CoBo(rho=0.0, graph_step=0.3, initial_graph=0.5, pairs_per_member=8.0, freeze_after_visits=0, **FACTORS)
    state = rounds(strategy, clients, 2)

    assert state.facts["broken/b"] == 6
    assert "broken/a" not in state.facts
    assert torch.equal(weights(state)[1], torch.tensor([0.5, 0.0, 0.5, 0.5]))
    assert not any(count for pair, count in visits(state).items() if 1 in pair)
    assert visits(state)[0, 2] == 2


def test_sketches_tell_about_what_gradients_do() -> None:
    generator = torch.Generator().manual_seed(0)
    points = {name: torch.randn(300, generator=generator).tolist() for name in "abcd"}
    shown = {}
    for exchange in ("gradient", "sketch"):
        strategy = CoBo(rho=0.0, graph_step=1e-3, pairs_per_member=8.0, exchange=exchange, sketch_size=2000, **FACTORS)
        shown[exchange] = rounds(strategy, bowls(points), 1).tensors["log"]

    cosines = shown["gradient"][:, 5] - shown["sketch"][:, 5]
    assert cosines.abs().max() < 5 / math.sqrt(2000)
    products, cosine = shown["gradient"][:, 4], shown["gradient"][:, 5]
    spread = (products / cosine).abs() * ((1 + cosine.square()) / 2000).sqrt()
    assert bool(((products - shown["sketch"][:, 4]).abs() < 5 * spread).all())
    assert cosines.abs().max() > 0


# --- neighbours by sketches


def kinds(count: int, each: int, *, seed: int = 0) -> tuple[dict[str, Bowl], list[int]]:
    """Members whose optima lie around those of their kinds, in directions at right angles."""
    generator = torch.Generator().manual_seed(seed)
    points, own = {}, []
    for number in range(count * each):
        kind = number % count
        optimum = torch.zeros(40)
        optimum[kind] = 3.0
        points[f"m{number:03d}"] = (optimum + 0.05 * torch.randn(40, generator=generator)).tolist()
        own.append(kind)
    return bowls(points), own


def test_neighbours_are_of_a_members_kind_and_weights_are_theirs_alone() -> None:
    clients, kind = kinds(4, 5)
    strategy = CoBo(rho=0.2, neighbours=4, common_rounds=0.5, graph_step=0.01, **FACTORS)
    state = rounds(strategy, clients, 20)

    found = graph_of_state(state)
    assert found.pairs.shape[1] == 4 * 10  # all pairs of a kind
    assert all(kind[i] == kind[j] for i, j in found.pairs.T.tolist())
    w = weights(state)
    assert bool((w > 0).sum() > 0)


def test_common_rounds_are_those_of_fedavg_and_show_nothing_else() -> None:
    clients, _ = kinds(2, 3)
    other, _ = kinds(2, 3)
    strategy = CoBo(neighbours=2, common_rounds=1.0, **FACTORS)
    state = rounds(strategy, clients, 3)
    alone = FedAvg().init(clients["m000"].initial)
    for round in range(1, 4):
        turn, sums = Turn(round, 0, 3), Sums()
        for name, task in FedAvg().plan(alone, turn, list(other)).items():
            sums.add(FedAvg().work(task, other[name]))
        alone = FedAvg().combine(alone, turn, sums, {})

    assert members_of(state) == []
    assert not any(client.asked for client in clients.values())
    for client in clients.values():
        personal = strategy.personal(state, client.state)
        assert personal is not None
        assert torch.equal(personal["x"], alone.tensors["model/x"])


def test_who_comes_late_finds_neighbours_at_the_same_point() -> None:
    clients, kind = kinds(3, 4)
    first = {name: client for name, client in clients.items() if name != "m005"}
    strategy = CoBo(rho=0.0, neighbours=3, common_rounds=0.25, graph_step=0.01, pairs_per_member=0.0, **FACTORS)
    state = rounds(strategy, first, 4)
    common = state.tensors["common/x"].clone()

    state = rounds(strategy, clients, 2, state=state, first=5)

    assert torch.equal(state.tensors["common/x"], common)
    assert torch.equal(clients["m005"].asked[0]["x"], common)
    names = members_of(state)
    assert names[-1] == "m005"
    found = {i for i, j in graph_of_state(state).pairs.T.tolist() if j == len(names) - 1}
    assert {names[place] for place in found} == {name for place, name in enumerate(clients) if kind[place] == 2} - {
        "m005"
    }


def test_a_member_without_a_direction_is_near_nobody() -> None:
    clients, _ = kinds(2, 3)
    clients["m001"].gradient = lambda *_, **__: {"x": torch.full((40,), math.nan)}  # type: ignore[method-assign]
    strategy = CoBo(neighbours=2, common_rounds=0.25, pairs_per_member=0.0, **FACTORS)
    state = rounds(strategy, clients, 4)

    assert members_of(state) == sorted(clients)
    assert 1 not in graph_of_state(state).pairs


def test_what_shows_a_place_has_length_one() -> None:
    clients, _ = kinds(2, 3)
    strategy = CoBo(neighbours=2, common_rounds=0.25, pairs_per_member=0.0, **FACTORS)
    state = rounds(strategy, clients, 4)

    assert torch.allclose(state.tensors["sketches"].norm(dim=1), torch.ones(6), atol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("neighbours", -1),
        ("common_rounds", 0.0),
        ("common_rounds", 1.5),
        ("rho", -0.1),
        ("rho", math.nan),
        ("initial_graph", 1.5),
        ("graph_step", -1.0),
        ("probe_records", 0),
        ("probe_split", "test"),
        ("geometry", "shape"),
        ("exchange", "nothing"),
    ],
)
def test_impossible_options_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        build_strategy("cobo", {option: value}, seed=0)


# --- real training


def test_one_member_is_local_training_bit_for_bit(
    run: Callable[..., Any], make_member: Callable[..., Member], settings: Train
) -> None:
    member = make_member("north")
    alone = run(Local(), [member], settings, rounds=3)
    found = run(CoBo(), [member], settings, rounds=3)

    expected = Local().personal(alone.state, alone.states["north"])
    one = CoBo().personal(found.state, found.states["north"])
    assert expected is not None
    assert one is not None
    assert all(torch.equal(one[name], tensor) for name, tensor in expected.items())


def test_a_run_that_was_stopped_goes_on_with_its_graph(
    run: Callable[..., Any], make_member: Callable[..., Member], settings: Train, tmp_path: Any
) -> None:
    members = [make_member(name) for name in ("east", "north", "south")]
    strategy = CoBo(rho=0.2, seed=4)
    whole = run(strategy, members, settings, rounds=4, folder=tmp_path / "whole")
    run(strategy, members, settings, rounds=2, folder=tmp_path / "half")
    start = Checkpoints(tmp_path / "half", "identity").newest()
    assert isinstance(start, Checkpoint)

    found = run(strategy, members, settings, rounds=4, start=start, folder=tmp_path / "half")

    assert found.state.facts == whole.state.facts
    # NaN, where a weight is not known yet, equals itself here
    assert dump(found.state.tensors, {}) == dump(whole.state.tensors, {})
    for name, state in whole.states.items():
        assert dump(found.states[name].tensors, {}) == dump(state.tensors, {})


def test_the_gradient_at_a_midpoint_of_products_is_that_of_the_model_between(
    make_trainable: Callable[..., Any], make_member: Callable[..., Member], settings: Train
) -> None:
    """Against autograd through merged weights, and whatever factors the two adapters happen to have."""
    from allmend.federation.collaboration.geometry import Products
    from allmend.federation.member import MemberClient

    trainable = make_trainable()
    generator = torch.Generator().manual_seed(3)
    one, other = (
        {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in trainable.state().items()}
        for _ in range(2)
    )
    client = MemberClient(make_member("north"), trainable, settings, trainable.state())
    turned = {}
    q = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
    for name, tensor in one.items():
        turned[name] = q.T @ tensor if "lora_A" in name else tensor @ q
    partner = client.gradient(Products().midpoint(one, other), Turn(1, PROBE, 1))
    again = client.gradient(Products().midpoint(turned, other), Turn(1, PROBE, 1))

    sizes = [sum(float(t.double().square().sum()) for t in found.values()) for found in (partner, again)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)
    # the gradient of B alone, B = ½ [B_i B_j], is G [A_i; A_j]ᵀ: that of a model with both adapters merged
    name = next(iter(partner))
    layer = name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    a, b = (f"{layer}.lora_{side}.weight" for side in "AB")
    assert partner[a].shape[0] == partner[b].shape[1] == 4
    whole = client.gradient(one, Turn(1, PROBE, 1))
    same = client.gradient(Products().midpoint(one, one), Turn(1, PROBE, 1))
    for key in (a, b):
        # two halves of one adapter: B's part sees [A; A], A's part ½ [B B]
        parts = same[key].chunk(2, dim=0 if key == a else 1)
        assert torch.allclose(parts[0], parts[1], atol=1e-6)
        assert torch.allclose(parts[0] * (2 if key == a else 1), whole[key], atol=1e-5)
    assert trainable.state().keys() == one.keys()
    assert all(t.shape == one[n].shape for n, t in trainable.state().items())
