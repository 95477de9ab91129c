"""A member's side of a secure sum: it hides its vector, and opens its neighbours' secrets one at a time at most.

Source: Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", CCS 2017, figure 4.
"""

import hashlib
import json
import secrets

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from allmend.federation.privacy.secure_sum.keys import SEED, Agreement, agrees, derive, seal, sign, signed, unseal
from allmend.federation.privacy.secure_sum.masks import Integers, add_mask, dtype
from allmend.federation.privacy.secure_sum.messages import (
    Keys,
    Neighbours,
    Opened,
    ProtocolError,
    Sealed,
    Shares,
    Survivors,
    dump_vector,
)
from allmend.federation.privacy.secure_sum.shares import split
from allmend.federation.privacy.secure_sum.terms import Terms

COORDINATOR = "the coordinator"


class SecureMember:
    """One member in one sum. Its four steps are taken once each, in this order; each returns a message to send.

    Args:
        terms: of the sum.
        name: the member's.
        identity: its long-lived private key; `terms.members[name]` is the public one.

    Raises:
        ValueError: the name is not in the terms, or has another key there.
    """

    def __init__(self, terms: Terms, name: str, identity: Ed25519PrivateKey) -> None:
        if terms.members.get(name) != identity.public_key().public_bytes_raw():
            raise ValueError(f"the terms of sum {terms.session!r} do not have member {name!r} with this key")
        self._terms, self._name, self._identity = terms, name, identity
        self._masks, self._sealing = Agreement.fresh(terms.digest), Agreement.fresh(terms.digest)
        self._self_mask = secrets.token_bytes(SEED)
        self._neighbours: dict[str, Keys] = {}
        self._own_share = b""
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._steps = ["keys", "shares", "masked", "opened"]
        self.survivors: list[str] = []
        """Whose vectors are in the sum that this member has opened, sorted."""

    def keys(self) -> bytes:
        """Step 1: fresh public keys, signed."""
        self._take("keys")
        keys = Keys(
            terms=self._terms.digest,
            member=self._name,
            masks=self._masks.public,
            sealing=self._sealing.public,
            commitment=commitment(self._self_mask, self._terms.digest),
            signature=bytes(64),
        )
        return keys.model_copy(update={"signature": sign(self._identity, keys.content)}).dump()

    def shares(self, message: bytes) -> bytes:
        """Step 2: shares of this member's two secrets, each sealed for the neighbour that is to hold it.

        Args:
            message: the neighbours' keys, from the coordinator.

        Raises:
            ProtocolError: a key is not signed by the member that it is said to be of, or too few neighbours are left.
        """
        self._take("shares")
        terms = self._terms
        for keys in Neighbours.parse(message, terms.digest, of=COORDINATOR).keys:
            check_keys(keys, terms)
            if keys.member not in terms.neighbourhoods[self._name] or keys.member in self._neighbours:
                raise ProtocolError(f"keys of {keys.member!r}, which is no neighbour or named twice", where=COORDINATOR)
            self._neighbours[keys.member] = keys
        enough(terms, self._name, {self._name, *self._neighbours}, "have sent their keys")
        seats = terms.degree + 1
        self_mask = split(self._self_mask, terms.needed, seats)
        key = split(self._masks.seed, terms.needed, seats)
        self._own_share = self_mask[terms.seat(self._name, self._name)]
        boxes = {}
        for other, keys in self._neighbours.items():
            seat = terms.seat(self._name, other)
            at = self._sealing.with_(keys.sealing, sealing(self._name, other))
            boxes[other] = seal(at, self_mask[seat] + key[seat], terms.digest)
        return Sealed(terms=terms.digest, boxes=boxes).dump()

    def masked(self, message: bytes, vector: Integers) -> bytes:
        """Step 3: the vector, behind a mask of its own and one with each neighbour that has sent its shares.

        Args:
            message: what neighbours sealed for this member, from the coordinator.
            vector: integers [length] modulo 2^bits; it stays as it is.

        Raises:
            ProtocolError: a share cannot be opened, or too few neighbours are left.
            ValueError: the vector has another length or type than the terms.
        """
        terms = self._terms
        if vector.shape != (terms.length,) or vector.dtype != dtype(terms.bits):
            expected = f"{terms.length} of {dtype(terms.bits)}"
            raise ValueError(f"the vector must have {expected}, and has shape {vector.shape} of {vector.dtype}")
        self._take("masked")
        for other, box in Shares.parse(message, terms.digest, of=COORDINATOR).boxes.items():
            if other not in self._neighbours:
                raise ProtocolError(f"a share of {other!r}, which has sent no keys", where=COORDINATOR)
            key = self._sealing.with_(self._neighbours[other].sealing, sealing(other, self._name))
            opened = unseal(key, box, terms.digest)
            if opened is None:
                raise ProtocolError(f"the share that {other!r} sealed cannot be opened", where=COORDINATOR)
            self._shares[other] = opened[:16], opened[16:]
        enough(terms, self._name, {self._name, *self._shares}, "have sent their shares")
        masked = vector.copy()
        add_mask(masked, self_mask_key(self._self_mask, terms.digest))
        for other in self._shares:
            key = self._masks.with_(self._neighbours[other].masks, masking(self._name, other))
            add_mask(masked, key, negative=self._name > other)
        return dump_vector(masked, terms.digest)

    def opened(self, message: bytes) -> bytes:
        """Step 4: of each neighbour one share: of its self-mask if its vector is in the sum, otherwise of its key.

        Args:
            message: whose vectors are in the sum, from the coordinator.

        Raises:
            ProtocolError: too few survived, or a member is named that cannot have.
        """
        self._take("opened")
        terms = self._terms
        survivors = Survivors.parse(message, terms.digest, of=COORDINATOR).members
        alive = set(survivors)
        if len(alive) != len(survivors) or not alive <= set(terms.members):
            raise ProtocolError("survivors are named twice, or are no members", where=COORDINATOR)
        if self._name not in alive:
            raise ProtocolError(f"{self._name!r} is asked to open a sum that it is not in", where=COORDINATOR)
        if len(alive) < terms.fewest:
            raise ProtocolError(
                f"a sum over {len(alive)} members is to be opened, and {terms.fewest} are the fewest", where=COORDINATOR
            )
        near = alive & {self._name, *terms.neighbourhoods[self._name]}
        if unknown := sorted(near - {self._name, *self._shares}):
            raise ProtocolError(f"{', '.join(unknown)} cannot have survived without shares", where=COORDINATOR)
        enough(terms, self._name, near, "have survived")
        self.survivors = sorted(alive)
        own = {self._name: self._own_share}
        return Opened(
            terms=terms.digest,
            self_masks=own | {other: share for other, (share, _) in self._shares.items() if other in alive},
            keys={other: share for other, (_, share) in self._shares.items() if other not in alive},
        ).dump()

    def _take(self, step: str) -> None:
        if not self._steps or self._steps[0] != step:
            due = f"{self._steps[0]!r} comes next" if self._steps else "it is over"
            raise ProtocolError(f"step {step!r} is asked for, and {due}: a message came twice or out of order")
        self._steps.pop(0)


