"""Members' sites behind a post that carries letters in this process, and loses them on demand."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from allmend.federation.engines.flower.exchange import Exchange
from allmend.federation.engines.flower.site import ArmAtMember, Site
from allmend.federation.member import Member
from allmend.models.adapters import remove_lora
from allmend.recipe import Train
from allmend.strategy import Strategy


@dataclass(frozen=True)
class Carried:
    member: str
    letter: str
    data: bytes | None


@dataclass
class FakePost:
    """`Postal` without a network. Time is what `sleep` adds up to.

    Attributes:
        answer: by member, what it makes of a letter.
        there: members that are online, and when they began.
        lose: called with member and letter number; True loses the letter.
    """

    answer: Mapping[str, Callable[[bytes], bytes]]
    there: dict[str, float] = field(init=False)
    lose: Callable[[str, int], bool] = lambda member, number: False
    now: float = 0.0
    largest: int = 0
    sent: list[str] = field(default_factory=list)
    inbox: dict[str, Carried] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)
    slow: dict[str, float] = field(default_factory=dict)
    due: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.there = dict.fromkeys(self.answer, 0.0)

    def online(self) -> Mapping[str, float]:
        return dict(self.there)

    def expect(self, largest: int) -> None:
        self.largest = largest

    def send(self, member: str, data: bytes) -> str | None:
        letter = f"{len(self.sent)}"
        self.sent.append(member)
        if not self.lose(member, len(self.sent) - 1):
            self.inbox[letter] = Carried(member, letter, self.answer[member](data))
            self.due[letter] = self.now + self.slow.get(member, 0.0)
        return letter

    def answers(self, waiting: Mapping[str, str]) -> Iterator[Carried]:
        for letter in list(waiting):
            if letter in self.inbox and self.now >= self.due[letter]:
                yield self.inbox.pop(letter)

    def forget(self, letter: str) -> None:
        self.forgotten.append(letter)
        self.inbox.pop(letter, None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def exchange(self) -> Exchange:
        return Exchange(self, clock=lambda: self.now, sleep=self.sleep)


@pytest.fixture
def make_post() -> Callable[..., FakePost]:
    return FakePost


@pytest.fixture
def make_site(make_trainable: Callable[[], Any], settings: Train, tmp_path: Path) -> Callable[..., Site]:
    """A site with an arm called `arm`."""

    def make(member: Member, strategy: Strategy, folder: Path | None = None, how: Train = settings) -> Site:
        @contextlib.contextmanager
        def open_arm(arm: str) -> Iterator[ArmAtMember]:
            trainable = make_trainable()
            yield ArmAtMember(strategy, trainable, member, how)
            remove_lora(trainable)

        return Site(folder or tmp_path / member.name, open_arm)

    return make


@pytest.fixture
def make_sites(make_site: Callable[..., Site], settings: Train) -> Callable[..., dict[str, Site]]:
    def make(
        members: Sequence[Member], strategy: Strategy, how: Train = settings, *, folder: Path | None = None
    ) -> dict[str, Site]:
        places = {member.name: folder / member.name if folder else None for member in members}
        return {member.name: make_site(member, strategy, places[member.name], how) for member in members}

    return make
