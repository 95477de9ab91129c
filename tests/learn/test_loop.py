import copy
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.data.chat import Encoded, Encoder
from allmend.data.records import question
from allmend.errors import UserError
from allmend.learn.loop import DivergedError, Outcome, Step, train
from allmend.learn.private import RecordNoise, poisson_batches
from allmend.learn.schedule import batches, learning_rate
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


@pytest.mark.parametrize("loss_mean", ["token", "record"])
@pytest.mark.parametrize("tokens_per_pass", [16, 50])
def test_how_a_batch_is_split_into_passes_does_not_matter(
    make_tiny_model: MakeModel, records: list[Encoded], tokens_per_pass: int, loss_mean: str
) -> None:
    settings = Train(learning_rate=1e-2, batch_size=4, loss_mean=loss_mean)
    wide = run(lora(make_tiny_model()), records, settings)
    narrow = run(lora(make_tiny_model()), records, settings.model_copy(update={"tokens_per_pass": tokens_per_pass}))
    for name, tensor in wide.tensors.items():
        assert torch.allclose(narrow.tensors[name], tensor, atol=1e-4), name
    for one, other in zip(wide.steps, narrow.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4)
        assert (one.tokens, one.targets) == (other.tokens, other.targets)


def _padded_adamw(model: LlamaForCausalLM, records: Sequence[Encoded], settings: Train, steps: int) -> list[float]:
    """Training as in a textbook: padded batches, cross-entropy, clipping and AdamW written out. Gives its losses."""
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
        each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        counts = (labels[:, 1:] >= 0).sum(1)
        by_token = each.sum() / counts.sum()
        loss = by_token if settings.loss_mean == "token" else (each.sum(1) / counts).mean()
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
        losses.append(by_token.item())
    return losses


@pytest.mark.parametrize("loss_mean", ["token", "record"])
def test_it_is_adamw_on_padded_batches(make_tiny_model: MakeModel, records: list[Encoded], loss_mean: str) -> None:
    settings = Train(batch_size=4, learning_rate=3e-3, weight_decay=0.1, clip_norm=0.5, loss_mean=loss_mean)
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


# --- privacy for records


def noise(clip: float, noise_multiplier: float, sampling: str = "poisson", randomness: str = "seeded") -> RecordNoise:
    return RecordNoise(clip, noise_multiplier, sampling, randomness)


TRAINABLES = {
    "q/v": lora,
    "all linear": lambda model: lora(model, targets="all-linear"),
    "full": full,
}


@pytest.mark.parametrize("which", TRAINABLES)
@pytest.mark.parametrize("tokens_per_pass", [50, 512])
def test_without_clip_and_noise_a_private_run_is_the_plain_one_bit_for_bit(
    make_tiny_model: MakeModel, records: list[Encoded], which: str, tokens_per_pass: int
) -> None:
    settings = Train(
        batch_size=4, learning_rate=1e-2, weight_decay=0.1, loss_mean="record", tokens_per_pass=tokens_per_pass
    )
    plain = run(TRAINABLES[which](make_tiny_model()), records, settings, steps=3)
    for loss_mean in ("record", "token"):  # privacy takes records whatever the recipe says
        private = run(
            TRAINABLES[which](make_tiny_model()),
            records,
            settings.model_copy(update={"loss_mean": loss_mean}),
            steps=3,
            noise=noise(math.inf, 0.0, "shuffle"),
        )
        assert same(plain.tensors, private.tensors)
        assert same(plain.optimizer, private.optimizer)
        assert plain.steps == private.steps
    for how in (noise(1e-3, 0.0, "shuffle"), noise(1e3, 1e-6, "shuffle"), noise(math.inf, 0.0, "poisson")):
        other = run(TRAINABLES[which](make_tiny_model()), records, settings, steps=1, noise=how)
        assert other.steps[0].gradient_norm != plain.steps[0].gradient_norm


