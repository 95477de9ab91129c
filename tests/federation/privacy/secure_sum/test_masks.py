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
