"""From records to token ids: rendering, and which tokens the loss looks at.

A record is rendered to one text and tokenised once, as a whole; the assistant's turns are found by character
offsets. Pieces are never tokenised by themselves: at their borders the tokens would differ from what the model sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from allmend.data.records import Message, Record
from allmend.errors import UserError

Template = Literal["chat", "plain"]

_MARK = "\0"
"""Stands in for a turn to find its place in the rendered text; it is in no data."""


@dataclass(frozen=True)
class Encoded:
    """A record as tokens: a trunk, and for multiple-choice questions one branch for each choice behind it.

    Attributes:
        id: the record's.
        ids: token ids, int64 [T].
        target: True where the token is predicted under the loss, bool [T].
        branch: 0 for the trunk, k for the k-th choice, int64 [T]. A branch sees the trunk and itself only.
        position: position ids, int64 [T]; every branch goes on from the trunk's end.
        cut: tokens cut off because the record was too long.
    """

    id: str
    ids: torch.Tensor
    target: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor
    cut: int = 0

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def learns(self) -> bool:
        """Whether there is a token to learn from: a target with a token before it to be predicted from."""
        return bool((self.target & (self.position > 0)).any())


@dataclass(frozen=True)
class Encoder:
    """Renders and tokenises records for one model.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: `chat` uses the tokenizer's chat template, `plain` joins turns with a space.
        max_tokens: longest record, trunk and longest branch together.
    """

    tokenizer: Any
    template: Template
    max_tokens: int

    def for_training(self, record: Record) -> Encoded:
        """Loss on the assistant's turns with their end mark, or on all of a running text."""
        text, spans = self._render(record, end=True)
        return self._cut(_trunk(record.id, *self._tokenize(record, text, spans)))

    def for_evaluation(self, record: Record) -> Encoded:
        """The same without end marks; a question's choices become branches behind their common beginning."""
        if not record.choices:
            text, spans = self._render(record, end=False)
            return self._cut(_trunk(record.id, *self._tokenize(record, text, spans)))
        options = []
        for choice in record.choices:
            messages = (*record.messages[:-1], Message("assistant", choice))
            text, spans = self._render(replace(record, messages=messages), end=False)
            options.append(self._tokenize(record, text[: spans[-1][1]], spans[-1:]))
        return self._cut(_tree(record.id, options))

    def locate(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Encoded, list[tuple[int, int]]]:
        """A running text as `for_evaluation` reads it, but never cut, and which of its tokens hold parts of it.

        Args:
            text: the running text.
            spans: places in it, in characters: `text[start:end]`.

        Returns:
            The text, whose every token is a target, special ones in front of it too; and for each span the tokens
            `[first, last)` that hold a character of it. A token across the span's border is one of them.

        Raises:
            UserError: a span is empty, lies outside the text, or holds nothing that the tokenizer keeps.
        """
        for low, high in spans:
            if not 0 <= low < high <= len(text):
                raise UserError(f"the span {low}–{high} lies outside the text of {len(text)} characters", where="spans")
        ids, places = self._places(text, special=True)
        found = []
        for low, high in spans:
            held = [index for index, place in enumerate(places) if _overlap(place, (low, high))]
            if not held:
                raise UserError(f"the tokenizer leaves out {text[low:high]!r}", where=f"characters {low}–{high}")
            found.append((held[0], held[-1] + 1))
        whole, _ = _targets(ids, places, [(0, len(text))])
        return _trunk("", whole, [True] * len(whole)), found

    def _render(self, record: Record, *, end: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans that the loss looks at."""
        eos = self.tokenizer.eos_token or ""
        if not record.messages:
            return (record.text + eos if end else record.text), [(0, len(record.text) + len(eos) * end)]
        if self.template == "plain":
            return _render_plain(record.messages, eos, end=end)
        return self._render_chat(record, end=end)

    def _render_chat(self, record: Record, *, end: bool) -> tuple[str, list[tuple[int, int]]]:
        turns = [{"role": message.role, "content": message.content} for message in record.messages]
        apply = self.tokenizer.apply_chat_template
        try:
            text: str = apply(turns, tokenize=False)
            spans = []
            for index, message in enumerate(record.messages):
                if message.role != "assistant":
                    continue
                marked = [*turns[:index], {"role": "assistant", "content": _MARK}]
                shown: str = apply([*marked, *turns[index + 1 :]], tokenize=False)
                start = text.find(message.content.strip(), _common([shown, text]))
                if start < 0:
                    raise UserError("the chat template leaves out an assistant's turn", where=f"record {record.id!r}")
                stop = start + len(message.content.strip())
                if end:
                    # what follows a last turn, as far as it follows this one too
                    ending: str = apply(marked, tokenize=False).rpartition(_MARK)[2]
                    stop += len(ending[: _common([ending, text[stop:]])].rstrip())
                spans.append((start, stop))
        except UserError:
            raise
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            raise UserError(
                f"the model's chat template refuses it: {error}",
                where=f"record {record.id!r}",
                hint='Mend the roles of its messages, or set data.template = "plain".',
            ) from error
        return text, spans

    def _tokenize(self, record: Record, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Ids up to the last target, and which of them are targets."""
        by_template = self.template == "chat" and bool(record.messages)  # it brings its own special tokens
        return _targets(*self._places(text, special=not by_template), spans)

    def _places(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and where in the text each of them stands; special tokens of the tokenizer's own have no width."""
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
        places, reached = [], 0
        for start, stop in encoded["offset_mapping"]:
            # some tokenizers trim white space off a token's place, down to nothing: it begins where the last one ended
            places.append((min(start, reached), stop))
            reached = max(stop, reached)
        return encoded["input_ids"], places

    def _cut(self, encoded: Encoded) -> Encoded:
        """Cut the trunk from its left (a mark of beginning stays), then everything from its right, to `max_tokens`."""
        excess = int(encoded.position.max()) + 1 - self.max_tokens if len(encoded) else 0
        if excess <= 0:
            return encoded
        in_trunk = encoded.branch == 0
        free = int((in_trunk & ~encoded.target).long().cumprod(0).sum())  # what stands before the first target
        keep_one = 1  # the first target is predicted from the token before it
        left = min(excess, max(0, free - keep_one))
        marks = int(encoded.ids[0].item() == self.tokenizer.bos_token_id)
        index = torch.arange(len(encoded))
        keep = (index < marks) | (index >= marks + left)
        position = torch.where(index < marks, index, encoded.position - left)
        keep &= position < self.max_tokens
        return Encoded(
            encoded.id,
            encoded.ids[keep],
            encoded.target[keep],
            encoded.branch[keep],
            position[keep],
            cut=len(encoded) - int(keep.sum()),
        )


def choose_template(wanted: Literal["auto", "chat", "plain"], tokenizer: Any) -> Template:
    """`auto` becomes `chat` where the tokenizer has a template.

    Raises:
        UserError: `chat` is wanted and the tokenizer has no template.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if wanted == "chat" and not has:
        raise UserError(
            "the model's tokenizer has no chat template",
            where="data.template",
            hint='Set it to "plain" or "auto", or use an instruction-tuned model.',
        )
    return wanted if wanted != "auto" else "chat" if has else "plain"


def _targets(
    ids: list[int], places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Ids up to the last one that holds a part of a span, and which of them do."""
    target = [any(_overlap(place, span) for span in spans) for place in places]
    length = max((index for index, is_target in enumerate(target, start=1) if is_target), default=len(target))
    return ids[:length], target[:length]


def _overlap(place: tuple[int, int], span: tuple[int, int]) -> bool:
    return place[0] < place[1] and place[0] < span[1] and place[1] > span[0]


def _render_plain(messages: Sequence[Message], eos: str, *, end: bool) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for message in messages:
        if message.role == "assistant":
            start = len(text)
            text += (" " if text and not text[-1].isspace() else "") + message.content + eos
            spans.append((start, len(text) if end else len(text) - len(eos)))
        else:
            text += ("\n" if text else "") + message.content
    return text, spans


def _trunk(id: str, ids: Sequence[int], target: Sequence[bool]) -> Encoded:
    length = len(ids)
    return Encoded(
        id,
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(target, dtype=torch.bool),
        torch.zeros(length, dtype=torch.int64),
        torch.arange(length),
    )


def _tree(id: str, options: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Encoded:
    """Join the options' token sequences at their common beginning, which holds no target of any of them."""
    first_target = min(target.index(True) if True in target else len(target) for _, target in options)
    shared = min(first_target, _common([ids for ids, _ in options]))
    ids, target = list(options[0][0][:shared]), [False] * shared
    branch, position = [0] * shared, list(range(shared))
    for number, (option_ids, option_target) in enumerate(options, start=1):
        ids += option_ids[shared:]
        target += option_target[shared:]
        branch += [number] * (len(option_ids) - shared)
        position += range(shared, len(option_ids))
    return Encoded(
        id, torch.tensor(ids), torch.tensor(target, dtype=torch.bool), torch.tensor(branch), torch.tensor(position)
    )


def _common(sequences: Sequence[Sequence[Any]]) -> int:
    """Length of the common beginning."""
    shortest = min(len(sequence) for sequence in sequences)
    first = sequences[0]
    return next((i for i in range(shortest) if any(other[i] != first[i] for other in sequences)), shortest)
