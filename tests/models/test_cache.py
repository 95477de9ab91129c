"""What is made once stays whole: full disks, kills and two at once."""

import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.models.test_gguf import write_gguf
from transformers import LlamaForCausalLM

from allmend.errors import UserError
from allmend.models import gguf
from allmend.models.cache import cache_dir
from allmend.models.sources import resolve

MakeFolder = Callable[..., Path]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALLMEND_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("ALLMEND_CACHE")
    assert cache_dir() == Path("/b/allmend")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/c/.cache/allmend")


def test_a_full_disk_is_told_and_nothing_kept(
    tmp_path: Path, model: LlamaForCausalLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 100))
    with pytest.raises(UserError, match="no space") as caught:
        resolve(str(file))
    assert "ALLMEND_CACHE" in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.parent.name == "models"]


def test_a_disk_that_fills_on_the_way_is_told(tmp_path: Path, model: LlamaForCausalLM) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    script = f"""
import resource, signal
from allmend.models.sources import resolve
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
resolve({str(file)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "UserError" in done.stderr
    assert "no space" in done.stderr
    assert "ALLMEND_CACHE" in done.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.parent.name == "models"]


def test_an_unwritable_cache_is_told(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path / "file"))  # root may write anywhere but below a file
    with pytest.raises(UserError, match="cannot be written") as caught:
        resolve(str(write_gguf(tmp_path / "tiny.gguf", model)))
    assert "ALLMEND_CACHE" in str(caught.value)


def test_a_kill_in_the_middle_leaves_no_folder(tmp_path: Path, model: LlamaForCausalLM, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    script = f"""
import os, signal
from allmend.models import gguf
from allmend.models.sources import resolve
def convert(file, folder, *, where):
    (folder / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
gguf.convert = convert
resolve({str(file)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    left = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert [path.name.endswith(".partial") for path in left] == [True]
    folder = resolve(str(file))
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == [folder]


def test_two_at_once_convert_once(tmp_path: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", model)
    calls = []
    convert = gguf.convert

    def counted(*arguments: object, **keywords: object) -> None:
        calls.append(arguments)
        convert(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(gguf, "convert", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(str(file)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == len(calls) == 1
