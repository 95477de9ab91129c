"""How fast models decode over several processes of one machine: tokens a second, sums for each token, what they cost.

A token takes at least weights / bandwidth + sums · latency. The first term is what a process reads and is the same
however layers are arranged; the second is what layers side by side halve. Both are measured in the same processes, and
the result stands beside what was found.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic_core import from_json, to_json
from torch import multiprocessing
from transformers import AutoConfig, AutoModelForCausalLM

from allmend.depth.all_reduce import AllReduce, bandwidth, latency, matrices, shard
from allmend.depth.bench import (
    RUNS,
    Decoded,
    GreedyDecoder,
    busy,
    check_length,
    decode_rates,
    in_turns,
    machine,
    random_prompts,
)
from allmend.depth.spread import finish, ratio, spread
from allmend.depth.tensor_parallel import ShardingReport, sharding_report, tensor_parallel_plan
from allmend.errors import UserError
from allmend.models.load import load_model, usable_device
from allmend.models.quiet import quiet
from allmend.models.sources import resolve
from allmend.results import Spread, Table

TIMEOUT = timedelta(minutes=10)
"""After which a process that waits for the others gives up."""

Load = Callable[[], Mapping[str, Any]]
"""Makes the models, by name, on the CPU: a function of a module, or a `partial` of one, since each process calls it."""


class ShardedSpeed(Table):
    """One model in slices.

    Attributes:
        sharding: which of its layers are cut how, in words.
        depth: layers one after the other.
        decoded: runs of the first process.
        all_reduces: for each token, counted.
        all_reduce_seconds: spent in them for each token, mean over processes, by run. Waiting for the slowest process
            is in it.
        weights: bytes that a process reads for each token.
        predicted: seconds of a token, weights / bandwidth + all_reduces · latency.
    """

    sharding: str
    depth: int
    decoded: Decoded
    all_reduces: int
    all_reduce_seconds: tuple[float, ...]
    weights: int
    predicted: float


class ParallelSpeed(Table):
    """`speed.json` of several processes.

    Attributes:
        machine: device, threads of each process, type of weights, versions.
        world, backend: processes, and what carries the sums.
        batch, prompt_tokens, tokens, runs: what was decoded.
        models: by name; the first is what the user asks about.
        latency: seconds of one all-reduce of `message` bytes.
        bandwidth: bytes a second that each process reads.
        ratio: tokens a second of the first model to the second's, in the same run.
        all_reduce_ratio: seconds in all-reduces of the first to the second's.
        predicted_ratio: of the two predictions.
        notes: what to know about the figures.
    """

    machine: dict[str, str | int]
    world: int
    backend: str
    batch: int
    prompt_tokens: int
    tokens: int
    runs: int
    models: dict[str, ShardedSpeed]
    message: int
    latency: Spread
    bandwidth: Spread
    ratio: Spread | None = None
    all_reduce_ratio: Spread | None = None
    predicted_ratio: float | None = None
    notes: tuple[str, ...] = ()


def load_sources(sources: Mapping[str, str], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Models by name, on the CPU."""
    return {name: load_model(source, dtype=dtype, device="cpu").model for name, source in sources.items()}


def check_sources(sources: Mapping[str, str], world: int, length: int) -> None:
    """See that models can go to so many processes, from their configurations alone.

    Raises:
        UserError: one cannot (`sharding_report`), or has fewer positions than `length`.
    """
    for name, source in sources.items():
        folder = resolve(source)
        auto: Any = AutoModelForCausalLM
        with quiet():
            try:
                config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
                with torch.device("meta"):
                    model = auto.from_config(config, trust_remote_code=False)
            except (OSError, ValueError, ImportError, KeyError) as error:
                raise UserError(f"no model can be built from config.json: {error}", where=folder) from error
        try:
            sharding_report(model, world)
        except UserError as error:
            raise UserError(error.what, where=source, hint=error.hint) from None
        check_length({name: model}, length)


