from collections.abc import Callable

import pytest

from allmend.auditing.runs import VIEWS
from allmend.recipe import Recipe
from allmend.results import AuditTable
from allmend.run import RunFolder

MakeRecipe = Callable[..., Recipe]


def test_the_last_broadcast_shows_what_the_final_model_does(run: RunFolder) -> None:
    audit = run.read_table("audit", AuditTable)
    assert audit is not None
    for arm in ("fedavg", "goldfish"):
        views = [view for view in audit.views if view.model == arm]
        assert {(view.round, view.party, view.of) for view in views} >= {(1, "members", None), (2, "members", None)}
        for gap in (gap for gap in audit.gaps if gap.model == arm):
            (last,) = (v for v in views if (v.round, v.party, v.copies) == (2, "members", gap.copies))
            assert last.gap.value == pytest.approx(gap.gap.value, abs=1e-4)
        # with each member's update, its own canaries
        seen = {(view.round, view.of) for view in views if view.party == "coordinator"}
        assert seen <= {(round, name) for round in (1, 2) for name in ("north", "south")}
        assert len(seen) >= 2
    assert {path.name for path in (run.arm("fedavg") / VIEWS / "round-000001").iterdir()} == {
        "broadcast.safetensors",
        "update-north.safetensors",
        "update-south.safetensors",
    }
