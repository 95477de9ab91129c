"""A run that ends with `kill -9` at a chosen moment. `test_life` starts it in a process of its own.

The global GIVEN holds the folder with `recipe.toml`, the run's folder, and the moment: a line of the log, or words.
"""

import itertools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from allmend import life
from allmend.events import Event
from allmend.federation import checkpoint
from allmend.models import adapters
from allmend.recipe import load_recipe

WORKPLACE, OUT, WHEN = globals()["GIVEN"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


write, remove, fsync = checkpoint.write_tensors, shutil.rmtree, os.fsync
lines, syncs = itertools.count(1), itertools.count(1)


def listen(event: Event) -> None:
    if str(line := next(lines)) == WHEN:
        if line % 2:  # torn: the kill came while the next line was written
            with (OUT / "events.jsonl").open("ab") as log:
                log.write(b'{"v": 1, "type": "ste')
        die()


def dying_write(path: Path, tensors: Any, metadata: Any) -> None:
    write(path, tensors, metadata)
    if metadata["round"] == 2 and path.parent.name == "members":
        die()


def dying_remove(path: Path, **options: Any) -> None:
    if path.name == "round-000001":
        die()
    remove(path, **options)


def dying_fsync(number: int) -> None:
    if next(syncs) == 9:
        os.ftruncate(number, 100)
        die()
    fsync(number)


match WHEN:
    case "while a checkpoint is written":
        checkpoint.write_tensors = dying_write
    case "before the older checkpoint is deleted":
        checkpoint.shutil.rmtree = dying_remove  # type: ignore[assignment]
    case "in the middle of a file":
        os.fsync = dying_fsync
    case "while the adapter is saved":
        adapters.save_safetensors = lambda *args, **options: die()  # type: ignore[assignment]
life.tune(load_recipe(WORKPLACE / "recipe.toml"), OUT, base=WORKPLACE, listeners=[listen])
