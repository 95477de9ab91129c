"""Who answers, token by token: the gates of a mixture of experts on texts and records."""

from collections.abc import Sequence
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


def usage(mixture: Mixture, records: Sequence[Encoded], *, most: int = MOST) -> Usage | None:
    """How a mixture's experts are used on records: on every token that is read, prompts and templates included.

    Args:
        mixture: with the state that is asked about.
        records: without branches, as for training.
        most: tokens in all: the first records up to so many, and the first one in any case.

    Returns:
        None where there is no token.
    """
    sums: list[torch.Tensor] = []
    tokens: list[int] = []
    for record in records:
        if tokens and sum(tokens) + len(record) > most:
            break
        if len(record):
            sums.append(token_gates(mixture, record.ids).double().sum(1).cpu())
            tokens.append(len(record))
    return Usage(torch.stack(sums), tuple(tokens)) if tokens else None
