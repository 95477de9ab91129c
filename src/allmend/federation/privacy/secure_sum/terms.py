"""What all parties of a secure sum agree on beforehand, and the graph of who masks with whom.

Source of the graph: Bell, Bonawitz, Gascón, Lepoint, Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead", CCS 2020: each member shares masks with k = O(log n) others instead of all. The ring that they stand on
follows from the terms alone, so that no party can choose its neighbours during the protocol.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

FEWEST = 3
"""Members that a sum must be over: of a sum of two, each of the two can subtract its own part."""

FULL_GRAPH = 32
"""Up to so many members, everyone shares masks with everyone."""

NEIGHBOURS = 4
"""k in units of ⌈log₂ n⌉. With half of it, one in ten members lost at random fails 1 in 5 sums of 256 members, since
some neighbourhood has too few left; with this one in 1,000 (`benchmarks/secure_sum.py`)."""


@dataclass(frozen=True)
class Terms:
    """The public terms of one sum.

    Attributes:
        session: names this sum among all that the same members ever form; using a name twice is a mistake.
        members: who takes part: name → raw Ed25519 public key (32 bytes), known from registration and not from the
            coordinator of the moment.
        length: numbers in each member's vector.
        bits: the sum is formed modulo 2^bits.
        threshold: shares that rebuild a secret of a member, out of its neighbourhood (its neighbours and itself); two
            thirds of the neighbourhood, rounded up, where it is None; at least `lowest_threshold`.
        fewest: members that the sum must at least be over.

    Raises:
        ValueError: fewer than three members, or values that cannot be.
    """

    session: str
    members: Mapping[str, bytes]
    length: int
    bits: Literal[32, 64] = 32
    threshold: int | None = None
    fewest: int = FEWEST

    def __post_init__(self) -> None:
        n = len(self.members)
        if n < FEWEST:
            raise ValueError(f"a sum over {n} members would show a member's value: there must be {FEWEST} or more")
        if not FEWEST <= self.fewest <= n:
            raise ValueError(f"the fewest members of a sum must lie between {FEWEST} and {n}, got {self.fewest}")
        if self.length < 1:
            raise ValueError(f"a vector has one number or more, got {self.length}")
        if self.bits not in (32, 64):
            raise ValueError(f"bits must be 32 or 64, got {self.bits}")
        if wrong := sorted(name for name, key in self.members.items() if len(key) != 32):
            raise ValueError(f"an Ed25519 public key has 32 bytes, and not that of {', '.join(wrong)}")
        if len(set(self.members.values())) != n:
            raise ValueError("two members have the same public key")
        size = self.degree + 1
        if not self.lowest_threshold <= self.needed <= size:
            raise ValueError(
                f"the threshold must lie between {self.lowest_threshold} and {size}, the whole neighbourhood, got "
                f"{self.needed}"
            )

    @property
    def degree(self) -> int:
        """k: neighbours of each member."""
        n = len(self.members)
        return n - 1 if n <= FULL_GRAPH else NEIGHBOURS * math.ceil(math.log2(n))

    @property
    def needed(self) -> int:
        """t: shares that rebuild a secret."""
        return math.ceil(2 * (self.degree + 1) / 3) if self.threshold is None else self.threshold

    @property
    def lowest_threshold(self) -> int:
        """The least t with which a coordinator that tells members different stories learns nothing by itself.

        To bare one member, it would have to rebuild that one's self-mask, and its mask key or the keys of all its
        neighbours. Every member tells one secret of each neighbour, so both need t members of their own: of the same
        neighbourhood, or of it and that of the next on the ring, which has one member more.
        """
        reachable = self.degree + 1 if len(self.members) <= FULL_GRAPH else self.degree + 2
        return reachable // 2 + 1

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the terms; every key, signature and share is bound to it."""
        what = {
            "protocol": "allmend secure sum 1",
            "session": self.session,
            "members": {name: key.hex() for name, key in self.members.items()},
            "length": self.length,
            "bits": self.bits,
            "threshold": self.needed,
            "fewest": self.fewest,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).digest()

    @cached_property
    def neighbourhoods(self) -> dict[str, tuple[str, ...]]:
        """Each member's neighbours, sorted: the k/2 on either side of it on a ring in pseudo-random order."""
        ring = sorted(self.members, key=lambda name: hashlib.sha256(self.digest + name.encode()).digest())
        n = len(ring)
        if n <= FULL_GRAPH:
            return {name: tuple(sorted(other for other in ring if other != name)) for name in ring}
        reach = [step for distance in range(1, self.degree // 2 + 1) for step in (-distance, distance)]
        return {name: tuple(sorted(ring[(place + step) % n] for step in reach)) for place, name in enumerate(ring)}

    def seat(self, owner: str, holder: str) -> int:
        """x > 0: the place at which `holder` has a share of a secret of `owner`, its neighbour or itself."""
        return sorted((owner, *self.neighbourhoods[owner])).index(holder) + 1
