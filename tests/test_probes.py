"""Probes come back from their file as they went in, and other files are told."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend.errors import UserError
from allmend.probes import Probe, read_probes, write_probes

numbers = st.floats(allow_nan=False, allow_infinity=False)
PROBES = st.builds(
    Probe,
    model=st.text(),
    canary=st.text(),
    kind=st.text(),
    client=st.text(),
    copies=st.integers(1, 100),
    inserted=st.booleans(),
    prefix=st.text(),
    prefix_tokens=st.integers(1, 1000),
    exact=st.booleans(),
    matched=numbers,
    bleu=numbers,
    secrets_out=st.integers(0, 9),
    secrets=st.integers(0, 9),
    log_discovered=numbers | st.just(-math.inf),
    log_likelihood=numbers,
)


@given(st.lists(PROBES, max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, probes: list[Probe]) -> None:
    path = tmp_path_factory.mktemp("probes") / "results" / "audit.parquet"
    write_probes(path, probes)
    assert read_probes(path) == tuple(probes)
    assert [p.name for p in path.parent.iterdir()] == ["audit.parquet"]


def test_columns_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "audit.parquet"
    probe = Probe("a", "c", "k", "n", 1, True, "20 tokens", 20, False, 0.5, 0.1, 0, 2, -9.0, -1.0)
    write_probes(path, [probe])
    pq.write_table(pq.read_table(path).append_column("more", pa.array([1])), path)
    assert read_probes(path) == (probe,)


def test_what_is_no_table_of_probes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "audit.parquet"
    with pytest.raises(UserError, match=r"no such file.*|audit\.parquet"):
        read_probes(path)
    pq.write_table(pa.table({"model": ["arm"]}), path)
    with pytest.raises(UserError, match=r"audit\.parquet"):
        read_probes(path)
    path.write_text("not parquet")
    with pytest.raises(UserError, match=r"audit\.parquet"):
        read_probes(path)
