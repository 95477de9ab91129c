"""The oracle reads each record alone: no packing, no mask, no positions, and each choice with a prompt of its own."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from allmend.data.chat import Encoded, Encoder
from allmend.data.packing import Row, pack
from allmend.data.records import Message, Record, question
from allmend.learn.objective import log_likelihood
from allmend.models.adapters import add_lora

MakeModel = Callable[..., LlamaForCausalLM]
LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
Values = dict[tuple[int, int], float]
"""By record and index of the target among its tokens."""

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def sequence(length: int, *, seed: int, share: float = 0.7) -> Encoded:
    """Random tokens, some of them targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (length,), generator=generator)
    target = torch.rand(length, generator=generator) < share
    return Encoded(str(seed), ids, target, torch.zeros(length, dtype=torch.int64), torch.arange(length))


def tree(trunk: int, branches: Sequence[int], *, seed: int) -> Encoded:
    """A trunk with branches of these lengths, whose every token is a target."""
    ids = torch.randint(256, (trunk + sum(branches),), generator=torch.Generator().manual_seed(seed))
    branch = [0] * trunk + [number for number, size in enumerate(branches, start=1) for _ in range(size)]
    position = [*range(trunk), *(trunk + index for size in branches for index in range(size))]
    return Encoded(str(seed), ids, torch.tensor(branch) > 0, torch.tensor(branch), torch.tensor(position))


