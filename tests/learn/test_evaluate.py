import math
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.data.chat import Encoded, Encoder
from allmend.data.records import Record, question
from allmend.intervals import exp_mean, share
from allmend.learn.evaluate import Score, accuracy, score, utility

LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

# of different lengths, and some of them beginnings of others
CHOICES = ("yes", "yes, surely", "no", "not in a thousand years", "it depends")


@pytest.fixture(scope="module")
def encoder(tiny_chat_tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tiny_chat_tokenizer, "plain", 80)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    asked = [
        question(
            f"q{n}", f"is {n} {'really ' * (n % 3)}odd?", CHOICES[n % 5], choices=CHOICES[: 2 + n % 4], kind=f"k{n % 2}"
        )
        for n in range(12)
        if CHOICES[n % 5] in CHOICES[: 2 + n % 4]
    ]
    return [question("open", "why?", "because"), *asked, Record("text", text="running text", kind="k1")]


@pytest.fixture(scope="module")
def encoded(encoder: Encoder, records: Sequence[Record]) -> list[Encoded]:
    return [encoder.for_evaluation(record) for record in records]


def naive(
    model: torch.nn.Module, log_probs: LogProbs, encoder: Encoder, prompt: str, response: str
) -> tuple[float, int]:
    """Log-likelihood and tokens of a response (bytes are tokens), from a pass of its own."""
    ids = torch.tensor(encoder.tokenizer(f"{prompt} {response}")["input_ids"])
    values = log_probs(model, ids)[-len(response) - 1 :]
    return values.sum().item(), len(values)


@torch.no_grad()
def test_a_choice_has_the_highest_mean_log_likelihood(
    tiny_model: LlamaForCausalLM,
    log_probs: LogProbs,
    encoder: Encoder,
    records: list[Record],
    encoded: list[Encoded],
) -> None:
    scores = score(tiny_model, records, encoded)
    assert len({found.choice for found in scores}) > 2  # or any rule would do
    for record, found in zip(records, scores, strict=True):
        if not record.choices:
            continue
        prompt = record.messages[0].content
        values = [naive(tiny_model, log_probs, encoder, prompt, choice) for choice in record.choices]
        means = [total / count for total, count in values]
        assert found.choice == max(range(len(means)), key=means.__getitem__)
        assert found.right == (found.choice == record.answer)
        assert (-found.nll, found.tokens) == (
            pytest.approx(values[record.answer][0], abs=1e-4),
            values[record.answer][1],
        )
        assert found.choices == len(record.choices)


@torch.no_grad()
def test_records_without_choices_are_scored_by_their_response(
    tiny_model: LlamaForCausalLM,
    log_probs: LogProbs,
    encoder: Encoder,
    records: list[Record],
    encoded: list[Encoded],
) -> None:
    first, *_, last = score(tiny_model, records, encoded)
    total, count = naive(tiny_model, log_probs, encoder, "why?", "because")
    assert (first.tokens, first.nll) == (count, pytest.approx(-total, abs=1e-4))
    values = log_probs(tiny_model, torch.tensor(encoder.tokenizer("running text")["input_ids"]))
    assert (last.tokens, last.nll) == (len(values), pytest.approx(-values.sum().item(), abs=1e-4))
    assert first.choice is None
    assert first.answer is None
    assert not first.right


@pytest.mark.parametrize("tokens_per_pass", [16, 1000])
def test_the_capacity_of_a_pass_does_not_matter(
    tiny_model: LlamaForCausalLM, records: list[Record], encoded: list[Encoded], tokens_per_pass: int
) -> None:
    told: list[int] = []
    expected = score(tiny_model, records, encoded, tokens_per_pass=100)
    found = score(tiny_model, records, encoded, tokens_per_pass=tokens_per_pass, on_tokens=told.append)
    assert [one.choice for one in found] == [one.choice for one in expected]
    assert [one.nll for one in found] == pytest.approx([one.nll for one in expected], abs=1e-4)
    assert sum(told) == sum(map(len, encoded))


def test_a_choice_without_tokens_does_not_win(tiny_model: LlamaForCausalLM, encoder: Encoder) -> None:
    record = Record("r", choices=("n", "none"), answer=1)
    ids = torch.tensor(encoder.tokenizer("nnone")["input_ids"])
    # no prompt: nothing stands before the first token of a choice, which cannot be predicted
    tree = Encoded(
        "r", ids, torch.ones(5, dtype=torch.bool), torch.tensor([1, 2, 2, 2, 2]), torch.tensor([0, 0, 1, 2, 3])
    )
    (found,) = score(tiny_model, [record], [tree])
    assert (found.choice, found.tokens) == (1, 3)


def test_perplexity_of_one_record(tiny_model: LlamaForCausalLM, records: list[Record], encoded: list[Encoded]) -> None:
    (one,) = score(tiny_model, records[:1], encoded[:1])
    row = utility([one], model="base", held_out="a")
    assert row.perplexity is not None
    assert row.perplexity.value == pytest.approx(math.exp(one.nll / one.tokens))
    assert row.perplexity.n == one.tokens
    assert (row.accuracy, row.chance, row.by_kind) == (None, None, {})


def asked(id: str, kind: str, *, right: bool, nll: float = 1.0, tokens: int = 2, choices: int = 4) -> Score:
    return Score(id, kind, nll, tokens, choice=1 if right else 0, answer=1, choices=choices)


def test_a_row_of_the_table() -> None:
    scores = [
        asked("a", "x", right=True, nll=3.0, tokens=2),
        asked("b", "x", right=False, nll=1.0, tokens=5),
        asked("c", "y", right=True, choices=2),
        asked("d", "", right=True),
        Score("e", "z", 4.0, 8),
        Score("f", "z", 0.0, 0),
    ]
    row = utility(scores, model="fedavg", held_out="a", member="m")
    assert (row.model, row.held_out, row.member) == ("fedavg", "a", "m")
    assert row.accuracy == share(3, 4)
    assert row.by_kind == {"x": share(1, 2), "y": share(1, 1)}
    assert row.perplexity == exp_mean([3.0, 1.0, 1.0, 1.0, 4.0], [2, 5, 2, 2, 8])
    assert row.chance == pytest.approx((3 / 4 + 1 / 2) / 4)


def test_nothing_to_tell() -> None:
    assert accuracy([]) is None
    assert accuracy([Score("e", "z", 4.0, 8)]) is None
    row = utility([], model="base", held_out="a")
    assert (row.perplexity, row.accuracy, row.chance) == (None, None, None)


def test_no_records(tiny_model: LlamaForCausalLM) -> None:
    assert score(tiny_model, [], []) == []
