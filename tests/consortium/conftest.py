"""Members and a coordinator in one process: the post carries letters from one to the other at once."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.consortium.processes import Federation, Machine

from allmend.consortium.coordinator import coordinate
from allmend.consortium.gathering import Patience
from allmend.consortium.member import MemberSide
from allmend.federation.engines.flower.exchange import Exchange
from allmend.recipe import Recipe, make_recipe
from allmend.run import RunFolder


@dataclass(frozen=True)
class Carried:
    member: str
    letter: str
    data: bytes | None


@dataclass
class Post:
    """Members that answer at once; `absent` ones never."""

    answer: Mapping[str, Callable[[bytes], bytes]]
    absent: set[str] = field(default_factory=set)
    now: float = 0.0
    largest: int = 0
    count: int = 0
    inbox: dict[str, Carried] = field(default_factory=dict)

    def online(self) -> dict[str, float]:
        return {name: 0.0 for name in self.answer if name not in self.absent}

    def expect(self, largest: int) -> None:
        self.largest = largest

    def send(self, member: str, data: bytes) -> str | None:
        self.count += 1
        letter = str(self.count)
        self.inbox[letter] = Carried(member, letter, self.answer[member](data))
        return letter

    def answers(self, waiting: Mapping[str, str]) -> Iterator[Carried]:
        for letter in list(waiting):
            if letter in self.inbox:
                yield self.inbox.pop(letter)

    def forget(self, letter: str) -> None:
        self.inbox.pop(letter, None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Place:
    """Three members with their records, and a coordinator beside them."""

    folder: Path
    recipe: Recipe
    keys: dict[str, bytes]
    sides: dict[str, MemberSide]
    post: Post
    asked: list[Any]

    def coordinate(self, out: str = "run", **patience: Any) -> RunFolder:
        @contextlib.contextmanager
        def open_exchange(run: Path) -> Iterator[Exchange]:
            yield Exchange(self.post, clock=lambda: self.post.now, sleep=self.post.sleep)

        return coordinate(
            self.recipe,
            self.keys,
            self.folder / out,
            base=self.folder,
            open_exchange=open_exchange,
            patience=Patience(**{"join": 100.0, "leg": 100.0, "fewest": 2} | patience),
        )


NAMES = ("east", "north", "south")


@pytest.fixture
def make_place(tmp_path: Path, tiny_folder: Path) -> Callable[..., Place]:
    def make(agree: bool = True, names: Sequence[str] = NAMES, **sections: Any) -> Place:
        for place, name in enumerate(names):
            rows = [
                {"id": f"{name}-{i}", "prompt": f"{name}: {i} + {i}?", "choices": [f"{2 * i}", "none"], "answer": 0}
                for i in range(28 + 2 * place)
            ]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = make_recipe(
            {
                "name": "tiny",
                "seed": 3,
                "model": {"source": str(tiny_folder)},
                "data": {"held_out": 0.3, "max_tokens": 256},
                "clients": [{"name": name, "data": f"{name}.jsonl"} for name in names],
                "adapter": {"rank": 2},
                "train": {"learning_rate": 0.01, "batch_size": 4},
                "strategy": {"name": "fedavg", "rounds": 2},
                "compare": {"local": {"strategy": {"name": "local"}}},
                "canaries": {"copies": [2], "count": 3},
                "audit": {"exposure": [], "membership_records": 0, "prefix_tokens": [5]},
                "engine": {"threads": 1},
            }
            | sections
        )
        asked: list[Any] = []

        def decide(*what: Any) -> bool:
            asked.append(what)
            return agree

        private = {name: Ed25519PrivateKey.generate() for name in names}
        sides = {
            name: MemberSide(name, private[name], tmp_path / f"{name}.jsonl", tmp_path / "members" / name, decide)
            for name in names
        }
        keys = {name: key.public_key().public_bytes_raw() for name, key in private.items()}
        return Place(tmp_path, recipe, keys, sides, Post({name: side.answer for name, side in sides.items()}), asked)

    return make


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.close()


@pytest.fixture
def make_federation(machine: Machine, tiny_folder: Path) -> Callable[..., Federation]:
    return lambda **options: Federation(machine, tiny_folder, **options)
