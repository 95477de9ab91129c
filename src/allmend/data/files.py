"""A client's own data: JSON Lines, CSV, Parquet or a Hub data set, read into rows, and these into records.

Text is read line by line, so that a fault has its place. What the fields of a row mean is in `rows`, what a record
means in `records`.
"""

import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

from allmend.data.records import ClientData, Record
from allmend.data.rows import FaultError, Faults, Row, named, to_records
from allmend.data.splits import split
from allmend.errors import UserError
from allmend.recipe import Fields

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
        faults = Faults(source, "row")
        rows = _hub_rows(source)
    else:
        path = base / Path(source).expanduser()
        name = path.name.lower()
        faults = Faults(source, "row" if name.endswith(".parquet") else "line")
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
    return to_records(rows, fields, faults)


def load_client(
    name: str,
    source: str,
    *,
    fields: Fields,
    held_out: float,
    base: Path,
    own_held_out: str | None = None,
    target: str | None = None,
) -> ClientData:
    """A member's data set, read and split.

    A held-out record that says word for word what a training record says would measure memory, not skill: it is left
    out and counted under "held-out records also in training". A target's record may stand in neither.

    Args:
        name: the client's name.
        source: see `read_records`.
        fields: which field holds what.
        held_out: the share of records to hold out where the data do not say, in [0, 1).
        base: the folder that a relative path starts from.
        own_held_out: a source of the held-out records, which are then no part of `source`.
        target: a source of records of what the member's model is to be good at.

    Raises:
        UserError: the data cannot be read, or the data's own split leaves nothing to learn from; both the data and
            `own_held_out` hold records out; or the target has records that are also trained on or held out.
    """
    records, notes = read_records(source, fields=fields, base=base)
    if own_held_out is None:
        train, rest = split(records, held_out)
    else:
        if marked := sum(record.held_out is True for record in records):
            raise UserError(
                f"marks {marked} of its records as held out, and client {name!r} has them in {own_held_out}",
                where=source,
                hint="Remove one of the two: the client's held_out, or these records' split.",
            )
        train, rest = tuple(records), tuple(read_records(own_held_out, fields=fields, base=base)[0])
    if not train:
        raise UserError(
            f"client {name!r} has no training record: all {len(rest)} are held out",
            where=source,
            hint=f"Mark some as 'train' in the field {fields.split!r}, or hold out less than everything.",
        )
    learnt = {record.content for record in train}
    unseen = tuple(record for record in rest if record.content not in learnt)
    if len(unseen) < len(rest):
        notes["held-out records also in training"] = len(rest) - len(unseen)
    aims = () if target is None else tuple(read_records(target, fields=fields, base=base)[0])
    for what, others in (("training", learnt), ("held-out", {record.content for record in unseen})):
        if also := [record for record in aims if record.content in others]:
            raise UserError(
                f"{len(also)} of its {len(aims)} records are {what} records of client {name!r} too, such as "
                f"{also[0].id!r}",
                where=target,
                hint="Take them out of the target: routers must learn from what nothing else was fitted to, and held-"
                "out records from what nobody has learnt from.",
            )
    return ClientData(name, train, unseen, notes, aims)


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


def _text_lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
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
                    faults.note(number, FaultError("nul", what, hint))
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
        faults.note(number, FaultError("encoding", what, hint), count=len(undecodable))


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


def _json_rows(lines: Iterable[tuple[int, str]], faults: Faults) -> Iterator[tuple[int, Row]]:
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
            faults.note(number, FaultError("json", what, hint))
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless nesting
            faults.note(number, FaultError("json", f"is not usable JSON: {error}", hint))
            continue
        if not isinstance(row, dict):
            if isinstance(row, list):
                hint += " `jq -c '.[]' OLD.json > NEW.jsonl` converts a list of them."
            faults.note(number, FaultError("object", f"is {named(row)}, not a JSON object", hint))
            continue
        yield number, row


def _csv_rows(lines: Iterator[tuple[int, str]], faults: Faults) -> Iterator[tuple[int, Row]]:
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
                faults.note(number, FaultError("columns", what, hint))
            else:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        hint = 'A double quote inside a value is written twice (""), and the whole value stands in quotes.'
        faults.note(start, FaultError("csv", f"is not valid CSV: {error}", hint))
        for _ in lines:  # faults of encoding are noted at the end
            pass
    finally:
        csv.field_size_limit(limit)


def _check_header(header: Sequence[str], number: int, faults: Faults) -> None:
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
