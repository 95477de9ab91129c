"""The page as a file: whole, escaped, silent, honest about what is missing."""

import json
import math
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

from allmend.errors import UserError
from allmend.events import Offered, RoundDone, RunFinished, RunStarted, StepDone, Stopped, dump_event, read_events
from allmend.report import numbers
from allmend.report.page import write_report
from allmend.results import BASE, POOLED, AuditTable, Estimate, UtilityTable

MakeRun = Callable[..., Path]


def read(run: Path) -> str:
    return write_report(run).read_text()


def words(page: str) -> str:
    """What a reader sees, without the markup."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)
    return unescape(re.sub(r"<[^>]+>", " ", body))


def estimates(run: Path) -> list[tuple[Estimate, numbers.Format, numbers.Format]]:
    """Every figure of the run's tables and how it is written."""
    utility = UtilityTable.model_validate_json((run / "results/utility.json").read_bytes())
    audit = AuditTable.model_validate_json((run / "results/audit.json").read_bytes())
    shares = [e for row in utility.rows for e in (row.accuracy, *row.by_kind.values()) if e]
    shares += [e for row in audit.extraction for e in (row.exact, row.matched, row.bleu, row.approximate)]
    shares += [e for row in audit.extraction if row.prefix_tokens == 30 for e in row.secrets.values()]
    shares += [e for row in audit.discoverable if row.prefix_tokens == 30 for e in (row.probability, row.likely)]
    shares += [row.tpr_at_1 for row in audit.membership if row.tpr_at_1]
    plain = [row.perplexity for row in utility.rows if row.perplexity]
    plain += [e for gap in audit.gaps for e in (gap.inserted, gap.control, gap.gap)]
    plain += [e for row in audit.exposure for e in (row.exposure, row.fitted) if e]
    plain += [row.auc for row in audit.membership] + [view.gap for view in audit.views]
    return (
        [(e, numbers.percent, numbers.hundredths) for e in shares]
        + [(e, numbers.number, numbers.number) for e in plain]
        + [(d.accuracy, numbers.points, numbers.points) for d in utility.differences if d.accuracy]
        + [(d.log_perplexity, numbers.signed, numbers.signed) for d in utility.differences if d.log_perplexity]
    )


def test_every_figure_of_the_tables_is_on_the_page(run: Path) -> None:
    seen = words(read(run))
    for estimate, form, ends in estimates(run):
        assert form(estimate.value) in seen
        assert numbers.interval(estimate, ends) in seen


def test_every_byte_count_and_loss_by_round_is_in_a_table(run: Path) -> None:
    seen = words(read(run))
    for event in read_events(run / "events.jsonl"):
        if event.type == "round":
            assert event.loss is not None
            assert numbers.number(event.loss) in seen
            assert all(numbers.size(octets) in seen for octets in event.sent.values() if octets)


def test_summary_names_difference_interval_and_sample(run: Path) -> None:
    seen = words(read(run)).replace("\u202f", " ").replace("\xa0", " ")
    assert "Pooled held-out accuracy rose from 35 % to 55 % with fedavg (+20 points, 95 % interval 14 to 26," in seen
    assert "fedavg is better than members who train alone, on average (+8 points" in seen
    assert "memorisation is measurable" in seen
    assert (
        "Given the first 30 tokens, fedavg recites 6 of 36 planted canaries without an error, and 0 of 36 controls"
        in seen
    )
    assert "bounds what any one training record can change by ε = 2.80 (δ = 10⁻⁵)" in seen
    assert "a member sends its change of the model, " in seen
    assert "Whoever sums the changes could see each. Here, members are simulated on one machine." in seen


def test_summary_sets_single_copies_alone_beside_the_accounted_epsilon(
    run: Path, change: Callable[..., None], audit_table: AuditTable
) -> None:
    once = [b.model_copy(update={"epsilon": 1.5}) for b in audit_table.epsilon if b.copies == 1]
    more = [b.model_copy(update={"epsilon": 6.25}) for b in audit_table.epsilon if b.copies != 1]
    for known, told in ((once + more, True), (more, False)):
        change("audit", epsilon=[b.model_dump() for b in known])
        page = words(read(run))
        summary = page[page.index("the accountant bounds") : page.index("What left each member?")].replace(
            "\u202f", " "
        )
        assert ("Measured from canaries with 1 copy: at least 1.50." in summary) is told
        assert "6.25" not in summary


