"""The causal language-modelling objective on packed rows, with logits only where it looks."""

from typing import Any

import torch

from allmend.data.chat import Encoded
from allmend.data.packing import Row, pack
from allmend.models.attention import packed_attention


def logits_at_sources(model: Any, row: Row) -> torch.Tensor:
    """Logits of the tokens that predict a target.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        row: on the model's device, U sources.

    Returns:
        [U, vocabulary], float32; float64 of a model in double precision.
    """
    dtype = torch.get_default_dtype() if (found := getattr(model, "dtype", None)) is None else found
    # additive rather than boolean: every attention implementation understands it
    mask = torch.zeros(row.visible.shape, dtype=dtype, device=row.visible.device)
    mask.masked_fill_(~row.visible, torch.finfo(dtype).min)
    with packed_attention(model):
        logits: torch.Tensor = model(
            input_ids=row.ids,
            position_ids=row.position,
            attention_mask=mask[:, None],
            slots=row.slots,
            logits_to_keep=row.sources,
            use_cache=False,
        ).logits
    return logits[0] if logits.dtype == torch.float64 else logits[0].float()


def log_likelihood(model: Any, row: Row) -> torch.Tensor:
    """log p(target | what stands before it) of each of the row's N targets (nats), [N], of the logits' type."""
    found: torch.Tensor = _LogLikelihood.apply(logits_at_sources(model, row), row.source_of, row.targets)  # type: ignore[no-untyped-call]
    return found


class _LogLikelihood(torch.autograd.Function):
    """logits[source_of, targets] − logsumexp(logits)[source_of], with a backward of one pass over the logits.

    The vocabulary is the widest thing there is: autograd's own way takes several passes over a [U, vocabulary] tensor.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, source_of: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        normaliser = logits.logsumexp(-1)
        ctx.save_for_backward(logits, normaliser, source_of, targets)
        return logits[source_of, targets] - normaliser[source_of]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, normaliser, source_of, targets = ctx.saved_tensors
        weight = torch.zeros_like(normaliser).index_add_(0, source_of, gradient)
        found = (logits - normaliser[:, None]).exp_().mul_(-weight[:, None])
        found.index_put_((source_of, targets), gradient, accumulate=True)
        return found, None, None


@torch.inference_mode()
def records_stay_apart(model: Any) -> bool:
    """Whether a record in a packed row is read as if alone, whatever stands before it.

    Attention is told where records end (`packed_attention`). A layer that mixes tokens in another way, as convolutions
    and recurrences do, is not, and would let a record see its neighbour.
    """
    first, other, text = (torch.arange(24) % model.config.vocab_size).view(3, 8)
    read, again = (_read_behind(model, before, text) for before in (first, other))
    # between experts, a token's arithmetic may depend on how many others come along, in the last bits
    rounding = 4 * torch.finfo(model.dtype).eps * read.abs().max()
    return bool((again - read).abs().max() <= rounding)


def _read_behind(model: Any, first: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """log p of a text's targets in a packed row, behind another text of its length."""
    every, trunk, places = torch.ones_like(text, dtype=torch.bool), torch.zeros_like(text), torch.arange(len(text))
    (row,) = pack([Encoded("", ids, every, trunk, places) for ids in (first, text)], 2 * len(text))
    return log_likelihood(model, row.to(model.device))[row.owner == 1]
