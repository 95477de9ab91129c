"""Deduplication: of records that say the same, only the first is learnt from.

Repetition is what makes a model learn a text by heart, so this is the cheapest safeguard against it (Lee et al.,
"Deduplicating Training Data Makes Language Models Better", ACL 2022). Pairs that may be near duplicates are found by
MinHash with locality-sensitive hashing (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3) and
then compared exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from allmend.data.chat import Encoded

Numbers = NDArray[np.int64]

_GRAM = 5
_PERMUTATIONS = 128
_SEED = 1
_MISS = 1e-4


@dataclass(frozen=True)
class Duplicates:
    """Records left out.

    Attributes:
        exact: equal to an earlier record in all token ids and targets.
        near: similar to an earlier record that is kept.
    """

    exact: int
    near: int


def without_duplicates(records: Sequence[Encoded], *, similarity: float) -> tuple[list[Encoded], Duplicates]:
    """The records, in order, without those that are equal or similar to an earlier one, and the counts.

    Similarity is the Jaccard index |A ∩ B| / |A ∪ B| of the sets of token 5-grams of two records; a record of fewer
    than five tokens is one gram. A record is left out when its index with a record that is kept is at least
    `similarity`; none is left out for less. A near duplicate may be missed: the hashing, taken as ideal, proposes
    a pair whose index is exactly `similarity` with probability at least 1 − 1e-4, and a more similar one with more
    (for a `similarity` of 0.07 or more; below, 128 hashes are too few to promise that). What is found depends on
    nothing but the records, and a second time over finds nothing more.

    Args:
        records: of one client, in the order of which the first of each group stays.
        similarity: in (0, 1]; at 1 only equal records are left out, and order of tokens and targets count too.

    Raises:
        ValueError: `similarity` is outside (0, 1].
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"the similarity of duplicates must lie in (0, 1], not {similarity}")
    first: dict[tuple[bytes, bytes], Encoded] = {}
    for record in records:
        first.setdefault((record.ids.numpy().tobytes(), record.target.numpy().tobytes()), record)
    distinct = list(first.values())
    kept = distinct if similarity == 1 else _dissimilar(distinct, similarity)
    return kept, Duplicates(exact=len(records) - len(distinct), near=len(distinct) - len(kept))


def _dissimilar(records: Sequence[Encoded], similarity: float) -> list[Encoded]:
    if not records:
        return []
    ids = [record.ids.numpy() for record in records]
    grams = _grams(ids)
    mark = np.zeros(max(own.max() for own in grams) + 1, dtype=bool)
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(similarity))
    empty = MinHash(num_perm=_PERMUTATIONS, seed=_SEED)
    kept = []
    for place, record in enumerate(records):
        sketch = empty.copy()
        sketch.update_batch(_windows(ids[place]))
        rivals = index.query(sketch)
        if rivals and _jaccard(grams[place], [grams[rival] for rival in rivals], mark).max() >= similarity:
            continue
        index.insert(place, sketch)
        kept.append(record)
    return kept


def _windows(ids: Numbers) -> list[bytes]:
    """The 5-grams of a record of T tokens (int64 [T]) as bytes, the same in every process and beside any records."""
    data, width = ids.astype("<u4").tobytes(), 4
    return [data[start : start + _GRAM * width] for start in range(0, max(1, len(ids) - _GRAM + 1) * width, width)]


def _grams(records: Sequence[Numbers]) -> list[Numbers]:
    """Each record's set of 5-grams, increasing, as numbers that are equal where the grams are.

    An n-gram's number is that of the pair (number of its first n − 1 tokens, last token) among all such pairs.
    """
    pad = max((ids.max() for ids in records if len(ids)), default=0) + 1
    lengths = [max(_GRAM, len(ids)) for ids in records]
    tokens = np.full(sum(lengths), pad)
    ends = np.cumsum(lengths)
    for ids, end, length in zip(records, ends, lengths, strict=True):
        tokens[end - length : end - length + len(ids)] = ids
    numbers = tokens
    for n in range(1, _GRAM):
        numbers = np.unique(numbers[:-1] * (pad + 1) + tokens[n:], return_inverse=True)[1]
    return [np.unique(numbers[end - length : end - _GRAM + 1]) for end, length in zip(ends, lengths, strict=True)]


def _jaccard(own: Numbers, others: Sequence[Numbers], mark: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The index of one set of grams with each of the others, [len(others)]; `mark` holds no mark before or after."""
    sizes = np.array([len(other) for other in others])
    mark[own] = True
    common = np.add.reduceat(mark[np.concatenate(others)], np.cumsum(sizes) - sizes, dtype=np.int64)
    mark[own] = False
    index: NDArray[np.float64] = common / (len(own) + sizes - common)
    return index


def _bands(similarity: float) -> tuple[int, int]:
    """Number of bands b and their rows r: the longest bands that miss a pair at `similarity` seldom enough.

    Longer bands propose fewer pairs below `similarity`. A pair of index s agrees in a band with probability s^r, and
    in none with (1 − s^r)^b.
    """
    lengths = range(1, _PERMUTATIONS // 2 + 1)
    rows = max((r for r in lengths if (1 - similarity**r) ** (_PERMUTATIONS // r) <= _MISS), default=1)
    return _PERMUTATIONS // rows, rows
