from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from allmend.data.windows import Windows
from allmend.depth.log import Log
from allmend.depth.measure import sequential
from allmend.depth.scanning import KINDS, candidates, scan, stretches
from allmend.errors import UserError

FACTS: dict[str, str | int] = {"model": "m", "text": "t"}


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows(torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(2)), "random tokens", "0")


def test_every_stretch_once() -> None:
    assert list(stretches("pairs", 5, 4)) == [(0, 2), (1, 3), (2, 4), (3, 5), (0, 4), (1, 5)]
    assert list(stretches("triples", 4, 9)) == [(0, 3), (1, 4)]
    assert list(stretches("prune", 3, 9)) == [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)]
    assert list(stretches("merge", 3, 9)) == [(0, 2), (1, 3), (0, 3)]
    for kind in KINDS:
        assert len(set(stretches(kind, 7, 5))) == len(list(stretches(kind, 7, 5)))


def test_an_unknown_kind() -> None:
    with pytest.raises(UserError, match=r"'pruned' is no kind.*\n.*prune, shuffle"):
        candidates(["pruned"], 4, 2)  # type: ignore[list-item]


def test_all_kinds_are_measured(make_decoder: Any, windows: Windows) -> None:
    found = scan(make_decoder(), windows, kinds=KINDS, longest=3)

    assert {one.kind for one in found} == {"sequential", *KINDS}
    assert all(np.isfinite(one.loss) for one in found.values())
    depths = {one.kind: measured.depth for one, measured in found.items() if one.end - one.start == 3}
    assert depths == {"triples": 4, "parallel": 4, "parallel_sum": 4, "merge": 4, "prune": 3, "shuffle": 6}


def test_a_scan_goes_on_where_it_was_stopped(make_decoder: Any, windows: Windows, tmp_path: Path) -> None:
    model, path = make_decoder(), tmp_path / "scan.parquet"
    whole = scan(model, windows, longest=3, log=Log(tmp_path / "whole.parquet", FACTS))

    class StopError(Exception):
        pass

    seen = 0

    def stop(share: float) -> None:
        nonlocal seen
        seen += 1
        if share > 0.5:
            raise StopError

    with pytest.raises(StopError):
        scan(model, windows, longest=3, log=Log(path, FACTS), on_share=stop)
    before, seen = seen, 0

    again = scan(model, windows, longest=3, log=Log(path, FACTS), on_share=lambda share: stop(0.0))

    assert 0 < seen < before + len(whole)
    assert again.keys() == whole.keys()
    for key, one in whole.items():
        assert one.dropped == again[key].dropped
        assert np.array_equal(np.concatenate(one.losses), np.concatenate(again[key].losses))
    columns = ["kind", "start", "end", "depth", "loss", "delta", "error", "tokens"]
    tables = [
        pq.read_table(tmp_path / name, columns=columns).sort_by(
            [("kind", "ascending"), ("start", "ascending"), ("end", "ascending")]
        )
        for name in ("whole.parquet", "scan.parquet")
    ]
    assert tables[0].equals(tables[1])

    seen = 0
    scan(model, windows, longest=3, log=Log(path, FACTS), on_share=lambda share: stop(0.0))
    assert seen == 0  # nothing is measured twice


def test_the_table_agrees_with_the_losses(make_decoder: Any, windows: Windows, tmp_path: Path) -> None:
    path = tmp_path / "scan.parquet"
    found = scan(make_decoder(), windows, longest=2, log=Log(path, FACTS))

    rows = pq.read_table(path).to_pylist()
    plain = found[sequential(6)].loss
    assert len(rows) == len(found)
    for row in rows:
        assert row["tokens"] == len(row["losses"]) == 19 * row["windows"]
        assert row["loss"] == pytest.approx(np.mean(row["losses"]), abs=1e-6)
        if row["windows"] == 3:
            assert row["delta"] == pytest.approx(row["loss"] - plain, abs=1e-6)


def test_another_scans_folder_is_refused(make_decoder: Any, windows: Windows, tmp_path: Path) -> None:
    path = tmp_path / "scan.parquet"
    scan(make_decoder(), windows, longest=1, log=Log(path, FACTS))
    before = path.read_bytes()

    with pytest.raises(UserError, match=r"another text \(t, now u\)"):
        Log(path, FACTS | {"text": "u"})
    with pytest.raises(UserError, match=r"another place \(None, now p\)"):
        Log(path, FACTS | {"place": "p"})
    assert path.read_bytes() == before
    path.write_bytes(before[:50])
    with pytest.raises(UserError, match="no measurements"):
        Log(path, FACTS)