def test_the_sum_is_divided_by_what_does_not_depend_on_the_draw(
    make_tiny_model: MakeModel, records: list[Encoded]
) -> None:
    """Six records of which four are expected: each clipped to 1e-3, they point about the same way."""
    settings = Train(batch_size=4, learning_rate=1e-2)
    outcome = run(full(make_tiny_model()), records, settings, steps=8, noise=noise(1e-3, 0.0))
    drawn = [len(batch) for batch in islice(poisson_batches(6, 4, noise(1e-3, 0.0), seed=5, first=0), 8)]
    assert len(set(drawn)) > 1
    for step, count in zip(outcome.steps, drawn, strict=True):
        assert 0.5 < step.gradient_norm / (1e-3 * count / 4) <= 1
    # all three are drawn, and three are expected, as where there is no drawing
    few, all_three = (
        run(full(make_tiny_model()), records[:3], settings, steps=1, noise=noise(1e-3, 0.0, sampling)).steps[0]
        for sampling in ("poisson", "shuffle")
    )
    assert few.gradient_norm == pytest.approx(all_three.gradient_norm, rel=1e-3)
    shuffled = run(full(make_tiny_model()), records, settings, steps=2, noise=noise(1e-3, 0.0, "shuffle"))
    assert all(0.5 < step.gradient_norm / 1e-3 <= 1 for step in shuffled.steps)  # four, then two


@pytest.mark.parametrize("sampling", ["poisson", "shuffle"])
def test_a_private_run_goes_on_as_if_it_had_not_stopped(
    make_tiny_model: MakeModel, records: list[Encoded], sampling: str
) -> None:
    settings = Train(batch_size=2, learning_rate=1e-2)
    how = noise(0.5, 1.0, sampling)
    whole = run(lora(make_tiny_model()), records, settings, noise=how)
    first = run(lora(make_tiny_model()), records, settings, steps=3, noise=how)
    again = lora(make_tiny_model())
    again.load(first.tensors)
    second = run(again, records, settings, steps=3, first_step=3, schedule_step=3, optimizer=first.optimizer, noise=how)
    assert same(whole.tensors, second.tensors)
    assert same(whole.optimizer, second.optimizer)
    assert whole.steps == (*first.steps, *second.steps)
    assert torch.equal(whole.learnt, first.learnt + second.learnt)
    secure = noise(0.5, 1.0, sampling, "secure")
    assert not same(
        run(lora(make_tiny_model()), records, settings, noise=secure).tensors,
        run(lora(make_tiny_model()), records, settings, noise=secure).tensors,
    )


def test_a_step_that_draws_nobody_is_a_step_of_noise(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    outcome = run(
        lora(make_tiny_model()), records, Train(batch_size=1), steps=12, total_steps=12, noise=noise(0.5, 1.0)
    )
    drawn = list(islice(poisson_batches(6, 1, noise(0.5, 1.0), seed=5, first=0), 12))
    assert [] in drawn
    for step, batch in zip(outcome.steps, drawn, strict=True):
        assert (step.loss is None) == (step.tokens == 0) == (step.targets == 0) == (not batch)
        assert step.gradient_norm > 0.5
    assert [step.number for step in outcome.steps] == list(range(1, 13))


# --- what was learnt from


@pytest.mark.parametrize("how", [None, noise(0.5, 1.0), noise(0.5, 1.0, "shuffle")])
@pytest.mark.parametrize("loss_mean", ["token", "record"])
def test_it_counts_what_it_learnt_from(
    make_tiny_model: MakeModel, records: list[Encoded], how: RecordNoise | None, loss_mean: str
) -> None:
    one = records[0]
    blank = Encoded("blank", one.ids, one.position == 0, one.branch, one.position)  # nothing stands before its target
    given = [blank, *records[:3], blank, *records[3:]]
    settings = Train(batch_size=4, loss_mean=loss_mean, tokens_per_pass=50)
    outcome = run(lora(make_tiny_model()), given, settings, steps=7, first_step=2, noise=how)
    if how is not None and how.sampling == "poisson":
        stream = poisson_batches(6, 4, how, seed=5, first=2)
    else:
        stream = batches(6, 4, seed=5, first=2)
    steps = [0] * 6
    for batch in islice(stream, 7):
        for index in batch:
            steps[index] += 1
    counts = [[count, count * int(record.target[1:].sum())] for count, record in zip(steps, records, strict=True)]
    assert outcome.learnt.dtype == torch.int64
    assert outcome.learnt.tolist() == [[0, 0], *counts[:3], [0, 0], *counts[3:]]
    assert outcome.learnt[:, 1].sum() == sum(step.targets for step in outcome.steps)
