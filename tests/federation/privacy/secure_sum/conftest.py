"""Parties of a secure sum in one process, and the loop that a transport would run between them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from allmend.federation.privacy.secure_sum import SecureMember, SecureSum, Terms
from allmend.federation.privacy.secure_sum.masks import Integers, dtype

PHASES = ("keys", "shares", "masked", "opened")


@dataclass
class Parties:
    """All parties of one sum.

    Attributes:
        vectors: by member.
        answers: what members are told in each phase, by phase and member.
        sent: what members sent, by phase and member.
    """

    terms: Terms
    identities: Mapping[str, Ed25519PrivateKey]
    vectors: Mapping[str, Integers]
    total: SecureSum = field(init=False)
    members: dict[str, SecureMember] = field(init=False)
    sent: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = SecureSum(self.terms)
        self.members = {name: SecureMember(self.terms, name, key) for name, key in self.identities.items()}

    def step(self, phase: str, told: Mapping[str, bytes], name: str) -> bytes:
        """A member's message of a phase."""
        member = self.members[name]
        match phase:
            case "keys":
                message = member.keys()
            case "shares":
                message = member.shares(told[name])
            case "masked":
                message = member.masked(told[name], self.vectors[name])
            case _:
                message = member.opened(told[name])
        self.sent.setdefault(phase, {})[name] = message
        return message

    def run(self, lost: Mapping[str, Sequence[str]] | None = None, until: str = "opened") -> dict[str, bytes]:
        """Go through the phases up to `until`; members named in `lost` fall silent from that phase on."""
        told, silent = dict.fromkeys(self.members, b""), set[str]()
        for phase in PHASES[: PHASES.index(until) + 1]:
            silent |= set((lost or {}).get(phase, ()))
            for name in sorted(set(told) - silent):
                self.total.receive(name, self.step(phase, told, name))
            told = self.total.advance()
        return told

    def sum_of(self, names: Sequence[str]) -> Integers:
        """The plain sum."""
        plain = np.zeros(self.terms.length, dtype=dtype(self.terms.bits))
        for name in names:
            plain = plain + self.vectors[name]
        return plain


@pytest.fixture
def make_parties() -> Callable[..., Parties]:
    def make(n: int = 5, *, length: int = 7, bits: Any = 32, session: str = "s", **terms: Any) -> Parties:
        # the same each time: places on the ring follow from them, and so whose losses meet in one neighbourhood
        seeds = {f"m{i:03d}": hashlib.sha256(f"{session} {i}".encode()).digest() for i in range(n)}
        identities = {name: Ed25519PrivateKey.from_private_bytes(seed) for name, seed in seeds.items()}
        public = {name: key.public_key().public_bytes_raw() for name, key in identities.items()}
        generator = np.random.default_rng(0)
        high = 2**bits - 1
        vectors = {
            name: generator.integers(0, high, length, dtype=np.uint64, endpoint=True).astype(dtype(bits))
            for name in identities
        }
        return Parties(Terms(session=session, members=public, length=length, bits=bits, **terms), identities, vectors)

    return make
