"""The noise of a private step, how records are drawn for it, and what a private run leaves behind."""

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.learn.loop import train
from allmend.learn.per_example import clipped_sum, separable_rows
from allmend.learn.private import RecordNoise, poisson_batches, private_gradient, sampling_rate
from allmend.models.adapters import Trainable, add_lora, full
from allmend.recipe import Train

MakeModel = Callable[..., LlamaForCausalLM]
LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]


def noise(clip: float = 0.5, noise_multiplier: float = 2.0, **changes: Any) -> RecordNoise:
    return RecordNoise(clip, noise_multiplier, **{"sampling": "poisson", "randomness": "seeded"} | changes)


@pytest.fixture(scope="module")
def records() -> list[Encoded]:
    """Ten texts over four letters, each the same few letters again and again."""
    made = []
    for index in range(10):
        ids = torch.tensor([97 + index % 4, 98, 99, 100] * 4)
        length = len(ids)
        made.append(
            Encoded(
                str(index), ids, torch.arange(length) > 0, torch.zeros(length, dtype=torch.int64), torch.arange(length)
            )
        )
    return made


def lora(model: torch.nn.Module) -> Trainable:
    return add_lora(model, rank=4, alpha=16.0, targets="all-linear", seed=1)


def gradient(trainable: Trainable) -> torch.Tensor:
    """All that lies in the parameters' `grad`, in one vector."""
    return torch.cat([p.grad.flatten().clone() for p in trainable.parameters().values() if p.grad is not None])


def noisy(trainable: Trainable, records: list[Encoded], how: RecordNoise, **changes: Any) -> torch.Tensor:
    rows = separable_rows(trainable, records, 100)
    private_gradient(trainable, rows, how, **{"size": 8, "seed": 3, "step": 0} | changes)
    return gradient(trainable)


@pytest.mark.parametrize(
    ("clip", "multiplier"),
    [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, -0.1), (1.0, math.inf), (1.0, math.nan), (math.inf, 0.1)],
)
def test_what_is_no_clip_or_no_noise_is_refused(clip: float, multiplier: float) -> None:
    with pytest.raises(ValueError, match=r"clip"):
        noise(clip, multiplier)


def test_the_deviation_is_in_proportion_to_the_clip() -> None:
    assert noise(0.5, 3.0).deviation == 1.5
    assert noise(math.inf, 0.0).deviation == 0.0


# --- noise


@pytest.mark.parametrize("randomness", ["seeded", "secure"])
@pytest.mark.parametrize("make", [lora, full])
def test_an_empty_batch_is_pure_noise(
    make_tiny_model: MakeModel, make: Callable[..., Trainable], randomness: str
) -> None:
    found = noisy(make(make_tiny_model()), [], noise(0.5, 3.0, randomness=randomness)).double()
    assert len(found) > 2000
    assert stats.kstest(found.numpy() / (0.5 * 3.0 / 8), "norm").pvalue > 1e-6


def test_the_noise_is_the_same_whatever_the_records_are(make_tiny_model: MakeModel, records: list[Encoded]) -> None:
    trainable = lora(make_tiny_model())
    clipped_sum(trainable, pack(records, 100), 0.5)
    signal = gradient(trainable)
    assert signal.norm() > 0.1
    assert torch.allclose(noisy(trainable, records, noise()), signal / 8 + noisy(trainable, [], noise()), atol=1e-6)


def test_steps_members_and_parameters_have_noise_of_their_own(make_tiny_model: MakeModel) -> None:
    trainable = lora(make_tiny_model())
    made = [noisy(trainable, [], noise(), step=step, seed=seed) for step in range(3) for seed in range(3)]
    assert torch.equal(made[0], noisy(trainable, [], noise(), step=0, seed=0))
    together = torch.cat(made)
    assert len(together.unique()) > 0.999 * len(together)  # float32 meets a number twice now and then
    secure = [noisy(trainable, [], noise(randomness="secure")) for _ in range(2)]
    assert not (secure[0] == secure[1]).any()
    drawn = torch.corrcoef(torch.stack([*made, *secure]))
    assert (drawn - torch.eye(11)).abs().max() < 5 / math.sqrt(len(made[0]))


# --- sampling


