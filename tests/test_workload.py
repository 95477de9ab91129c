from pathlib import Path
from typing import Any

import pytest
from tests.test_prepare import recipe, write

from allmend import life
from allmend.events import PhaseDone, RunStarted, WorkDone
from allmend.prepare import prepare
from allmend.run import RunFolder
from allmend.workload import reading_rate, work_ahead

SECTIONS: dict[str, Any] = {
    "data": {"held_out": 0.4},
    "train": {"batch_size": 4},
    "strategy": {"name": "fedavg", "rounds": 2},
    "canaries": {"copies": [1], "count": 8},
    "audit": {"prefix_tokens": [20], "exposure": [], "membership_records": 0},
    "compare": {"alone": {"strategy": {"name": "local"}}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("north", "south"):
        write(tmp_path, name, 12)
    return tmp_path


def test_the_work_shrinks_as_a_run_goes_on_and_ends_with_it(tiny_folder: Path, folder: Path) -> None:
    prepared = prepare(recipe(tiny_folder, **SECTIONS), folder)
    whole = work_ahead(prepared)
    assert min(whole.values()) > 0
    events: list[Any] = []

    def stop(event: Any) -> None:
        events.append(event)
        if isinstance(event, PhaseDone) and event.phase == "evaluate fedavg":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        life.tune(prepared.recipe, folder / "run", base=folder, listeners=[stop])
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert started.work == whole
    left = work_ahead(prepared, RunFolder(folder / "run"))
    assert whole.keys() - left.keys() == {"evaluate base", "train fedavg", "evaluate fedavg"}
    assert all(left[phase] == whole[phase] for phase in left)


def test_a_model_that_was_audited_before_a_stop_is_no_work_any_more(tiny_folder: Path, folder: Path) -> None:
    prepared = prepare(recipe(tiny_folder, **SECTIONS), folder)

    def stop(event: Any) -> None:
        if isinstance(event, WorkDone) and event.phase == "audit fedavg":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        life.tune(prepared.recipe, folder / "run", base=folder, listeners=[stop])
    assert work_ahead(prepared, RunFolder(folder / "run")).keys() == {"audit fedavg"}


def test_the_rate_is_a_rate(tiny_folder: Path, folder: Path) -> None:
    assert reading_rate(prepare(recipe(tiny_folder, **SECTIONS), folder)) > 0
