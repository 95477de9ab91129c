from collections.abc import Callable
from pathlib import Path

import pytest

from allmend import life
from allmend.audit_runs.runs import VIEWS
from allmend.federation.strategies.fedavg import FedAvg
from allmend.models.load import LoadedModel
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


def test_what_was_seen_of_a_round_that_was_broken_off_is_forgotten(
    workplace: Path, make: Callable[..., Recipe], model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a guarantee for members, its second try may be other members'."""

    def cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    recipe = make(audit={"prefix_tokens": [20], "exposure": [], "membership_records": 0, "views": True})
    with monkeypatch.context() as patch:
        patch.setattr(FedAvg, "combine", cut)
        with pytest.raises(KeyboardInterrupt):
            life.tune(recipe, tmp_path / "run", base=workplace, model=model)
    views = tmp_path / "run" / "arms" / "fedavg" / VIEWS
    (seen, *_) = sorted((views / "round-000001").glob("update-*.safetensors"))
    seen.rename(seen.with_name("update-nobody.safetensors"))
    life.resume(tmp_path / "run", model=model)
    names = {path.name for path in views.rglob("*.safetensors")}
    assert names == {"broadcast.safetensors", "update-north.safetensors", "update-south.safetensors"}