def test_every_record_is_drawn_with_the_same_probability_independently() -> None:
    draws = list(islice(poisson_batches(20, 5, noise(), seed=1, first=0), 4000))
    drawn = torch.zeros(4000, 20)
    for step, batch in enumerate(draws):
        drawn[step, batch] = 1
    assert sampling_rate(20, 5) == 0.25
    assert all(stats.binomtest(int(count), 4000, 0.25).pvalue > 1e-6 for count in drawn.sum(0))
    sizes = drawn.sum(1).int().tolist()
    expected = [4000 * stats.binom.pmf(size, 20, 0.25) for size in range(12)]
    observed = [sizes.count(size) for size in range(12)]
    rest = [4000 - sum(observed)], [4000 - sum(expected)]
    assert stats.chisquare(observed + rest[0], expected + rest[1]).pvalue > 1e-6
    assert (torch.corrcoef(drawn.T) - torch.eye(20)).abs().max() < 5 / math.sqrt(4000)  # between records
    assert (torch.corrcoef(torch.cat([drawn[1:], drawn[:-1]], 1).T)[:20, 20:]).abs().max() < 5 / math.sqrt(4000)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**48), st.integers(0, 12))
def test_samples_go_on_from_any_step(records: int, size: int, seed: int, first: int) -> None:
    stream = list(islice(poisson_batches(records, size, noise(), seed=seed, first=0), first + 3))
    assert list(islice(poisson_batches(records, size, noise(), seed=seed, first=first), 3)) == stream[first:]
    if size >= records:
        assert stream[0] == list(range(records))


def test_secure_samples_do_not_come_again() -> None:
    how = noise(randomness="secure")
    assert next(poisson_batches(200, 100, how, seed=0, first=0)) != next(
        poisson_batches(200, 100, how, seed=0, first=0)
    )


# --- dropout


@pytest.mark.parametrize("base", ["llama", "gpt2"])  # which has dropout of its own
def test_one_record_more_moves_a_step_by_the_clip_at_most_whatever_is_dropped_in_plain_training(
    make_tiny_model: MakeModel, records: list[Encoded], monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    summed: list[torch.Tensor] = []

    def keep(trainable: Trainable, rows: Any, how: RecordNoise, *, size: int, **where: Any) -> float:
        loss = private_gradient(trainable, rows, how, size=size, **where)
        summed.append(size * gradient(trainable))
        return loss

    monkeypatch.setattr("allmend.learn.loop.private_gradient", keep)
    clip, sums = 1e-3, {}
    for kept in (records[:7], records[:8]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=64)
            model = make_tiny_model() if base == "llama" else GPT2LMHeadModel(config)
        trainable = add_lora(model, rank=4, alpha=16.0, targets="all-linear", dropout=0.3, seed=1)
        trainable.load({name: tensor + 0.1 for name, tensor in trainable.state().items()})
        how = noise(clip=clip, noise_multiplier=0.0, sampling="shuffle")
        settings = Train(batch_size=8, learning_rate=1e-3)
        train(trainable, kept, settings, steps=1, first_step=0, schedule_step=0, total_steps=1, seed=0, noise=how)
        sums[len(kept)] = summed[-1]
    assert (sums[8] - sums[7]).norm() <= clip * (1 + 1e-4)  # sums in float32 are subtracted
    assert sums[7].norm() > clip


# --- a whole run


@pytest.mark.parametrize("make", [lora, full])
def test_what_a_private_run_learnt_is_saved_and_comes_back(
    make_tiny_model: MakeModel,
    tiny_folder: Path,
    records: list[Encoded],
    log_probs: LogProbs,
    tmp_path: Path,
    make: Callable[..., Trainable],
) -> None:
    trainable = make(make_tiny_model())
    outcome = train(
        trainable,
        records,
        Train(batch_size=5, learning_rate=2e-2),
        steps=40,
        first_step=0,
        schedule_step=0,
        total_steps=40,
        seed=0,
        noise=noise(clip=0.1, noise_multiplier=0.02),
    )
    trainable.save(tmp_path / "out", outcome.tensors, base=str(tiny_folder))
    base = AutoModelForCausalLM.from_pretrained(str(tiny_folder))
    with torch.no_grad():
        before = [log_probs(base, record.ids) for record in records]
        if trainable.kind == "lora":
            loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
        else:
            loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
        after = [log_probs(loaded, record.ids) for record in records]
        trained = [log_probs(trainable.model, record.ids) for record in records]
    torch.testing.assert_close(torch.cat(after), torch.cat(trained), rtol=0, atol=1e-5)
    assert torch.cat(after).mean() > torch.cat(before).mean() + 0.3
