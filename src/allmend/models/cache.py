"""The user's cache: what was fetched, converted or computed once.

One process at a time makes a folder, beside its place, so that a kill or a full disk leaves nothing half-made.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from allmend.errors import UserError
from allmend.models.folder import check_folder
from allmend.run import folder_atomic, write_atomic

log = logging.getLogger(__name__)


CONVERSION = "c1"
"""Part of the name of a converted folder: raise it when the conversion gives another result."""


def cache_dir() -> Path:
    """Where fetched and converted models lie.

    `$ALLMEND_CACHE`, else `$XDG_CACHE_HOME/allmend`, else `~/.cache/allmend`.
    """
    if own := os.environ.get("ALLMEND_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "allmend"
    return Path.home() / ".cache" / "allmend"


def cache_place(name: str) -> Path:
    return cache_dir() / "models" / f"{name}-{CONVERSION}"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `make` unless it is there. One process at a time makes it."""
    target = cache_place(name)
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with (target.parent / f".{target.name}.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if the process is killed
                if not target.is_dir():
                    for left in target.parent.glob(f".{target.name}.*.partial"):
                        shutil.rmtree(left, ignore_errors=True)
                    with folder_atomic(target) as folder:
                        try:
                            make(folder)
                        except OSError as error:  # before folder_atomic, whose advice is for run folders
                            raise _fault(error) from error
        except OSError as error:
            raise _fault(error) from error
    check_folder(target)
    return target


def _fault(error: OSError) -> UserError:
    """The user's message for an error of the operating system in the cache."""
    where = cache_dir()
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return UserError(
            f"no space left for the model ({error.strerror}); nothing half-made is kept",
            where=where,
            hint="Free some space, or set ALLMEND_CACHE to a folder on a larger disk.",
        )
    return UserError(
        f"the cache cannot be written: {error.strerror or error}",
        where=where,
        hint="Set ALLMEND_CACHE to a folder that you may write to.",
    )


def remembered_digest(files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave for the same files with the same sizes and times of change before.

    Args:
        files: what the digest depends on.
        compute: gives a digest as text.

    Raises:
        OSError: a file cannot be looked at.
    """
    facts = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    sidecar = cache_dir() / "digests" / f"{key}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = sidecar.read_text()
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
    digest = compute()
    try:
        write_atomic(sidecar, digest.encode())
    except UserError as error:  # the next start computes it again
        log.info("the digest is not kept: %s", error)
    return digest
