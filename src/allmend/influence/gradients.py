"""Gradients of single records, a few records at a time: what every method of influence is made of.

The loss of a record is the sum over its targets. The gradient of a layer's weight is a matrix [r, d] with its wide side
last: a LoRA factor A as it is stored, B transposed, so that r is the rank of the adapter in both.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from allmend.data.chat import Encoded
from allmend.data.packing import Row, packed
from allmend.errors import UserError
from allmend.learn.objective import log_likelihood
from allmend.learn.per_example import by_layer
from allmend.models.adapters import Trainable


@dataclass(frozen=True)
class Batch:
    """Gradients of n records.

    Attributes:
        places: of the records among all, n of them.
        gradients: by module, float [n, r, d].
        losses: of the records, summed over their targets (nats), float64 [n].
    """

    places: tuple[int, ...]
    gradients: Mapping[str, torch.Tensor]
    losses: torch.Tensor


class Source(Protocol):
    """Records whose gradients can be gone through as often as one likes, the same each time."""

    def __len__(self) -> int:
        """Records."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Each record once, in any order."""
        ...


@dataclass(frozen=True)
class Given:
    """Gradients that are in memory already, [n, r, d] by module."""

    gradients: Mapping[str, torch.Tensor]
    losses: torch.Tensor | None = None
    batch: int = 64

    def __len__(self) -> int:
        return len(next(iter(self.gradients.values())))

    def __iter__(self) -> Iterator[Batch]:
        losses = torch.zeros(len(self), dtype=torch.float64) if self.losses is None else self.losses
        for start in range(0, len(self), self.batch):
            some = slice(start, start + self.batch)
            places = tuple(range(len(self)))[some]
            yield Batch(places, {name: one[some] for name, one in self.gradients.items()}, losses[some])


@dataclass(frozen=True)
class OfRecords:
    """Gradients of records under a model with an adapter; no more than a packed row's are in memory.

    Attributes:
        trainable: the model and what of it counts.
        records: encoded as in training.
        modules: a regular expression that names of weights must match somewhere; all that learn when None.
        tokens_per_pass: capacity of a packed row.
        on_tokens: told the tokens of each pass.
    """

    trainable: Trainable
    records: Sequence[Encoded]
    modules: str | None = None
    tokens_per_pass: int = 512
    on_tokens: Callable[[int], None] = lambda tokens: None

    def __post_init__(self) -> None:
        if self.trainable.kind != "lora":
            raise UserError(
                "influence is about the factors of a LoRA adapter, and here everything learns",
                hint="Name an adapter.",
            )
        if not self.names:
            raise UserError(
                f"no weight that learns matches {self.modules!r}",
                where="modules",
                hint=f"There are {', '.join(list(self.trainable.parameters())[:2])} …",
            )

    @property
    def names(self) -> list[str]:
        """The weights that count."""
        return names_of(self.trainable.parameters(), self.modules)

    @property
    def untrained(self) -> bool:
        """Whether A learns and all factors B are zero, as before the first step: then A has no gradient."""
        parameters = self.trainable.parameters()
        factors = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
        both = len(factors) < len(parameters)
        return both and not any(bool(parameter.detach().any()) for parameter in factors)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def nbytes(self) -> int:
        """Of a record's gradients, in single precision."""
        parameters = self.trainable.parameters()
        return 4 * sum(parameters[name].numel() for name in self.names)

    def __iter__(self) -> Iterator[Batch]:
        for row in self.rows():
            yield self.batch(row)
            self.on_tokens(row.tokens)

    def rows(self) -> Iterator[Row]:
        """The records as they go through the model together.

        Raises:
            UserError: a record has no token to learn from.
        """
        silent = [place for place, record in enumerate(self.records) if not record.learns]
        if silent:
            raise UserError(
                f"{len(silent)} records have no token to learn from, the first of them {self.records[silent[0]].id!r}",
                hint="Look at data.max_tokens and the response fields.",
            )
        return packed(self.records, self.tokens_per_pass)

    def batch(self, row: Row) -> Batch:
        """Gradients of a row's records.

        Raises:
            UserError: a loss or a gradient is not finite; the record is named.
        """
        names = set(self.names)
        parameters = self.trainable.parameters()
        for parameter in parameters.values():
            parameter.grad = None
        device = next(iter(parameters.values())).device
        lengths = Counter(row.record.tolist())
        training = self.trainable.model.training
        self.trainable.model.eval()  # dropout would make another loss of each pass
        try:
            with by_layer(self.trainable, list(lengths.values()), _each) as found:
                losses = -log_likelihood(self.trainable.model, row.to(device))
                losses.sum().backward()  # type: ignore[no-untyped-call]
        finally:
            self.trainable.model.train(training)
            for parameter in parameters.values():
                parameter.grad = None
        if not bool(losses.isfinite().all()):
            strange = self.records[int(row.owner[losses.detach().cpu().isfinite().logical_not()][0])]
            raise UserError(
                f"the loss of record {strange.id!r} is not finite",
                hint="The model or the adapter holds NaN or infinity.",
            )
        places = tuple(lengths)
        of = {place: index for index, place in enumerate(places)}
        owner = torch.tensor([of[place] for place in row.owner.tolist()])
        summed = torch.zeros(len(places), dtype=torch.float64)
        summed.index_add_(0, owner, losses.detach().double().cpu())
        gradients = {name: wide_last(name, one) for name, one in found.items() if name in names}
        # what is not finite shows in the sum
        whole = torch.stack([g.flatten(1).sum(1) for g in gradients.values()]).sum(0).cpu()
        if not bool(whole.isfinite().all()):
            strange = self.records[places[int(whole.isfinite().logical_not().nonzero()[0])]]
            raise UserError(
                f"the gradient of record {strange.id!r} is not finite",
                hint="Leave it out, or look for NaN and infinity in the model and the adapter.",
            )
        return Batch(places, gradients, summed)


