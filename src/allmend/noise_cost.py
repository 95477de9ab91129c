"""What a guarantee's noise would cost a finished run, estimated without training again."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from allmend.errors import UserError
from allmend.events import Event, WorkPlanned, to_all
from allmend.federation.arm import trainable_of
from allmend.intervals import paired_difference
from allmend.learn.evaluate import Score, score
from allmend.learn.noise import noise_source
from allmend.meter import Meter
from allmend.models.adapters import Trainable
from allmend.models.load import LoadedModel
from allmend.models.tensors import Tensors
from allmend.prepare import Prepared, differs, prepare, read_frozen, threads
from allmend.results import Estimate
from allmend.run import RunFolder

DRAWS = 3
"""Draws of the noise, over which a record's scores are averaged."""


@dataclass(frozen=True)
class NoiseCost:
    """Held-out records under a run's model with as much noise as the private rounds would have left in it.

    Attributes:
        arm: whose model it is.
        clip: C that was assumed.
        deviation: of the noise on each parameter.
        change: length of what training changed in the model; that of the noise is `noise`.
        noise: expected length of the noise.
        log_perplexity: with noise minus without, nats per token, paired by record.
        accuracy: the same as a share, paired by question; None without questions.
    """

    arm: str
    clip: float
    deviation: float
    change: float
    noise: float
    log_perplexity: Estimate
    accuracy: Estimate | None


def noise_cost(
    out: Path | str,
    *,
    noise_on_average: float,
    rounds: int,
    clip: float | None = None,
    model: LoadedModel | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> NoiseCost:
    """Ask the held-out records of a run again, with the noise of DP-FedAvg on the model that all share.

    Every round adds noise of standard deviation `noise_on_average` · C to each parameter; after T rounds the sum of
    them has √T times that. What clipping itself costs, and that later rounds could have made up for noise of
    earlier ones, is left out.

    Args:
        out: a finished run whose own arm is a LoRA that all share.
        noise_on_average: standard deviation on the mean update, in clips.
        rounds: T.
        clip: C; when None, the length of the whole change in this run over its rounds. A single member's change in a
            round is longer than that as a rule, so that its clip would be larger and the noise too.
        model: the recipe's model, where the caller has it in memory already.
        listeners: told how far it is.

    Raises:
        UserError: there is no such run, or it has no adapter or no held-out records.
    """
    run = RunFolder.open(Path(out))
    recipe = read_frozen(run)
    arm = recipe.arms()[recipe.strategy.name]
    path = run.arm(arm.name) / "adapter" / "adapter_model.safetensors"
    if not path.exists():
        raise UserError(
            f"arm {arm.name!r} has no adapter that all share",
            where=run.path,
            hint="Name a finished run of fedavg with a LoRA adapter.",
        )
    prepared = prepare(recipe, Path(str(run.facts["base"])), model=model)
    if prepared.model.digest != run.facts.get("model"):
        raise differs("the base model", run)
    emit = to_all(listeners)
    phase, records = "ask held-out records", [one for client in prepared.held_out_encoded.values() for one in client]
    meter = Meter(emit, phase, float((1 + DRAWS) * sum(len(record) for record in records)))
    emit(WorkPlanned(work={phase: meter.expected}))
    with threads(recipe), trainable_of(prepared.model, arm.adapter, seed=recipe.seed) as trainable:
        trainable.model.eval()
        start, saved = trainable.state(), load_file(path)
        final = {name: saved[name] for name in start}  # a frozen factor is saved, and has no noise
        change = math.sqrt(sum(float((final[name] - start[name]).double().square().sum()) for name in final))
        clip = change / arm.strategy.rounds if clip is None else clip
        deviation = noise_on_average * clip * math.sqrt(rounds)
        before = _scores(prepared, trainable, final, meter)
        noisy = [_scores(prepared, trainable, _with_noise(final, deviation, draw), meter) for draw in range(DRAWS)]
        count = trainable.count
    meter.done()
    if not before:
        raise UserError("the run has no held-out records to ask", where=run.path, hint="Set data.held_out.")
    learnt = [place for place, one in enumerate(before) if one.tokens]
    asked = [place for place, one in enumerate(before) if one.answer is not None]
    return NoiseCost(
        arm=arm.name,
        clip=clip,
        deviation=deviation,
        change=change,
        noise=deviation * math.sqrt(count),
        log_perplexity=paired_difference(
            [sum(scores[place].nll for scores in noisy) / DRAWS / before[place].tokens for place in learnt],
            [before[place].nll / before[place].tokens for place in learnt],
        ),
        accuracy=paired_difference(
            [sum(scores[place].right for scores in noisy) / DRAWS for place in asked],
            [float(before[place].right) for place in asked],
        )
        if asked
        else None,
    )


def _scores(prepared: Prepared, trainable: Trainable, tensors: Tensors, meter: Meter) -> list[Score]:
    trainable.load(tensors)
    clients = sorted(prepared.held_out)
    records = [record for client in clients for record in prepared.held_out[client]]
    encoded = [one for client in clients for one in prepared.held_out_encoded[client]]
    tokens_per_pass = prepared.recipe.evaluation.tokens_per_pass
    return score(trainable.model, records, encoded, tokens_per_pass=tokens_per_pass, on_tokens=meter.add)


def _with_noise(tensors: Tensors, deviation: float, draw: int) -> Tensors:
    return {
        name: tensor + (deviation * noise_source("seeded", draw, "price", name).normal(tensor.shape)).to(torch.float32)
        for name, tensor in tensors.items()
    }