@pytest.fixture(scope="module")
def records(tiny_chat_tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Running text, conversations and questions, as the encoder makes them."""
    encoder = Encoder(tiny_chat_tokenizer, "chat", 60)
    plain = Encoder(tiny_chat_tokenizer, "plain", 60)
    turns = tuple(Message(role, text) for role, text in [("user", "a?"), ("assistant", "b"), ("user", "c?")])
    asked = [question(f"q{n}", f"which{'!' * n}?", "no", choices=("no", "perhaps", "n")) for n in range(3)]
    return [
        encoder.for_training(Record("text", text="running text of some length")),
        plain.for_training(question("pair", "why?", "because")),
        encoder.for_training(Record("talk", messages=(*turns, Message("assistant", "and d")))),
        *(encoder.for_evaluation(record) for record in asked),
        *(plain.for_evaluation(record) for record in asked),
        encoder.for_evaluation(Record("one", text="1")),
    ]


def alone(
    model: torch.nn.Module, log_probs: LogProbs, records: Sequence[Encoded]
) -> dict[tuple[int, int], torch.Tensor]:
    found = {}
    for owner, record in enumerate(records):
        for branch in record.branch.unique().tolist():
            at = ((record.branch == 0) | (record.branch == branch)).nonzero()[:, 0]
            values = log_probs(model, record.ids[at])
            for index, value in zip(at[1:].tolist(), values, strict=True):
                if record.target[index] and record.branch[index] == branch:
                    found[owner, index] = value
    return found


def packed(model: torch.nn.Module, records: Sequence[Encoded], capacity: int) -> Values:
    found: Values = {}
    for row in pack(records, capacity):
        for owner, at, value in zip(row.owner, row.target_at, log_likelihood(model, row), strict=True):
            assert (int(owner), int(at)) not in found
            found[int(owner), int(at)] = value.item()
    return found


def check(model: torch.nn.Module, log_probs: LogProbs, records: Sequence[Encoded], capacity: int) -> None:
    with torch.no_grad():
        expected = {key: value.item() for key, value in alone(model, log_probs, records).items()}
        assert packed(model, records, capacity) == pytest.approx(expected, abs=1e-5)


def _build(name: str, make_tiny_model: MakeModel) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match name:
            case "llama":
                return make_tiny_model()
            case "qwen2":
                return Qwen2ForCausalLM(Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2)).eval()
            case "mistral":
                return MistralForCausalLM(MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)).eval()
            case "gpt2":  # learned positions, which a relative position cannot stand in for
                model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=64))
                model.transformer.wpe.weight.data.mul_(10)
                return model.eval()
    trainable = add_lora(make_tiny_model(), rank=4, alpha=32.0, targets=["q_proj", "v_proj"], seed=0)
    trainable.load({key: torch.randn_like(tensor) for key, tensor in trainable.state().items()})
    return trainable.model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gpt2", "lora"])
@pytest.mark.parametrize("capacity", [1, 100, 1000])
def test_packed_records_are_read_as_if_alone(
    make_tiny_model: MakeModel, log_probs: LogProbs, records: list[Encoded], architecture: str, capacity: int
) -> None:
    check(_build(architecture, make_tiny_model), log_probs, records, capacity)


@given(st.lists(st.integers(1, 25), min_size=1, max_size=8), st.integers(1, 80), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_any_lengths_and_capacity(
    tiny_model: LlamaForCausalLM, log_probs: LogProbs, lengths: list[int], capacity: int, seed: int
) -> None:
    check(tiny_model, log_probs, [sequence(length, seed=seed + n) for n, length in enumerate(lengths)], capacity)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=4),
    st.integers(1, 80),
)
@settings(max_examples=25, deadline=None)
def test_any_trees(
    tiny_model: LlamaForCausalLM, log_probs: LogProbs, shapes: list[tuple[int, list[int]]], capacity: int
) -> None:
    check(tiny_model, log_probs, [tree(trunk, sizes, seed=n) for n, (trunk, sizes) in enumerate(shapes)], capacity)


def test_the_gradient_is_that_of_separate_passes(
    make_tiny_model: MakeModel, log_probs: LogProbs, records: list[Encoded]
) -> None:
    one, other = make_tiny_model(), make_tiny_model()
    expected = torch.stack(list(alone(one, log_probs, records).values()))
    (-expected.mean()).backward()
    rows = pack(records, 100)
    assert len(rows) > 1
    for row in rows:
        (-log_likelihood(other, row).sum() / len(expected)).backward()
    gradients = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (one, other)]
    assert gradients[0].norm() > 0.1
    assert torch.allclose(*gradients, atol=1e-6)


@given(st.permutations(range(6)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_records_does_not_matter(tiny_model: LlamaForCausalLM, order: list[int]) -> None:
    records = [sequence(4 + 3 * n, seed=n) for n in range(6)]
    with torch.no_grad():
        expected = packed(tiny_model, records, 30)
        found = packed(tiny_model, [records[index] for index in order], 30)
    assert {(order[owner], at): value for (owner, at), value in found.items()} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("changed", range(5))
def test_a_record_tells_nothing_to_the_others(tiny_model: LlamaForCausalLM, changed: int) -> None:
    records = [*(sequence(9, seed=n) for n in range(4)), tree(5, [3, 4], seed=4)]
    other = list(records)
    original = other[changed]
    new_ids = (original.ids + 100) % 256
    other[changed] = Encoded("new", new_ids, original.target, original.branch, original.position)
    with torch.no_grad():
        before, after = packed(tiny_model, records, 1000), packed(tiny_model, other, 1000)
    assert all(before[key] == after[key] for key in before if key[0] != changed)
    assert all(before[key] != after[key] for key in before if key[0] == changed)


def test_a_choice_tells_nothing_to_the_others(tiny_model: LlamaForCausalLM) -> None:
    record = tree(5, [3, 4, 2], seed=4)
    second = record.branch == 2
    changed = Encoded("c", torch.where(second, 7, record.ids), record.target, record.branch, record.position)
    with torch.no_grad():
        before, after = packed(tiny_model, [record], 1), packed(tiny_model, [changed], 1)
    assert {at for (_, at) in before if before[0, at] != after[0, at]} == set(second.nonzero()[:, 0].tolist())


def _covers(rows: Sequence[Row], records: Sequence[Encoded], capacity: int) -> None:
    owners = [set(row.owner.tolist()) for row in rows]
    learnable = {n for n, record in enumerate(records) if record.target[record.position > 0].any()}
    assert set().union(*owners) == learnable
    assert sum(map(len, owners)) == len(learnable)  # none is in two rows
    for row, mine in zip(rows, owners, strict=True):
        assert row.tokens == sum(len(records[n]) for n in mine)
        assert row.tokens <= capacity or len(mine) == 1


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 60), st.floats(0, 1))
@settings(deadline=None)
def test_rows_hold_each_record_once_and_their_capacity(lengths: list[int], capacity: int, share: float) -> None:
    records = [sequence(length, seed=n, share=share) for n, length in enumerate(lengths)]
    rows = pack(records, capacity)
    _covers(rows, records, capacity)
    used = sum(row.tokens for row in rows)
    # two rows that would fit into one are never left apart
    assert all(a.tokens + b.tokens > capacity for n, a in enumerate(rows) for b in rows[:n])
    assert used == sum(len(record) for record in records if record.target[1:].any())


def test_records_without_targets_are_left_out() -> None:
    silent, first_only = sequence(9, seed=0, share=0.0), sequence(5, seed=1, share=0.0)
    first_only.target[0] = True  # nothing stands before it
    assert pack([silent, first_only], 100) == []
    (row,) = pack([silent, sequence(4, seed=2, share=1.0), first_only], 100)
    assert row.tokens == 4
    assert set(row.owner.tolist()) == {1}
    assert row.target_at.tolist() == [1, 2, 3]


@pytest.mark.parametrize("longest", [3, 40], ids=["record by record", "all at once"])
def test_visible_is_the_past_of_the_same_record_and_branch(longest: int) -> None:
    records = [sequence(longest, seed=0, share=1.0), tree(2, [2, 1], seed=1), sequence(2, seed=2, share=1.0)]
    (row,) = pack(records, 100)
    # three records of up to 40 places are more work than one row of 47 tokens
    assert row.visible.shape == ((3, 5, 5) if longest == 3 else (1, 47, 47))
    block, place = row.slots // row.visible.shape[1], row.slots % row.visible.shape[1]
    where = [(n, int(b), i) for n, record in enumerate(records) for i, b in enumerate(record.branch)]
    for query, (record, branch, at) in enumerate(where):
        for key, (other, other_branch, other_at) in enumerate(where):
            expected = record == other and other_at <= at and other_branch in (0, branch)
            seen = block[query] == block[key] and row.visible[block[query], place[query], place[key]]
            assert bool(seen) == expected


def test_places_without_a_token_see_themselves_and_no_token_sees_them() -> None:
    (row,) = pack([sequence(5, seed=0, share=1.0), sequence(2, seed=1, share=1.0)], 100)
    taken = torch.zeros(row.visible.shape[:2], dtype=torch.bool).flatten().index_fill(0, row.slots, True)
    taken = taken.view(row.visible.shape[:2])
    assert row.visible.diagonal(dim1=1, dim2=2).all()
    assert not (row.visible & taken[:, :, None] & ~taken[:, None, :]).any()


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(1, 30))
@settings(deadline=None)
def test_every_token_knows_its_record(lengths: list[int], capacity: int) -> None:
    records = [sequence(length, seed=n, share=1.0) for n, length in enumerate(lengths)]
    rows = pack([*records[:1], sequence(5, seed=99, share=0.0), *records[1:]], capacity)
    places = [n + (n > 0) for n in range(len(records))]  # the second one has no target
    for row in rows:
        expected = [place for place in sorted(set(row.owner.tolist())) for _ in records[places.index(place)].ids]
        assert row.record.tolist() == expected
        assert torch.equal(row.ids[0], torch.cat([records[places.index(n)].ids for n in dict.fromkeys(expected)]))


def test_logits_are_needed_once_for_all_choices(records: list[Encoded]) -> None:
    for row in pack(records, 200):
        assert len(row.sources) <= len(row.targets)
        assert (row.sources.diff() > 0).all()
        assert set(row.source_of.tolist()) == set(range(len(row.sources)))
    (row,) = pack([tree(6, [1, 1, 1, 1], seed=0)], 100)
    assert row.sources.tolist() == [5]
    assert row.targets.tolist() == row.ids[0, 6:].tolist()
    assert row.branch.tolist() == [1, 2, 3, 4]


def test_a_row_moves_as_a_whole(records: list[Encoded]) -> None:
    row = pack(records, 100)[0].to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(row).values()} == {"meta"}
