"""Gradients of packed records against those of each record by itself, one backward pass each, and Opacus'."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from allmend.data.chat import Encoded
from allmend.data.packing import Row, pack
from allmend.learn.objective import log_likelihood
from allmend.learn.per_example import (
    ROUNDING,
    _Direct,
    _factors,
    _Ghost,
    _gradients,
    _Layer,
    _layer,
    _norm,
    _records,
    by_layer,
    clipped_sum,
    record_loss,
    separable_rows,
)
from allmend.models.adapters import Learns, Trainable, add_lora, full
from allmend.models.tensors import Tensors

MakeModel = Callable[..., LlamaForCausalLM]
LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

LENGTHS = [2, 40, 7, 19, 3, 28, 11]


def sequence(length: int, *, seed: int) -> Encoded:
    """Random tokens, of which about two in three and the last are targets."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(length, generator=generator) < 0.66
    target[-1] = True
    ids = torch.randint(256, (length,), generator=generator)
    return Encoded(str(seed), ids, target, torch.zeros(length, dtype=torch.int64), torch.arange(length))


RECORDS = [sequence(length, seed=seed) for seed, length in enumerate(LENGTHS)]
SHORT = [sequence(length, seed=seed) for seed, length in enumerate([2, 5, 4, 6, 3])]


def lora(
    model: torch.nn.Module,
    *,
    rank: int = 4,
    targets: tuple[str, ...] | str = ("q_proj", "v_proj"),
    dropout: float = 0.0,
    learns: Learns = "both",
) -> Trainable:
    """An adapter in the middle of training: neither factor is zero."""
    targets = list(targets) if isinstance(targets, tuple) else targets
    trainable = add_lora(model, rank=rank, alpha=16.0, targets=targets, dropout=dropout, learns=learns, seed=1)
    generator = torch.Generator().manual_seed(2)
    trainable.load({name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in trainable.state().items()})
    return trainable


def gpt2(make_tiny_model: MakeModel) -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=64)).eval()


TRAINABLES: dict[str, Callable[[MakeModel], Trainable]] = {
    "q/v": lambda make: lora(make()),
    "all linear": lambda make: lora(make(), targets="all-linear"),
    "all linear, wide": lambda make: lora(make(), targets="all-linear", rank=16),
    "q/v, b alone": lambda make: lora(make(), learns="b"),
    "gpt2": lambda make: lora(gpt2(make), targets="all-linear"),
    "full": lambda make: full(make()),
}


def alone(trainable: Trainable, records: Sequence[Encoded], log_probs: LogProbs) -> list[Tensors]:
    """The gradient of each record's mean loss: no packing, no mask, no positions."""
    parameters = trainable.parameters()
    found = []
    for record in records:
        losses = -log_probs(trainable.model, record.ids)[record.target[1:]]
        gradients = torch.autograd.grad(losses.mean(), list(parameters.values()), allow_unused=True)
        zeros = (torch.zeros_like(parameter) for parameter in parameters.values())
        found.append({n: z if g is None else g for n, g, z in zip(parameters, gradients, zeros, strict=True)})
    return found


def norm(gradients: Tensors) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def left(trainable: Trainable) -> Tensors:
    """The gradients that lie in the parameters."""
    return {name: parameter.grad for name, parameter in trainable.parameters().items() if parameter.grad is not None}


def watched(trainable: Trainable, row: Row) -> dict[str, _Layer]:
    with by_layer(trainable, list(_records(row).values()), _layer) as layers:
        _gradients(trainable, row)
    return layers


def close(found: Tensors, expected: Tensors, tolerance: float = 1e-5) -> bool:
    assert found.keys() == expected.keys()
    return norm({name: found[name] - expected[name] for name in found}) < tolerance * norm(expected)


# --- norms


@pytest.mark.parametrize("capacity", [1, 60, 1000], ids=["a record a row", "some rows", "one row"])
@pytest.mark.parametrize("which", ["q/v", "all linear", "all linear, wide", "q/v, b alone", "gpt2"])
def test_norms_are_those_of_each_record_by_itself(
    make_tiny_model: MakeModel, log_probs: LogProbs, which: str, capacity: int
) -> None:
    trainable = TRAINABLES[which](make_tiny_model)
    for records in (RECORDS, SHORT):
        expected = alone(trainable, records, log_probs)
        rows = pack(records, capacity)
        for row in rows:
            layers = watched(trainable, row)
            assert layers.keys() == trainable.parameters().keys()
            whole = torch.tensor([norm(expected[index]) for index in _records(row)], dtype=torch.float64)
            for name, layer in layers.items():
                norms = torch.stack([expected[index][name].norm() for index in _records(row)])
                assert ((layer.norms() - norms).abs() < 1e-5 * whole).all(), name
            found = torch.stack([layer.norms() for layer in layers.values()]).norm(dim=0)
            assert torch.allclose(found, whole, rtol=1e-5, atol=0)


