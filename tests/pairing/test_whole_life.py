"""A paired model goes where any model goes: it is tuned, audited, asked for influence, and loaded with its adapter."""

import json
from pathlib import Path

import pytest
import torch

from allmend import load_model, make_recipe, tune
from allmend.attribution.folders import attribute_folder
from allmend.attribution.settings import Settings
from allmend.depth.plan import stretch_plan, write_plan
from allmend.errors import UserError
from allmend.models.adapters import applied
from allmend.pairing.applied import apply_folder
from allmend.pairing.folders import search_folder
from allmend.recipe import Fields
from allmend.results import AuditTable, InfluenceByMember, UtilityTable


def test_it_is_tuned_audited_and_asked_for_influence(deep_folder: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", stretch_plan(6, 2, 6))
    apply_folder(str(deep_folder), tmp_path / "plan.json", tmp_path / "paired", device="cpu")
    for client in ("north", "south"):
        rows = [{"id": f"{client}{i}", "prompt": f"{client} {i}?", "response": f"It is {7 * i}."} for i in range(12)]
        (tmp_path / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        {
            "model": {"source": str(tmp_path / "paired")},
            "data": {"held_out": 0.25, "max_tokens": 300},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in ("north", "south")],
            "adapter": {"rank": 2, "targets": "all-linear"},
            "train": {"learning_rate": 0.01, "batch_size": 4},
            "strategy": {"name": "fedavg", "rounds": 2},
            "canaries": {"copies": [2], "count": 3},
            "audit": {"prefix_tokens": [20], "exposure": ["ward"], "membership_records": 2},
            "influence": {"min_records": 1, "reveal": "client_sums"},
        }
    )

    run = tune(recipe, tmp_path / "run", base=tmp_path)

    utility, audit, influence = (
        run.read_table(name, kind)
        for name, kind in (("utility", UtilityTable), ("audit", AuditTable), ("influence", InfluenceByMember))
    )
    assert isinstance(utility, UtilityTable)
    assert {row.model for row in utility.rows} == {"base", "fedavg"}
    assert isinstance(audit, AuditTable)
    assert {gap.model for gap in audit.gaps} == {"base", "fedavg"}
    assert isinstance(influence, InfluenceByMember)
    assert {one.client for one in influence.arms[0].members} == {"north", "south"}

    base = load_model(str(tmp_path / "paired"), device="cpu")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base.model(ids).logits
        with applied(base.model, run.arm("fedavg") / "adapter") as tuned:
            assert not torch.equal(tuned(ids).logits, before)
        assert torch.equal(base.model(ids).logits, before)

    found = attribute_folder(
        str(tmp_path / "paired"),
        run.arm("fedavg") / "adapter",
        train=[tmp_path / "north.jsonl"],
        target=tmp_path / "south.jsonl",
        fields=Fields(),
        settings=Settings(),
    )
    assert len(found.rows) == 12
    assert any(row.score for row in found.rows)

    with pytest.raises(UserError, match="side by side already"):
        search_folder(str(run.path), pairs=1, device="cpu")
