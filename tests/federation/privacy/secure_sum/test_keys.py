import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from allmend.federation.privacy.secure_sum.keys import Agreement, agrees, derive, seal, sign, signed, unseal

DIGEST = bytes(32)


def test_both_sides_find_the_same_key_and_another_for_another_purpose() -> None:
    one, other = Agreement.fresh(DIGEST), Agreement.fresh(DIGEST)
    key = one.with_(other.public, b"a")
    assert key == other.with_(one.public, b"a")
    assert len({key, one.with_(other.public, b"b"), one.with_(Agreement.fresh(DIGEST).public, b"a")}) == 3


def test_a_pair_follows_from_its_seed_within_its_sum_alone() -> None:
    pair = Agreement.fresh(DIGEST)
    assert Agreement(pair.seed, DIGEST).public == pair.public
    assert Agreement(pair.seed, b"\1" * 32).public != pair.public
    assert len(pair.seed) == 16


def test_a_public_key_of_small_order_is_refused() -> None:
    assert not agrees(bytes(32))
    assert agrees(Agreement.fresh(DIGEST).public)
    with pytest.raises(ValueError, match="shared key"):
        Agreement.fresh(DIGEST).with_(bytes(32), b"a")


def test_keys_are_derived_by_hkdf() -> None:
    """RFC 5869 by hand: extract, then the first block of expand."""
    secret, purpose = b"secret", b"purpose"
    extracted = hmac.digest(DIGEST, secret, hashlib.sha256)
    assert derive(secret, DIGEST, purpose) == hmac.digest(extracted, b"allmend secure sum/purpose\x01", hashlib.sha256)


def test_what_is_sealed_opens_with_its_key_and_context_only() -> None:
    key = bytes(range(32))
    sealed = seal(key, b"text", b"context")
    assert unseal(key, sealed, b"context") == b"text"
    assert unseal(bytes(32), sealed, b"context") is None
    assert unseal(key, sealed, b"other") is None
    assert unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"context") is None
    assert unseal(key, b"", b"context") is None


def test_a_signature_is_its_owners_for_this_text() -> None:
    identity = Ed25519PrivateKey.generate()
    public = identity.public_key().public_bytes_raw()
    assert signed(public, sign(identity, b"text"), b"text")
    assert not signed(public, sign(identity, b"text"), b"other")
    assert not signed(Ed25519PrivateKey.generate().public_key().public_bytes_raw(), sign(identity, b"text"), b"text")
    assert not signed(b"short", sign(identity, b"text"), b"text")
