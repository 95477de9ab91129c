"""Masks: long pseudo-random vectors of integers from short keys, and what is added and taken off modulo 2^bits.

A mask is the keystream of ChaCha20, read as little-endian integers. Under the cipher's usual assumption it cannot be
told from uniform numbers by whoever lacks the key, which has 256 bits.
"""

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

Integers: TypeAlias = npt.NDArray[np.unsignedinteger]
"""Integers modulo 2³² (uint32) or 2⁶⁴ (uint64)."""

BLOCK = 2**20
"""Numbers that are made at a time: a block of mask stays in the processor's cache while it is added."""


def dtype(bits: Literal[32, 64]) -> np.dtype[np.unsignedinteger]:
    """Of integers modulo 2^bits, little-endian."""
    return np.dtype("<u4" if bits == 32 else "<u8")


def add_mask(vector: Integers, key: bytes, *, negative: bool = False) -> None:
    """Add the mask of a key (32 bytes) to a vector, in place; subtract it if `negative`."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    for start in range(0, len(vector), BLOCK):
        part = vector[start : start + BLOCK]
        mask = np.frombuffer(stream.update(bytes(part.nbytes)), dtype=vector.dtype)
        (np.subtract if negative else np.add)(part, mask, out=part)
