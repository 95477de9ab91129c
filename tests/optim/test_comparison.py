"""The small model and the comparison on it: one seed has the same weights and batches; gaps; steps of known size."""

import math
from dataclasses import replace

import pytest
import torch

from allmend.optim.comparison import Gap, Method, Training, compare, gaps, rows, train_once
from allmend.optim.small_model import Sequences, Shape, encode, held_out_loss, loss_of, make_model

TINY = Shape(layers=2, hidden=32, feed_forward=48, heads=2, vocabulary=300, positions=16, batch=8, held_out=16)
SHORT = Training(steps=30)


@pytest.fixture(scope="module")
def data() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    words = ["red", "green", "blue", "is", "not", "a", "colour", "here"]
    texts = [" ".join(words[int(i)] for i in torch.randint(len(words), (30,), generator=generator)) for _ in range(200)]
    return encode(texts, TINY)


def test_every_tenth_document_is_held_out_and_nothing_of_it_is_learnt() -> None:
    texts = [f"{'x' if place % 10 == 0 else 'y'} " * 40 for place in range(60)]
    found = encode(texts, TINY)
    train, held_out = ({int(i) for i in part.unique()} for part in (found.train, found.held_out))
    assert train - held_out
    assert held_out - train
    assert found.train.shape[1] == found.held_out.shape[1] == TINY.positions


def test_too_little_text_is_told() -> None:
    with pytest.raises(ValueError, match="3 documents are too few"):
        encode(["a"] * 3, TINY)
    with pytest.raises(ValueError, match="too few for a batch of 8 sequences of 16"):
        encode(["a"] * 20, TINY)


def test_the_model_is_the_seeds_and_has_the_size_that_is_told() -> None:
    state = torch.get_rng_state()
    one, same, other = make_model(TINY, 1), make_model(TINY, 1), make_model(TINY, 2)
    assert torch.equal(state, torch.get_rng_state())
    ids = torch.arange(16).view(1, -1)
    assert torch.equal(loss_of(one, ids), loss_of(same, ids))
    assert not torch.equal(loss_of(one, ids), loss_of(other, ids))
    assert sum(p.numel() for p in make_model(Shape(), 0).parameters()) == pytest.approx(0.54e6, rel=0.02)
    assert loss_of(one, ids).item() == pytest.approx(math.log(TINY.vocabulary), rel=0.05)  # nothing is known yet


def test_the_held_out_loss_does_not_depend_on_how_it_is_cut(data: Sequences) -> None:
    model = make_model(TINY, 0)
    whole = loss_of(model, data.held_out).item()
    assert held_out_loss(model, data.held_out, 3) == pytest.approx(whole, rel=1e-5)
    assert model.training


def test_a_seed_has_the_same_weights_and_batches_for_every_method(data: Sequences) -> None:
    methods = [Method("adamw", 1e-3), Method("liona", 1e-3)]
    found = list(compare(data, methods, warmups=[0.0, 0.5], seeds=[0, 1], shape=TINY, training=SHORT))
    assert [(one.method, one.warmup, one.seed) for one in found] == [
        (name, warmup, seed) for seed in (0, 1) for name in ("adamw", "liona") for warmup in (0.0, 0.5)
    ]
    firsts = {(one.seed, one.curve[0]) for one in found}
    assert len(firsts) == 2  # the first loss is before any step
    table = rows(found)
    assert len(table) == 4
    assert all(set(row.losses) == {0, 1} for row in table)
    by = {(row.method, row.warmup): row for row in table}
    assert by["adamw", 0.0].spike > 10 * by["adamw", 0.5].spike  # whose first step is one of length 0
    (adamw, _) = gaps(table)
    expected = [by["adamw", 0.0].losses[seed] - by["adamw", 0.5].losses[seed] for seed in (0, 1)]
    assert adamw.by_seed == pytest.approx(expected)


def test_a_training_learns_and_one_that_diverges_is_infinite(data: Sequences) -> None:
    seen: list[int] = []
    good = train_once(data, Method("adamw", 5e-3), warmup=0.0, seed=0, shape=TINY, training=SHORT, on_step=seen.append)
    assert seen == list(range(1, 31))
    assert good.loss < good.curve[0] - 1
    bad = replace(SHORT, clip_norm=math.inf)
    assert train_once(data, Method("sgd", 1e30), warmup=0.0, seed=0, shape=TINY, training=bad).loss == math.inf


def test_a_ramp_and_schedule_free_weights_take_part(data: Sequences) -> None:
    for method in (Method("adamw", 5e-3, ramp=True), Method("schedulefree", 5e-3), Method("muon", 5e-3)):
        found = train_once(data, method, warmup=0.0, seed=0, shape=TINY, training=SHORT)
        assert found.loss < found.curve[0] - 0.5, method
    assert (
        train_once(data, Method("adamw", 5e-3, ramp=True), warmup=0.0, seed=0, shape=TINY, training=SHORT).report.spike
        < 2
    )


@pytest.mark.parametrize(
    ("by_seed", "words"),
    [((0.2, 0.3), "needs a warmup"), ((-0.2, 0.02), "needs no warmup"), ((-0.1, 0.2), "not decided")],
)
def test_a_verdict_needs_all_seeds(by_seed: tuple[float, ...], words: str) -> None:
    assert words in Gap("adamw", 1e-3, 0.25, by_seed).verdict
