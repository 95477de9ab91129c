"""What must not stand anywhere in the source."""

import re
from pathlib import Path

import pytest

import allmend

SOURCE = sorted(Path(allmend.__file__).parent.rglob("*.py"))
UNPICKLING = re.compile(
    r"^\s*(import|from)\s+(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\b"
    r"|\btorch\.load\(|\ballow_pickle\s*=\s*True|\bread_pickle\(|\byaml\.(unsafe_)?load\(",
    re.MULTILINE,
)


def test_nothing_is_unpickled() -> None:
    """Bytes from the wire or the disk could run code then."""
    assert len(SOURCE) > 100
    assert [str(path) for path in SOURCE if UNPICKLING.search(path.read_text())] == []


@pytest.mark.parametrize("line", ["import pickle", "    from dill import loads", "x = torch.load(path)"])
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert UNPICKLING.search(f"import json\n{line}\n")
