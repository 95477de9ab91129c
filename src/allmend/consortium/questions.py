"""What the coordinator asks members beside the legs of a round, and what they answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allmend.errors import UserError
from allmend.federation.engines.flower.exchange import Exchange
from allmend.federation.engines.wire import error_of, parse_reply
from allmend.models.tensors import Tensors, dump, parse
from allmend.strategy import Reply, grouped

NOTICE = 60.0
"""Seconds, at most, in which members hear what needs no answer."""


@dataclass
class Questions:
    """Puts questions to members over an exchange.

    Attributes:
        exchange: carries questions and answers.
        run: digest of what members have agreed to; it stands in each question.
        seconds: how long to wait for answers.
        names: members that have joined.
    """

    exchange: Exchange
    run: str
    seconds: float
    names: Sequence[str] = ()

    def question(self, ask: str, about: Mapping[str, Any] = {}, tensors: Mapping[str, torch.Tensor] = {}) -> bytes:
        """One question: what is asked, facts that belong to it, and a model."""
        return dump(grouped("model", dict(tensors)), {"ask": ask, "run": self.run, **about})

    def to_each(
        self, ask: str, about: Mapping[str, Any], tensors: Tensors, own: Mapping[str, tuple[int, int]] = {}
    ) -> dict[str, bytes]:
        """A question to all that have joined: one for all, or with the state of each that is meant (`own`)."""
        if own:
            found = {name: {**about, "counted": own.get(name)} for name in self.names}
            return {name: self.question(ask, facts, tensors) for name, facts in found.items()}
        return dict.fromkeys(self.names, self.question(ask, about, tensors))

    def ask(
        self, questions: Mapping[str, bytes], *, seconds: float | None = None
    ) -> Iterator[tuple[str, Reply | str | None]]:
        """Replies by member; words where it tells of an error, None where it does not answer."""
        for name, data in self.exchange.ask(questions, seconds=self.seconds if seconds is None else seconds):
            if data is None:
                yield name, None
                continue
            try:
                error = error_of(parse(data, where=f"client {name!r}")[1])
                yield name, parse_reply(data)[0] if error is None else error
            except UserError as error:
                yield name, str(error)

    def tell(self, questions: Mapping[str, bytes], *, seconds: float = NOTICE) -> None:
        """The same where it does no harm that one does not answer."""
        for _ in self.ask(questions, seconds=min(seconds, self.seconds)):
            pass