def check_keys(keys: Keys, terms: Terms) -> None:
    """Refuse keys that the member did not sign with the key that it is known by, or that are of no use.

    Raises:
        ProtocolError: so it is: somebody may have put other keys in their place.
    """
    public = terms.members.get(keys.member)
    if public is None or keys.terms != terms.digest or not signed(public, keys.signature, keys.content):
        raise ProtocolError(
            f"the keys of {keys.member!r} do not have its signature: they may be someone else's",
            hint="Compare the member's registered public key with the member; do not go on if they are equal.",
        )
    if not (agrees(keys.masks) and agrees(keys.sealing)):
        raise ProtocolError(f"the keys of {keys.member!r} hold no public key to agree with")


def enough(terms: Terms, name: str, there: set[str], what: str) -> None:
    """Refuse to go on where the secrets of `name` could not be rebuilt.

    Raises:
        ProtocolError: fewer than the threshold of its neighbourhood are there.
    """
    if len(there) < terms.needed:
        raise ProtocolError(
            f"{len(there)} of the {terms.degree + 1} in the neighbourhood of {name!r} {what}, and {terms.needed} are "
            "needed",
            hint="Too many members were lost: try the round again.",
        )


def commitment(self_mask: bytes, digest: bytes) -> bytes:
    """SHA-256 of a self-mask's seed, which has 128 bits that nobody can guess."""
    return hashlib.sha256(b"allmend secure sum commitment" + digest + self_mask).digest()


def self_mask_key(seed: bytes, digest: bytes) -> bytes:
    """The key of a member's self-mask."""
    return derive(seed, digest, b"self")


def masking(one: str, other: str) -> bytes:
    """The purpose of two members' common mask; the same from both sides."""
    return b"mask " + json.dumps(sorted((one, other))).encode()


def sealing(sender: str, recipient: str) -> bytes:
    """The purpose of a key that seals what one member tells another."""
    return b"seal " + json.dumps([sender, recipient]).encode()
