"""A small language model from scratch, on which optimisers can be compared in minutes on a CPU.

It has the parts of a Llama (RMSNorm, rotary positions, SwiGLU, tied embeddings). Nothing that it shows holds for larger
models without a look at them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<eos>"

HELD_OUT = 0.1
"""Share of the documents on which a model is measured and not trained."""


@dataclass(frozen=True)
class Shape:
    """The model, and what it is trained on; the defaults make 0.54 million parameters.

    Attributes:
        layers, hidden, feed_forward, heads: of the model.
        vocabulary: tokens of byte-level BPE, made from the training documents.
        positions: tokens of a sequence.
        batch: sequences in a step.
        held_out: sequences, at most, on which it is measured.
    """

    layers: int = 4
    hidden: int = 96
    feed_forward: int = 256
    heads: int = 4
    vocabulary: int = 1024
    positions: int = 64
    batch: int = 32
    held_out: int = 768


@dataclass(frozen=True)
class Sequences:
    """Documents as tokens: `train` and `held_out`, both int64 [sequences, positions]."""

    train: torch.Tensor
    held_out: torch.Tensor


def encode(texts: Sequence[str], shape: Shape) -> Sequences:
    """Documents end to end, cut into sequences; every tenth of them is held out.

    Args:
        texts: documents, in an order that means nothing.
        shape: of the model.

    Raises:
        ValueError: there are too few for a batch of each.
    """
    step = round(1 / HELD_OUT)
    if len(texts) < step:
        raise ValueError(f"{len(texts)} documents are too few: {step} or more leave some to measure on")
    parts = [[text for place, text in enumerate(texts) if (place % step == 0) == held] for held in (False, True)]
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(parts[0], trainer)
    train, held_out = (_cut(bare, part, shape.positions) for part in parts)
    if len(train) < shape.batch or not len(held_out):
        raise ValueError(
            f"the documents have {train.numel() + held_out.numel():,} tokens, too few for a batch of {shape.batch} "
            f"sequences of {shape.positions}"
        )
    return Sequences(train, held_out[: shape.held_out])


def _cut(tokenizer: Tokenizer, texts: Sequence[str], positions: int) -> torch.Tensor:
    ids = torch.cat([torch.tensor(one.ids) for one in tokenizer.encode_batch([text + END for text in texts])])
    return ids[: len(ids) // positions * positions].view(-1, positions).long()


def make_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """The model with its weights by a seed, in single precision and training mode; the caller's generator is kept."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlamaForCausalLM(config)
    made.train()
    return made


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of each token of int64 [B, T] but the first."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Any, ids: torch.Tensor, batch: int) -> float:
    """The same over many sequences, in evaluation mode."""
    model.eval()
    total = sum(loss_of(model, some).item() * len(some) for some in torch.split(ids, batch))
    model.train()
    return total / len(ids)
