"""What a device's measurement came to is kept, and nothing else is ever taken."""

import json
from pathlib import Path

import pytest
import torch

from allmend.attribution.settings import Settings
from allmend.influence.fastest_inverse import SAFE, device_name, fastest, kept_at, remember
from allmend.influence.inverses import INVERSES
from allmend.influence.methods import Gfim

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cholesky_s_is_taken_until_a_measurement_says_otherwise(cache: Path) -> None:
    assert fastest(CPU) == SAFE == "cholesky"
    assert remember(CPU, "hyperpower", {"sizes": [8]}) == kept_at() == cache / "inverses.json"
    assert fastest(CPU) == "hyperpower"
    remember(CPU, "cholesky", {})
    assert fastest(CPU) == "cholesky"


def test_devices_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(CPU, "eigen", {})
    monkeypatch.setattr("allmend.influence.fastest_inverse.device_name", lambda device: "another")
    assert fastest(CPU) == SAFE
    remember(CPU, "hyperpower", {})
    assert len(json.loads(kept_at().read_text())) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"NAME": 3}', '{"NAME": {"inverse": "magic"}}', '{"NAME": {}}']
)
def test_a_file_that_is_damaged_tells_nothing(content: str, cache: Path) -> None:
    cache.mkdir()
    kept_at().write_text(content.replace("NAME", device_name(CPU)))
    assert fastest(CPU) == SAFE
    remember(CPU, "eigen", {})
    assert fastest(CPU) == "eigen"


def test_auto_is_what_settings_take_by_default() -> None:
    def inverse(settings: Settings) -> object:
        method = settings.build()
        assert isinstance(method, Gfim)
        return method.inverse

    assert inverse(Settings()) is INVERSES["cholesky"]
    remember(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "eigen", {})
    assert Settings().solver == "eigen"
    assert inverse(Settings()) is INVERSES["eigen"]
    assert inverse(Settings(inverse="hyperpower")) is INVERSES["hyperpower"]
