"""10,000 mutants of each message: read, or refused with one clear error; none crashes, hangs or fills the memory.

`pytest -rP -k mutants` shows the figures.
"""

import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from allmend.errors import UserError
from allmend.federation.engines.flower import letters
from allmend.federation.engines.wire import dump_reply, dump_task, parse_reply, parse_task
from allmend.federation.privacy.secure_sum import SecureMember, SecureSum, Terms
from allmend.federation.privacy.secure_sum.messages import Keys, Message, Neighbours, Opened, Sealed, Shares, Survivors
from allmend.strategy import Reply, State, Task, Turn

MUTANTS = 10_000
TENSORS = {"update/a": torch.arange(12.0).view(3, 4), "update/b": torch.ones(5, dtype=torch.bfloat16)}
JUNK = (
    *(b"null", b"true", b"[]", b"{}", b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"[" * 5000, b'{"":' * 2000),
    *(b'"\\ud800"', b"\xff\xfe", b"\0" * 64, b"../../etc/passwd", b"F64", b"[1000000000000, 1000000]"),
)


def mutants(valid: list[bytes], seed: int) -> Iterator[bytes]:
    """Valid messages with one to four things done to them."""
    chance = random.Random(seed)
    for _ in range(MUTANTS):
        data = bytearray(chance.choice(valid))
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            place = chance.randrange(len(data) + 1)
            end = min(len(data), place + chance.choice((1, 2, 8, 64)))
            match chance.randrange(8):
                case 0:
                    if place < len(data):
                        data[place] ^= 1 << chance.randrange(8)
                case 1:
                    data[place:end] = chance.randbytes(end - place)
                case 2:
                    del data[place:]
                case 3:
                    del data[place:end]
                case 4:
                    data[place:place] = data[place:end] * chance.choice((1, 100))
                case 5:
                    data[place:end] = chance.choice(JUNK)
                case 6:
                    data[:8] = chance.choice(
                        (chance.randbytes(8), b"\xff" * 8, bytes(8), (2**26).to_bytes(8, "little"))
                    )
                case _:
                    other = chance.choice(valid)
                    data[place:] = other[chance.randrange(len(other) + 1) :]
        yield bytes(data)


def sum_messages() -> dict[type[Message], list[bytes]]:
    """The messages of a secure sum, by kind."""
    keys = {name: Ed25519PrivateKey.from_private_bytes(name.encode() * 32) for name in "abcd"}
    public = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    terms = Terms(session="s", members=public, length=3)
    total, members = SecureSum(terms), {name: SecureMember(terms, name, key) for name, key in keys.items()}
    found: dict[type[Message], list[bytes]] = {}
    told: dict[str, bytes] = {}
    steps: tuple[tuple[str, type[Message] | None, type[Message] | None], ...] = (
        ("keys", None, Keys),
        ("shares", Neighbours, Sealed),
        ("masked", Shares, None),
        ("opened", Survivors, Opened),
    )
    for step, asked, answered in steps:
        for name, member in members.items():
            arguments: list[Any] = [told[name]] if asked else []
            if step == "masked":
                arguments.append(np.zeros(3, dtype=np.uint32))
            message = getattr(member, step)(*arguments)
            if asked:
                found.setdefault(asked, []).append(told[name])
            if answered:
                found.setdefault(answered, []).append(message)
            total.receive(name, message)
        told = total.advance()
    return found


def a_question() -> bytes:
    task = Task(Turn(2, 0, 5, 3), {"a": torch.zeros(2, 2)}, {"clip": 1.5, "words": "x"})
    return dump_task(task, State({"s": torch.ones(1)}, {"n": 1}), {"ask": "work", "run": "r", "arm": "fedavg"})


def an_answer() -> bytes:
    return dump_reply(Reply(TENSORS, {"weight": 3.0}, {"s": torch.ones(2)}, {"steps": 3}), about={"arm": "fedavg"})


PARSERS: dict[str, tuple[list[bytes], Callable[[bytes], Any]]] = {
    "a question, at the member": ([a_question()], parse_task),
    "an answer, at the coordinator": ([an_answer()], parse_reply),
} | {
    f"{kind.__name__} of a secure sum": (
        messages,
        partial(kind.parse, terms=kind.model_validate_json(messages[0]).terms, of="somebody"),
    )
    for kind, messages in sum_messages().items()
}


@pytest.mark.parametrize("what", PARSERS)
def test_mutants_are_read_or_refused(what: str) -> None:
    valid, parse = PARSERS[what]
    for data in valid:
        parse(data)
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    longest = 0
    came: Counter[str] = Counter()
    for data in mutants(valid, seed=len(what)):
        began = time.perf_counter()
        try:
            parse(data)
            came["read"] += 1
        except UserError as error:
            came["refused"] += 1
            longest = max(longest, len(str(error)))
        slowest = max(slowest, time.perf_counter() - began)
    risen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{what}: {came.total():,} mutants, {came['read']:,} read, {came['refused']:,} refused, 0 crashes; "
          f"slowest {1e3 * slowest:.1f} ms, memory + {risen:.1f} MB")  # fmt: skip
    assert came.total() == MUTANTS
    assert came["refused"] > MUTANTS / 2
    assert risen < 64
    assert longest < 2000


def test_mutants_of_letters_are_read_or_refused() -> None:
    """What Flower carries them in, which a member that is registered can fill as it likes."""
    letter = letters.write(b"x" * 100, run=1, source=2, target=3, now=1000.0, ttl=60.0)
    refused = 0
    for place, (id, part) in enumerate(letter.objects.items()):
        for data in mutants([part], seed=place):
            try:
                letters.read(letter.id, letter.objects | {id: data}, largest=1000)
            except ValueError:
                refused += 1
    print(f"a letter's objects: {MUTANTS * len(letter.objects):,} mutants, {refused:,} refused, 0 crashes")
    assert refused > MUTANTS
