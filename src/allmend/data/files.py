"""A client's own data: JSON Lines, CSV, Parquet or a Hub data set, read into records.

One layout holds for a whole file: a prompt and its response, a conversation, or running text. Text is read line by
line, and nothing is guessed or repaired: the first fault is reported with its file, its line, how many more lines
have it, and what to do about it. What a record means is not known here (see `records`), nor how it is tokenised.
"""

import csv
import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from allmend.data.records import ClientData, Message, Record
from allmend.data.splits import split
from allmend.errors import UserError
from allmend.recipe import Fields

Row = dict[str, Any]
Layout = Literal["question", "conversation", "text"]

ROLES = ("system", "user", "assistant")
TRAIN_SPLITS = frozenset({"train", "training"})
HELD_OUT_SPLITS = frozenset({"test", "held_out", "held-out", "validation", "valid", "val", "dev", "eval"})

_FOREIGN = {
    b"PK\x03\x04": "a zip archive (or an Office document)",
    b"\x1f\x8b": "gzip-compressed; its name must end in .gz",
    b"PAR1": "a Parquet file; its name must end in .parquet",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"SQLite format": "an SQLite database",
    b"%PDF": "a PDF document",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"ARROW1": "an Arrow file",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of files that are often taken for text, and what they are."""

_SYNONYMS = {
    "prompt": ("question", "instruction", "input", "query", "context", "source"),
    "response": ("answer", "output", "completion", "reply", "target", "label"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "turns", "chat"),
    "text": ("content", "body", "document", "note", "passage"),
}
"""Names under which other data sets keep the same thing, for the suggestion in an error."""


class _FaultError(Exception):
    """What is wrong with one row; `kind` groups rows that have the same fault."""

    def __init__(self, kind: str, what: str, hint: str) -> None:
        super().__init__(what)
        self.kind, self.what, self.hint = kind, what, hint


class _Faults:
    """The faults of one source, kept until its end so that the first can be reported with how many are like it.

    Args:
        source: the data set as the user names it.
        unit: `line` or `row`, what positions in the source are called.
    """

    def __init__(self, source: str, unit: str) -> None:
        self.source, self.unit = source, unit
        self._first: dict[str, tuple[int, _FaultError]] = {}
        self._count: dict[str, int] = {}

    def place(self, number: int) -> str:
        return f"{self.source}:{number}" if self.unit == "line" else f"{self.source}, row {number}"

    def note(self, number: int, fault: _FaultError, *, count: int = 1) -> None:
        self._first.setdefault(fault.kind, (number, fault))
        self._count[fault.kind] = self._count.get(fault.kind, 0) + count

    def raise_first(self) -> None:
        """Raise the fault that stands first in the source, if there is any."""
        if not self._first:
            return
        # bytes that are not text may have caused any other fault
        number, fault = min(
            self._first.values(), key=lambda first: (first[1].kind not in ("encoding", "nul"), first[0])
        )
        total = self._count[fault.kind]
        more = f" ({total} {self.unit}s in all have this fault)" if total > 1 else ""
        raise UserError(fault.what + more, where=self.place(number), hint=fault.hint)


def read_records(source: str, *, fields: Fields, base: Path = Path()) -> tuple[list[Record], dict[str, int]]:
    """All records of one data set, in its order, and the counts of what was left out.

    `fields` maps the data set's own field names. A record without an id is named by a hash of its content. The same
    record under the same id is kept once, the first, and counted under "duplicate records". With `choices` (a list of
    strings, or one string with `|` between the options), `answer` is the right one's text or its index from 0, and
    stands in for a missing `response`.

    Args:
        source: a `.jsonl`, `.ndjson`, `.json` (one object a line) or `.csv` file, each also `.gz`; a `.parquet`
            file; or `hub:owner/name[:split]` for a data set of the Hugging Face Hub (split `train` by default).
        fields: which field holds what.
        base: the folder that a relative path starts from.

    Raises:
        UserError: anything is wrong with the source or one of its records; the message names the first such place.
    """
    if source.startswith("hub:"):
        faults = _Faults(source, "row")
        rows = _hub_rows(source)
    else:
        path = base / Path(source).expanduser()
        name = path.name.lower()
        faults = _Faults(source, "row" if name.endswith(".parquet") else "line")
        _check_path(source, path)
        if name.endswith(".parquet"):
            rows = _parquet_rows(source, path, fields)
        elif re.search(r"\.(jsonl|ndjson|json)(\.gz)?$", name):
            rows = _json_rows(_text_lines(path, faults), faults)
        elif re.search(r"\.csv(\.gz)?$", name):
            rows = _csv_rows(_text_lines(path, faults), faults)
        else:
            raise UserError(
                f"{path.suffix or 'a file without a suffix'} is not a format that is read here",
                where=source,
                hint="Use .jsonl, .json (one object a line) or .csv, each also with .gz, or .parquet.",
            )
    return _records(rows, fields, faults)


def load_client(name: str, source: str, *, fields: Fields, held_out: float, base: Path) -> ClientData:
    """A member's data set, read and split.

    A held-out record that says word for word what a training record says would measure memory, not skill: it is left
    out and counted under "held-out records also in training".

    Args:
        name: the client's name.
        source: see `read_records`.
        fields: which field holds what.
        held_out: the share of records to hold out where the data do not say, in [0, 1).
        base: the folder that a relative path starts from.

    Raises:
        UserError: the data cannot be read, or the data's own split leaves nothing to learn from.
    """
    records, notes = read_records(source, fields=fields, base=base)
    train, rest = split(records, held_out)
    if not train:
        raise UserError(
            f"client {name!r} has no training record: all {len(rest)} are held out",
            where=source,
            hint=f"Mark some as 'train' in the field {fields.split!r}, or hold out less than everything.",
        )
    learnt = {(record.messages, record.text) for record in train}
    unseen = tuple(record for record in rest if (record.messages, record.text) not in learnt)
    if len(unseen) < len(rest):
        notes["held-out records also in training"] = len(rest) - len(unseen)
    return ClientData(name, train, unseen, notes)


def _check_path(source: str, path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise UserError("is a folder, not a file", where=source, hint="Name the data file inside it.")
    if path.exists():
        raise UserError("is not a regular file", where=source, hint="Name a data file.")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "Check the path."
    raise UserError(f"no such file ({path.absolute()})", where=source, hint=hint)


def _text_lines(path: Path, faults: _Faults) -> Iterator[tuple[int, str]]:
    """The file's lines as text. Bytes that are not text are noted and replaced, so that the rest is still checked."""
    number = 0
    undecodable: list[tuple[int, str]] = []
    valid_accents = 0
    try:
        with _opened(path) as file:
            _refuse_foreign(file.peek(16), faults.source)
            offset = 0
            for number, raw in enumerate(file, start=1):
                try:
                    # a byte order mark is no part of the first line
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    valid_accents += not line.isascii()
                except UnicodeDecodeError as error:
                    undecodable.append((number, _undecodable(raw, offset, error.start)))
                    line = raw.decode("utf-8", errors="replace")
                if "\0" in line:
                    what = f"holds a NUL byte (byte {offset + raw.index(0)} of the file), which text never does"
                    hint = "The file is damaged, binary or UTF-16: export it again as UTF-8 text."
                    faults.note(number, _FaultError("nul", what, hint))
                    line = line.replace("\0", "\ufffd")
                offset += len(raw)
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"the gzip file is truncated or damaged ({error})",
            where=faults.place(number + 1),
            hint="Copy or compress it again; `gzip -t` checks it.",
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=faults.source, hint="Check its permissions."
        ) from None
    if undecodable:
        number, what = undecodable[0]
        if valid_accents:
            what = f"the file mixes encodings: {what}, while {valid_accents} other lines hold valid UTF-8"
            hint = "Export it again from its source as UTF-8, or mend these lines one by one."
        else:
            hint = f"Convert the file: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name}"
        faults.note(number, _FaultError("encoding", what, hint), count=len(undecodable))


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.GzipFile(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _undecodable(raw: bytes, offset: int, start: int) -> str:
    around = raw[max(0, start - 20) : start + 20].decode("cp1252", errors="replace").strip()
    return (
        f"byte 0x{raw[start]:02X} at offset {offset + start} is not UTF-8; "
        f"it looks like Latin-1 or Windows-1252, where it reads “{around}”"
    )


def _refuse_foreign(head: bytes, source: str) -> None:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(
                f"is not UTF-8 text but {what}",
                where=source,
                hint="Export the data as JSON Lines, CSV or Parquet, and name the file accordingly.",
            )


def _json_rows(lines: Iterable[tuple[int, str]], faults: _Faults) -> Iterator[tuple[int, Row]]:
    for number, line in lines:
        if not line.strip():
            continue
        hint = "Write one JSON object a line."
        if line.strip() in ("[", "{"):
            # the file is spread over lines: every further line would only repeat this
            jq = "'.[]'" if line.strip() == "[" else "."
            raise UserError(
                "one JSON value is spread over several lines",
                where=faults.place(number),
                hint=f"{hint} `jq -c {jq} OLD.json > NEW.jsonl` converts it.",
            )
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"is not valid JSON: {error.msg} (column {error.colno})"
            faults.note(number, _FaultError("json", what, hint))
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless nesting
            faults.note(number, _FaultError("json", f"is not usable JSON: {error}", hint))
            continue
        if not isinstance(row, dict):
            if isinstance(row, list):
                hint += " `jq -c '.[]' OLD.json > NEW.jsonl` converts a list of them."
            faults.note(number, _FaultError("object", f"is {_named(row)}, not a JSON object", hint))
            continue
        yield number, row


def _csv_rows(lines: Iterator[tuple[int, str]], faults: _Faults) -> Iterator[tuple[int, Row]]:
    reader = csv.reader((line for _, line in lines), strict=True)
    start = 1
    header: list[str] = []
    # the csv module's own limit is 128 KiB a field, and it is global
    limit = csv.field_size_limit(2**31 - 1)
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(header, number, faults)
            elif len(cells) != len(header):
                what = f"has {len(cells)} columns, the header has {len(header)}"
                hint = 'Put values that hold commas or line breaks in double quotes ("…").'
                faults.note(number, _FaultError("columns", what, hint))
            else:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        hint = 'A double quote inside a value is written twice (""), and the whole value stands in quotes.'
        faults.note(start, _FaultError("csv", f"is not valid CSV: {error}", hint))
        for _ in lines:  # faults of encoding are noted at the end
            pass
    finally:
        csv.field_size_limit(limit)


def _check_header(header: Sequence[str], number: int, faults: _Faults) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"the header names the column {twice!r} twice", where=faults.place(number), hint="Rename one of them."
        )
    for separator, words in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise UserError(
                f"columns are separated by {words}", where=faults.place(number), hint="Export the file with commas."
            )