@pytest.mark.parametrize(("high", "said"), [(-1.1, "fell"), (0.1, "shows no difference:")])
def test_without_questions_the_summary_is_about_perplexity(run: Path, high: float, said: str) -> None:
    path = run / "results/utility.json"
    table = UtilityTable.model_validate_json(path.read_bytes())
    rows = [row.model_copy(update={"accuracy": None, "by_kind": {}}) for row in table.rows]
    differences = [
        d.model_copy(update={"accuracy": None, "log_perplexity": d.log_perplexity.model_copy(update={"high": high})})
        if d.other == BASE and d.log_perplexity
        else d.model_copy(update={"accuracy": None})
        for d in table.differences
    ]
    path.write_text(table.model_copy(update={"rows": tuple(rows), "differences": tuple(differences)}).model_dump_json())
    seen = words(read(run)).replace("\u202f", " ").replace("\xa0", " ")
    before, after = (
        next(numbers.number(row.perplexity.value) for row in rows if (row.model, row.held_out) == (model, POOLED))
        for model in (BASE, "fedavg")
    )
    assert f"{before} → {after}" in seen
    assert f"Pooled held-out perplexity {said} from {before} to {after} with fedavg (−1.30 nats per token" in seen
    assert "fedavg is better than members who train alone, on average (−0.70 nats per token" in seen
    assert "Differences of log-perplexity" in seen
    assert "Accuracy on held-out questions" not in seen


def test_a_run_that_cannot_go_on_is_not_told_to(run: Path) -> None:
    for resumable, said in ((True, "To go on:"), (False, "Going on would only meet the same end: start a new run.")):
        log = run / "events.jsonl"
        kept = [line for line in log.read_bytes().splitlines() if b'"run.finished"' not in line]
        kept.append(dump_event(Stopped(cause="diverged", resumable=resumable)).strip())
        log.write_bytes(b"\n".join(kept) + b"\n")
        seen = words(read(run))
        assert said in seen
        assert ("To go on:" in seen) is resumable


def test_without_canaries_there_is_nothing_to_audit(run: Path) -> None:
    (run / "results/audit.json").unlink()
    assert "Not audited yet." in words(read(run))
    (run / "recipe.toml").write_text("[adapter]\nrank = 2\n")
    seen = words(read(run))
    assert "The recipe plants no canaries: there is nothing to audit." in seen
    assert "Not audited yet." not in seen


def test_interval_over_zero_is_no_difference(run: Path) -> None:
    path = run / "results/utility.json"
    table = UtilityTable.model_validate_json(path.read_bytes())
    wide = [
        d.model_copy(update={"accuracy": d.accuracy.model_copy(update={"low": -0.01})}) if d.held_out == POOLED else d
        for d in table.differences
    ]
    path.write_text(table.model_copy(update={"differences": tuple(wide)}).model_dump_json())
    seen = words(read(run))
    assert "Pooled held-out accuracy shows no difference:" in seen
    assert "shows no difference from members who train alone" in seen
    assert "rose from" not in seen


def test_without_paired_differences_there_is_no_interval(run: Path) -> None:
    path = run / "results/utility.json"
    table = UtilityTable.model_validate_json(path.read_bytes())
    path.write_text(table.model_copy(update={"differences": ()}).model_dump_json())
    seen = words(read(run))
    assert "Pooled held-out accuracy went from" in seen
    assert "is ahead of members who train alone, on average (+14 points; no interval)" in seen


def test_members_alone_are_set_beside_the_base_model(run: Path) -> None:
    path = run / "results/utility.json"
    table = UtilityTable.model_validate_json(path.read_bytes())
    rows = tuple(row for row in table.rows if row.model != "fedavg")
    path.write_text(table.model_copy(update={"rows": rows, "differences": ()}).model_dump_json())
    assert "the members’ own models (local) reach 41" in words(read(run))


def test_asks_the_network_for_nothing(run: Path) -> None:
    page = read(run)
    for outside in ("http://", "https://", "src=", "url(", "@import", "<iframe", "fetch(", "XMLHttpRequest"):
        assert outside not in page
    assert "default-src 'none'" in page
    assert set(re.findall(r'href="([^"]+)"', page)) <= {
        "data:,",
        "#summary",
        *(f"#{part}" for part in ("utility", "learning", "memorisation", "privacy", "exchange", "data", "provenance")),
    }


def test_is_small(run: Path) -> None:
    assert write_report(run).stat().st_size < 500_000


def test_markup_is_well_formed(run: Path) -> None:
    page = read(run)
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(svgs) > 10
    for svg in svgs:
        ElementTree.fromstring(svg)
    body = page[page.index("<body>") : page.index("<script>")]
    ElementTree.fromstring(body + "</body>")


def test_anchors_and_ids_are_unique_and_tables_have_captions_and_scopes(run: Path) -> None:
    page = read(run)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("<table>") == page.count("<caption>") > 8
    assert "<th>" not in page
    assert re.findall(r"<th (?!scope=)", page) == []


def test_a_figure_that_is_not_finite_is_refused_and_its_file_named(run: Path) -> None:
    path = run / "results/audit.json"
    table = json.loads(path.read_bytes())
    table["gaps"][0]["gap"]["value"] = math.nan
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"audit\.json"):
        read(run)


EVIL = "<script>alert(1)</script>\"'&\x00\u202e"


