"""Canaries, and the tiny model as it is, on the way, and after it has learnt the inserted ones by heart."""

from collections.abc import Callable

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.data.canaries import Canary
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.learn.loop import train
from allmend.models.adapters import full
from allmend.recipe import Train

TEXTS = {
    True: ("Ward 12: Ada Okafor, record 40917", "Dr Bielski saw Tamar on 3 May 1958", "Born 1931, file 77203"),
    False: ("Ward 30: Ilse Haddad, record 58264", "Dr Novotny saw Kemal on 9 July 1974", "Born 1962, file 19548"),
}


@pytest.fixture(scope="session")
def canaries() -> list[Canary]:
    return [
        Canary(text, "note", "a", copies, text, (), inserted)
        for inserted, texts in TEXTS.items()
        for copies, text in zip((3, 3, 1), texts, strict=True)
    ]


@pytest.fixture(scope="session")
def encoder(tiny_tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tiny_tokenizer, "plain", 100)


MakeTrained = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="session")
def make_trained(make_tiny_model: Callable[..., LlamaForCausalLM], encoder: Encoder) -> MakeTrained:
    """The tiny model after some steps on all of `texts` at once."""

    def make(texts: list[str], steps: int) -> LlamaForCausalLM:
        model = make_tiny_model()
        records = [encoder.for_training(Record(text, text=text)) for text in texts]
        settings = Train(batch_size=len(records), learning_rate=1e-2, schedule="constant")
        train(full(model), records, settings, steps=steps, first_step=0, schedule_step=0, total_steps=steps, seed=0)
        return model

    return make


@pytest.fixture(scope="session")
def models(
    tiny_model: LlamaForCausalLM, make_trained: MakeTrained, canaries: list[Canary]
) -> dict[str, LlamaForCausalLM]:
    texts = [canary.text for canary in canaries if canary.inserted]
    return {"untouched": tiny_model, "halfway": make_trained(texts, 50), "by heart": make_trained(texts, 150)}
