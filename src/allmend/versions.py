"""Versions of what decides what a run comes to."""

import platform
from collections.abc import Sequence
from importlib import metadata

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "datasets")


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run comes to."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in (*PACKAGES, *more)}
