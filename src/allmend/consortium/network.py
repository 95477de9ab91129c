"""The two ends of the wire: a coordinator's open door, and a member that listens until the run ends."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from allmend.consortium.member import MemberSide
from allmend.errors import UserError
from allmend.federation.engines.flower.door import Door, Listen
from allmend.federation.engines.flower.exchange import Exchange
from allmend.federation.engines.flower.node import Node
from allmend.federation.engines.flower.post import Post
from allmend.federation.engines.flower.signing import Gate
from allmend.models.tensors import parse

LINGER = 1.0
"""Seconds that a member stays after its last answer: the coordinator reads answers of those that are there."""

DATABASE = "post.db"
"""Flower's state, in the coordinator's run folder."""


@contextlib.contextmanager
def open_door(
    run: Path,
    members: Mapping[str, bytes],
    listen: Listen,
    *,
    on_open: Callable[[int], None] = lambda port: None,
) -> Iterator[Exchange]:
    """The coordinator's end.

    Args:
        run: folder of the run.
        members: name → raw public key.
        listen: where.
        on_open: told the port.

    Raises:
        UserError: the address cannot be had.
    """
    quiet()
    post = Post(run / DATABASE, members)
    try:
        door = Door(post.links, Gate(members), listen, post.most_objects)
        try:
            on_open(door.port)
            yield Exchange(post)
        finally:
            door.close()
    finally:
        post.close()


def serve(side: MemberSide, node: Node, *, poll: float = 0.5) -> None:
    """The member's end: answer questions until the coordinator says that the run has ended.

    Raises:
        UserError: the coordinator refuses this member, or cannot be reached for too long, or this member cannot be
            in the run that it was offered.
    """
    quiet()
    node.connect()
    try:
        for letter in node.receive(poll=poll):
            node.answer(letter, side.answer(letter.data))
            if side.refused is not None:
                raise side.refused
            if side.declined or _ends(letter.data):
                time.sleep(LINGER)
                return
    finally:
        side.close()
        node.close()


def _ends(question: bytes) -> bool:
    try:
        return parse(question)[1].get("ask") == "end"
    except UserError:  # it was answered with what is wrong with it
        return False


def quiet() -> None:
    """Keep what Flower logs off the screen: what a user can act on is told by this program."""
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.CRITICAL)
