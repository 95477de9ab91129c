"""How far a phase of a run is: what tells the terminal the time left."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from allmend.events import Event, PhaseDone, WorkDone


@dataclass
class Meter:
    """Emits `WorkDone` as a phase goes on, at most once per hundredth, and `PhaseDone` at its end.

    Attributes:
        emit: writes events.
        phase: its name, as it was announced in `RunStarted` or `WorkPlanned`.
        expected: tokens of the whole phase.
        tokens: so far.
    """

    emit: Callable[[Event], None]
    phase: str
    expected: float
    tokens: int = 0
    _told: float = 0.0
    _began: float = field(default_factory=time.perf_counter)

    def add(self, tokens: int) -> None:
        """Note that so many more tokens are done."""
        self.tokens += tokens
        share = min(1.0, self.tokens / self.expected) if self.expected else 1.0
        if share - self._told >= 0.01:
            self._told = share
            self.emit(WorkDone(phase=self.phase, share=share))

    def done(self) -> None:
        """Note that the phase is over."""
        self.emit(PhaseDone(phase=self.phase, seconds=time.perf_counter() - self._began, tokens=self.tokens))
