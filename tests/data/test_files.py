import csv
import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allmend import UserError
from allmend.data.files import Fields, load_client, read_records
from allmend.data.records import Message, Record, question

QA = [{"id": "a", "prompt": "Wie?", "response": "So."}, {"id": "b", "prompt": "Où ?", "response": "Là."}]
CHAT = [
    {"role": "system", "content": "Short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
]


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Folder:
    """A temporary folder of data files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, content: str | bytes, name: str = "d.jsonl", **fields: str) -> tuple[list[Record], dict[str, int]]:
        (self.path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return read_records(name, fields=Fields(**fields), base=self.path)

    def records(self, *rows: object, **fields: str) -> list[Record]:
        return self.read(jsonl(*rows), **fields)[0]

    def error(self, content: str | bytes, name: str = "d.jsonl", **fields: str) -> str:
        with pytest.raises(UserError) as caught:
            self.read(content, name, **fields)
        assert caught.value.hint
        return str(caught.value)

    def row_error(self, *rows: object, **fields: str) -> str:
        return self.error(jsonl(*rows), **fields)


@pytest.fixture
def data(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- formats


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", jsonl(*QA).encode()),
        ("d.json", jsonl(*QA).encode()),
        ("d.jsonl.gz", gzip.compress(jsonl(*QA).encode(), mtime=0)),
        ("d.csv", as_csv(QA)),
        ("D.CSV.GZ", gzip.compress(as_csv(QA), mtime=0)),
        ("d.parquet", as_parquet(QA)),
        ("bom.jsonl", b"\xef\xbb\xbf" + jsonl(*QA).encode()),
        ("bom.csv", b"\xef\xbb\xbf" + as_csv(QA)),
        ("windows.jsonl", jsonl(*QA).replace("\n", "\r\n\r\n").encode()),
        ("unended.jsonl", jsonl(*QA).rstrip().encode()),
    ],
)
def test_every_format_gives_the_same_records(data: Folder, name: str, content: bytes) -> None:
    records, notes = data.read(content, name)
    assert records == [question("a", "Wie?", "So."), question("b", "Où ?", "Là.")]
    assert notes == {}


def test_conversations_text_kind_and_split(data: Folder) -> None:
    (record,) = data.records({"id": 7, "messages": CHAT, "kind": "greeting", "split": "TEST"})
    assert record == Record("7", tuple(Message(**m) for m in CHAT), kind="greeting", held_out=True)
    (record,) = data.records({"text": "Once upon a time", "split": "train", "kind": 3})
    assert (record.text, record.messages, record.held_out, record.kind) == ("Once upon a time", (), False, "3")
    (record,) = data.read(as_csv([{"messages": json.dumps(CHAT)}]), "c.csv")[0]
    assert record.messages[2] == Message("assistant", "Ho")
    (record,) = data.read(as_parquet([{"messages": CHAT, "other": 1}]), "c.parquet")[0]
    assert record.messages[2] == Message("assistant", "Ho")


@pytest.mark.parametrize("value", ["test", "held_out", "validation", "val"])
def test_held_out_splits(data: Folder, value: str) -> None:
    assert data.records({"text": "t", "split": value})[0].held_out is True


def test_field_names_can_be_mapped_and_left_out(data: Folder) -> None:
    row = {"id": "x", "question": "Why?", "answer": "Because.", "split": "fold 3"}
    fields = {"prompt": "question", "response": "answer", "split": ""}
    assert data.records(row, **fields) == [question("x", "Why?", "Because.")]
    assert data.records(row, **fields, id="")[0].id != "x"


@pytest.mark.parametrize(
    "rest",
    [
        {"answer": 1},
        {"answer": "1"},
        {"answer": "lung"},
        {"answer": 1.0},
        {"response": "lung", "answer": None},
        {"response": "lung"},
        {"response": "lung", "answer": 1},
        {"response": "", "answer": "lung"},
    ],
)
def test_choices(data: Folder, rest: dict[str, Any]) -> None:
    (record,) = data.records({"id": "q", "prompt": "Where?", "choices": ["heart", "lung"], **rest})
    assert record == question("q", "Where?", "lung", choices=("heart", "lung"))


def test_choices_in_csv_and_under_one_name_with_the_response(data: Folder) -> None:
    rows = [{"id": "q", "prompt": "Where?", "choices": "heart | lung", "answer": "1"}]
    assert data.read(as_csv(rows), "d.csv")[0] == [question("q", "Where?", "lung", choices=("heart", "lung"))]
    row = {"id": "q", "prompt": "Where?", "choices": ["heart", "lung"], "answer": 1}
    assert data.records(row, response="answer") == [question("q", "Where?", "lung", choices=("heart", "lung"))]


def test_an_answers_text_goes_before_its_index(data: Folder) -> None:
    (record,) = data.records({"prompt": "How many?", "choices": ["2", "1", "0"], "answer": "0"})
    assert record.response == "0"


def test_a_missing_id_is_made_from_the_content(data: Folder) -> None:
    first, second = data.records({"prompt": "p", "response": "r"}, {"prompt": "p", "response": "s"})
    assert first.id != second.id
    assert data.records({"response": "r", "id": None, "prompt": "p", "kind": "k"})[0].id == first.id


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
def test_a_record_of_a_megabyte_is_read(data: Folder, name: str) -> None:
    rows = [{"prompt": "p", "response": "long " * 250_000}]
    content = {"d.jsonl": jsonl(*rows).encode(), "d.csv": as_csv(rows), "d.parquet": as_parquet(rows)}[name]
    limit = csv.field_size_limit()
    assert len(data.read(content, name)[0][0].response) == 1_250_000
    assert csv.field_size_limit() == limit


# --- there and back

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
extras = {
    "kind": st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    "held_out": st.sampled_from([None, True, False]),
}
ids = st.uuids().map(str)
texts = st.builds(Record, id=ids, text=words, **extras)
turns = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), words)
talks = st.builds(
    lambda turns, last, **rest: Record(messages=(*turns, Message("assistant", last)), **rest),
    st.lists(turns, max_size=3),
    words,
    id=ids,
    **extras,
)
options = st.lists(words.map(str.strip).filter(bool), min_size=2, max_size=4, unique=True)
questions = st.builds(
    lambda id, prompt, options, **rest: question(id, prompt, options[0], choices=tuple(options), **rest),
    ids,
    words,
    options,
    **extras,
)
one_layout = st.one_of(*(st.lists(kind, min_size=1, unique_by=lambda r: r.id) for kind in (texts, talks, questions)))


def rows_of(records: list[Record]) -> list[dict[str, Any]]:
    """Records as rows of one file, in the one layout that fits them all."""
    pairs = all([message.role for message in record.messages] == ["user", "assistant"] for record in records)
    rows = []
    for record in records:
        row: dict[str, Any] = {"id": record.id, "kind": record.kind}
        if not record.messages:
            row["text"] = record.text
        elif pairs:
            row |= {"prompt": record.messages[0].content, "response": record.response}
        else:
            row["messages"] = [{"role": message.role, "content": message.content} for message in record.messages]
        if record.choices:
            row |= {"choices": list(record.choices), "answer": record.answer}
        if record.held_out is not None:
            row["split"] = "test" if record.held_out else "train"
        rows.append(row)
    return rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(one_layout)
def test_written_records_read_back(tmp_path: Path, records: list[Record]) -> None:
    (tmp_path / "d.jsonl").write_text(jsonl(*rows_of(records)), encoding="utf-8", newline="")
    assert read_records("d.jsonl", fields=Fields(), base=tmp_path) == (records, {})


# --- duplicates


def test_the_same_record_twice_is_kept_once_and_counted(data: Folder) -> None:
    records, notes = data.read(jsonl(QA[0], QA[1], QA[0], QA[0]))
    assert [record.id for record in records] == ["a", "b"]
    assert notes == {"duplicate records": 2}


def test_records_without_ids_that_say_the_same_are_one(data: Folder) -> None:
    row = {"prompt": "p", "response": "r"}
    records, notes = data.read(jsonl(row | {"split": "test"}, row | {"split": "train"}))
    assert [record.held_out for record in records] == [True]
    assert notes == {"duplicate records": 1}


def test_one_id_for_two_records_names_both_lines(data: Folder) -> None:
    message = data.row_error(QA[0], QA[1], QA[0] | {"response": "Anders."}, QA[1] | {"response": "Ici."})
    assert message.startswith("d.jsonl:3: the id 'a' stands on line 1 already")
    assert "2 lines" in message


# --- bad input: the message names the file, the line and what to do


@pytest.mark.parametrize("content", ["", "\n \n", b"\xef\xbb\xbf"])
def test_empty_files(data: Folder, content: str | bytes) -> None:
    assert "holds no record" in data.error(content)


def test_a_csv_of_a_header_alone_is_empty(data: Folder) -> None:
    assert "holds no record" in data.error("prompt,response\n", "d.csv")
    assert "holds no record" in data.error(as_parquet([]), "d.parquet")


def test_invalid_json_is_counted(data: Folder) -> None:
    message = data.error(jsonl(QA[0]) + "{'id': 1}\n" + jsonl(QA[1]) + "nonsense\n")
    assert message.startswith("d.jsonl:2: is not valid JSON")
    assert "2 lines" in message
    assert "is not usable JSON" in data.error('{"id": ' + "9" * 5000 + "}")
    assert "is not usable JSON" in data.error("[" * 100_000)


def test_other_json_than_one_object_a_line(data: Folder) -> None:
    assert "jq" in data.error(json.dumps(QA))
    assert "several lines" in data.error(json.dumps(QA, indent=1))
    assert "several lines" in data.error(json.dumps(QA[0], indent=1))
    assert "d.jsonl:2: is a number" in data.error(jsonl(QA[0], 5))


def test_wrong_field_names_are_listed_with_what_they_may_be(data: Folder) -> None:
    message = data.row_error({"question": "Why?", "answer": "So."})
    assert "d.jsonl:1" in message
    assert "'question', 'answer'" in message
    assert 'prompt = "question", response = "answer"' in message
    assert "[data.fields]" in message
    assert 'prompt = "Prompts"' in data.row_error({"Prompts": "Why?", "response": "So."})
    assert 'messages = "conversations"' in data.row_error({"conversations": CHAT})
    assert "[data.fields]" in data.row_error({"x": 1})
    assert "none" in data.row_error({})
    assert 'response = "output"' in data.error(as_parquet([{"prompt": "p", "output": "o"}]), "d.parquet")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "no field 'response'"),
        ({"prompt": "p", "response": None}, "'response' is null"),
        ({"prompt": "p", "response": ""}, "'response' is empty"),
        ({"prompt": "p", "response": " \n"}, "'response' is empty"),
        ({"prompt": "p", "response": 5}, "'response' is a number"),
        ({"prompt": "p", "response": ["x"]}, "'response' is a list"),
        ({"prompt": True, "response": "r"}, "'prompt' is true or false"),
        ({"prompt": "p", "response": "a\0b"}, "NUL"),
        ({"prompt": "p", "response": "r", "id": ["x"]}, "'id' is a list"),
        ({"prompt": "p", "response": "r", "split": "fold 1"}, "neither training nor held-out"),
        ({"prompt": "p", "response": "r", "choices": 5}, "not a list"),
        ({"prompt": "p", "response": "r", "choices": ["r"]}, "too few"),
        ({"prompt": "p", "response": "r", "choices": ["r", "r"]}, "twice"),
        ({"prompt": "p", "response": "r", "choices": ["r", 5]}, "'choices' is a number"),
        ({"prompt": "p", "response": "r", "choices": ["s", "t"]}, "none of the 2 choices"),
        ({"prompt": "p", "response": "r", "choices": ["r", "t"], "answer": 1}, "the response is 'r'"),
        ({"prompt": "p", "response": None, "choices": ["r", "t"], "answer": 2}, "none of the 2 choices"),
        ({"prompt": "p", "response": None, "choices": ["r", "t"], "answer": -1}, "none of the 2 choices"),
        ({"prompt": "p", "response": None, "choices": ["r", "t"], "answer": True}, "none of the 2 choices"),
        ({"prompt": "p", "response": None, "choices": ["r", "t"]}, "'answer' is missing"),
    ],
)
def test_faulty_questions(data: Folder, row: dict[str, Any], message: str) -> None:
    found = data.row_error(QA[0], QA[1], row, row)
    assert found.startswith("d.jsonl:3: ")
    assert message in found
    assert "2 lines" in found


def test_half_a_character(data: Folder) -> None:
    assert "surrogate" in data.error('{"prompt": "p", "response": "\\ud83d"}')


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "an empty list"),
        ("hello", "not valid JSON"),
        (None, "is null"),
        ([{"from": "human", "value": "Hi"}], "turn 1"),
        ([{"role": "human", "content": "Hi"}], "unknown role 'human'"),
        ([{"role": ["user"], "content": "Hi"}], "unknown role"),
        ([*CHAT, {"role": "user", "content": "Hi"}], "the last turn of 'messages' is the user's"),
        ([{"role": "assistant", "content": ""}], "'content' is empty"),
        ([{"role": "assistant", "content": None}], "'content' is null"),
    ],
)
def test_faulty_conversations(data: Folder, messages: object, message: str) -> None:
    found = data.row_error({"messages": CHAT}, {"messages": messages})
    assert found.startswith("d.jsonl:2: ")
    assert message in found


def test_another_encoding(data: Folder) -> None:
    content = jsonl(*QA).encode("cp1252")
    message = data.error(content)
    assert message.startswith(f"d.jsonl:2: byte 0xF9 at offset {content.index(0xF9)} is not UTF-8")
    assert "Où ?" in message
    assert "iconv -f WINDOWS-1252 -t UTF-8" in message


def test_mixed_encodings(data: Folder) -> None:
    content = jsonl(QA[1]).encode() + jsonl(QA[1]).encode("latin-1") + jsonl(QA[1]).encode("latin-1")
    for name, text in (("d.jsonl", content), ("d.csv", as_csv(QA) + "c,où,là\n".encode("latin-1") * 2)):
        message = data.error(text, name)
        assert "mixes encodings" in message
        assert "2 lines" in message
        assert "iconv" not in message


def test_encoding_is_reported_behind_broken_csv(data: Folder) -> None:
    assert "d.csv:2" in data.error(b'prompt,response\n\xe9,x\n"open,y\n', "d.csv")


def test_nul_bytes(data: Folder) -> None:
    content = jsonl(QA[0]).encode() + b"\0\0\0\n"
    assert data.error(content).startswith(f"d.jsonl:2: holds a NUL byte (byte {content.index(0)} of the file)")
    assert "NUL" in data.error(b"prompt,response\nx,\0\n", "d.csv")


def test_foreign_files(data: Folder) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    assert "zip archive" in data.error(archive.getvalue())
    assert "pickle" in data.error(pickle.dumps(QA))
    assert "Parquet" in data.error(as_parquet(QA))
    assert ".gz" in data.error(gzip.compress(b"{}", mtime=0))
    assert "UTF-16" in data.error(jsonl(*QA).encode("utf-16"))
    assert "zip archive" in data.error(gzip.compress(archive.getvalue(), mtime=0), "d.jsonl.gz")
    assert "readable Parquet" in data.error(jsonl(*QA), "d.parquet")
    assert "readable Parquet" in data.error(as_parquet(QA)[:-20], "d.parquet")
    assert "not a format" in data.error("x", "d.xlsx")
    assert "not a format" in data.error("x", "plain")


def test_damaged_gzip(data: Folder) -> None:
    whole = gzip.compress(jsonl(*({"prompt": str(i), "response": str(i**9)} for i in range(2000))).encode())
    assert "truncated or damaged" in data.error(whole[:-100], "d.jsonl.gz")
    assert "truncated or damaged" in data.error(whole[:500] + bytes(50) + whole[550:], "d.jsonl.gz")
    assert "truncated or damaged" in data.error(jsonl(*QA), "d.jsonl.gz")


def test_csv_faults(data: Folder) -> None:
    assert "d.csv:3: has 3 columns" in data.error("prompt,response\na,b\na,b,c\n", "d.csv")
    assert "twice" in data.error("prompt,prompt\na,b\n", "d.csv")
    assert "semicolons" in data.error("prompt;response\na;b\n", "d.csv")
    assert "tabs" in data.error("prompt\tresponse\na\tb\n", "d.csv")
    assert "d.csv:2: is not valid CSV" in data.error('prompt,response\n"a,b\n', "d.csv")
    # the line is the one where the row begins
    assert "d.csv:5: 'response' is empty" in data.error('prompt,response\n"a\nb\nc",d\ne,\n', "d.csv")


def test_paths(data: Folder, tmp_path: Path) -> None:
    data.read(jsonl(*QA), "clinic-north.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"Did you mean 'clinic-north\.jsonl'"):
        read_records("clinic-nort.jsonl", fields=Fields(), base=tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_records("nowhere/d.jsonl", fields=Fields(), base=tmp_path)
    with pytest.raises(UserError, match="folder"):
        read_records("folder.jsonl", fields=Fields(), base=tmp_path)
    with pytest.raises(UserError, match="regular file"):
        read_records("/dev/null", fields=Fields())


def test_unreadable(data: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    # permissions do not stop root, who may run the tests
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("allmend.data.files._opened", refuse)
    assert "Permission denied" in data.error(jsonl(*QA))


# --- the Hub


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, *, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(QA)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_records("hub:owner/name", fields=Fields())[0]) == 2
    read_records("hub:owner/name:test[:10%]", fields=Fields())
    assert asked == [("owner/name", "train"), ("owner/name", "test[:10%]")]
    with pytest.raises(UserError, match="hub:owner/name, row 1"):
        read_records("hub:owner/name", fields=Fields(prompt="x", response="y"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("offline\nmore"), "cannot be reached"),
        (FileNotFoundError("no"), "no such data set"),
        (ValueError("Unknown split"), "Unknown split"),
        (RuntimeError("scripts"), "scripts"),
    ],
)
def test_hub_faults(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    import datasets

    def load(name: str, *, split: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=message):
        read_records("hub:owner/name", fields=Fields())


def test_hub_names() -> None:
    for source in ("hub:", "hub:a/b/c", "hub:/etc", "hub:../x y"):
        with pytest.raises(UserError, match="not a Hub data set"):
            read_records(source, fields=Fields())


# --- clients


def client(tmp_path: Path, *rows: dict[str, Any], held_out: float = 0.1) -> Any:
    (tmp_path / "d.jsonl").write_text(jsonl(*rows))
    return load_client("north", "d.jsonl", fields=Fields(), held_out=held_out, base=tmp_path)


def test_a_client_is_split_by_hash_or_as_the_data_say(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"text {i}"} for i in range(400)]
    data = client(tmp_path, *rows, held_out=0.25)
    assert len(data.train) + len(data.held_out) == 400
    assert 60 <= len(data.held_out) <= 140
    marked = client(tmp_path, *(row | {"split": "test" if i < 3 else "train"} for i, row in enumerate(rows)))
    assert [record.id for record in marked.held_out] == ["0", "1", "2"]


def test_one_record_is_learnt_from(tmp_path: Path) -> None:
    assert len(client(tmp_path, QA[0], held_out=0.99).train) == 1


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'north' has no training record"):
        client(tmp_path, QA[0] | {"split": "test"})


def test_held_out_records_that_are_also_learnt_from_are_left_out(tmp_path: Path) -> None:
    data = client(tmp_path, QA[0] | {"split": "train"}, QA[0] | {"id": "z", "split": "test"}, QA[1] | {"split": "test"})
    assert [record.id for record in data.held_out] == ["b"]
    assert data.notes == {"held-out records also in training": 1}


def test_held_out_records_and_a_target_in_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(jsonl(*({"id": str(i), "text": f"own {i}"} for i in range(20))))
    (tmp_path / "t.jsonl").write_text(jsonl({"text": "own 3"}, {"id": "1", "text": "test 1"}, {"text": "test 2"}))
    (tmp_path / "v.csv").write_text("text,split\naim 1,test\naim 2,train\n")
    data = load_client(
        "north", "d.jsonl", fields=Fields(), held_out=0.5, base=tmp_path, own_held_out="t.jsonl", target="v.csv"
    )
    assert len(data.train) == 20, "the share is for clients whose data say nothing else"
    assert [record.text for record in data.held_out] == ["test 1", "test 2"]
    assert [record.text for record in data.target] == ["aim 1", "aim 2"], "a target has no split"
    assert data.notes["held-out records also in training"] == 1


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("target", "own 3", "1 of its 2 records are training records of client 'north' too, such as 'x'"),
        ("target", "test 2", "1 of its 2 records are held-out records of client 'north' too, such as 'x'"),
        ("target", "", "'text'"),
    ],
)
def test_a_target_has_records_of_its_own(tmp_path: Path, kind: str, text: str, message: str) -> None:
    (tmp_path / "d.jsonl").write_text(jsonl(*({"id": str(i), "text": f"own {i}"} for i in range(20))))
    (tmp_path / "t.jsonl").write_text(jsonl({"text": "test 1"}, {"text": "test 2"}))
    (tmp_path / "v.jsonl").write_text(jsonl({"id": "y", "text": "else"}, {"id": "x", "text": text}))
    with pytest.raises(UserError, match=message):
        load_client(
            "north", "d.jsonl", fields=Fields(), held_out=0, base=tmp_path, own_held_out="t.jsonl", target="v.jsonl"
        )


def test_records_are_held_out_in_one_place(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(jsonl({"text": "a", "split": "test"}, {"text": "b", "split": "train"}))
    (tmp_path / "t.jsonl").write_text(jsonl({"text": "c"}))
    with pytest.raises(UserError, match=r"marks 1 of its records as held out.*\n.*split"):
        load_client("north", "d.jsonl", fields=Fields(), held_out=0, base=tmp_path, own_held_out="t.jsonl")
