"""The messages of a secure sum as bytes. Whatever does not have its exact form is refused with one clear error.

member → coordinator   Keys            fresh public keys, signed
coordinator → member   Neighbours      the keys of its neighbours
member → coordinator   Sealed          a share of its two secrets for each neighbour, sealed
coordinator → member   Shares          what neighbours sealed for it
member → coordinator   a masked vector (`dump_vector`)
coordinator → member   Survivors       whose vectors are in the sum
member → coordinator   Opened          one share for each neighbour: of its self-mask, or of its key, never both
"""

import json
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from allmend.errors import UserError
from allmend.federation.privacy.secure_sum.masks import Integers, dtype

LARGEST = 2**24
"""Bytes of a message, vectors aside."""

Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Key = Annotated[bytes, Field(min_length=32, max_length=32)]
Share = Annotated[bytes, Field(min_length=16, max_length=16)]
Box = Annotated[bytes, Field(min_length=48, max_length=48)]
"""Two sealed shares: 32 bytes and the seal's 16."""


class ProtocolError(UserError):
    """A party of a secure sum did not keep to the protocol, or too few of them are left."""


class Message(BaseModel):
    """Whatever is not a masked vector: JSON, bytes as base64."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    terms: Digest
    """Of the terms of the sum that this belongs to."""

    def dump(self) -> bytes:
        """As bytes."""
        return self.model_dump_json().encode()

    @classmethod
    def parse(cls, data: bytes, terms: bytes, *, of: str) -> Self:
        """What `dump` made bytes of.

        Args:
            data: the whole message.
            terms: digest of the terms of this sum.
            of: who sent it, for the error.

        Raises:
            ProtocolError: too long, of another form, or of another sum.
        """
        if len(data) > LARGEST:
            raise ProtocolError(f"a message of {len(data):,} bytes, and {LARGEST:,} are the most", where=of)
        try:
            message = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ProtocolError(f"not a {cls.__name__} message: {place}: {first['msg']}", where=of) from None
        if message.terms != terms:
            raise ProtocolError("a message of another sum: a replay, or other terms", where=of)
        return message


class Keys(Message):
    """A member's public keys for this sum."""

    member: str
    masks: Key
    """X25519, to agree on masks."""
    sealing: Key
    """X25519, to seal shares for it."""
    commitment: Key
    """SHA-256 of the seed of its self-mask, by which a wrong share is found out."""
    signature: Annotated[bytes, Field(min_length=64, max_length=64)]

    @property
    def content(self) -> bytes:
        """What the signature is of."""
        fields = (self.masks.hex(), self.sealing.hex(), self.commitment.hex())
        return json.dumps(["allmend secure sum keys", self.terms.hex(), self.member, *fields]).encode()


class Neighbours(Message):
    keys: list[Keys]


class Sealed(Message):
    boxes: dict[str, Box]
    """By the neighbour that they are for."""


class Shares(Message):
    boxes: dict[str, Box]
    """By the neighbour that they are from."""


class Survivors(Message):
    members: list[str]


class Opened(Message):
    self_masks: dict[str, Share]
    """By the member whose vector is in the sum."""
    keys: dict[str, Share]
    """By the member that was lost before its vector came."""


def dump_vector(vector: Integers, terms: bytes) -> bytes:
    """A masked vector as bytes: the terms' digest, then the integers, little-endian."""
    return terms + vector.tobytes()


def parse_vector(data: bytes, terms: bytes, *, length: int, bits: Literal[32, 64], of: str) -> Integers:
    """The integers [length] of a masked vector; they share the memory of `data`.

    Raises:
        ProtocolError: another length, or of another sum.
    """
    expected = len(terms) + length * bits // 8
    if len(data) != expected:
        raise ProtocolError(f"a masked vector of {len(data):,} bytes, and it must have {expected:,}", where=of)
    if data[: len(terms)] != terms:
        raise ProtocolError("a masked vector of another sum: a replay, or other terms", where=of)
    vector: np.ndarray[Any, Any] = np.frombuffer(data, dtype=dtype(bits), offset=len(terms))
    return vector
