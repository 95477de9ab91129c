"""The member's end of the wire: it answers until the run ends.

The coordinator's end is a file of its own, since loading its server takes seconds that a member need not wait.
"""

import time

from allmend.consortium.member import MemberSide
from allmend.errors import UserError
from allmend.federation.engines.flower import quiet
from allmend.federation.engines.flower.node import Node
from allmend.models.tensors import parse

LINGER = 1.0
"""Seconds that a member stays after its last answer: the coordinator reads answers of those that are there."""


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