def compare_sources_in_parallel(
    sources: Mapping[str, str],
    world: int,
    *,
    device: str | None = None,
    batch: int = 1,
    prompt_tokens: int = 32,
    tokens: int = 64,
    runs: int = RUNS,
    seed: int = 0,
) -> ParallelSpeed:
    """`compare_in_parallel` of models that are loaded, in bfloat16 on CUDA and float32 on the CPU.

    Raises:
        UserError: a model cannot be loaded or cut, or there are fewer GPUs than processes.
    """
    check_sources(sources, world, prompt_tokens + tokens + 1)
    kind = usable_device(device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    return compare_in_parallel(
        partial(load_sources, dict(sources), dtype),
        world,
        device=kind,
        batch=batch,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        runs=runs,
        seed=seed,
    )


def compare_in_parallel(
    load: Load,
    world: int,
    *,
    device: str = "cpu",
    batch: int = 1,
    prompt_tokens: int = 32,
    tokens: int = 64,
    runs: int = RUNS,
    threads: int | None = None,
    seed: int = 0,
) -> ParallelSpeed:
    """Time one model or two over several processes of this machine, in turns, eager.

    A script that calls this does so under `if __name__ == "__main__":`, since each process imports it.

    Slices are ordinary tensors (`all_reduce.shard`); `parallelize_module` makes the same ones into tensors that know
    how they are spread, which costs the processor more for each operation than a small layer takes.

    Args:
        load: makes the models.
        world: processes.
        device: `cpu` (gloo) or `cuda` (nccl, a GPU for each process).
        batch, prompt_tokens, tokens, runs, seed: as of `decode_rates`.
        threads: of each process; its share of torch's if absent.

    Raises:
        UserError: a model cannot be cut, or there are fewer GPUs than processes.
    """
    if device not in ("cpu", "cuda"):
        raise UserError(f"several processes need cpu or cuda, not {device}", hint="Name one: --device cpu.")
    if device == "cuda" and torch.cuda.device_count() < world:
        raise UserError(
            f"{world} processes need {world} GPUs, and there are {torch.cuda.device_count()}",
            hint="Ask for fewer, or for --device cpu.",
        )
    settings = {"batch": batch, "prompt_tokens": prompt_tokens, "tokens": tokens, "runs": runs, "seed": seed}
    threads = threads or max(1, torch.get_num_threads() // world)
    notes = busy(threads)
    with tempfile.TemporaryDirectory() as folder:
        torch_multiprocessing: Any = multiprocessing  # partly untyped
        torch_multiprocessing.spawn(
            _process, (world, folder, load, device, threads, settings), nprocs=world, daemon=True
        )
        found = from_json((Path(folder) / "found.json").read_bytes())
    if "wrong" in found:
        raise UserError(found["wrong"], where=found["where"], hint=found["hint"])
    measured = ParallelSpeed.model_validate(found)
    return measured.model_copy(update={"notes": (*notes_on(measured, os.cpu_count() or 1), *notes)})


def notes_on(speed: ParallelSpeed, cores: int) -> tuple[str, ...]:
    """What to know about the figures."""
    notes = [
        "A token takes weights / bandwidth + all-reduces · latency, and what the processor needs to tell the device "
        "what to do, which the prediction leaves out."
    ]
    if speed.backend == "gloo":
        notes.append(
            "Processes of one machine that share its memory stand in for GPUs: counts are those of GPUs, seconds are "
            "not."
        )
        if speed.world * int(speed.machine["threads"]) > cores:
            notes.append(f"{speed.world} processes share {cores} cores: they wait for each other, and not for sums.")
    return tuple(notes)


def _process(
    rank: int, world: int, folder: str, load: Load, device: str, threads: int, settings: Mapping[str, int]
) -> None:
    """One of the processes; the first writes what was found."""
    torch.set_num_threads(threads)
    out = Path(folder) / "found.json"
    try:
        with _together(rank, world, folder, device) as place:
            found = to_json(_measured(rank, world, load, place, **settings))
    except UserError as error:  # every process finds the same
        found = to_json({"wrong": error.what, "where": error.where, "hint": error.hint})
    if rank == 0:
        out.write_bytes(found)


@contextlib.contextmanager
def _together(rank: int, world: int, folder: str, device: str) -> Iterator[torch.device]:
    """The processes as a group, and this one's device."""
    if sys.platform == "linux":  # the others are here, and the machine's name need not lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    try:
        yield place
    finally:
        dist.destroy_process_group()


def _measured(
    rank: int,
    world: int,
    load: Load,
    device: torch.device,
    *,
    batch: int,
    prompt_tokens: int,
    tokens: int,
    runs: int,
    seed: int,
) -> ParallelSpeed:
    models, reduce = dict(load()), AllReduce()
    reports: dict[str, ShardingReport] = {}
    for name, model in models.items():
        reports[name] = sharding_report(model, world)
        shard(model, tensor_parallel_plan(model, world), rank=rank, world=world, reduce=reduce)
        models[name] = model.to(device).eval()

    def done() -> None:
        finish(device)

    common: dict[str, Any] = {"batch": batch, "prompt_tokens": prompt_tokens, "tokens": tokens, "seed": seed}
    decoded = decode_rates(models, runs=runs, before_run=dist.barrier, **common)
    counts, spent = _in_sums(models, reduce, runs=runs, **common)
    last = list(models)[-1]
    config, dtype = models[last].config, models[last].dtype
    message = torch.zeros(batch, 1, config.hidden_size, dtype=dtype, device=device)
    with torch.no_grad():
        seconds = latency(message, finish=done)
        speed = bandwidth(matrices(models[last]), batch=batch, finish=done)
    sharded = {}
    for name, model in models.items():
        weights = sum(one.nbytes for one in matrices(model))
        sharded[name] = ShardedSpeed(
            sharding=str(reports[name]),
            depth=len(reports[name].layers),
            decoded=decoded[name],
            all_reduces=counts[name],
            all_reduce_seconds=spent[name],
            weights=weights,
            predicted=weights / spread(speed).median + counts[name] * spread(seconds).median,
        )
    a, b = sharded[next(iter(models))], sharded[last]
    two = len(models) == 2
    return ParallelSpeed(
        machine=machine(device, dtype),
        world=world,
        backend=dist.get_backend(),
        batch=batch,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        runs=runs,
        models=sharded,
        message=message.nbytes,
        latency=spread(seconds),
        bandwidth=spread(speed),
        ratio=ratio(a.decoded.rates, b.decoded.rates) if two else None,
        all_reduce_ratio=ratio(a.all_reduce_seconds, b.all_reduce_seconds) if two else None,
        predicted_ratio=b.predicted / a.predicted if two else None,
    )


def _in_sums(
    models: Mapping[str, Any], reduce: AllReduce, *, batch: int, prompt_tokens: int, tokens: int, runs: int, seed: int
) -> tuple[dict[str, int], dict[str, tuple[float, ...]]]:
    """Of each model, all-reduces for a token, and seconds in them by run, mean over processes.

    In runs of their own: to time each sum takes time.
    """
    counts: dict[str, int] = {}
    spent: dict[str, list[float]] = {name: [] for name in models}
    reduce.timed = True
    for number in range(runs):
        for name in in_turns(models, number):
            model = models[name]
            decoder = GreedyDecoder(model, random_prompts(model, batch, prompt_tokens, seed=seed), tokens)
            token = decoder.prefill()
            dist.barrier()
            reduce.take()
            decoder.steps(token)
            count, seconds = reduce.take()
            counts[name] = count // tokens
            mean = torch.tensor(seconds / dist.get_world_size(), device=token.device)
            dist.all_reduce(mean)
            spent[name].append(mean.item() / tokens)
    reduce.timed = False
    return counts, {name: tuple(some) for name, some in spent.items()}
