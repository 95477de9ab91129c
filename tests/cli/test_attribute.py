"""`allmend attribute`: the ends of the list, clients, how sure it is; for programs, JSON."""

import json
import re
from pathlib import Path

import pytest
from tests.attribution.test_subject import Silencing
from tests.cli.conftest import Allmend

from allmend.attribution import subject

ADAPTER = "runs/tiny/arms/fedavg/adapter"
GIVEN = ("--adapter", ADAPTER, "--train", "north.jsonl", "--train", "south.jsonl", "--target", "test.jsonl")


@pytest.fixture
def run(allmend: Allmend, workplace: Path) -> Path:
    assert allmend("tune", "recipe.toml").code == 0
    rows = [{"id": f"test-{i}", "prompt": f"north: {i} plus 1?", "response": f"{i + 1}"} for i in range(2, 8)]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workplace


def test_records_clients_and_their_sureness_are_shown(allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "model", *GIVEN, "--out", "found")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    for words in (
        "Most helpful",
        "Most harmful",
        "By client",
        "training on the record lowers the target's loss",
        "Damping 0.1",
        "halves of the target records",
        "Curvature comes from 15 records, fewer than 32.",
        "Written to found",
    ):
        assert words in text
    assert f"Report  {Path('found/influence.html').resolve()}" in shown.out
    assert Path("found/influence.html").exists()
    assert max(len(line) for line in shown.out.splitlines() if not line.startswith("Report")) <= 120
    assert Path("found/influence.parquet").exists()
    found = json.loads(allmend("attribute", "run", "model", *GIVEN, "--json").out)
    assert {row["client"] for row in found["rows"]} == {"north", "south"}
    assert found["table"]["method"] == "gfim"
    assert found["table"]["inverse"] == "cholesky"
    scored = [line for line in shown.out.splitlines() if re.match(r"\d+ +(north|south)-", line)]
    assert scored
    assert all(re.search(r"[+-][\d.e-]+ \?", line) for line in scored), "the mark stands beside every score"


def test_other_dampings_are_shown_with_what_they_do_not_tell(allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "model", *GIVEN, "--damping-sweep", "--out", "found")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    assert "Under other dampings" in text
    assert "No validation target exists in general" in text
    rows = json.loads(Path("found/influence.json").read_text())["sweep"]
    assert [row["damping"] for row in rows] == [0.001, 0.01, 0.1, 1.0, 10.0]
    assert rows[2]["agreement"] == pytest.approx(1)
    shown = allmend("attribute", "model", *GIVEN, "--damping-sweep", "--method", "hessian_free")
    assert shown.code == 2
    assert "hessian_free has no damping to vary" in shown.err


def test_a_target_record_that_is_a_training_record_is_refused_or_left_out(allmend: Allmend, run: Path) -> None:
    both = Path("test.jsonl").read_text() + Path("north.jsonl").read_text().splitlines()[3] + "\n"
    Path("both.jsonl").write_text(both)
    given = (*GIVEN[:-1], "both.jsonl")
    for command in ("run", "mislabeled"):
        shown = allmend("attribute", command, "model", *given)
        assert shown.code == 2
        assert "1 of 7 target records are training records too: north-3" in shown.err
        shown = allmend("attribute", command, "model", *given, "--drop-overlap")
        assert (shown.code, shown.err) == (0, "")
        assert "1 target record is among the training records, and left out." in " ".join(shown.out.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "magic"), "there is no method 'magic'"),
        (("--targets", "some"), "'some' is none of mean, each and group:FIELD"),
        (("--side", "tall"), "'tall' is none of wide, rank"),
        (("--damping", "0"), "damping must be above 0"),
        (("--targets", "group:nothing"), "no label to group them by"),
        (("--targets", "group:"), "'group:' is none of mean, each and group:FIELD"),
    ],
)
def test_what_cannot_be_is_told(words: tuple[str, ...], told: str, allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "model", *GIVEN, *words)
    assert shown.code == 2
    assert told in shown.err


def test_records_without_a_score_are_listed(allmend: Allmend, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "Encoder", Silencing)
    monkeypatch.setattr(Silencing, "silenced", {"north-3", "south-0", "south-1"})
    shown = allmend("attribute", "model", *GIVEN)
    assert (shown.code, shown.err) == (0, "")
    assert "Without a score, north: north-3" in shown.out
    assert "Without a score, south: south-0, south-1" in shown.out
    found = json.loads(allmend("attribute", "model", *GIVEN, "--json").out)
    assert [row["record_id"] for row in found["rows"] if row["score"] is None] == ["north-3", "south-0", "south-1"]


