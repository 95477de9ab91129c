"""Scores of the same records by several methods, and what each costs.

The gradients go through the model once and are kept, as far as memory allows; what a method costs alone is its own time
and that of its passes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from allmend.attribution.folders import UNTRAINED, per_token
from allmend.attribution.method_figures import LOSS
from allmend.attribution.retraining import target_losses
from allmend.attribution.settings import PASSES
from allmend.attribution.subject import Subject
from allmend.influence.gradients import OfRecords, Source, mean_gradient
from allmend.influence.inverses import NotInvertedError
from allmend.influence.kept import Counted, keep
from allmend.influence.methods import Directions, Method
from allmend.influence.scores import score
from allmend.influence.tracin import tracin
from allmend.meter import Meter
from allmend.models.adapters import Trainable, learning_adapter

BACKWARD = 2
"""What a token costs with its gradient, against one without."""


@dataclass(frozen=True)
class Scored:
    """Scores by a method.

    Attributes:
        values: [n, q]; None where the method cannot be applied.
        passes: over the training records' gradients.
        seconds: that the method would take alone, with its passes and the one over the target's gradients.
        notes: in sentences.
    """

    values: "np.ndarray | None"
    passes: int | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AllScored:
    """Scores by several methods, and `loss`.

    Attributes:
        methods: by name.
        loss: of the target, nats a token.
        pass_seconds: of one pass of the training records' gradients.
        notes: what a reader should know of the adapter, in sentences.
    """

    methods: dict[str, Scored]
    loss: float
    pass_seconds: float
    notes: tuple[str, ...] = ()


def target_groups(subject: Subject) -> list[tuple[str]]:
    """A target for each target record; the names are in the records' order when sorted, too."""
    return [(f"{place:06}",) for place in range(len(subject.aim))]


def target_tokens(subject: Subject) -> int:
    """Of the target records, those under the loss."""
    return sum(int((one.target & (one.position > 0)).sum()) for one in subject.aim)


def gradients_fit(subject: Subject) -> bool:
    """Whether all gradients of the training records find room in half of the memory that is free."""
    with learning_adapter(subject.model.model, subject.adapter) as trainable:
        names = OfRecords(trainable, subject.encoded, subject.settings.modules).names
        parameters = trainable.parameters()
        device = next(iter(parameters.values())).device
        need = 4 * len(subject.records) * sum(parameters[name].numel() for name in names)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return bool(need < free / 2)


def scoring_work(subject: Subject, methods: Sequence[str], *, checkpoints: int, keeping: bool) -> float:
    """What `score_by` and `score_checkpoints` will tell a meter in all, in tokens."""
    of_train, of_target = subject.tokens
    passes = 1 if keeping else 1 + sum(PASSES.get(name, 2) for name in methods)
    return BACKWARD * ((passes + checkpoints) * of_train + (1 + checkpoints) * of_target) + of_target


def score_by(subject: Subject, methods: Mapping[str, Method], meter: Meter, *, keeping: bool) -> AllScored:
    """Scores of the training records for each target record, by each method and by the loss.

    Args:
        subject: model, adapter and records.
        methods: by name.
        meter: told the tokens that went through the model.
        keeping: whether gradients are kept in memory, or made anew in each pass.
    """
    settings = subject.settings
    with learning_adapter(subject.model.model, subject.adapter) as trainable:
        loss = sum(target_losses(trainable, subject.aim, settings.tokens_per_pass, on_tokens=meter.add))
        train, aim = _sources(subject, trainable, meter)
        notes = (UNTRAINED,) if train.untrained else ()
        if "gfim" in methods:
            subject.check_room(train)
        began = time.perf_counter()
        _, targets = mean_gradient(aim, target_groups(subject))
        aiming, began = time.perf_counter() - began, time.perf_counter()
        source: Source = keep(train) if keeping else train
        if not keeping:
            for _ in source:
                pass
        seconds = time.perf_counter() - began
        found: dict[str, Scored] = {}
        losses = torch.zeros(len(train), dtype=torch.float64)
        for name, method in methods.items():
            found[name], losses = _by(method, source, targets, of_pass=seconds if keeping else 0.0, aiming=aiming)
        if not methods:
            _, losses = score(source, {})
    simple = -per_token(losses, subject)[:, None].expand(-1, len(subject.aim))
    found[LOSS] = Scored(simple.numpy())
    return AllScored(found, loss / target_tokens(subject), seconds, notes)


def score_checkpoints(
    subject: Subject, adapters: Sequence[Path], rates: Sequence[float] | None, meter: Meter
) -> Scored:
    """Scores by TracIn.

    Args:
        subject: model and records.
        adapters: checkpoints.
        rates: of each; 1 when None.
        meter: told the tokens that went through the model.

    Raises:
        UserError: an adapter does not fit the model.
    """

    def each() -> Iterator[tuple[Source, Source]]:
        for adapter in adapters:
            with learning_adapter(subject.model.model, adapter) as trainable:
                yield _sources(subject, trainable, meter)

    began = time.perf_counter()
    found = tracin(each(), rates, groups=target_groups(subject))
    return Scored(found.values.numpy(), len(adapters), time.perf_counter() - began, found.solved.notes)


def _by(
    method: Method, source: Source, targets: Directions, *, of_pass: float, aiming: float
) -> tuple[Scored, torch.Tensor]:
    counted, began = Counted(source), time.perf_counter()
    try:
        solved = method.solve(counted, targets)
    except NotInvertedError as error:  # what one method cannot do says nothing against the others
        _, losses = score(source, {})
        return Scored(None, notes=(f"left out: {error.what}",)), losses
    values, losses = score(counted, solved.directions)
    seconds = aiming + time.perf_counter() - began + of_pass * counted.passes
    return Scored(values.numpy(), counted.passes, seconds, solved.notes), losses


def _sources(subject: Subject, trainable: Trainable, meter: Meter) -> tuple[OfRecords, OfRecords]:
    settings = subject.settings

    def told(tokens: int) -> None:
        meter.add(BACKWARD * tokens)

    train, aim = (
        OfRecords(trainable, some, settings.modules, settings.tokens_per_pass, told)
        for some in (subject.encoded, subject.aim)
    )
    return train, aim
