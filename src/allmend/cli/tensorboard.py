"""A reader of events that writes them for TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from allmend.errors import UserError
from allmend.events import Event, RoundDone, StepDone


@contextmanager
def board(run: Path, *, wanted: bool) -> Iterator[list[Callable[[Event], None]]]:
    """Listeners that write `run/tensorboard`: one if it is wanted, else none.

    Raises:
        UserError: TensorBoard is not installed.
    """
    if not wanted:
        yield []
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "TensorBoard is not installed", where="--tensorboard", hint="pip install 'allmend[tensorboard]'"
        ) from error
    writers: dict[str, Any] = {}

    def listen(event: Event) -> None:
        if not isinstance(event, StepDone | RoundDone):
            return
        # made at the first figure: before that there may be no run folder yet
        name = f"{event.arm}/{event.client}" if isinstance(event, StepDone) else event.arm
        if name not in writers:
            writers[name] = SummaryWriter(str(run / "tensorboard" / name))
        writer = writers[name]
        if isinstance(event, StepDone):
            writer.add_scalar("train/loss", event.loss, event.step)
            writer.add_scalar("train/learning_rate", event.learning_rate, event.step)
            writer.add_scalar("train/gradient_norm", event.gradient_norm, event.step)
        elif event.loss is not None:
            writer.add_scalar("round/loss", event.loss, event.round)
            writer.add_scalar("round/bytes", sum(event.received.values()), event.round)

    try:
        yield [listen]
    finally:
        for writer in writers.values():
            writer.close()