def test_inverses_are_timed_and_the_verdict_decides_what_auto_takes(
    allmend: Allmend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allmend.influence import inverse_table

    monkeypatch.setenv("ALLMEND_CACHE", str(tmp_path))
    shown = allmend("attribute", "inverse", "--size", 16, "--batch", 3, "--device", "cpu")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    for words in ("3 × 16, condition", "Cholesky's factors, 8 right sides", "hyperpower to 1e-4", "DataInf's error"):
        assert words in text
    assert max(map(len, shown.out.splitlines())) <= 100
    assert "`--inverse auto` goes by the usual sizes" in text
    assert not list(tmp_path.iterdir()), "sizes of one's own decide nothing"

    monkeypatch.setattr(inverse_table, "SIZES", ((2, 8), (1, 12)))
    monkeypatch.setattr("allmend.cli.attribute_inverse.SIMULATED", 12)
    shown = allmend("attribute", "inverse", "--device", "cpu")
    assert (shown.code, shown.err) == (0, "")
    (kept,) = json.loads((tmp_path / "inverses.json").read_text()).values()
    assert f"takes {kept['inverse']} on this device" in " ".join(shown.out.split())
    found = json.loads(allmend("attribute", "inverse", "--device", "cpu", "--json").out)
    assert found.keys() == {"simulation", "timings", "verdict", "machine"}
    assert [(one["batch"], one["size"]) for one in found["timings"]] == [(2, 8), (1, 12)]
    shown = allmend("attribute", "inverse", "--size", 16, "--size", 8, "--batch", 3)
    assert shown.code == 2
    assert "1 batch for 2 sizes" in shown.err


def test_inverses_have_a_page_where_one_is_asked_for(allmend: Allmend, workplace: Path) -> None:
    for options in ((), ("--json",)):
        shown = allmend("attribute", "inverse", "--size", 8, "--device", "cpu", "--out", "page.html", *options)
        assert (shown.code, shown.err) == (0, "")
        assert "order 2" in Path("page.html").read_text()
        Path("page.html").unlink()
        assert (f"Report  {Path('page.html').resolve()}" in shown.out) is (not options)
    shown = allmend("attribute", "inverse", "--size", 8, "--device", "cpu", "--out", "north.jsonl/page.html")
    assert shown.code == 2
    assert "a file stands where a folder is needed" in " ".join(shown.err.split())


def test_a_list_to_review_has_a_page_beside_it(allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "mislabeled", "model", *GIVEN, "--out", "list.jsonl")
    assert (shown.code, shown.err) == (0, "")
    assert "Written to list.jsonl" in shown.out
    assert f"Report  {Path('list.html').resolve()}" in shown.out
    assert "north: 3 plus 3?" in Path("list.html").read_text()
    shown = allmend("attribute", "mislabeled", "model", *GIVEN, "--out", "list.html")
    assert shown.code == 2
    assert "Name the list otherwise, such as list.jsonl." in " ".join(shown.err.split())


def test_whose_data_helped_in_a_run(allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "runs/tiny", "--target", "test.jsonl", "--min-records", 2)
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    for words in (
        "Whose data helped fedavg (test.jsonl, 6 records)",
        "below 0",
        "To and from a client: sizes",
        "Report",
    ):
        assert words in text
    lines = [line for line in shown.out.splitlines() if re.match(r"(north|south) +[+-]", line)]
    assert len(lines) == 2
    assert "Whose data helped" in Path("runs/tiny/report.html").read_text()
    for name in ("north", "south"):
        assert f"arms/fedavg/influence/{name}/influence.html" in shown.out
    found = json.loads(allmend("attribute", "members", "runs/tiny", "--min-records", 2, "--json").out)
    assert found["arms"][0]["target"] == "held_out"
    assert {one["client"] for one in found["arms"][0]["members"]} == {"north", "south"}
    told = allmend("attribute", "runs/tiny", "--reveal", "none", "--min-records", 2)
    assert "Nothing is revealed" in told.out
    told = allmend("attribute", "runs/tiny", "--method", "datainf", "--clip", 0.01, "--min-records", 2)
    assert (told.code, told.err) == (0, "")
    assert "corrections" in told.out
    assert re.search(r"[1-9]\d* of \d+ gradients, .* were scaled down to norm 0\.01", " ".join(told.out.split()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "nowhere.jsonl"), "is no file"),
        (("--damping", "0"), "influence.damping: must be greater than 0, got 0"),
        (("--clip", "0"), "influence.clip: must be greater than 0, got 0"),
        (("--method", "exact"), "influence.method"),
        (("--method", "hessian_free", "--clip", "1"), "has no curvature whose gradients are clipped to 1"),
        (("--reveal", "everything"), "influence.reveal"),
        (("--arm", "nobody"), "no arm of this recipe is called nobody"),
        (("--by-kind",), "have no kinds"),
        (("--modules", "("), "is no regular expression"),
        (("--modules", "nothing"), "no weight that learns matches 'nothing'"),
        (("--members", "members.toml"), "members.toml"),
    ],
)
def test_what_cannot_be_measured_of_a_run(options: tuple[str, ...], words: str, allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "runs/tiny", "--min-records", 2, *options)
    assert shown.code == 2
    assert words in " ".join(shown.err.split())
    assert not Path("runs/tiny/results/influence.json").exists()


