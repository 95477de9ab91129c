import itertools
import secrets

import pytest

from allmend.federation.privacy.secure_sum.shares import combine, split


def test_any_threshold_of_shares_makes_the_secret_and_fewer_do_not() -> None:
    secret = secrets.token_bytes(16)
    for threshold in (1, 2, 3, 5):
        shares = split(secret, threshold, 5)
        assert sorted(shares) == [1, 2, 3, 4, 5]
        for size in range(1, 6):
            for seats in itertools.combinations(shares, size):
                chosen = {seat: shares[seat] for seat in seats}
                if size < threshold:
                    with pytest.raises(ValueError, match=f"{size} shares are there, and {threshold} are needed"):
                        combine(chosen, threshold)
                else:
                    assert combine(chosen, threshold) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """With t − 1 shares fixed, each value of one more share makes another secret: they exclude none."""
    shares = split(bytes(16), 3, 5)
    found = {combine({1: shares[1], 2: shares[2], 3: bytes([value]) + bytes(15)}, 3) for value in range(256)}
    assert len(found) == 256


def test_the_same_secret_is_never_split_the_same_way() -> None:
    assert split(bytes(16), 2, 3) != split(bytes(16), 2, 3)
