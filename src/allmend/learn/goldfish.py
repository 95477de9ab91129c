"""The Goldfish loss: some tokens are left out of the loss, so that no passage can be learnt from beginning to end.

Which ones a hash of the tokens before them decides (variant `hash`). Copies of a passage, in one record or in many,
at one client or at several, therefore leave out the same tokens, and no copy teaches what another one hides. The
tokens left out are still read: they are context of the later ones.

Hans et al., "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs", NeurIPS 2024.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from allmend.data.chat import Encoded
from allmend.recipe import Goldfish


@dataclass(frozen=True)
class Dropped:
    """How much was left out.

    Attributes:
        targets: tokens under the loss before.
        dropped: of these, left out.
        short: records of at most h tokens, from which `hash` can leave nothing out; 0 for the other variants.
        emptied: records that had targets and have none left. Training passes over them.
    """

    targets: int
    dropped: int
    short: int
    emptied: int


def goldfish(records: Sequence[Encoded], settings: Goldfish) -> tuple[list[Encoded], Dropped]:
    """The records with fewer targets, about one in k less, and the counts.

    With H a keyed BLAKE2b hash, the target at place i of a record is left out when

    * `hash`: H(ids[i−h : i]) mod k = 0, the ids as little-endian uint32. The token itself is no part of it, and one
      with fewer than h tokens before it stays;
    * `static`: it is the k-th, 2k-th, … target of its record;
    * `random`: H(id of the record, i) mod k = 0: a coin for each target, which falls otherwise in a copy with
      another id.

    A first token is predicted from nothing; it neither counts as a target nor is it left out. A record may lose all
    its targets. It is not spared: its tokens are left out of longer records too, and must be learnt from none.

    Args:
        records: encoded for training, T tokens each.
        settings: k, h (`context`), variant and key.

    Raises:
        ValueError: a record has branches, whose tokens do not all follow the ones before them.
    """
    key = hashlib.blake2b(settings.key.encode(), digest_size=32).digest()
    keyed = hashlib.blake2b(digest_size=8, key=key)  # absorbs the key once; copies of it absorb a message each
    kept, targets, dropped, short, emptied = [], 0, 0, 0, 0
    for record in records:
        if record.branch.any():
            raise ValueError(f"record {record.id!r} has branches: it is encoded for evaluation")
        at = (record.target & (record.position > 0)).nonzero()[:, 0].tolist()
        out = _static(at, settings) if settings.variant == "static" else list(_hashed(record, at, settings, keyed))
        target = record.target.clone()
        target[torch.tensor(out, dtype=torch.int64)] = False
        kept.append(replace(record, target=target))
        targets += len(at)
        dropped += len(out)
        short += settings.variant == "hash" and len(record) <= settings.context
        emptied += len(out) == len(at) > 0
    return kept, Dropped(targets, dropped, short, emptied)


def _static(at: Sequence[int], settings: Goldfish) -> list[int]:
    return list(at[settings.k - 1 :: settings.k])


def _hashed(record: Encoded, at: Sequence[int], settings: Goldfish, keyed: hashlib.blake2b) -> Iterator[int]:
    """Those of the places `at` whose message has a hash that k divides."""
    h, width = settings.context, 4
    ids, name = record.ids.numpy().astype("<u4").tobytes(), record.id.encode()
    for i in at:
        if settings.variant == "random":
            message = name + i.to_bytes(8, "little")
        elif i >= h:
            message = ids[(i - h) * width : i * width]
        else:
            continue
        digest = keyed.copy()
        digest.update(message)
        if int.from_bytes(digest.digest(), "little") % settings.k == 0:
            yield i
