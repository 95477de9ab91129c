"""Members in worker processes, side by side: the base's weights are shared memory, what learns is each worker's own.

Worth it where one process does not use all cores. Tasks, replies and states go over pipes as message bytes. Replies
come back in the order of members' names whoever finishes first, so sums do not depend on timing.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from allmend.errors import UserError
from allmend.federation.engines import Answer
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.engines.wire import dump_reply, dump_task, parse_reply, parse_task
from allmend.federation.member import Member, OnStep
from allmend.models.adapters import Trainable
from allmend.recipe import Train
from allmend.strategy import State, Strategy, Task


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    member: str | None = None


class WorkerEngine:
    """`Engine` over worker processes on this machine.

    Args:
        trainable: the model; its frozen weights move to shared memory, which stays so afterwards.
        members: the members; each worker can work for any of them.
        settings: of local training.
        on_step: told of every optimiser step, in this process.
        workers: number of processes.
        threads: of torch in each worker; the machine's cores divided by the workers when None.

    Raises:
        UserError: the model is not on the CPU.
    """

    def __init__(
        self,
        trainable: Trainable,
        members: Sequence[Member],
        settings: Train,
        on_step: OnStep,
        *,
        workers: int,
        threads: int | None = None,
    ) -> None:
        if any(parameter.device.type != "cpu" for parameter in trainable.model.parameters()):
            raise UserError("worker processes need the model on the CPU", where="engine.workers", hint="Set it to 0.")
        self._states: dict[str, State] = {member.name: State() for member in members}
        self._on_step = on_step
        for tensor in (*trainable.model.parameters(), *trainable.model.buffers()):
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        context = mp.get_context("spawn")
        threads = threads or max(1, torch.get_num_threads() // workers)
        self._workers = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, trainable, members, settings, threads), daemon=True)
            with _interrupts_ignored():
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    @property
    def members(self) -> list[str]:
        return sorted(self._states)

    def work(self, strategy: Strategy, tasks: Mapping[str, Task]) -> Iterator[Answer]:
        order = sorted(tasks)
        waiting, answers = list(order), dict[str, Answer]()
        for worker in self._workers:
            self._hand_out(worker, waiting, strategy, tasks)
        for name in order:
            while name not in answers:
                for worker in self._ready():
                    self._take(worker, answers)
                    if worker.member is None:
                        self._hand_out(worker, waiting, strategy, tasks)
            yield answers.pop(name)

    def summed(self) -> None:
        return None

    def states(self) -> dict[str, State]:
        return dict(self._states)

    def restore(self, states: Mapping[str, State]) -> None:
        self._states = {name: states.get(name, State()) for name in self._states}

    def close(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.pipe.close()
            worker.process.terminate()
            worker.process.join()

    def _hand_out(self, worker: _Worker, waiting: list[str], strategy: Strategy, tasks: Mapping[str, Task]) -> None:
        if not waiting:
            return
        worker.member = waiting.pop(0)
        task, state = tasks[worker.member], self._states[worker.member]
        message = dump_task(task, state, {"member": worker.member})
        try:
            worker.pipe.send((strategy, message))
        except OSError:
            raise _died(worker) from None

    def _ready(self) -> list[_Worker]:
        busy = {worker.pipe: worker for worker in self._workers if worker.member is not None}
        return [busy[pipe] for pipe in wait(list(busy)) if isinstance(pipe, Connection)]

    def _take(self, worker: _Worker, answers: dict[str, Answer]) -> None:
        assert worker.member is not None
        try:
            kind, *content = worker.pipe.recv()
        except (EOFError, OSError):
            raise _died(worker) from None
        match kind:
            case "step":
                self._on_step(worker.member, *content)
            case "error":
                raise content[0]
            case "reply":
                (message,) = content
                reply, self._states[worker.member], _ = parse_reply(message)
                answers[worker.member] = Answer(worker.member, reply)
                worker.member = None


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """What is started here never sees a Ctrl-C: the terminal sends it to the whole group, and the parent decides."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _died(worker: _Worker) -> UserError:
    worker.process.join(5)
    return UserError(
        f"the worker process died (exit code {worker.process.exitcode})",
        where=f"client {worker.member!r}",
        hint="It may have run out of memory: lower engine.workers in a new run, or resume this one.",
    )


def _serve(pipe: Connection, trainable: Trainable, members: Sequence[Member], settings: Train, threads: int) -> None:
    """A worker's life: one task after the other, until the pipe closes."""
    torch.set_num_threads(threads)
    _own(trainable.parameters())
    steps: OnStep = lambda name, turn, step: pipe.send(("step", turn, step))  # noqa: E731
    engine = InProcessEngine(trainable, members, settings, steps)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            strategy, message = pipe.recv()
            try:
                pipe.send(("reply", _reply(engine, strategy, message)))
            except Exception as error:
                pipe.send(("error", error))


def _reply(engine: InProcessEngine, strategy: Strategy, message: bytes) -> bytes:
    task, state, about = parse_task(message)
    member = about["member"]
    engine.restore({member: state})
    (answer,) = engine.work(strategy, {member: task})
    return dump_reply(answer.reply, engine.states()[member])


def _own(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give this process its own copy of what learns; the rest stays shared."""
    for parameter in parameters.values():
        parameter.data = parameter.data.clone()
