"""Alternation against training written out by hand, and what each group's gradients do not depend on."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.data.chat import Encoded, Encoder
from allmend.data.packing import pack
from allmend.data.records import question
from allmend.errors import UserError
from allmend.learn import alternating
from allmend.learn.alternating import Alternation, RouterSettings, alternate, balance_penalty
from allmend.learn.loop import DivergedError, Step, train
from allmend.learn.schedule import batches, learning_rate
from allmend.models.mixture import PRESENT, Mixture, apply_mixture, initial, of_ranks, role
from allmend.models.mixture_layers import MixtureConfig, MixtureMLP, routing
from allmend.models.tensors import Tensors
from allmend.recipe import Train

MakeModel = Callable[..., LlamaForCausalLM]
CONFIG = MixtureConfig(generalists=1, specialists=2, rank=3)
SETTINGS = Train(batch_size=3, learning_rate=1e-2)
ROUTER = RouterSettings(every=3, steps=2, learning_rate=5e-3)
STILL = 1e-30
"""A learning rate whose steps change no parameter that is not zero."""


@pytest.fixture(scope="module")
def records(tiny_tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    encoder = Encoder(tiny_tokenizer, "plain", 40)
    pairs = {"red": "apple", "blue": "sky", "green": "the grass", "grey": "fog", "black": "a night", "white": "snow"}
    return [encoder.for_training(question(name, f"what is {name}?", thing)) for name, thing in pairs.items()]


@pytest.fixture(scope="module")
def validation(tiny_tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    encoder = Encoder(tiny_tokenizer, "plain", 40)
    pairs = {"rouge": "une pomme", "bleu": "le ciel", "vert": "l'herbe", "gris": "la brume", "noir": "la nuit"}
    return [encoder.for_training(question(name, f"quoi est {name} ?", thing)) for name, thing in pairs.items()]


def mixture_of(model: LlamaForCausalLM, config: MixtureConfig = CONFIG, *, trained: bool = False) -> Mixture:
    mixture = apply_mixture(model, config, seed=3, specialist_seed=4, digest="")
    if trained:
        generator = torch.Generator().manual_seed(1)
        state = mixture.state()
        for name, tensor in state.items():
            if name != PRESENT:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        mixture.load(state)
    return mixture


def run(
    mixture: Mixture,
    records: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: Train = SETTINGS,
    router: RouterSettings = ROUTER,
    **changes: Any,
) -> Alternation:
    arguments = {"steps": 8, "first_step": 0, "schedule_step": 0, "total_steps": 8, "seed": 5} | changes
    return alternate(mixture, records, validation, settings, router, **arguments)


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def of(tensors: Tensors, *roles: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if role(name) in roles}


def _by_hand(
    mixture: Mixture, records: Sequence[Encoded], validation: Sequence[Encoded], settings: Train, steps: int
) -> tuple[list[float], list[float]]:
    """Padded batches, cross-entropy, `autograd.grad` by group, and AdamW written out; gives the losses."""
    groups = [
        {name: one for name, one in mixture.parameters().items() if (role(name) == "router") == routers}
        for routers in (False, True)
    ]
    moments = [{name: [torch.zeros_like(one)] * 2 for name, one in group.items()} for group in groups]
    counts = [0, 0]
    orders = [
        batches(len(records), settings.batch_size, seed=5, first=0),
        batches(len(validation), settings.batch_size, seed=5 + alternating._ROUTER_STREAM, first=0),
    ]
    losses: tuple[list[float], list[float]] = ([], [])

    def step(group: int, source: Sequence[Encoded], rate: float) -> None:
        batch = [source[index] for index in next(orders[group])]
        shape = (len(batch), max(map(len, batch)))
        ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
        for row, record in enumerate(batch):
            ids[row, : len(record)] = record.ids
            labels[row, : len(record)] = torch.where(record.target, record.ids, -100)
        logits = mixture.model(input_ids=ids).logits  # what is padded stands behind what is not
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
        losses[group].append(loss.item())
        gradients = torch.autograd.grad(loss, list(groups[group].values()))
        norm = math.sqrt(sum(float(one.square().sum()) for one in gradients))
        counts[group] += 1
        with torch.no_grad():
            for (name, p), g in zip(groups[group].items(), gradients, strict=True):
                g = g * min(1.0, settings.clip_norm / norm)
                m, v = moments[group][name]
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                moments[group][name] = [m, v]
                p.mul_(1 - rate * settings.weight_decay)
                m, v = m / (1 - 0.9 ** counts[group]), v / (1 - 0.999 ** counts[group])
                p.sub_(rate * m / (v.sqrt() + 1e-8))

    for number in range(1, steps + 1):
        step(0, records, settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (number - 1) / steps)))
        if number % ROUTER.every == 0:
            for _ in range(ROUTER.steps):
                step(1, validation, ROUTER.learning_rate)
    return losses


def test_it_is_two_optimisers_in_turns(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]
) -> None:
    settings = Train(batch_size=3, learning_rate=3e-3, weight_decay=0.1, clip_norm=0.5)
    plain, mixture = (mixture_of(make_tiny_model().double(), trained=True) for _ in range(2))
    losses, router_losses = _by_hand(plain, records, validation, settings, 8)
    outcome = run(mixture, records, validation, settings)
    assert [step.loss for step in outcome.steps] == pytest.approx(losses, abs=1e-9)
    assert [step.loss for step in outcome.router_steps] == pytest.approx(router_losses, abs=1e-9)
    for name, parameter in plain.parameters().items():
        torch.testing.assert_close(outcome.tensors[name], parameter.detach(), atol=1e-7, rtol=1e-6)
    start = mixture_of(make_tiny_model().double(), trained=True).state()
    assert all(not torch.equal(start[name], outcome.tensors[name]) for name in plain.parameters())


def test_steps_say_what_they_were_like(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]
) -> None:
    told: list[Step] = []
    mixture = mixture_of(make_tiny_model())
    settings = Train(batch_size=3, learning_rate=1e-2, warmup_steps=2)
    outcome = run(
        mixture, records, validation, settings, first_step=4, schedule_step=1, on_step=told.append,
        on_router_step=told.append,
    )  # fmt: skip
    assert [step.number for step in outcome.steps] == list(range(5, 13))
    assert [step.learning_rate for step in outcome.steps] == [learning_rate(1 + n, 8, settings) for n in range(8)]
    # after the 6th, 9th and 12th expert step; two came before, after the 3rd
    assert [step.number for step in outcome.router_steps] == [3, 4, 5, 6, 7, 8]
    assert {step.learning_rate for step in outcome.router_steps} == {ROUTER.learning_rate}
    turns = ["e", "e", *["r"] * 2, *["e"] * 3, *["r"] * 2, *["e"] * 3, *["r"] * 2]
    assert ["r" if step in outcome.router_steps else "e" for step in told] == turns
    assert outcome.learnt[:, 0].sum() == 3 * 8
    batch = batches(len(validation), 3, seed=5 + alternating._ROUTER_STREAM, first=2)
    expected = torch.zeros(len(validation), dtype=torch.int64)
    for _ in range(6):
        expected[next(batch)] += 1
    assert torch.equal(outcome.validated[:, 0], expected)
    assert not mixture.model.training
    assert all(one.requires_grad and one.grad is None for one in mixture.parameters().values())


def test_routers_see_their_records_in_an_order_of_their_own(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    """Also where they are the same records."""
    outcome = run(mixture_of(make_tiny_model()), records, records, router=RouterSettings(every=1, steps=1), steps=1)
    assert not torch.equal(outcome.learnt[:, 0], outcome.validated[:, 0])


def test_routers_do_not_move_before_the_first_expert_steps(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]
) -> None:
    start = mixture_of(make_tiny_model()).state()
    before = run(mixture_of(make_tiny_model()), records, validation, steps=2)
    assert same(of(before.tensors, "router"), of(start, "router"))
    assert (before.routers, before.router_steps) == ({}, ())
    after = run(mixture_of(make_tiny_model()), records, validation, steps=3)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in of(after.tensors, "router").items())
    assert all(step.gradient_norm > 0 for step in after.router_steps)


def test_router_steps_know_nothing_of_the_training_records(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]
) -> None:
    """Experts that stand still, so that a training record could reach a router by its gradient alone."""
    still = SETTINGS.model_copy(update={"learning_rate": STILL})
    mixtures = [mixture_of(make_tiny_model(), trained=True) for _ in range(2)]
    start = mixtures[0].state()
    one = run(mixtures[0], records, validation, still)
    other = run(mixtures[1], [*validation, records[3]], validation, still)
    assert same(one.tensors, other.tensors)
    assert same(one.routers, other.routers)
    assert one.router_steps == other.router_steps
    assert one.steps != other.steps
    assert same(of(one.tensors, "generalist", "specialist"), of(start, "generalist", "specialist"))
    assert not same(of(one.tensors, "router"), of(start, "router"))


def test_expert_steps_know_nothing_of_the_validation_records(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]
) -> None:
    still = RouterSettings(every=3, steps=2, learning_rate=STILL)
    mixtures = [mixture_of(make_tiny_model(), trained=True) for _ in range(2)]
    start = mixtures[0].state()
    one = run(mixtures[0], records, validation, router=still)
    other = run(mixtures[1], records, [*records, validation[1]], router=still)
    assert same(one.tensors, other.tensors)
    assert same(one.experts, other.experts)
    assert one.steps == other.steps
    assert one.router_steps != other.router_steps
    assert same(of(one.tensors, "router"), of(start, "router"))
    assert not same(of(one.tensors, "generalist"), of(start, "generalist"))


@pytest.mark.parametrize("rounds", [(3, 5), (4, 4), (1, 1, 6), (2, 6)])
def test_calls_with_the_optimisers_handed_on_are_one(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded], rounds: tuple[int, ...]
) -> None:
    settings = Train(batch_size=4, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
    whole = run(mixture_of(make_tiny_model()), records, validation, settings)
    assert {step.learning_rate for step in whole.router_steps} == {ROUTER.learning_rate}
    tensors, experts, routers, done = mixture_of(make_tiny_model()).state(), None, None, 0
    steps: list[Step] = []
    router_steps: list[Step] = []
    for count in rounds:
        mixture = mixture_of(make_tiny_model())
        mixture.load(tensors)
        handed_on = copy.deepcopy((experts, routers))
        part = run(
            mixture, records, validation, settings, steps=count, first_step=done, schedule_step=done,
            experts=experts, routers=routers,
        )  # fmt: skip
        for before, now in zip(handed_on, (experts, routers), strict=True):
            assert before is now or same(before, now)
        tensors, experts, routers, done = part.tensors, part.experts, part.routers, done + count
        steps, router_steps = [*steps, *part.steps], [*router_steps, *part.router_steps]
    assert same(tensors, whole.tensors)
    assert same(experts, whole.experts)
    assert same(routers, whole.routers)
    assert (tuple(steps), tuple(router_steps)) == (whole.steps, whole.router_steps)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "liona"])
def test_the_same_call_gives_the_same_bits(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded], optimizer: str
) -> None:
    settings = SETTINGS.model_copy(update={"optimizer": optimizer})
    one = run(mixture_of(make_tiny_model()), records, validation, settings)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    other = run(mixture_of(make_tiny_model()), records, validation, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one.tensors, other.tensors)
    assert same(one.experts, other.experts)
    assert same(one.routers, other.routers)
    assert {name.partition("/")[2] for name in one.experts} == set(of(one.tensors, "generalist", "specialist"))
    assert {name.partition("/")[2] for name in one.routers} == set(of(one.tensors, "router"))
    assert {name.partition("/")[0] for name in one.routers} == {"step", "exp_avg", "exp_avg_sq"}


def test_without_router_steps_it_is_plain_training_of_the_experts(
    make_tiny_model: MakeModel, records: list[Encoded]
) -> None:
    found = run(mixture_of(make_tiny_model()), records, [], router=RouterSettings(every=3, steps=0))
    plain = mixture_of(make_tiny_model())
    routers = of(dict(plain.parameters()), "router")
    for parameter in routers.values():
        parameter.requires_grad_(False)
    expected = train(plain, records, SETTINGS, steps=8, first_step=0, schedule_step=0, total_steps=8, seed=5)
    assert same(found.tensors, expected.tensors)
    assert found.steps == expected.steps


@pytest.mark.parametrize("config", [MixtureConfig(1, 0, rank=3), CONFIG])
def test_a_member_with_one_expert_needs_no_validation(
    make_tiny_model: MakeModel, records: list[Encoded], config: MixtureConfig
) -> None:
    mixture = mixture_of(make_tiny_model(), config)
    ranks = (3,) + (0,) * config.specialists
    start = initial(mixture, seed=3, specialist_seed=4, ranks=ranks)
    mixture.load(start)
    outcome = run(mixture, records, [], Train(batch_size=3, learning_rate=1e-2, weight_decay=0.1))
    assert (outcome.router_steps, outcome.routers) == ((), {})
    assert same(of_ranks(outcome.tensors, config, ranks), outcome.tensors)
    assert same(of(outcome.tensors, "router", PRESENT, "specialist"), of(start, "router", PRESENT, "specialist"))
    alone = mixture_of(make_tiny_model(), MixtureConfig(1, 0, rank=3))
    expected = run(alone, records, [], Train(batch_size=3, learning_rate=1e-2, weight_decay=0.1))
    for name, tensor in of(expected.tensors, "generalist").items():
        torch.testing.assert_close(outcome.tensors[name], tensor, atol=1e-5, rtol=1e-5)


def test_routers_turn_to_the_expert_that_fits_the_validation_records(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]
) -> None:
    """Experts that know the training and the validation records apart; from equal gates."""
    config = MixtureConfig(1, 1, rank=4)
    mixture = mixture_of(make_tiny_model(), config)
    settings = Train(batch_size=6, learning_rate=2e-2)
    none = RouterSettings(steps=0)
    knowing = mixture.state()
    for present, known in (([1.0, 0], records), ([0, 1.0], validation)):
        mixture.load(knowing | {PRESENT: torch.tensor(present)})
        knowing = run(mixture, known, [], settings, none, steps=60, total_steps=60).tensors
    knowing |= {PRESENT: torch.ones(2)} | {name: torch.zeros(2, 32) for name in of(knowing, "router")}
    shares = []
    for target in (records, validation):
        mixture.load(knowing)
        still = settings.model_copy(update={"learning_rate": STILL})
        run(mixture, records, target, still, RouterSettings(every=1, steps=40, learning_rate=0.05), steps=1)
        text = {"input_ids": torch.cat([record.ids for record in target])[None]}
        shares.append(routing(mixture.model, text)[..., 0].mean().item())
    assert shares[0] > 0.6
    assert shares[1] < 0.4


@pytest.mark.parametrize("tokens_per_pass", [16, 500])
def test_the_balance_term_has_the_gradient_of_its_formula(
    make_tiny_model: MakeModel, validation: list[Encoded], tokens_per_pass: int
) -> None:
    mixture = mixture_of(make_tiny_model().double(), trained=True)
    state = mixture.state() | {PRESENT: torch.tensor([1.0, 0, 1], dtype=torch.float64)}
    mixture.load(state)
    routers = of(dict(mixture.parameters()), "router")
    balance_penalty(mixture, 0.7)(pack(validation, tokens_per_pass))
    found = {name: one.grad.clone() for name, one in routers.items()}
    gates = []
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: gates.append(module.gates(inputs[0])[0]))
        for module in mixture.model.modules()
        if isinstance(module, MixtureMLP)
    ]
    for record in validation:
        mixture.model(record.ids[None])
    for handle in handles:
        handle.remove()
    means = [torch.cat(gates[layer::2]).mean(0) for layer in range(2)]
    term = sum(2 * mean.square().sum() for mean in means) / 2
    assert 1 < term < 2
    for one, expected in zip(found.values(), torch.autograd.grad(0.7 * term, list(routers.values())), strict=True):
        torch.testing.assert_close(one, expected)


def test_balance_evens_gates_out(make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]) -> None:
    def uneven(balance: float) -> float:
        mixture = mixture_of(make_tiny_model(), trained=True)
        router = RouterSettings(every=1, steps=20, learning_rate=0.02, balance=balance)
        run(mixture, records, validation, router=router, steps=2)
        text = {"input_ids": torch.cat([record.ids for record in validation])[None]}
        return float(routing(mixture.model, text).mean(1).square().sum(-1).mean())

    assert uneven(10.0) < uneven(0.0)


def test_what_cannot_work_is_refused_before_anything_changes(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]
) -> None:
    mixture = mixture_of(make_tiny_model())
    start = mixture.state()
    with pytest.raises(UserError, match="no validation record has a token to learn from"):
        run(mixture, records, [])
    with pytest.raises(UserError, match="no record has a token to learn from"):
        run(mixture, [], validation)
    with pytest.raises(ValueError, match="after every 0 expert steps"):
        run(mixture, records, validation, router=RouterSettings(every=0))
    assert same(mixture.state(), start)


def test_routers_that_diverge_say_so(
    make_tiny_model: MakeModel, records: list[Encoded], validation: list[Encoded]
) -> None:
    mixture = mixture_of(make_tiny_model())
    wild = RouterSettings(every=3, steps=2, learning_rate=float("inf"))
    with pytest.raises(DivergedError, match="routers: "):
        run(mixture, records, validation, router=wild)
    assert not mixture.model.training
    assert all(one.requires_grad and one.grad is None for one in mixture.parameters().values())
