"""Starts `allmend` with faults in it: `python launch.py FAULTS ARGUMENTS…`, where FAULTS is a JSON list of objects.

Each has a `kind`, which is one of the functions below, and its arguments. Nothing of this is in the program itself.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def die(*, at: str, marker: str, when: str = "before", call: int = 1, about: Mapping[str, Any] | None = None) -> None:
    """Kill this process as `kill -9` does, once: the file `marker` says that it was done.

    Args:
        at: the function at which, `module:Class.method`.
        marker: a file, made at the kill.
        when: `before` it is called or `after` it has returned.
        call: at which call.
        about: counts calls only whose second argument, a mapping, has these values.
    """
    if Path(marker).exists():
        return
    calls = 0

    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if about is None or all(args[1].get(key) == value for key, value in about.items()):
            calls += 1
            if calls == call:
                found = original(*args, **kwargs) if when == "after" else None
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
                return found
        return original(*args, **kwargs)

    _wrap(at, around)


def clock(*, seconds: float) -> None:
    """Have a clock that is wrong by so much."""
    import time

    right = time.time
    time.time = lambda: right() + seconds


def version(*, number: str) -> None:
    """Be another version."""
    import allmend

    allmend.__version__ = number


def spoil(*, rounds: Mapping[str, str]) -> None:
    """Spoil the member's reply in these rounds: `nan`, `huge`, `shape` or `name`."""
    from dataclasses import replace

    import torch

    def around(original: Callable[..., Any], strategy: Any, task: Any, client: Any) -> Any:
        reply = original(strategy, task, client)
        match rounds.get(str(task.turn.round)):
            case "nan":
                change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor * torch.nan  # noqa: E731
            case "huge":
                change = lambda tensor: tensor + 1e30  # noqa: E731
            case "shape":
                change = lambda tensor: tensor[:1]  # noqa: E731
            case "name":
                return replace(reply, summed={f"{name}.x": tensor for name, tensor in reply.summed.items()})
            case _:
                return reply
        return replace(reply, summed={name: change(tensor) for name, tensor in reply.summed.items()})

    _wrap("allmend.federation.strategies.fedavg:FedAvg.work", around)


def swell(*, round: int, size: int) -> None:
    """Answer the question of a round with so many bytes."""

    def around(original: Callable[..., Any], node: Any, letter: Any, data: bytes) -> Any:
        from allmend.models.tensors import parse

        about = parse(letter.data)[1]
        asked = about.get("ask") == "work" and about["turn"]["round"] == round
        return original(node, letter, os.urandom(size) if asked else data)

    _wrap("allmend.federation.engines.flower.node:Node.answer", around)


def _wrap(at: str, around: Callable[..., Any]) -> None:
    module, _, path = at.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


FAULTS = {"die": die, "clock": clock, "version": version, "spoil": spoil, "swell": swell}

if __name__ == "__main__":
    for fault in json.loads(sys.argv.pop(1)):
        FAULTS[fault.pop("kind")](**fault)
    from allmend.cli import main

    main()
