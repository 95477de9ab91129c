"""Which inverse is taken where nobody names one: Cholesky's, unless a measurement on the device says otherwise.

`allmend attribute inverse` measures, and keeps what it finds in the user's cache, by device.
"""

import contextlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from allmend.influence.inverses import INVERSES
from allmend.models.cache import cache_dir
from allmend.models.tensors import JSON
from allmend.run import write_atomic

AUTO = "auto"
"""Stands for the device's own."""

SAFE = "cholesky"
"""Of a device that was not measured."""


def fastest(device: torch.device) -> str:
    """The name in `INVERSES` that a device's measurement came to; Cholesky's where there is none."""
    known = _known().get(device_name(device))
    name = known.get("inverse") if isinstance(known, Mapping) else None
    return name if isinstance(name, str) and name in INVERSES else SAFE


def remember(device: torch.device, inverse: str, measured: JSON) -> Path:
    """Keep what a device's measurement came to, and say where.

    Args:
        device: which.
        inverse: a name in `INVERSES`.
        measured: what it was, for who looks.

    Raises:
        UserError: the cache cannot be written.
    """
    found = {**_known(), device_name(device): {"inverse": inverse, "torch": torch.__version__, "measured": measured}}
    write_atomic(kept_at(), json.dumps(found, indent=1, sort_keys=True).encode())
    return kept_at()


def kept_at() -> Path:
    """The file."""
    return cache_dir() / "inverses.json"


def _known() -> dict[str, JSON]:
    with contextlib.suppress(OSError, ValueError):  # a file that is missing or damaged tells nothing
        found = json.loads(kept_at().read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def device_name(device: torch.device) -> str:
    """What kind of device it is, such as a processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{device.type}: {line.partition(':')[2].strip()}"
    return f"{device.type}: {platform.processor() or platform.machine()}"