def test_both_ways_to_a_norm_are_taken(make_tiny_model: MakeModel) -> None:
    (short,), (long,) = pack(SHORT, 1000), pack([RECORDS[1]], 1000)
    wide = TRAINABLES["all linear, wide"](make_tiny_model)
    assert {type(layer) for layer in watched(wide, short).values()} == {_Ghost}
    assert {type(layer) for layer in watched(wide, long).values()} == {_Direct}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12), st.integers(0, 999))
def test_both_ways_are_one(lengths: list[int], wide: int, high: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, delta = (torch.randn(sum(lengths), size, generator=generator) for size in (wide, high))
    weights = torch.rand(len(lengths), generator=generator)
    each = torch.stack([d.T @ a for a, d in zip(x.split(lengths), delta.split(lengths), strict=True)])
    summed = (weights[:, None, None] * each).sum(0)
    for layer in (_Direct(each), _Ghost(x, delta, lengths), _layer(x, delta, lengths)):
        assert torch.allclose(layer.norms(), each.double().flatten(1).norm(dim=1), rtol=1e-4, atol=1e-5)
        assert torch.allclose(layer.weighted_sum(weights), summed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["q/v", "all linear"])
def test_opacus_finds_the_same_gradients(make_tiny_model: MakeModel, which: str) -> None:
    from opacus import GradSampleModule

    trainable = TRAINABLES[which](make_tiny_model)
    (row,) = pack(RECORDS, 1000)
    layers = watched(trainable, row)
    padded = torch.nn.utils.rnn.pad_sequence([record.ids for record in RECORDS], batch_first=True)
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(record.ids) for record in RECORDS], batch_first=True)
    target = torch.nn.utils.rnn.pad_sequence([record.target for record in RECORDS], batch_first=True)[:, 1:]
    hooked = GradSampleModule(trainable.model.train(), loss_reduction="sum")
    logits = hooked(input_ids=padded, attention_mask=seen, use_cache=False).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedding's input needs no gradient
        (-(chosen * target).sum(1) / target.sum(1)).sum().backward()
    assert list(_records(row)) == list(range(len(RECORDS)))
    norms = {n: parameter.grad_sample.flatten(1).norm(dim=1) for n, parameter in trainable.parameters().items()}
    whole = torch.stack(list(norms.values())).norm(dim=0)
    for name, of_layer in norms.items():
        assert ((layers[name].norms() - of_layer).abs() < 1e-5 * whole).all(), name


