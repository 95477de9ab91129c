"""How fast models decode here, side by side in one process, and what can be expected of layers that run in parallel."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from allmend.depth.layer_times import LayerTimes, layer_times, token_seconds, widths_of
from allmend.depth.spread import finish, ratio, spread
from allmend.errors import UserError
from allmend.models.quiet import quiet
from allmend.results import Spread, Table
from allmend.versions import versions

EAGER, COMPILED = "eager", "compiled"

RUNS = 5
"""Counted runs of each model where no number is named."""


class Decoded(Table):
    """What decoding took, by run.

    Attributes:
        prefill: seconds from the prompt to the first token.
        rates: tokens a second after that, of all sequences together.
    """

    prefill: tuple[float, ...]
    rates: tuple[float, ...]


class ModelSpeed(Table):
    """One model.

    Attributes:
        source: what the user named.
        widths: layers of the original in each step.
        parameters: number of them.
        decoded: by way, `eager` or `compiled`.
    """

    source: str
    widths: tuple[int, ...]
    parameters: int
    decoded: dict[str, Decoded]


class Prediction(Table):
    """What layers timed alone make of two models, eager.

    Attributes:
        times: of the layers, and of what is outside them.
        rates: tokens a second, by model.
        ratio: of the first model's rate to the second's.
    """

    times: LayerTimes
    rates: dict[str, Spread]
    ratio: Spread


class Speed(Table):
    """`speed.json` of one device.

    Attributes:
        machine: device, threads, type of weights, versions.
        batch, prompt_tokens, tokens, runs: what was decoded.
        models: by name; the first is what the user asks about.
        ratio: by way, tokens a second of the first model to the second's in the same run.
        prediction: none where the models are not made of the same layers.
        notes: what to know about the figures.
    """

    machine: dict[str, str | int]
    batch: int
    prompt_tokens: int
    tokens: int
    runs: int
    models: dict[str, ModelSpeed]
    ratio: dict[str, Spread]
    prediction: Prediction | None = None
    notes: tuple[str, ...] = ()


class GreedyDecoder:
    """Greedy decoding of one model with a cache, the prompt and the tokens after it apart.

    Args:
        model: in evaluation mode.
        ids: the prompts, int64 [batch, tokens].
        tokens: to decode after the first.
        compiled: whether steps are compiled, over a cache of fixed size; CUDA graphs on CUDA.
    """

    def __init__(self, model: Any, ids: torch.Tensor, tokens: int, *, compiled: bool = False) -> None:
        self.model, self.ids, self.tokens = model, ids.to(model.device), tokens
        self.cache: Any = None
        self.fixed: Any = None
        self.call: Any = model
        if compiled:
            self.fixed = StaticCache(config=model.config, max_cache_len=ids.shape[1] + tokens)
            self.call = model.get_compiled_call(None)  # what `generate` takes for a cache of fixed size

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        """Read the prompts into the cache, and give the first token of each, int64 [batch, 1]."""
        if self.fixed is not None:
            self.fixed.reset()  # in place: compiled steps know where it lies
        out = self.model(input_ids=self.ids, past_key_values=self.fixed, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def steps(self, token: torch.Tensor) -> torch.Tensor:
        """Decode the others, int64 [batch, tokens]."""
        found = [token]
        for _ in range(self.tokens):
            out = self.call(input_ids=found[-1], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            found.append(out.logits[:, -1:].argmax(-1))
        return torch.cat(found[1:], dim=1)

    def seconds(self, clock: Callable[[], float]) -> tuple[float, float]:
        """Decode once: seconds to the first token, and of the others."""
        finish(self.ids.device)
        start = clock()
        token = self.prefill()
        finish(self.ids.device)
        middle = clock()
        self.steps(token)
        finish(self.ids.device)
        return middle - start, clock() - middle


def decode_rates(
    models: Mapping[str, Any],
    *,
    batch: int = 1,
    prompt_tokens: int = 32,
    tokens: int = 64,
    runs: int = RUNS,
    compiled: bool = False,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    before_run: Callable[[], None] = lambda: None,
    on_run: Callable[[float], None] = lambda share: None,
) -> dict[str, Decoded]:
    """Let models decode in turns, so that what else the machine does meets all of them.

    After one run of each that does not count; the order is another one each time. Prompts are random tokens, and
    nothing ends a sequence early: speed does not depend on what is said.

    Args:
        models: by name, in evaluation mode, of one vocabulary.
        batch: sequences at a time.
        prompt_tokens: of each prompt.
        tokens: decoded after the first.
        runs: that count, of each model.
        compiled: as of `GreedyDecoder`; a model's first run then takes minutes.
        seed: of the prompts.
        clock: seconds. `time.process_time` counts those in which this process runs, the ones to compare where other
            work shares a core with it; on one thread of the CPU alone.
        before_run: called before each run.
        on_run: told the share of runs that are done.

    Raises:
        UserError: prompt and tokens are more than a model has positions for.
    """
    first = next(iter(models.values()))
    check_length(models, prompt_tokens + tokens + 1)
    ids = torch.randint(first.config.vocab_size, (batch, prompt_tokens), generator=torch.Generator().manual_seed(seed))
    decoders = {name: GreedyDecoder(model, ids, tokens, compiled=compiled) for name, model in models.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(runs + 1):
        for place, name in enumerate(in_turns(models, number)):
            before_run()
            prefill, seconds = decoders[name].seconds(clock)
            if number:
                found[name].append((prefill, batch * tokens / seconds))
            on_run((number + (place + 1) / len(models)) / (runs + 1))
    return {
        name: Decoded(prefill=tuple(one for one, _ in some), rates=tuple(one for _, one in some))
        for name, some in found.items()
    }


def in_turns(models: Mapping[str, Any], number: int) -> list[str]:
    """Names in the order of a run: every other one from the last to the first."""
    names = list(models)
    return names if number % 2 else names[::-1]


def random_prompts(model: Any, batch: int, tokens: int, *, seed: int) -> torch.Tensor:
    """Tokens of a model's vocabulary, int64 [batch, tokens]."""
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def check_length(models: Mapping[str, Any], length: int) -> None:
    """See that models have positions for so many tokens.

    Raises:
        UserError: one has not.
    """
    for name, model in models.items():
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and length > most:
            raise UserError(
                f"prompt and tokens come to {length:,}, and the model has {most:,} positions",
                where=name,
                hint="Ask for fewer: --prompt-tokens, --tokens.",
            )


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """What a speed depends on beside the model."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    known = versions()
    return {
        "device": device.type,
        "name": name,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": known["transformers"],
        "python": known["python"],
    }


def compare_speed(
    models: Mapping[str, Any],
    sources: Mapping[str, str],
    *,
    batch: int = 1,
    prompt_tokens: int = 32,
    tokens: int = 64,
    runs: int = RUNS,
    compiled: bool | None = None,
    seed: int = 0,
    on_run: Callable[[float], None] = lambda share: None,
) -> Speed:
    """Time one model or two on one device, and say what layers timed alone would have foretold.

    Args:
        models: by name, one or two; the first is what is asked about. All on one device and of one type.
        sources: what the user named, by name.
        batch, prompt_tokens, tokens, runs, seed: as of `decode_rates`.
        compiled: whether compiled steps are timed, too; on CUDA unless told otherwise.
        on_run: told the share of the work that is done.

    Raises:
        UserError: as `decode_rates` does.
    """
    first = next(iter(models.values()))
    ways = [EAGER, COMPILED] if (compiled if compiled is not None else first.device.type == "cuda") else [EAGER]
    decoded: dict[str, dict[str, Decoded]] = {}
    load = busy(torch.get_num_threads())
    for place, way in enumerate(ways):
        with quiet():
            decoded[way] = decode_rates(
                models,
                batch=batch,
                prompt_tokens=prompt_tokens,
                tokens=tokens,
                runs=runs,
                compiled=way == COMPILED,
                seed=seed,
                on_run=lambda share, place=place: on_run((place + share) / len(ways)),  # type: ignore[misc]
            )
    ratios: dict[str, Spread] = {}
    prediction = None
    if len(models) == 2:
        a, b = models
        ratios = {way: ratio(some[a].rates, some[b].rates) for way, some in decoded.items()}
        if comparable(models[a], models[b]):
            prediction = _predicted(models, batch=batch, length=prompt_tokens + tokens // 2, seed=seed)
    return Speed(
        machine=machine(first.device, first.dtype),
        batch=batch,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        runs=runs,
        models={
            name: ModelSpeed(
                source=sources[name],
                widths=tuple(widths_of(model)),
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                decoded={way: some[name] for way, some in decoded.items()},
            )
            for name, model in models.items()
        },
        ratio=ratios,
        prediction=prediction,
        notes=(*_limits(models, first.device), *load),
    )


def comparable(one: Any, other: Any) -> bool:
    """Whether two models are made of layers of one kind and size, so that layers timed alone say something of both."""
    layers: list[Any] = [getattr(getattr(model, "model", None), "layers", ()) for model in (one, other)]
    if not all(layers) or type(layers[0][0]) is not type(layers[1][0]):
        return False
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return all(getattr(one.config, size, None) == getattr(other.config, size, None) for size in sizes)


def _predicted(models: Mapping[str, Any], *, batch: int, length: int, seed: int) -> Prediction:
    times = layer_times(list(models.values()), batch=batch, length=length, seed=seed)
    a, b = (token_seconds(times, widths_of(model)) for model in models.values())
    rates = {name: spread([batch / seconds for seconds in some]) for name, some in zip(models, (a, b), strict=True)}
    return Prediction(times=times, rates=rates, ratio=ratio(b, a))


def busy(threads: int) -> tuple[str, ...]:
    """A note where other work runs on this machine, for a process with so many threads."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except (AttributeError, OSError):
        return ()
    # a core's worth may be this process itself
    if load < 0.5 * cores + 1:
        return ()
    words = f"Other work was running here (load {load:.1f} on {cores} cores): ranges are wider than they need to be."
    if threads > 1:
        words += (
            " The threads of an operation then wait for each other at its end, and fewer operations wait less: ratios "
            "are higher than on a quiet machine."
        )
    return (words,)


def _limits(models: Mapping[str, Any], device: torch.device) -> tuple[str, ...]:
    """What one device can and cannot show."""
    if all(width == 1 for model in models.values() for width in widths_of(model)):
        return ()
    notes = [
        "On one device, layers side by side do the same arithmetic and read the same weights as one after the other: "
        "what is saved is the time between operations.",
    ]
    if device.type == "cpu":
        notes.append(
            "1.2 times as fast is no figure of a CPU: it comes of fewer sums over several GPUs (--tp), or of fewer "
            "kernel launches on one."
        )
    elif device.type == "cuda":
        depths = [len(widths_of(model)) for model in models.values()]
        notes.append(
            f"Eager steps wait for kernel launches, and fewer layers launch fewer: the depths' ratio, "
            f"{max(depths) / min(depths):.2f}, is the most that this can come to. CUDA graphs launch a step as a "
            "whole, and about 1 is left."
        )
    return tuple(notes)