def test_names_and_recipe_are_escaped(make_run: MakeRun) -> None:
    run = make_run(clients=("injuries", EVIL), recipe=f"# </pre>{EVIL.replace(chr(0), '')}\nmodel = '<img>'\n")
    page = read(run)
    assert page.count("<script>") == page.count("</script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "</pre><script" not in page
    assert "<img" not in page
    body = page[page.index("<body>") : page.index("<script>")]
    ElementTree.fromstring(body + "</body>")


def test_title_and_warning_are_escaped(run: Path) -> None:
    log = (run / "events.jsonl").read_text().replace("icd-demo", "</title><b>x").replace("only 24", "<b>only</b> 24")
    (run / "events.jsonl").write_text(log)
    page = read(run)
    assert "<title>&lt;/title&gt;&lt;b&gt;x" in page
    assert "&lt;b&gt;only&lt;/b&gt; 24" in page


@pytest.mark.parametrize("torn", [False, True])
def test_half_finished_run_says_what_is_missing_and_how_to_go_on(run: Path, make_run: MakeRun, torn: bool) -> None:
    log = [e for e in read_events(run / "events.jsonl") if not isinstance(e, RunFinished)]
    half = log[: len(log) // 3]
    (run / "results/utility.json").unlink()
    (run / "results/audit.json").unlink()
    make_run(log=half, measured=False)
    if torn:
        with (run / "events.jsonl").open("ab") as file:
            file.write(b'{"type": "step", "arm"')
    seen = words(read(run))
    assert "This run is not complete" in seen
    assert f"allmend tune --resume {run}" in seen
    assert "Utility was not measured" in seen
    assert "Memorisation was not audited" in seen
    assert "How the loss fell" in seen


def test_stopped_run_tells_its_cause(make_run: MakeRun, run: Path) -> None:
    log = [e for e in read_events(run / "events.jsonl") if not isinstance(e, RunFinished)]
    seen = words(read(make_run(log=[*log, Stopped(cause="loss is not finite: client <eye>")])))
    assert "It stopped: loss is not finite: client <eye>." in seen


def test_finished_run_without_audit_points_to_it(run: Path) -> None:
    (run / "results/audit.json").unlink()
    assert f"allmend audit {run}" in words(read(run))


@pytest.mark.parametrize(
    "name", ["events.jsonl", "recipe.toml", "results/utility.json", "results/audit.json", "results/privacy.json"]
)
def test_any_file_alone_makes_a_page_and_any_may_be_missing(run: Path, name: str) -> None:
    keep = (run / name).read_bytes()
    (run / name).unlink()
    assert "<h1>" in read(run)
    for path in (*run.glob("*.*"), *run.glob("results/*")):
        path.unlink()
    (run / name).write_bytes(keep)
    assert "<h1>" in read(run)


def test_run_that_only_just_started(make_run: MakeRun, run: Path) -> None:
    start = [e for e in read_events(run / "events.jsonl") if isinstance(e, RunStarted)]
    page = read(make_run(log=start, measured=True))
    assert "No step was logged yet" in page


def test_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is here"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["events.jsonl", *(f"results/{t}" for t in ("utility.json", "audit.json", "privacy.json", "audit.parquet"))]
)
def test_broken_file_is_named(run: Path, name: str) -> None:
    (run / name).write_text('{"rows": 3}\n')
    with pytest.raises(UserError, match=name.split("/")[-1]):
        write_report(run)


def test_many_clients_steps_and_rounds_stay_small(make_run: MakeRun, run: Path) -> None:
    names = [f"client-{i}" for i in range(128)]
    log = list(read_events(run / "events.jsonl"))
    step = next(e for e in log if isinstance(e, StepDone))
    done = next(e for e in log if isinstance(e, RoundDone))
    bytes_each = dict.fromkeys(names, 10**6)
    for number in range(1, 51):
        for name in names:
            log.append(step.model_copy(update={"client": name, "step": number, "round": number}))
        log.append(done.model_copy(update={"round": number, "sent": bytes_each, "received": bytes_each}))
    assert write_report(make_run(clients=names, log=log, rounds=50)).stat().st_size < 2_000_000


def test_audit_of_a_model_made_elsewhere_is_no_unfinished_run(run: Path) -> None:
    for path in (run / "events.jsonl", run / "recipe.toml", run / "results/utility.json", run / "results/privacy.json"):
        path.unlink()
    seen = words(read(run))
    assert "audit of a model" in seen
    assert "Did anything come out?" in seen
    for part in ("not complete", "allmend tune", "Not measured yet", "No step was logged yet", "No round is complete"):
        assert part not in seen


def test_a_run_without_canaries_owes_no_audit(make_run: Callable[..., Path]) -> None:
    run = make_run(recipe='name = "plain"\n')
    (run / "results/audit.json").unlink()
    assert "was not audited" not in words(read(run))


def test_among_organisations_the_time_of_a_round_is_not_called_training(run: Path) -> None:
    assert "Exchange, aggregation and checkpoints took" in words(read(run))
    with (run / "events.jsonl").open("a") as log:
        log.write(Offered(digest="ab" * 32, members=["a", "b"]).model_dump_json() + "\n")
    seen = words(read(run))
    assert "Exchange, aggregation and checkpoints took" not in seen
    assert "Waiting for members" in seen