def test_gradients_are_kept_over_commands(allmend: Allmend, run: Path) -> None:
    plain = allmend("attribute", "run", "model", *GIVEN, "--json").out
    for command in ("run", "mislabeled"):
        shown = allmend("attribute", command, "model", *GIVEN, "--cache", "kept", "--json")
        assert (shown.code, shown.err) == (0, "")
        if command == "run":
            assert shown.out == plain
            assert list(Path("kept").glob("*.safetensors"))
    other = allmend("attribute", "run", "model", *GIVEN, "--cache", "kept", "--modules", "v_proj")
    assert other.code == 2
    assert "of another modules: None, now v_proj" in " ".join(other.err.split())


def test_a_choice_is_tried_on_records_that_no_score_has_seen(allmend: Allmend, run: Path) -> None:
    assert allmend("attribute", "model", *GIVEN, "--out", "found").code == 0
    rows = [{"id": f"new-{i}", "prompt": f"south: {i} plus 3?", "response": f"{i + 3}"} for i in range(20, 26)]
    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("attribute", "select", "found", "--train", "north.jsonl", "--train", "south.jsonl", "--out", "less")
    tried = ("--try-on", "new.jsonl", "--model", "model", "--adapter", ADAPTER, "--seeds", 2, "--epochs", 1)
    shown = allmend(*words, *tried)
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    for said in ("Loss on 6 unseen records, nats a token, 2 seeds", "Chosen minus random", "No difference to random"):
        assert said in text
    assert max(map(len, shown.out.splitlines())) <= 120
    refused = allmend(*words[:-1], "none", "--try-on", "new.jsonl")
    assert refused.code == 2
    assert "--try-on: needs --model and --adapter" in " ".join(refused.err.split())
    assert not Path("none").exists()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_scored(allmend: Allmend, run: Path) -> None:
    Path("taken").write_text("")
    for command, name in (("run", "taken"), ("mislabeled", "taken/list.jsonl"), ("compare", "taken")):
        shown = allmend("attribute", command, "model", *GIVEN, "--out", name)
        assert shown.code == 2
        assert "a file stands where a folder is needed" in " ".join(shown.err.split())
        assert shown.out == "", "no progress, hence no work"
    for folder, name in (("list.html", "list.jsonl"), ("listed.jsonl", "listed.jsonl")):
        Path(folder).mkdir()
        shown = allmend("attribute", "mislabeled", "model", *GIVEN, "--out", name)
        assert (shown.code, shown.out) == (2, "")
        assert "a folder stands where a file is needed" in " ".join(shown.err.split())


def test_a_run_that_is_not_there_is_told_as_a_run(allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "runs/nowhere")
    assert shown.code == 2
    assert "runs/nowhere" in shown.err
    assert "--adapter" not in shown.err
    shown = allmend("attribute", "model", "--train", "north.jsonl", "--target", "test.jsonl")
    assert shown.code == 2
    assert "--adapter" in shown.err


def test_what_each_measure_finds_fits_a_narrow_terminal(
    allmend: Allmend, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        json.loads(line) | {"bad": str(i % 2)}
        for i, line in enumerate(Path("north.jsonl").read_text().split("\n")[:-1])
    ]
    Path("north.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--adapter", ADAPTER, "--train", "north.jsonl", "--target", "test.jsonl", "--noisy", "bad")
    shown = allmend("attribute", "mislabeled", "model", *given)
    assert (shown.code, shown.err) == (0, "")
    table = shown.out.partition("What each measure finds")[2].splitlines()[2:5]
    assert [line.split()[0] for line in table] == ["influence", "loss", "self"]
    assert all(line.count("(") == line.count(")") == 3 for line in table)
    assert "…" not in "".join(table)


def test_a_template_is_that_of_every_command_that_reads_records(allmend: Allmend, run: Path) -> None:
    """The tiny model has no chat template, so that `chat` is refused by whoever takes it to the records."""
    assert allmend("attribute", "model", *GIVEN, "--out", "found").code == 0
    rows = [{"id": f"new-{i}", "prompt": f"south: {i} plus 3?", "response": f"{i + 3}"} for i in range(20, 22)]
    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--train", "north.jsonl", "--train", "south.jsonl", "--out", "less")
    tried = ("--try-on", "new.jsonl", "--model", "model", "--adapter", ADAPTER)
    commands = [(name, "model", *GIVEN) for name in ("run", "mislabeled", "compare")]
    for command in (*commands, ("select", "found", *files, *tried)):
        for template, told in (
            ("verse", "--template: 'verse' is none of auto, chat, plain"),
            ("chat", "chat template"),
        ):
            shown = allmend("attribute", *command, "--template", template)
            assert shown.code == 2
            assert told in " ".join(shown.err.split())
