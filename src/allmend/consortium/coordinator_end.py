"""The coordinator's end of the wire: an open door, and the post behind it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from allmend.federation.engines.flower import quiet
from allmend.federation.engines.flower.door import Door, Listen
from allmend.federation.engines.flower.exchange import Exchange
from allmend.federation.engines.flower.post import Post
from allmend.federation.engines.flower.signing import Gate

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
