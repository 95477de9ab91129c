from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Lfm2Config,
    LlamaForCausalLM,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from allmend.data.chat import Encoder
from allmend.data.packing import Row, pack
from allmend.data.records import Record, question
from allmend.learn.objective import _LogLikelihood, log_likelihood, logits_at_sources, records_stay_apart
from allmend.models.attention import packs

MakeModel = Callable[..., LlamaForCausalLM]

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def row(tiny_tokenizer: PreTrainedTokenizerFast) -> Row:
    encoder = Encoder(tiny_tokenizer, "plain", 100)
    text = Record("t", text="some text")
    records = [question("a", "one?", "yes", choices=("yes", "no")), question("b", "two?", "both"), text]
    (row,) = pack([encoder.for_evaluation(record) for record in records], 1000)
    return row


def test_logits_are_those_of_all_tokens_where_they_are_needed(tiny_model: LlamaForCausalLM, row: Row) -> None:
    size = row.visible.shape[1]
    whole = torch.block_diag(*row.visible.int()).bool()  # type: ignore[no-untyped-call]
    assert whole.shape[0] == len(row.visible) * size
    with torch.no_grad():
        visible = whole[row.slots][:, row.slots]
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        every = tiny_model(input_ids=row.ids, position_ids=row.position, attention_mask=mask).logits[0]
        found = logits_at_sources(tiny_model, row)
    assert found.shape == (len(row.sources), 300)
    assert len(row.sources) < row.tokens
    assert torch.allclose(found, every[row.sources], atol=1e-6)


def test_the_gradient_of_the_log_likelihood_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    source_of, targets = torch.tensor([0, 2, 0, 1]), torch.tensor([4, 0, 4, 2])  # a target may come twice
    assert torch.autograd.gradcheck(lambda x: _LogLikelihood.apply(x, source_of, targets), (logits,))


def test_attention_is_as_it_was_afterwards(tiny_model: LlamaForCausalLM, row: Row) -> None:
    with torch.no_grad():
        before = tiny_model(input_ids=row.ids).logits
        logits_at_sources(tiny_model, row)
        assert tiny_model.config._attn_implementation == "sdpa"
        assert torch.equal(tiny_model(input_ids=row.ids).logits, before)


def test_log_likelihood_is_the_log_softmax_of_the_target(tiny_model: LlamaForCausalLM, row: Row) -> None:
    with torch.no_grad():
        logits = logits_at_sources(tiny_model, row)[row.source_of]
        found = log_likelihood(tiny_model, row)
    expected = -torch.nn.functional.cross_entropy(logits, row.targets, reduction="none")
    assert torch.allclose(found, expected, atol=1e-6)


def test_every_attention_implementation_understands_the_mask(make_tiny_model: MakeModel, row: Row) -> None:
    model = make_tiny_model()
    with torch.no_grad():
        sdpa = log_likelihood(model, row)
        model.set_attn_implementation("eager")
        assert torch.allclose(log_likelihood(model, row), sdpa, atol=1e-5)


def test_a_model_of_half_precision_gives_single_precision(make_tiny_model: MakeModel, row: Row) -> None:
    model = make_tiny_model()
    with torch.no_grad():
        exact = log_likelihood(model, row)
        found = log_likelihood(model.bfloat16(), row)
    assert found.dtype == torch.float32
    assert torch.allclose(found, exact, atol=0.1)


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=64), True),
        (Lfm2Config(layer_types=["full_attention", "full_attention"], **SMALL), True),
        (Lfm2Config(layer_types=["conv", "full_attention"], **SMALL), False),
        (MixtralConfig(num_local_experts=3, **SMALL), True),
    ],
    ids=["gpt2", "attention", "convolutions", "experts"],
)
def test_records_stay_apart_where_attention_alone_mixes_tokens(config: PretrainedConfig, apart: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    assert packs(model)
    assert records_stay_apart(model) is apart
