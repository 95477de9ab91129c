"""A run among organisations as it is run: a coordinator and members in processes of their own, over TLS."""

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from allmend.federation.pki import make_pki
from allmend.federation.strategies.fedavg import FedAvg
from allmend.life import tune
from allmend.recipe import load_recipe
from allmend.run import RunFolder
from allmend.strategy import State, Task, Turn

NAMES = ("east", "north", "south")
LAUNCH = Path(__file__).parent / "chaos" / "launch.py"
RECIPE = """
name = "tiny"
seed = 3
[model]
source = "{model}"
[data]
held_out = 0.3
max_tokens = 256
{clients}
[adapter]
{adapter}
[train]
learning_rate = 0.01
batch_size = 4
{train}
[strategy]
{strategy}
rounds = {rounds}
[engine]
threads = 1
{more}
"""

Fault = Mapping[str, Any]
"""What goes wrong in a process; see `chaos/launch.py`."""


class Machine:
    """Processes of one machine, each with its log.

    Args:
        folder: where they work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.begun: dict[str, Callable[[], None]] = {}

    def start(self, name: str, *arguments: str, faults: Sequence[Fault] = (), **settings: Any) -> None:
        """Start `allmend` with these arguments, and with faults in it."""

        def begin() -> None:
            with (self.folder / f"{name}.log").open("ab") as log:
                self.running[name] = subprocess.Popen(
                    [sys.executable, str(LAUNCH), json.dumps(faults), *arguments],
                    cwd=self.folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    **settings,
                )

        self.begun[name] = begin
        begin()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def said(self, name: str, pattern: str) -> str:
        """The first words of a log that fit a pattern."""
        found = re.search(pattern, self.log(name))
        assert found, f"{name} has not said {pattern!r}:\n{self.log(name)}"
        return found[0].strip()

    def until(self, name: str, words: str, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while words not in self.log(name):
            assert time.monotonic() < end, f"{name} has not said {words!r}:\n{self.log(name)}"
            assert self.running[name].poll() is None or words in self.log(name), self.log(name)
            time.sleep(0.05)

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        self.running[name].send_signal(how)
        if how == signal.SIGKILL:
            self.running[name].wait()

    def again(self, name: str) -> None:
        """Start a process that has ended with the same command."""
        self.begun[name]()

    def done(self, name: str, seconds: float = 180.0) -> int:
        code: int = self.running[name].wait(seconds)
        return code

    def all_done(self, seconds: float = 240.0) -> int:
        """Wait for all to end, and start whoever is killed again, with the same command. Returns how often."""
        end, deaths = time.monotonic() + seconds, 0
        while any(process.poll() in (None, -signal.SIGKILL) for process in self.running.values()):
            assert time.monotonic() < end, "\n".join(f"== {name}\n{self.log(name)}" for name in self.running)
            for name, process in list(self.running.items()):
                if process.poll() == -signal.SIGKILL:
                    deaths += 1
                    self.again(name)
            time.sleep(0.05)
        return deaths

    def close(self) -> None:
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


class Federation:
    """Members with their records and keys, and a recipe for them.

    Args:
        machine: where all processes run.
        model: folder of the base model.
        names: the members'.
        rounds: of the recipe.
        train, more: further lines of the recipe, in `[train]` and at its end.
        strategy, adapter: lines of the recipe in `[strategy]` beside its rounds, and in `[adapter]`.
    """

    def __init__(
        self,
        machine: Machine,
        model: Path,
        *,
        names: Sequence[str] = NAMES,
        rounds: int = 4,
        train: str = "",
        more: str = "",
        strategy: str = 'name = "fedavg"',
        adapter: str = "rank = 2",
    ) -> None:
        self.machine, self.folder, self.names = machine, machine.folder, names
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        make_pki(self.folder / "pki", [], days=2)
        lines = []
        for place, name in enumerate(names):
            rows = [
                {"id": f"{name}-{i}", "prompt": f"{name}: {i} + {i}?", "choices": [f"{2 * i}", "none"], "answer": 0}
                for i in range(8 + 2 * place)
            ]
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            lines.append(f'{name} = "{self.key(name)}"')
        (self.folder / "members.toml").write_text("[members]\n" + "\n".join(lines))
        clients = "".join(f'[[clients]]\nname = "{name}"\ndata = "{name}.jsonl"\n' for name in names)
        text = RECIPE.format(
            model=model, clients=clients, rounds=rounds, train=train, more=more, strategy=strategy, adapter=adapter
        )
        (self.folder / "recipe.toml").write_text(text)

    def key(self, name: str) -> str:
        """A new key in `NAME.key`, and its public line."""
        return self.run("member", "key", "--out", f"{name}.key").stdout.strip()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, str(LAUNCH), "[]", *arguments], cwd=self.folder, capture_output=True, text=True, check=True
        )

    def coordinate(self, *, faults: Sequence[Fault] = (), settings: Mapping[str, Any] = {}, **options: Any) -> None:
        given = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        self.machine.start(
            "coordinator",
            *("coordinate", "recipe.toml", "--members", "members.toml", "--listen", self.address, "--out", "run"),
            *given,
            faults=faults,
            **settings,
        )

    def join(
        self,
        name: str,
        *,
        faults: Sequence[Fault] = (),
        settings: Mapping[str, Any] = {},
        process: str | None = None,
        address: str | None = None,
        key: str | None = None,
        ca: str = "pki/ca.pem",
    ) -> None:
        self.machine.until("coordinator", "Offer ")
        digest = re.findall(r"Offer\s+([0-9a-f]{64})", self.machine.log("coordinator"))[-1]
        self.machine.start(
            process or name,
            *("join", address or self.address, "--ca", ca, "--key", key or f"{name}.key", "--data", f"{name}.jsonl"),
            *("--name", name, "--accept", digest),
            faults=faults,
            **settings,
        )

    @property
    def outcome(self) -> bytes:
        """The adapter that the run came to."""
        return adapter(RunFolder.open(self.folder / "run"))

    def simulated(self, missing: Mapping[int, Sequence[str]] = {}) -> bytes:
        """The adapter of a simulation in which some members are not sampled in some rounds."""
        plan = FedAvg.plan

        def without(self: FedAvg, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
            tasks = plan(self, state, turn, members)
            return {name: task for name, task in tasks.items() if name not in missing.get(turn.round, ())}

        FedAvg.plan = without  # type: ignore[method-assign]
        try:
            return adapter(tune(load_recipe(self.folder / "recipe.toml"), self.folder / "simulated", base=self.folder))
        finally:
            FedAvg.plan = plan  # type: ignore[method-assign]


def adapter(run: RunFolder) -> bytes:
    return (run.arm("fedavg") / "adapter" / "adapter_model.safetensors").read_bytes()


class Wire:
    """A way to a port of this machine that can be cut: what goes through it is passed on as it is.

    Args:
        port: where it leads.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._cut = False
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def cut(self) -> None:
        """Break what is open, and let nothing through."""
        with self._lock:
            self._cut = True
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._cut = False

    def close(self) -> None:
        self.cut()
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            if self._cut:
                return
            with socket.create_connection(("127.0.0.1", self._target)) as far:
                with self._lock:
                    self._open |= {near, far}
                try:
                    _pass_on(near, far)
                finally:
                    with self._lock:
                        self._open -= {near, far}


def _pass_on(near: socket.socket, far: socket.socket) -> None:
    with selectors.DefaultSelector() as ready:
        ready.register(near, selectors.EVENT_READ, far)
        ready.register(far, selectors.EVENT_READ, near)
        while True:
            for key, _ in ready.select():
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                if not data:
                    return
                key.data.sendall(data)