@given(st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_the_norm_of_many_numbers_is_not_too_small(seed: int) -> None:
    """In float32 the norm of an embedding's gradient comes out too small by more than what `ROUNDING` leaves."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(20_000, 576, generator=generator)
    exact = gradient.double().square().sum().sqrt().item()
    (factor,) = _factors([_norm(gradient)[None]], 1.0)
    assert 1 - 2 * ROUNDING <= factor.item() * exact <= 1
    # factors that nearly cancel: the second half of the tokens takes back what the first half gave
    x = torch.randn(20, 64, generator=generator)
    delta = torch.randn(20, 8, generator=generator)
    x, delta = torch.cat([x, x]), torch.cat([delta, -delta * (1 - 1e-3)])
    whole = (delta.double().T @ x.double()).norm().item()
    assert _Ghost(x, delta, [40]).norms().item() == pytest.approx(whole, rel=1e-9)


# --- the clipped sum


def clipped(gradients: Sequence[Tensors], clip: float) -> Tensors:
    factors = [min(1.0, clip / norm(one)) for one in gradients]
    return {
        name: sum((f * one[name] for f, one in zip(factors, gradients, strict=True)), torch.zeros(()))
        for name in gradients[0]
    }


@pytest.mark.parametrize("records", [RECORDS, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("which", TRAINABLES)
def test_the_sum_is_that_of_the_clipped_gradients(
    make_tiny_model: MakeModel, log_probs: LogProbs, which: str, records: list[Encoded]
) -> None:
    trainable = TRAINABLES[which](make_tiny_model)
    expected = alone(trainable, records, log_probs)
    norms = sorted(map(norm, expected))
    losses = sum(-log_probs(trainable.model, record.ids)[record.target[1:]].sum().item() for record in records)
    for clip in (norms[0] / 2, norms[len(norms) // 2], norms[-1] * 1.01):
        for capacity in (50, 1000):
            found = clipped_sum(trainable, separable_rows(trainable, records, capacity), clip)
            assert close(left(trainable), clipped(expected, clip)), clip
            assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("which", TRAINABLES)
def test_no_record_moves_the_sum_by_more_than_the_bound(make_tiny_model: MakeModel, which: str) -> None:
    trainable = TRAINABLES[which](make_tiny_model)
    for record in (RECORDS[1], RECORDS[3], SHORT[1]):
        rows = separable_rows(trainable, [record], 1000)
        clipped_sum(trainable, rows, math.inf)
        whole = norm(left(trainable))
        for share in (0.999, 0.5, 1e-3):
            clipped_sum(trainable, rows, share * whole)
            assert 1 - 1e-5 < norm(left(trainable)) / (share * whole) <= 1


@pytest.mark.parametrize("which", TRAINABLES)
def test_where_nobody_is_clipped_it_is_the_plain_gradient_bit_for_bit(make_tiny_model: MakeModel, which: str) -> None:
    trainable = TRAINABLES[which](make_tiny_model)
    rows = separable_rows(trainable, RECORDS, 50)
    for row in rows:
        record_loss(trainable.model, row)[0].backward()
    plain = {name: gradient.clone() for name, gradient in left(trainable).items()}
    largest = 10 * norm(plain)
    for clip in (largest, math.inf):
        clipped_sum(trainable, rows, clip)
        assert all(torch.equal(gradient, plain[name]) for name, gradient in left(trainable).items())
    clipped_sum(trainable, rows, largest / 1e3)
    assert not all(torch.equal(gradient, plain[name]) for name, gradient in left(trainable).items())


def test_dropout_is_the_same_for_norm_and_sum(make_tiny_model: MakeModel) -> None:
    """Against a backward pass for each record through one forward pass, so that all see the same dropped inputs."""
    trainable = lora(make_tiny_model(), dropout=0.4)
    trainable.model.train()
    (row,) = pack(RECORDS, 1000)
    parameters = trainable.parameters()
    with _seeded():
        losses = -log_likelihood(trainable.model, row)
    each = [
        torch.autograd.grad(losses[row.owner == index].mean(), list(parameters.values()), retain_graph=True)
        for index in _records(row)
    ]
    expected = [dict(zip(parameters, gradients, strict=True)) for gradients in each]
    clip = sorted(map(norm, expected))[2]
    with _seeded():
        clipped_sum(trainable, [row], clip)
    assert close(left(trainable), clipped(expected, clip))
    clipped_sum(trainable, [row], clip)  # other inputs are dropped
    assert not close(left(trainable), clipped(expected, clip), tolerance=1e-2)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_no_record_no_gradient(make_tiny_model: MakeModel) -> None:
    trainable = TRAINABLES["q/v"](make_tiny_model)
    clipped_sum(trainable, pack(RECORDS, 1000), 1.0)
    assert clipped_sum(trainable, [], 1.0) == 0.0
    assert left(trainable).keys() == trainable.parameters().keys()
    assert not any(gradient.any() for gradient in left(trainable).values())


def test_what_is_not_a_number_is_not_clipped_away(make_tiny_model: MakeModel) -> None:
    trainable = TRAINABLES["q/v"](make_tiny_model)
    next(iter(trainable.parameters().values())).data[0, 0] = math.nan
    clipped_sum(trainable, pack(RECORDS, 1000), 1.0)
    assert all(gradient.isnan().any() for gradient in left(trainable).values())


# --- records that cannot be told apart


def test_a_record_on_several_rows_is_refused(make_tiny_model: MakeModel) -> None:
    trainable = TRAINABLES["q/v"](make_tiny_model)
    (row,) = pack(RECORDS, 1000)
    with pytest.raises(ValueError, match="several rows"):
        clipped_sum(trainable, [row, row], 1.0)


def test_only_lora_takes_several_records_a_row(make_tiny_model: MakeModel) -> None:
    trainable = TRAINABLES["full"](make_tiny_model)
    assert all(len(_records(row)) == 1 for row in separable_rows(trainable, RECORDS, 1000))
    with pytest.raises(ValueError, match="share a row"):
        clipped_sum(trainable, pack(RECORDS, 1000), 1.0)


def test_a_layer_used_twice_is_refused(make_tiny_model: MakeModel) -> None:
    model = make_tiny_model()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match=r"lora_.*does not see each token once"):
        clipped_sum(lora(model), pack(RECORDS, 1000), 1.0)


def test_what_learns_outside_linear_layers_is_refused(make_tiny_model: MakeModel) -> None:
    adapter = lora(make_tiny_model())
    scale = adapter.model.base_model.model.model.norm.weight.requires_grad_(True)
    more = Trainable(adapter.model, "lora", {**adapter.parameters(), "norm.weight": scale})
    with pytest.raises(ValueError, match=r"norm\.weight is no linear layer"):
        clipped_sum(more, pack(RECORDS, 1000), 1.0)


def test_no_hook_stays_behind(make_tiny_model: MakeModel) -> None:
    trainable = TRAINABLES["q/v"](make_tiny_model)
    (row,) = pack(RECORDS, 1000)
    clipped_sum(trainable, [row], 1.0)
    with pytest.raises(IndexError), by_layer(trainable, [1], _layer):
        raise IndexError
    assert not any(module._forward_hooks for module in trainable.model.modules())
