"""The coordinator's post office: letters to members and their answers, kept in Flower's database."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from allmend.federation.engines.flower import letters

TTL = 30 * 86400.0
"""Seconds that a letter waits for its member."""

_HEARTBEAT = 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """A member's answer to the letter with this id; None where it cannot be read."""

    member: str
    letter: str
    data: bytes | None


class Post:
    """Letters to registered members. Each start is a new run of Flower's: letters of the one before are void.

    Args:
        database: a file, made where it is not there; only its owner can read it.
        members: name → raw public key.
    """

    def __init__(self, database: Path, members: Mapping[str, bytes]) -> None:
        if not database.exists():
            os.close(os.open(database, os.O_CREAT | os.O_WRONLY, 0o600))
        objects = ObjectStoreFactory(str(database))
        self.links = LinkStateFactory(str(database), NoOpFederationManager(), objects)
        self._state = state = self.links.state()
        for before in state.get_run_info():
            state.stop_run(before.run_id)
            state.cleanup_run(before.run_id)
        self._nodes: dict[str, int] = {}
        for name, key in members.items():
            found = state.get_node_id_by_public_key(key)
            self._nodes[name] = found or state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 30, name=name)
        self._names = {node: name for name, node in self._nodes.items()}
        self._run = state.create_run(
            "allmend/federation", "1", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = state.get_run_info(run_ids=[self._run])[0].primary_task_id
        state.claim_task(task)
        state.activate_task(task)
        self._closed = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, args=(task,), name="post", daemon=True)
        self._beat.start()
        self._arriving: dict[str, tuple[str, str, list[str]]] = {}
        self._largest = 0

    def online(self) -> dict[str, float]:
        """Members that have been heard of lately, and when they began (seconds since the epoch)."""
        found = self._state.get_node_info(node_ids=list(self._nodes.values()))
        return {
            self._names[node.node_id]: datetime.fromisoformat(node.last_activated_at).timestamp()
            for node in found
            if node.status == "online"
        }

    def expect(self, largest: int) -> None:
        """From now on, answers have at most so many bytes; the door keeps out larger ones."""
        self._largest = largest

    def most_objects(self) -> int:
        """Objects of the largest answer that may come."""
        return letters.objects_of(self._largest)

    def send(self, member: str, data: bytes) -> str | None:
        """Leave a letter for a member; its id, or None where the member was never there."""
        letter = letters.write(
            data, run=self._run, source=SUPERLINK_NODE_ID, target=self._nodes[member], now=time.time(), ttl=TTL
        )
        session = self._state.start_session(self._run)
        stored, missing = self._state.store_message_and_object_tree(letter.envelope, letter.tree, session)
        if not stored:
            return None
        for id in missing:
            self._state.store_object(self._run, session, id, letter.objects[id])
        return letter.id

    def answers(self, waiting: Mapping[str, str]) -> Iterator[Answered]:
        """Answers that have come whole since it was last asked, one in memory at a time.

        Args:
            waiting: id of a letter → the member that it went to.
        """
        there = self.online()
        asked = {id for id, member in waiting.items() if member in there} - set(self._arriving)
        for reply in self._state.get_message_res(asked, self._run) if asked else ():
            letter, id = reply.metadata.reply_to_message_id, reply.metadata.message_id
            if letter not in waiting or reply.has_error():
                continue
            try:
                tree = self._state.object_store.get_object_tree(id)
            except NoObjectInStoreError:  # its upload was given up; whoever waits asks again
                _log.warning("an answer of %s came without its content", waiting[letter])
                continue
            self._arriving[letter] = (waiting[letter], id, letters.ids_of(tree))
        for letter, (member, id, parts) in list(self._arriving.items()):
            if letter not in waiting:
                continue
            objects = {part: self._state.get_object(self._run, part) for part in parts}
            if any(part == b"" for part in objects.values()):  # on their way
                continue
            del self._arriving[letter]
            try:
                whole = {part: value for part, value in objects.items() if value is not None}
                data = letters.read(id, whole, largest=self._largest + letters.CHUNK)
            except ValueError as error:
                _log.warning("the answer of %s cannot be read: %s", member, error)
                data = None
            self._state.object_store.delete(id)
            self._state.delete_messages({letter})
            yield Answered(member, letter, data)

    def forget(self, letter: str) -> None:
        """Nobody waits for an answer to this letter any more."""
        self._arriving.pop(letter, None)
        self._state.delete_messages({letter})

    def close(self) -> None:
        """End the run."""
        self._closed.set()
        self._beat.join(5)
        self._state.stop_run(self._run)

    def _keep_alive(self, task: int) -> None:
        while not self._closed.wait(_HEARTBEAT):
            self._state.acknowledge_task_heartbeat(task)
