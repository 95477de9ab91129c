import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy.stats import chisquare

from allmend.federation.privacy.secure_sum import masks
from allmend.federation.privacy.secure_sum.masks import add_mask, dtype

KEY = bytes(range(32))


@pytest.mark.parametrize("bits", [32, 64])
def test_a_mask_added_and_taken_off_leaves_nothing(bits: int) -> None:
    vector = np.random.default_rng(0).integers(0, 2**bits - 1, 1001, dtype=np.uint64).astype(dtype(bits))
    masked = vector.copy()
    add_mask(masked, KEY)
    assert (masked != vector).mean() > 0.99
    add_mask(masked, KEY, negative=True)
    np.testing.assert_array_equal(masked, vector)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_mask_is_the_keystream_whatever_the_block(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "BLOCK", 7)
    vector = np.zeros(100, dtype=dtype(bits))
    add_mask(vector, KEY)
    stream = Cipher(ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(vector.nbytes))
    assert vector.tobytes() == stream


def test_masks_are_uniform_and_another_keys_are_independent() -> None:
    one, other = np.zeros(2**16, dtype=dtype(32)), np.zeros(2**16, dtype=dtype(32))
    add_mask(one, KEY)
    add_mask(other, bytes(32))
    for values in (one, other, one ^ other, one - other):
        assert chisquare(np.bincount(values.view(np.uint8), minlength=256)).pvalue > 1e-6


def test_every_bit_of_a_key_counts_which_is_not_so_with_a_generator_of_32_bits() -> None:
    """Flower's SecAgg+ folds a secret by XOR into 32 bits: 2³² guesses undo a mask, and other secrets make the same."""
    generate = pytest.importorskip("flwr.common.secure_aggregation.secaggplus_utils").pseudo_rand_gen
    other = bytes(value ^ (0xA5 if place in (0, 16) else 0) for place, value in enumerate(KEY))  # folds to the same
    theirs = [generate(key, 2**32, [(100,)])[0] for key in (KEY, other)]
    np.testing.assert_array_equal(*theirs)
    ours = [np.zeros(100, dtype=dtype(32)) for _ in range(2)]
    for vector, key in zip(ours, (KEY, other), strict=True):
        add_mask(vector, key)
    assert (ours[0] != ours[1]).mean() > 0.9
    for bit in range(256):
        flipped = bytes(value ^ (1 << bit % 8 if place == bit // 8 else 0) for place, value in enumerate(KEY))
        vector = np.zeros(100, dtype=dtype(32))
        add_mask(vector, flipped)
        assert (vector != ours[0]).mean() > 0.9
