"""Questions to members and their answers, by a deadline, over a post that may lose any letter.

A question is sent again when its member was away or has begun anew, and now and then besides. Members answer the same
question with the same bytes, so that nothing is worked out twice and duplicates do no harm.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

POLL = 0.05
AGAIN = 60.0
"""Seconds of silence after which a question is sent again; each time twice as long."""

FACTS = 16 * 2**20
"""Bytes that an answer without tensors has room for."""


class Answered(Protocol):
    """A member's answer to a letter; its data is None where it cannot be read."""

    @property
    def member(self) -> str: ...
    @property
    def letter(self) -> str: ...
    @property
    def data(self) -> bytes | None: ...


class Postal(Protocol):
    """What carries the letters; see `post.Post`."""

    def online(self) -> Mapping[str, float]:
        """Members that have been heard of lately, and when they began (seconds since the epoch)."""
        ...

    def expect(self, largest: int) -> None:
        """Answers have at most so many bytes from now on."""
        ...

    def send(self, member: str, data: bytes) -> str | None: ...
    def answers(self, waiting: Mapping[str, str]) -> Iterator[Answered]: ...
    def forget(self, letter: str) -> None: ...


@dataclass
class _Asked:
    """A question on its way.

    Attributes:
        data: the question.
        letter: its id, once it is sent.
        sent: when.
        again: seconds of silence before it is sent again.
        away: whether the member was away since.
        begun: when the member had begun, as it was then known.
    """

    data: bytes
    letter: str | None = None
    sent: float = 0.0
    again: float = AGAIN
    away: bool = False
    begun: float = 0.0


@dataclass
class Exchange:
    """Asks members and waits.

    Attributes:
        post: carries the letters.
        clock, sleep: of the time that passes here.
        on_wait: told, about once a second, who is still waited for and who of them is away.
    """

    post: Postal
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    on_wait: Callable[[list[str], list[str]], None] = lambda waiting, away: None
    _told: float = field(init=False, default=0.0)

    def ask(
        self, questions: Mapping[str, bytes], *, seconds: float, largest: int = FACTS
    ) -> Iterator[tuple[str, bytes | None]]:
        """Answers in the order of names, whoever is first; None for members that did not answer in time.

        Answers that came early wait in the post, so that one is in memory at a time.

        Args:
            questions: by member.
            seconds: how long to wait in all.
            largest: bytes of an answer; a larger one is kept out, and counts as none.
        """
        self.post.expect(largest)
        asked = {name: _Asked(data) for name, data in questions.items()}
        end = self.clock() + seconds
        try:
            for name in sorted(asked):
                yield name, self._answer(name, asked, end)
                asked.pop(name)
        finally:
            for one in asked.values():
                if one.letter is not None:
                    self.post.forget(one.letter)

    def _answer(self, name: str, asked: Mapping[str, _Asked], end: float) -> bytes | None:
        while True:
            self._send(asked)
            letter = asked[name].letter
            if letter is not None:
                for answer in self.post.answers({letter: name}):
                    if answer.data is not None:
                        return answer.data
                    asked[name].letter = None  # spoilt on its way: ask again
            now = self.clock()
            if now >= end:
                if letter is not None:
                    self.post.forget(letter)
                return None
            if now - self._told > 1:
                there, self._told = self.post.online(), now
                self.on_wait(sorted(asked), sorted(set(asked) - set(there)))
            self.sleep(POLL)

    def _send(self, asked: Mapping[str, _Asked]) -> None:
        """Send what has not been sent, or has to be sent again."""
        there, now = self.post.online(), self.clock()
        for name, one in asked.items():
            if name not in there:
                one.away = True
                continue
            silent = one.letter is not None and now - one.sent > one.again
            if one.letter is not None and not (one.away or silent or there[name] > one.begun):
                continue
            if silent:
                one.again *= 2
            if one.letter is not None:
                self.post.forget(one.letter)
            one.letter, one.sent, one.away, one.begun = self.post.send(name, one.data), now, False, there[name]
