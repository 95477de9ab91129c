"""Keys of a secure sum: who somebody is, whom it agrees with, and what only one other may read.

Everything cryptographic is the library's (`cryptography`); this file fixes which primitive is used for what. A member
has one long-lived Ed25519 key, by which the others know it, and for every sum fresh X25519 keys: one to agree on masks,
one to seal shares for a neighbour.
"""

import secrets
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SEED = 16
"""Bytes of a secret that is shared: a mask's seed, or the seed of a key. Shamir's field has 2^128 elements."""


@dataclass(frozen=True)
class Agreement:
    """An X25519 key pair that follows from a short seed, so that shares of the seed are shares of the key."""

    seed: bytes
    digest: bytes

    @classmethod
    def fresh(cls, digest: bytes) -> "Agreement":
        """A pair for the sum with these terms."""
        return cls(secrets.token_bytes(SEED), digest)

    @property
    def _private(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(derive(self.seed, self.digest, b"agreement"))

    @property
    def public(self) -> bytes:
        """32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def with_(self, other: bytes, purpose: bytes) -> bytes:
        """The key (32 bytes) that both sides of the pair find for a purpose.

        Args:
            other: the other side's public key.
            purpose: what it is for; equal on both sides.

        Raises:
            ValueError: `other` is no public key, or one that makes every agreement the same.
        """
        shared = self._private.exchange(X25519PublicKey.from_public_bytes(other))
        return derive(shared, self.digest, purpose)


def agrees(public: bytes) -> bool:
    """Whether an X25519 key is of use: with one of small order, everybody agrees on the same."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def derive(secret: bytes, digest: bytes, purpose: bytes) -> bytes:
    """A key of 32 bytes from a secret, for one purpose within the sum with these terms (HKDF, SHA-256)."""
    return HKDF(algorithm=SHA256(), length=32, salt=digest, info=b"allmend secure sum/" + purpose).derive(secret)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """`text` readable with `key` only (ChaCha20-Poly1305). A key seals one text, which is why no nonce is needed."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """What was sealed, or None if it was not sealed so."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, context)
    except InvalidTag:
        return None


def sign(identity: Ed25519PrivateKey, what: bytes) -> bytes:
    """A signature of 64 bytes."""
    return identity.sign(what)


def signed(public: bytes, signature: bytes, what: bytes) -> bool:
    """Whether the owner of a raw Ed25519 public key signed this."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, what)
    except (InvalidSignature, ValueError):
        return False
    return True
