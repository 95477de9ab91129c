"""Tiny models and byte-level tokenizers, made on the spot.

The `tiny_*` fixtures serve a whole session: do not change them. `make_tiny_model` and `make_tiny_tokenizer` make
objects of a test's own.
"""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MakeModel = Callable[..., LlamaForCausalLM]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
LogProbs = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<eos>", "<pad>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Ctrl-C works here and in the processes that tests start, also where the tests run as a background job."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors take longer on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_tiny_tokenizer() -> MakeTokenizer:
    """A tokenizer of the 256 bytes, tokens of its own for `special`, and one for each of `merges` (`":y"`)."""

    def make(
        *,
        special: Sequence[str] = ("<eos>",),
        merges: Sequence[str] = (),
        chat_template: str | None = None,
        **tokens: str,
    ) -> PreTrainedTokenizerFast:
        symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *merges]
        bare = Tokenizer(
            BPE(
                vocab={symbol: number for number, symbol in enumerate(symbols)},
                merges=[(merge[:-1], merge[-1]) for merge in merges],
            )
        )
        bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bare.decoder = decoders.ByteLevel()
        bare.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        names = {"eos_token": "<eos>"} | tokens
        return PreTrainedTokenizerFast(tokenizer_object=bare, chat_template=chat_template, **names)

    return make


@pytest.fixture(scope="session")
def make_tiny_model() -> MakeModel:
    """A Llama of 300 tokens and two layers, whose weights depend on `seed` and the configuration alone."""

    def make(*, tied: bool = True, seed: int = 0, vocab_size: int = 300, **other: Any) -> LlamaForCausalLM:
        facts = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 256,
            "attn_implementation": "sdpa",
        }
        config = LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **(facts | other))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(make_tiny_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Without a chat template."""
    return make_tiny_tokenizer(special=SPECIAL, pad_token="<pad>")


@pytest.fixture(scope="session")
def tiny_chat_tokenizer(make_tiny_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """With the ChatML template; `<|im_end|>` is its end token."""
    return make_tiny_tokenizer(special=SPECIAL, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: MakeModel) -> LlamaForCausalLM:
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The tiny model and the tokenizer without a chat template, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: LlamaForCausalLM,
    tiny_chat_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The tiny model and the tokenizer with a chat template, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny") / "chat"
    tiny_model.save_pretrained(folder)
    tiny_chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def log_probs() -> LogProbs:
    """log p of each token of one sequence (int64 [T]) given those before it, [T − 1]: no packing, mask or positions."""

    def read(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids[None]).logits[0, :-1]
        return logits.float().log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]

    return read


@pytest.fixture(scope="session")
def deep_folder(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A Llama of six layers with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    make_tiny_model(num_hidden_layers=6, max_position_embeddings=1024, initializer_range=0.2).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of 1,100 and 2,600 bytes that have nothing in common."""
    folder = tmp_path_factory.mktemp("texts")
    for name, words, count in (
        ("search.txt", "a text of few words, over and over. ", 31),
        ("report.txt", "another. ", 290),
    ):
        (folder / name).write_text("".join(f"{place}{words}" for place in range(count)))
    return folder / "search.txt", folder / "report.txt"
