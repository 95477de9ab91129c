"""Bytes as Flower's messages: one array of bytes, in chunks that Flower stores and transfers one by one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Metadata
from flwr.app.message import Array, ArrayRecord, Message, RecordDict, make_message, remove_content_from_message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_tree,
    get_object_type_from_object_content,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

CHUNK = 5 * 2**20
"""Bytes that Flower puts into one object."""

FRAME = 8
"""Objects of a letter that are not its content: message, records, array, and room for what a version may add."""

KIND = "train"
"""Flower's type of message; it has no meaning here."""


@dataclass(frozen=True)
class Letter:
    """A message without its content, the tree of the content's objects, and their bytes by id."""

    envelope: Message
    tree: Any
    objects: dict[str, bytes]

    @property
    def id(self) -> str:
        return str(self.envelope.metadata.message_id)


def write(data: bytes, *, run: int, source: int, target: int, now: float, ttl: float, reply_to: str = "") -> Letter:
    """A letter from one node to another.

    Args:
        data: its content.
        run: Flower's id of the run.
        source: node that sends it.
        target: node that it is for.
        now: seconds since the epoch by the coordinator's clock.
        ttl: seconds that it waits.
        reply_to: id of the letter that it answers.
    """
    array = Array("uint8", (len(data),), "allmend", data)
    metadata = Metadata(run, "", source, target, reply_to, "", now, ttl, KIND)
    message = make_message(metadata, RecordDict({"allmend": ArrayRecord({"message": array})}))
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {id: part.deflate() for id, part in get_all_nested_objects(message).items()}
        tree = get_object_tree(message)
    return Letter(remove_content_from_message(message), tree, objects)


def ids_of(tree: Any) -> list[str]:
    """The ids of a tree's objects."""
    return list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))


def objects_of(size: int) -> int:
    """The most objects that a letter of `size` bytes has."""
    return FRAME + -(-size // CHUNK)


def _whole(objects: Mapping[str, bytes]) -> int:
    """Bytes of the arrays when they are put together: one object may stand in them many times."""
    total = 0
    for content in objects.values():
        if get_object_type_from_object_content(content) == Array.__name__:
            parts = get_object_children_ids_from_object_content(content)
            for place in json.loads(get_object_body(content, Array))["arraychunk_ids"]:
                total += len(objects[parts[place]])
    return total


def read(id: str, objects: Mapping[str, bytes], *, largest: int | None = None) -> bytes:
    """The content of a letter whose objects have come.

    Args:
        id: of the letter.
        objects: by their ids.
        largest: bytes that it may have; None for any number.

    Raises:
        ValueError: they are not such a letter's, or it is larger.
    """
    try:
        if largest is not None and (size := _whole(objects)) > largest:
            raise ValueError(f"a letter of {size:,} bytes, and {largest:,} are the most")
        message = inflate_object_from_contents(id, dict(objects))
        assert isinstance(message, Message)
        data = message.content["allmend"]["message"].data
    except ValueError:
        raise
    except Exception as error:  # bytes of a stranger: whatever goes wrong is their fault
        raise ValueError(f"not a letter: {type(error).__name__}") from error
    if not isinstance(data, bytes):
        raise ValueError("not a letter of bytes")
    return data