def _parquet_rows(source: str, path: Path, fields: Fields) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    wanted = {getattr(fields, name) for name in Fields.model_fields}
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        # a file with none of the wanted columns yields a row all the same, whose names the error then lists
        columns = [name for name in names if name in wanted] or names
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row if number > 1 else dict.fromkeys(names) | row
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise UserError(
            f"is not a readable Parquet file ({str(error).splitlines()[0]})", where=source, hint="Write it again."
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot be read ({error})", where=source, hint="Check its permissions, or copy it again."
        ) from None


def _hub_rows(source: str) -> Iterator[tuple[int, Row]]:
    name, _, part = source.removeprefix("hub:").partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError("is not a Hub data set", where=source, hint="Write hub:owner/name or hub:owner/name:split.")
    import datasets

    try:
        data = datasets.load_dataset(name, split=part or "train")
    except ConnectionError as error:
        raise UserError(
            f"the Hub cannot be reached ({_first_line(error)})",
            where=source,
            hint="Check the network, or download the data once and name the file.",
        ) from None
    except FileNotFoundError as error:
        raise UserError(
            f"there is no such data set, or it is not open to you ({_first_line(error)})",
            where=source,
            hint="Check the name on huggingface.co/datasets; log in with `hf auth login` if it is private.",
        ) from None
    except (ValueError, RuntimeError, OSError) as error:  # an unknown split, a loading script, a missing configuration
        raise UserError(
            f"the data set cannot be loaded ({_first_line(error)})",
            where=source,
            hint="Name a split it has (hub:owner/name:split), or download the data and name the file.",
        ) from None
    yield from enumerate(data, start=1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- rows into records


def _records(rows: Iterable[tuple[int, Row]], fields: Fields, faults: _Faults) -> tuple[list[Record], dict[str, int]]:
    layout: Layout | None = None
    records: list[Record] = []
    seen: dict[str, tuple[int, int]] = {}  # id → (line, index in records)
    duplicates = 0
    for number, row in rows:
        if layout is None:
            layout = _layout(row, fields)
        if layout is None:
            faults.raise_first()
            raise _unknown_fields(row, fields, faults.place(number))
        try:
            record = _record(row, layout, fields)
        except _FaultError as fault:
            faults.note(number, fault)
            continue
        if record.id not in seen:
            seen[record.id] = (number, len(records))
            records.append(record)
            continue
        first, index = seen[record.id]
        if _absent(row, fields.id) or records[index] == record:
            duplicates += 1
        else:
            what = f"the id {record.id!r} stands on {faults.unit} {first} already, with other content"
            hint = 'Give every record an id of its own, or set id = "" in [data.fields] to go by their content.'
            faults.note(number, _FaultError("id", what, hint))
    faults.raise_first()
    if not records:
        raise UserError("holds no record", where=faults.source, hint="Put at least one record in it.")
    return records, {"duplicate records": duplicates} if duplicates else {}


def _layout(row: Row, fields: Fields) -> Layout | None:
    if fields.prompt in row and (fields.response in row or {fields.choices, fields.answer} <= row.keys()):
        return "question"
    if fields.messages in row:
        return "conversation"
    return "text" if fields.text in row else None


def _unknown_fields(row: Row, fields: Fields, where: str) -> UserError:
    wanted = ("prompt", "response") if fields.prompt in row or fields.response in row else tuple(_SYNONYMS)
    names = list(row)
    lower = {name.lower(): name for name in names}
    found = {}
    for part in wanted:
        if getattr(fields, part) in row:
            continue
        near = difflib.get_close_matches(part, lower, n=1, cutoff=0.75)
        name = next((lower[n] for n in (*near, *_SYNONYMS[part]) if n in lower), None)
        if name is not None:
            found[part] = name
    hint = "Rename the fields, or say in the recipe's [data.fields] which holds what"
    if found:
        hint += ", perhaps: " + ", ".join(f'{part} = "{name}"' for part, name in found.items())
    return UserError(
        f"has neither {fields.prompt!r} with {fields.response!r}, nor {fields.messages!r}, nor {fields.text!r}; "
        f"its fields are: {', '.join(map(repr, names)) or 'none'}",
        where=where,
        hint=hint + ".",
    )


def _record(row: Row, layout: Layout, fields: Fields) -> Record:
    """The record in one row; `_FaultError` says why there is none."""
    messages: tuple[Message, ...] = ()
    text = ""
    choices: tuple[str, ...] = ()
    answer: int | None = None
    if layout == "text":
        text = _string(row, fields.text)
    else:
        choices = _choices(row, fields.choices)
        if layout == "conversation":
            messages = _conversation(row, fields.messages)
            response = messages[-1].content
        else:
            # where `answer` is the response's own field, its index or text is the answer to the choices
            given = not choices or (fields.response != fields.answer and not _absent(row, fields.response))
            response = _string(row, fields.response) if given else ""
        if choices:
            answer = _answer(row, choices, fields.answer, response)
            response = choices[answer]
        if layout == "question":
            messages = (Message("user", _string(row, fields.prompt)), Message("assistant", response))
    return Record(
        id=_id(row, fields.id, (messages, text, choices)),
        messages=messages,
        text=text,
        choices=choices,
        answer=answer,
        kind="" if _absent(row, fields.kind) else str(row[fields.kind]),
        held_out=_held_out(row, fields.split),
    )


def _absent(row: Row, name: str) -> bool:
    return row.get(name) is None or row[name] == ""


def _named(value: object) -> str:
    """What a JSON value is, in words."""
    words = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else words.get(type(value), "a string" if isinstance(value, str) else "no text")


def _checked(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _FaultError(f"{name} type", f"{name!r} is {_named(value)}, not text", "Write it as a string.")
    if not value.strip():
        raise _FaultError(f"{name} empty", f"{name!r} is empty", "Fill it in or remove the record.")
    if "\0" in value:
        raise _FaultError(f"{name} nul", f"{name!r} holds a NUL character (\\u0000)", "Remove it from the text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        what = f"{name!r} holds half a character (a lone surrogate such as \\ud83d)"
        raise _FaultError(f"{name} surrogate", what, "The text was cut inside a character: export it again.") from None
    return value


def _string(row: Row, name: str) -> str:
    if name not in row:
        what = f"has no field {name!r}; its fields are: {', '.join(map(repr, row)) or 'none'}"
        raise _FaultError(f"{name} missing", what, "Every record of a file needs the same fields; see [data.fields].")
    return _checked(row[name], name)


def _conversation(row: Row, name: str) -> tuple[Message, ...]:
    turns = row.get(name)
    hint = "Write a list of objects with `role` (system, user or assistant) and `content`."
    if isinstance(turns, str):  # CSV has no lists
        try:
            turns = json.loads(turns)
        except ValueError:
            raise _FaultError("messages", f"{name!r} is not valid JSON", hint) from None
    if not isinstance(turns, list) or not turns:
        what = f"{name!r} is {'an empty list' if turns == [] else _named(turns)}, not a list of turns"
        raise _FaultError("messages", what, hint)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise _FaultError("turn", f"turn {number} of {name!r} has no `role` and `content`", hint)
        if turn["role"] not in ROLES:
            raise _FaultError("role", f"turn {number} of {name!r} has the unknown role {turn['role']!r}", hint)
        messages.append(Message(turn["role"], _checked(turn["content"], "content")))
    if messages[-1].role != "assistant":
        what = f"the last turn of {name!r} is the {messages[-1].role}'s, not the assistant's"
        raise _FaultError("last turn", what, "End each conversation with the answer to learn, or remove it.")
    return tuple(messages)


def _choices(row: Row, name: str) -> tuple[str, ...]:
    if _absent(row, name) or row[name] == []:
        return ()
    value = row[name]
    options = value.split("|") if isinstance(value, str) else value
    hint = "Write a list of two or more different strings (in CSV: one string with | between them)."
    if not isinstance(options, list):
        raise _FaultError("choices", f"{name!r} is {_named(value)}, not a list", hint)
    choices = tuple(_checked(option, name).strip() for option in options)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise _FaultError("choices", f"{name!r} holds too few options, or one of them twice: {options}", hint)
    return choices


def _answer(row: Row, choices: tuple[str, ...], name: str, response: str) -> int:
    """The index of the right choice, from the answer's text or index, or from the response where there is no answer."""
    hint = f"Give the right option's text, or its index from 0 to {len(choices) - 1}."
    value = response if _absent(row, name) else row[name]
    if isinstance(value, str):
        value = value.strip()
    index: object = value
    if value in choices:
        index = choices.index(value)
    elif re.fullmatch(r"[0-9]{1,4}(\.0)?", str(value)):  # a column of integers with gaps becomes one of floats
        index = int(float(value))
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        what = (
            f"{name!r} is {value!r}, which is none of the {len(choices)} choices" if value else f"{name!r} is missing"
        )
        raise _FaultError("answer", what, hint)
    if response and response.strip() != choices[index]:
        what = f"the response is {response!r}, but {name!r} says {choices[index]!r}"
        raise _FaultError("answer and response", what, "Make them agree, or leave one of them out.")
    return index


def _id(row: Row, name: str, content: tuple[tuple[Message, ...], str, tuple[str, ...]]) -> str:
    if _absent(row, name):
        messages, text, choices = content
        canonical = json.dumps([[[m.role, m.content] for m in messages], text, choices])
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _checked(value, name)


def _held_out(row: Row, name: str) -> bool | None:
    if _absent(row, name):
        return None
    value = str(row[name]).strip().lower()
    if value in TRAIN_SPLITS:
        return False
    if value in HELD_OUT_SPLITS:
        return True
    raise _FaultError(
        "split",
        f"{name!r} is {row[name]!r}, which is neither training nor held-out data",
        f"Use 'train' or 'test' (or another of {', '.join(sorted(HELD_OUT_SPLITS))}), or set split = \"\" in "
        "[data.fields] to leave the split to allmend.",
    )
