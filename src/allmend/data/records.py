"""What a client's data consists of: records, and the client's named set of them.

A record is one of two things: a conversation whose last turn is the assistant's (the loss looks at the
assistant's turns only), or running text (the loss looks at every token). It may carry the options of a
multiple-choice question, whose right one is the assistant's answer.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One example of a client.

    Attributes:
        id: unique within the client; the split between training and held-out records is a hash of it.
        messages: the conversation; empty for running text.
        text: running text; empty for a conversation.
        choices: options of a multiple-choice question, or empty.
        answer: index of the right option in `choices`.
        kind: a label by which results are broken down (a question type); empty when there is none.
        held_out: the split that the data itself fixes; None leaves it to the hash of the id.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    choices: tuple[str, ...] = ()
    answer: int | None = None
    kind: str = ""
    held_out: bool | None = None

    @property
    def response(self) -> str:
        """The last assistant turn, or the running text itself."""
        return self.messages[-1].content if self.messages else self.text

    @property
    def content(self) -> tuple[object, ...]:
        """What it says, by which records are the same whatever their ids."""
        return self.messages, self.text

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is written in it: every turn, or the running text."""
        return tuple(message.content for message in self.messages) or (self.text,)


def question(
    id: str, prompt: str, response: str, *, choices: tuple[str, ...] = (), kind: str = "", held_out: bool | None = None
) -> Record:
    """A record of one prompt and its response, with the response's index among `choices` if there are any.

    Raises:
        ValueError: `choices` do not hold `response` exactly once.
    """
    if choices and choices.count(response) != 1:
        raise ValueError(f"record {id!r}: the response must stand exactly once among the choices")
    return Record(
        id=id,
        messages=(Message("user", prompt), Message("assistant", response)),
        choices=choices,
        answer=choices.index(response) if choices else None,
        kind=kind,
        held_out=held_out,
    )


@dataclass(frozen=True, slots=True)
class ClientData:
    """A member's records, split, with the counts of what was left out on the way.

    Attributes:
        name: the client's name.
        train: records to learn from.
        held_out: records never learnt from.
        target: records of what its model is to be good at, where they are a set of their own.
        notes: counts worth telling the user (`{"duplicate ids": 3}`); shown in the report.
    """

    name: str
    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    notes: dict[str, int] = field(default_factory=dict)
    target: tuple[Record, ...] = ()

    @property
    def records(self) -> tuple[Record, ...]:
        """All of them."""
        return (*self.train, *self.held_out, *self.target)
