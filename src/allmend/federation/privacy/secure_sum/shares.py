"""Shamir's secret sharing of 16-byte secrets: any t shares rebuild one, and t − 1 say nothing about it.

The arithmetic is PyCryptodome's, over GF(2¹²⁸); this file keeps its seats and refusals in one place.
"""

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir


def split(secret: bytes, threshold: int, seats: int) -> dict[int, bytes]:
    """Shares (16 bytes each) of a secret (16 bytes) by seat, from 1 to `seats`."""
    if threshold == 1:  # a polynomial of degree 0, which the library has no use for
        return dict.fromkeys(range(1, seats + 1), secret)
    return dict(Shamir.split(threshold, seats, secret, ssss=False))


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of at least `threshold` shares.

    Raises:
        ValueError: there are fewer.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares are there, and {threshold} are needed")
    chosen = sorted(shares.items())[:threshold]  # more would make a polynomial of a higher degree
    return bytes(Shamir.combine(chosen, ssss=False))
