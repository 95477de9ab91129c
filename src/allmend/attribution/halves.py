"""Random halves of the training records, and what the target's losses are after training on each."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from allmend.attribution.loss_folder import Identity, LossFolder, digest
from allmend.attribution.retraining import Retraining, retrain, target_losses
from allmend.attribution.scored import BACKWARD
from allmend.attribution.subject import Subject
from allmend.learn.loop import Step
from allmend.meter import Meter
from allmend.models.adapters import learning_adapter


def balanced_half(owners: Sequence[str], *, seed: str) -> list[int]:
    """A random half of the records, and of each client's but for one where its number is odd; in increasing order.

    Args:
        owners: whose each record is.
        seed: of chance.
    """
    chance = random.Random(seed)
    order: list[int] = []
    for owner in dict.fromkeys(owners):
        own = [place for place, other in enumerate(owners) if other == owner]
        chance.shuffle(own)
        order += own
    return sorted(order[chance.randrange(2) :: 2])


def retraining_identity(subject: Subject, retraining: Retraining) -> Identity:
    """Everything that retrained losses follow from; how many halves there are is not of it, so that more may follow."""
    config = json.loads((subject.adapter / "adapter_config.json").read_bytes())
    with learning_adapter(subject.model.model, subject.adapter) as trainable:
        shapes = {name: list(one.shape) for name, one in trainable.parameters().items()}
    shaping = ("lora_alpha", "lora_dropout", "use_rslora", "alpha_pattern", "rank_pattern")
    return {
        "model": subject.model.digest,
        "adapter_shape": {"parameters": shapes, **{key: config.get(key) for key in shaping}},
        "training_records": digest(subject.encoded, subject.owners),
        "target_records": digest(subject.aim),
        "learning_rate": retraining.learning_rate,
        "epochs": retraining.epochs,
        "batch_size": retraining.batch_size,
        "tokens_per_pass": retraining.tokens_per_pass,
        "seed": retraining.seed,
    }


def training_work(subject: Subject, places: Sequence[int], retraining: Retraining) -> float:
    """What training on some records will tell a meter in all, in tokens."""
    return float(BACKWARD * retraining.epochs * sum(len(subject.encoded[place]) for place in places))


def metered(meter: Meter) -> Callable[[Step], None]:
    """Tells a meter of each step."""
    return lambda step: meter.add(BACKWARD * step.tokens)


@dataclass
class Halves:
    """Halves of the records, and the target's losses after training on each; None where that is to be done.

    Attributes:
        subject: model, adapter and records; the adapter's shape counts.
        retraining: how.
        folder: where losses are kept; None where nothing is trained.
        places: of the records of each half.
        losses: of the target records, summed over their tokens (nats).
    """

    subject: Subject
    retraining: Retraining
    folder: LossFolder | None
    places: list[list[int]]
    losses: list[list[float] | None]

    @classmethod
    def of(cls, count: int, subject: Subject, retraining: Retraining, folder: LossFolder | None) -> "Halves":
        """So many, with the losses that are kept already.

        Raises:
            UserError: a file of kept losses is damaged.
        """
        seeds = [f"{retraining.seed}/{index}" for index in range(count)]
        halves = cls(subject, retraining, folder, [balanced_half(subject.owners, seed=seed) for seed in seeds], [])
        if folder is not None:
            halves.losses = [folder.read(index, halves._names(index), len(subject.aim)) for index in range(count)]
        return halves

    def _names(self, index: int) -> list[str]:
        return [f"{self.subject.owners[place]}/{self.subject.records[place].id}" for place in self.places[index]]

    def work(self) -> float:
        """Tokens to come."""
        return sum(
            training_work(self.subject, half, self.retraining) + self.subject.tokens[1]
            for half, found in zip(self.places, self.losses, strict=True)
            if found is None
        )

    def train(self, meter: Meter) -> None:
        """Fill in what is missing, one by one, each kept as soon as it is known.

        Raises:
            UserError: a training diverged, or the operating system refused a file.
        """
        assert self.folder is not None
        subject, retraining = self.subject, self.retraining
        with learning_adapter(subject.model.model, subject.adapter) as trainable:
            for index, half in enumerate(self.places):
                if self.losses[index] is not None:
                    continue
                some = [subject.encoded[place] for place in half]
                retrain(trainable, some, retraining, seed=retraining.seed + 1 + index, on_step=metered(meter))
                found = target_losses(trainable, subject.aim, retraining.tokens_per_pass, on_tokens=meter.add)
                self.folder.write(index, self._names(index), found)
                self.losses[index] = found
        meter.done()

    def array(self) -> "np.ndarray":
        """Losses [m, q]."""
        return np.array([found for found in self.losses if found is not None])
