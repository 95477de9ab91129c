import shutil
from pathlib import Path
from typing import Any

import pytest

from allmend.audit_runs import runs
from allmend.audit_runs.runs import UNFINISHED, audit_run
from allmend.models.load import LoadedModel
from allmend.probes import read_probes
from allmend.run import RunFolder


@pytest.fixture
def copy(run: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(run.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


class Counted:
    """`audit_model`, by the models it was asked for, up to one at which somebody stops it."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.stop_at, self.names, self.real = stop_at, list[str](), runs.audit_model

    def __call__(self, name: str, *arguments: Any, **more: Any) -> Any:
        if name == self.stop_at:
            raise KeyboardInterrupt
        self.names.append(name)
        return self.real(name, *arguments, **more)


def counted(monkeypatch: pytest.MonkeyPatch, copy: RunFolder, model: LoadedModel, **options: Any) -> list[str]:
    """The models that an audit asks."""
    ask = Counted(options.pop("stop_at", None))
    with monkeypatch.context() as patch:
        patch.setattr(runs, "audit_model", ask)
        if ask.stop_at is None:
            audit_run(copy.path, model=model, **options)
        else:
            with pytest.raises(KeyboardInterrupt):
                audit_run(copy.path, model=model, **options)
    return ask.names


def test_an_audit_that_was_broken_off_goes_on_with_the_next_model(
    copy: RunFolder, run: RunFolder, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counted(monkeypatch, copy, model, stop_at="goldfish") == ["base", "fedavg"]
    assert counted(monkeypatch, copy, model) == ["goldfish", "once", "private"]
    # and what comes of both is what comes of one
    tables = [one.path / "results" / "audit.json" for one in (copy, run)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    probes = [read_probes(one.path / "results" / "audit.parquet") for one in (copy, run)]
    assert probes[0] == probes[1]
    assert not (copy.path / "results" / UNFINISHED).exists()
    # a whole one is made again when somebody asks for it
    assert len(counted(monkeypatch, copy, model)) == 5


def test_what_was_found_under_another_design_or_in_another_model_does_not_count(
    copy: RunFolder, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch, copy, model, stop_at="goldfish")
    assert counted(monkeypatch, copy, model, stop_at="fedavg", changes={"prefix_tokens": [21]}) == ["base"]
    counted(monkeypatch, copy, model, stop_at="once")
    (weights,) = (copy.arm("fedavg") / "adapter").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes())  # at another time
    assert counted(monkeypatch, copy, model, stop_at="once") == ["fedavg"]


def test_what_was_kept_and_cannot_be_read_is_found_again(
    copy: RunFolder, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch, copy, model, stop_at="goldfish")
    kept = copy.path / "results" / UNFINISHED / "base.safetensors"
    kept.write_bytes(kept.read_bytes()[:-10])
    (kept.parent / "fedavg.parquet").unlink()
    assert counted(monkeypatch, copy, model, stop_at="goldfish") == ["base", "fedavg"]
