import copy
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.data.chat import Encoded, Encoder
from allmend.data.records import question
from allmend.errors import UserError
from allmend.learn.loop import DivergedError, Outcome, Step, batches, learning_rate, steps_per_round, train
from allmend.models.adapters import Trainable, add_lora, full
from allmend.models.tensors import Tensors
from allmend.recipe import Train

MakeModel = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def records(tiny_tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    encoder = Encoder(tiny_tokenizer, "plain", 40)
    pairs = {"red": "apple", "blue": "sky", "green": "the grass", "grey": "fog", "black": "a night", "white": "snow"}
    return [encoder.for_training(question(name, f"what is {name}?", thing)) for name, thing in pairs.items()]


def lora(model: LlamaForCausalLM, **changes: Any) -> Trainable:
    return add_lora(model, **{"rank": 4, "alpha": 16.0, "targets": ["q_proj", "v_proj"], "seed": 1} | changes)


def run(trainable: Trainable, records: Sequence[Encoded], settings: Train | None = None, **changes: Any) -> Outcome:
    arguments = {"steps": 6, "first_step": 0, "schedule_step": 0, "total_steps": 6, "seed": 5} | changes
    return train(trainable, records, settings or Train(batch_size=4, learning_rate=1e-2), **arguments)


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("make", [full, lora, lambda model: lora(model, dropout=0.5)])
def test_the_same_call_gives_the_same_bits(
    make_tiny_model: MakeModel, records: list[Encoded], make: Callable[[LlamaForCausalLM], Trainable]
) -> None:
    one = run(make(make_tiny_model()), records)
    torch.manual_seed(123)
    other = run(make(make_tiny_model()), records)
    assert same(one.tensors, other.tensors)
    assert same(one.optimizer, other.optimizer)
    assert one.steps == other.steps


@pytest.mark.parametrize("make", [full, lambda model: lora(model, dropout=0.5)])
def test_two_calls_with_the_optimizer_handed_on_are_one(
    make_tiny_model: MakeModel, records: list[Encoded], make: Callable[[LlamaForCausalLM], Trainable]
) -> None:
    settings = Train(batch_size=4, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
    whole = run(make(make_tiny_model()), records, settings)
    first = run(make(make_tiny_model()), records, settings, steps=3)
    again = make(make_tiny_model())
    again.load(first.tensors)
    handed_on = copy.deepcopy(first.optimizer)
    second = run(again, records, settings, steps=3, first_step=3, schedule_step=3, optimizer=first.optimizer)
    assert same(whole.tensors, second.tensors)
    assert same(whole.optimizer, second.optimizer)
    assert whole.steps == (*first.steps, *second.steps)
    assert same(first.optimizer, handed_on)
    fresh = make(make_tiny_model())
    fresh.load(first.tensors)
    assert not same(whole.tensors, run(fresh, records, settings, steps=3, first_step=3, schedule_step=3).tensors)


@pytest.mark.parametrize("tokens_per_pass", [16, 50])
def test_how_a_batch_is_split_into_passes_does_not_matter(
    make_tiny_model: MakeModel, records: list[Encoded], tokens_per_pass: int
) -> None:
    wide = run(lora(make_tiny_model()), records, Train(learning_rate=1e-2, batch_size=4))
    narrow = run(
        lora(make_tiny_model()), records, Train(learning_rate=1e-2, batch_size=4, tokens_per_pass=tokens_per_pass)
    )
    for name, tensor in wide.tensors.items():
        assert torch.allclose(narrow.tensors[name], tensor, atol=1e-4), name
    for one, other in zip(wide.steps, narrow.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
        assert (one.tokens, one.targets) == (other.tokens, other.targets)


def _padded_adamw(model: LlamaForCausalLM, records: Sequence[Encoded], settings: Train, steps: int) -> list[float]:
    """Training as in a textbook: padded batches, cross-entropy, clipping and AdamW written out."""
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    order = batches(len(records), settings.batch_size, seed=5, first=0)
    losses = []
    for step in range(1, steps + 1):
        batch = [records[index] for index in next(order)]
        shape = (len(batch), max(map(len, batch)))
        ids, seen = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100)
        for row, record in enumerate(batch):
            ids[row, : len(record)], seen[row, : len(record)] = record.ids, 1
            labels[row, : len(record)] = torch.where(record.target, record.ids, -100)
        logits = model(input_ids=ids, attention_mask=seen).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        scale = min(1.0, (settings.clip_norm or math.inf) / norm)
        rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * scale * g)
                v.mul_(0.999).add_(0.001 * (scale * g) ** 2)
                p.mul_(1 - rate * settings.weight_decay)
                p.sub_(rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
        losses.append(loss.item())
    return losses


def test_it_is_adamw_on_padded_batches(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    settings = Train(batch_size=4, learning_rate=3e-3, weight_decay=0.1, clip_norm=0.5)
    plain, packed = make_tiny_model(), make_tiny_model()
    losses = _padded_adamw(plain, records, settings, steps=6)
    outcome = run(full(packed), records, settings)
    assert [step.loss for step in outcome.steps] == pytest.approx(losses, abs=1e-4)
    assert any(step.gradient_norm > 0.5 for step in outcome.steps)
    for name, parameter in plain.named_parameters():
        assert torch.allclose(outcome.tensors[name], parameter, atol=3e-4), name
    start = make_tiny_model().state_dict()
    moved = max((outcome.tensors[name] - start[name]).abs().max() for name in outcome.tensors)
    assert moved > 3e-3


def test_the_loss_falls_on_a_tiny_set(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    outcome = run(full(make_tiny_model()), records, Train(batch_size=6, learning_rate=1e-2), steps=60, total_steps=60)
    assert outcome.steps[-1].loss < 0.1 * outcome.steps[0].loss
    assert run(lora(make_tiny_model()), records, Train(batch_size=6, learning_rate=1e-2)).steps[-1].loss < (
        outcome.steps[0].loss  # the same batch: all records
    )


def test_steps_say_what_they_were_like(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    told: list[Step] = []
    settings = Train(batch_size=4, learning_rate=1e-2)
    outcome = run(
        lora(make_tiny_model()), records, settings, first_step=8, schedule_step=2, steps=4, on_step=told.append
    )
    assert tuple(told) == outcome.steps
    order = batches(len(records), 4, seed=5, first=8)
    for number, step in enumerate(outcome.steps):
        batch = [records[index] for index in next(order)]
        assert step.number == 9 + number
        assert step.learning_rate == learning_rate(2 + number, 6, settings)
        assert step.tokens == sum(map(len, batch))
        assert step.targets == sum(int(record.target.sum()) for record in batch)
        assert step.gradient_norm > 0


def test_only_the_adapter_changes(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    base = make_tiny_model().state_dict()
    trainable = lora(make_tiny_model())
    before = trainable.state()
    outcome = run(trainable, records)
    assert all(not torch.equal(before[name], tensor) for name, tensor in outcome.tensors.items())
    after = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in trainable.model.base_model.model.state_dict().items()
    }
    assert same(base, {name: tensor for name, tensor in after.items() if "lora" not in name})
    assert not trainable.model.training
    assert all(parameter.grad is None for parameter in trainable.model.parameters())


def test_dropout_drops_and_the_callers_generator_is_given_back(
    make_tiny_model: MakeModel, records: list[Encoded]
) -> None:
    state = torch.get_rng_state()
    with_dropout = run(lora(make_tiny_model(), dropout=0.5), records)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(with_dropout.tensors, run(lora(make_tiny_model()), records).tensors)
    other_seed = run(lora(make_tiny_model(), dropout=0.5), records, Train(batch_size=6), seed=6, steps=1)
    seed = run(lora(make_tiny_model(), dropout=0.5), records, Train(batch_size=6), seed=5, steps=1)
    assert not same(seed.optimizer, other_seed.optimizer)  # the batch is the same: all records


def test_parameters_that_are_not_numbers_stop_it(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    trainable = lora(make_tiny_model())
    next(iter(trainable.parameters().values())).data[0, 0] = math.nan
    state = torch.get_rng_state()
    with pytest.raises(DivergedError, match=r"diverged at step 5.*nan"):
        run(trainable, records, first_step=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert not trainable.model.training
    assert all(parameter.grad is None for parameter in trainable.parameters().values())


def test_a_learning_rate_far_too_high_stops_it(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    told: list[Step] = []
    with pytest.raises(DivergedError, match="step 2") as raised:
        run(full(make_tiny_model()), records, Train(learning_rate=1e30), on_step=told.append)
    assert [step.number for step in told] == [1]
    assert "learning_rate" in str(raised.value.hint)


def test_records_without_targets_are_passed_over(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    blank = Encoded(
        "blank", records[0].ids, torch.zeros_like(records[0].target), records[0].branch, records[0].position
    )
    settings = Train(batch_size=1)
    mixed = run(lora(make_tiny_model()), [blank, *records, blank], settings)
    assert same(mixed.tensors, run(lora(make_tiny_model()), records, settings).tensors)
    assert all(step.targets > 0 for step in mixed.steps)
    with pytest.raises(UserError, match="no record has a token"):
        run(lora(make_tiny_model()), [blank])


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**48), st.integers(0, 40))
def test_epochs_are_permutations_and_any_start_continues(records: int, size: int, seed: int, first: int) -> None:
    per_epoch = math.ceil(records / size)
    stream = list(islice(batches(records, size, seed=seed, first=0), first + 3 * per_epoch))
    for start in range(0, len(stream) - per_epoch + 1, per_epoch):
        epoch = stream[start : start + per_epoch]
        assert sorted(index for batch in epoch for index in batch) == list(range(records))
        assert all(len(batch) == size for batch in epoch[:-1])
    assert list(islice(batches(records, size, seed=seed, first=first), 3 * per_epoch)) == stream[first:]


def test_epochs_and_seeds_differ() -> None:
    one = list(islice(batches(50, 50, seed=1, first=0), 2))
    assert one[0] != one[1]
    assert one[0] != next(batches(50, 50, seed=2, first=0))


@given(st.integers(1, 60), st.integers(0, 20), st.sampled_from(["cosine", "constant"]))
def test_the_schedule_rises_and_falls(total: int, warmup: int, schedule: str) -> None:
    settings = Train(learning_rate=0.1, warmup_steps=warmup, schedule=schedule)
    rates = [learning_rate(step, total, settings) for step in range(total)]
    assert all(0 < rate <= 0.1 + 1e-15 for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup < total:
        assert falling[0] == 0.1
    if schedule == "constant":
        assert set(falling) <= {0.1}
    else:  # point symmetry of the half cosine around its middle
        assert learning_rate(max(total, warmup), total, settings) == pytest.approx(0.0 if total > warmup else 0.1)
        span = total - warmup
        assert all(
            learning_rate(warmup + step, total, settings) + learning_rate(total - step, total, settings)
            == pytest.approx(0.1)
            for step in range(span)
        )


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5))
def test_steps_of_whole_epochs_are_their_batches(records: int, size: int, epochs: int) -> None:
    steps = steps_per_round(records, Train(batch_size=size, local_epochs=float(epochs)))
    seen = [index for batch in islice(batches(records, size, seed=0, first=0), steps) for index in batch]
    assert sorted(seen) == sorted(list(range(records)) * epochs)


def test_steps_per_round() -> None:
    assert steps_per_round(7, Train(batch_size=4)) == 2
    assert steps_per_round(40, Train(batch_size=4, local_epochs=0.25)) == 3
    assert steps_per_round(3, Train(batch_size=4, local_epochs=0.01)) == 1
    assert steps_per_round(7, Train(local_steps=5)) == 5