def _each(x: torch.Tensor, delta: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """δᵀx of each record, [n, out, in], float32 whatever went through the model."""
    pairs = zip(x.split_with_sizes(lengths), delta.split_with_sizes(lengths), strict=True)
    return torch.stack([(d.T @ one).float() if d.dtype != torch.float64 else d.T @ one for one, d in pairs])


def names_of(names: Iterable[str], modules: str | None) -> list[str]:
    """Those that a regular expression matches somewhere; all when it is None.

    Raises:
        UserError: it is no regular expression.
    """
    try:
        return [name for name in names if modules is None or re.search(modules, name)]
    except re.error as error:
        raise UserError(
            f"{modules!r} is no regular expression: {error}", where="modules", hint=r"Put \ in front of . and (."
        ) from None


def wide_last(name: str, gradients: torch.Tensor) -> torch.Tensor:
    """A weight's gradients with the wide side last: [r, d]."""
    return gradients.mT if ".lora_B." in name else gradients


def mean_gradient(
    source: Source, groups: Sequence[Collection[str]] | None = None
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Mean gradients of groups of records: v of each target, by module [q, r, d], and the groups' names in order.

    Args:
        source: the target records.
        groups: the groups of each record, which may be in several; all in one, called `all`, when None.

    Raises:
        ValueError: there are no records.
    """
    if not len(source):
        raise ValueError("there is no target record")
    of = [("all",)] * len(source) if groups is None else [tuple(some) for some in groups]
    counts = Counter(name for some in of for name in some)
    names = sorted(counts)
    member = torch.tensor([[float(name in some) for some in of] for name in names], dtype=torch.float64)  # [q, n]
    sums: dict[str, torch.Tensor] = {}
    for batch in source:
        for module, g in batch.gradients.items():
            total = sums.setdefault(module, g.new_zeros(len(names), *g.shape[1:]))
            total += torch.einsum("qn,nrd->qrd", member[:, list(batch.places)].to(g), g)
    sizes = torch.tensor([counts[name] for name in names])
    return names, {module: total / sizes.to(total).view(-1, 1, 1) for module, total in sums.items()}
