"""Who answers, token by token: the gates of a mixture of experts on texts and records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from allmend.data.chat import Encoded
from allmend.models.mixture import Mixture
from allmend.models.mixture_layers import MixtureMLP, routing

MOST = 4096
"""Tokens that a member's routing is measured on."""


@dataclass(frozen=True)
class Usage:
    """How experts were used on some records.

    Attributes:
        gates: sum over a record's tokens of each expert's gate in each layer, float64 [records, layers, E].
        tokens: of each record.
    """

    gates: torch.Tensor
    tokens: tuple[int, ...]

    @property
    def mean(self) -> torch.Tensor:
        """Mean gates over all tokens, [layers, E]."""
        return self.gates.sum(0) / sum(self.tokens)


def layers_with_experts(mixture: Mixture) -> list[int]:
    """Numbers of the decoder's layers that have experts, from 0, in the order in which `routing` has them."""
    places = [name for name, module in mixture.model.named_modules() if isinstance(module, MixtureMLP)]
    return [next(int(part) for part in place.split(".") if part.isdigit()) for place in places]


def token_gates(mixture: Mixture, ids: torch.Tensor) -> torch.Tensor:
    """The gates of each token of one text, [layers, T, E].

    Args:
        mixture: with the state that is asked about.
        ids: the text's token ids, int64 [T].
    """
    device = mixture.present.device
    # logits are the widest thing there is, and nobody looks at them
    batch = {"input_ids": ids[None].to(device), "logits_to_keep": torch.zeros(1, dtype=torch.int64, device=device)}
    return routing(mixture.model, batch)


def first_records(records: Sequence[Encoded], most: int = MOST) -> list[Encoded]:
    """Those whose tokens come to no more than so many, and the first one in any case; none without a token."""
    found: list[Encoded] = []
    tokens = 0
    for record in records:
        tokens += len(record)
        if found and tokens > most:
            break
        if len(record):
            found.append(record)
    return found


def usage(
    mixture: Mixture,
    records: Sequence[Encoded],
    *,
    most: int = MOST,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Usage | None:
    """How a mixture's experts are used on records: on every token that is read, prompts and templates included.

    Args:
        mixture: with the state that is asked about.
        records: without branches, as for training.
        most: tokens in all: see `first_records`.
        on_tokens: told the tokens of each record.

    Returns:
        None where there is no token.
    """
    sums: list[torch.Tensor] = []
    read = first_records(records, most)
    for record in read:
        sums.append(token_gates(mixture, record.ids).double().sum(1).cpu())
        on_tokens(len(record))
    return Usage(torch.stack(sums), tuple(map(len, read))) if read else None
