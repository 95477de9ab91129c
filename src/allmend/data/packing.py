"""Packing: many records in one sequence, none of which sees another.

Positions restart at each record, and attention stays within it (and, for a question's choices, within trunk and
branch). Logits are needed only at tokens that predict a target; `Row` names them.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from allmend.data.chat import Encoded


@dataclass(frozen=True)
class Row:
    """One packed sequence of T tokens with N targets, of which the logits at U ≤ N tokens are needed.

    Attributes:
        ids: int64 [1, T].
        position: int64 [1, T].
        record: int64 [T]: index, among the records given to `pack`, of the record that a token belongs to, increasing.
        visible: bool [R, L, L]: R records of L places, the longest's; True where the token in the place of the first
            index may attend to that in the second. A record's tokens are in its first places; no token attends to a
            place without one, and every place attends to itself. One record of T places where that is less work.
        slots: int64 [T]: each token's place among the R × L.
        sources: int64 [U]: tokens whose logits are needed, increasing.
        source_of: int64 [N]: which of `sources` predicts each target.
        targets: int64 [N]: token ids to predict.
        owner: int64 [N]: index, among the records given to `pack`, of the record a target belongs to.
        branch: int64 [N]: branch of the target within its record.
        target_at: int64 [N]: index of the target among its record's tokens.
    """

    ids: torch.Tensor
    position: torch.Tensor
    record: torch.Tensor
    visible: torch.Tensor
    slots: torch.Tensor
    sources: torch.Tensor
    source_of: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    branch: torch.Tensor
    target_at: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def to(self, device: torch.device) -> Self:
        """The same row on a device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def pack(records: Sequence[Encoded], capacity: int) -> list[Row]:
    """Rows of at most `capacity` tokens (a longer record gets a row of its own), by best fit, longest first.

    Records without a target are left out; rows and their order depend on nothing but the records given.
    """
    return list(packed(records, capacity))


def packed(records: Sequence[Encoded], capacity: int) -> Iterator[Row]:
    """`pack`, a row at a time: of a hundred thousand records no more than one row's tensors are there at once."""
    for group in _best_fit(records, capacity):
        yield _row([(index, records[index]) for index in group])


def _best_fit(records: Sequence[Encoded], capacity: int) -> list[list[int]]:
    order = sorted(
        (i for i, record in enumerate(records) if _predictable(record).any()), key=lambda i: -len(records[i])
    )
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for index in order:
        size = len(records[index])
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            left, group = room.pop(at)
        else:
            left, group = max(capacity, size), len(groups)
            groups.append([])
        groups[group].append(index)
        bisect.insort(room, (left - size, group))
    return [sorted(group) for group in groups]


def _predictable(record: Encoded) -> torch.Tensor:
    """Targets that have a token before them to be predicted from."""
    return record.target & (record.position > 0)


def _row(records: Iterable[tuple[int, Encoded]]) -> Row:
    ids, position, record_of, branch = [], [], [], []
    source, targets, owner, target_branch, target_at = [], [], [], [], []
    offset = 0
    for index, record in records:
        ids.append(record.ids)
        position.append(record.position)
        record_of.append(torch.full_like(record.ids, index))
        branch.append(record.branch)
        at = _predictable(record).nonzero()[:, 0]
        # the first token of a branch is predicted from the trunk's last, every other one from the token before it
        trunk = int((record.branch == 0).sum())
        starts_branch = (record.branch[at] > 0) & (record.position[at] == trunk)
        source.append(torch.where(starts_branch, trunk - 1, at - 1) + offset)
        targets.append(record.ids[at])
        owner.append(torch.full_like(at, index))
        target_branch.append(record.branch[at])
        target_at.append(at)
        offset += len(record)
    visible, slots = _visible(branch)
    sources, source_of = torch.unique(torch.cat(source), return_inverse=True)
    return Row(
        ids=torch.cat(ids)[None],
        position=torch.cat(position)[None],
        record=torch.cat(record_of),
        visible=visible,
        slots=slots,
        sources=sources,
        source_of=source_of,
        targets=torch.cat(targets),
        owner=torch.cat(owner),
        branch=torch.cat(target_branch),
        target_at=torch.cat(target_at),
    )


def _visible(branches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`Row.visible` and `Row.slots` of records with these branches."""
    tokens, longest = sum(map(len, branches)), max(map(len, branches))
    branch = torch.nn.utils.rnn.pad_sequence(list(branches), batch_first=True)
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    visible &= torch.ones(longest, longest, dtype=torch.bool).tril()
    if len(branches) * longest**2 < tokens**2:
        places = torch.arange(longest)[None] < torch.tensor([[len(one)] for one in branches])
        return visible, places.flatten().nonzero()[:, 0]
    blocks = [one[: len(record), : len(record)] for one, record in zip(visible, branches, strict=True)]
    whole: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole[None], torch.arange(tokens)
