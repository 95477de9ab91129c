"""Letters: bytes in, the same bytes out, and no more of them than were asked for."""

import pytest

from allmend.federation.engines.flower import letters


def write(data: bytes) -> letters.Letter:
    return letters.write(data, run=1, source=2, target=3, now=1000.0, ttl=60.0)


@pytest.mark.parametrize("size", [1, 1000, letters.CHUNK, 2 * letters.CHUNK + 1])
def test_what_is_written_is_read(size: int) -> None:
    data = (b"0123456789" * (size // 10 + 1))[:size]
    letter = write(data)
    assert letters.read(letter.id, letter.objects, largest=size + 1000) == data
    assert len(letters.ids_of(letter.tree)) <= letters.objects_of(size)


def test_a_letter_that_grows_when_it_is_put_together_is_refused_before() -> None:
    """A gigabyte of zeros is one object that stands in it two hundred times."""
    letter = write(bytes(20 * letters.CHUNK))
    assert sum(len(part) for part in letter.objects.values()) < 2 * letters.CHUNK
    with pytest.raises(ValueError, match=r"a letter of 104,8.* bytes, and 1,000 are the most"):
        letters.read(letter.id, letter.objects, largest=1000)
