"""An arm of a run: one strategy with its adapter and settings, trained from its newest checkpoint and saved."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from allmend.events import ArmStarted, Event, StepDone, UpdateSeen
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines import Engine
from allmend.federation.engines.hiding import HidingEngine
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.engines.workers import WorkerEngine
from allmend.federation.member import LEARNT, Member
from allmend.federation.privacy.layers import noisy, protected
from allmend.federation.privacy.ledger import Ledger, member_account, open_ledger
from allmend.federation.privacy.vectors import codes_of_legs, rounding
from allmend.federation.rounds import Observer, run_rounds
from allmend.federation.strategies import build_strategy
from allmend.federation.strategies.cobo import CoBo
from allmend.federation.strategies.comigs import CoMiGS
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.private_fedavg import PrivateFedAvg
from allmend.federation.strategies.product import FedAvgProduct
from allmend.learn.loop import Step, mean_loss
from allmend.learn.noise import NoiseSource
from allmend.learn.private import RecordNoise
from allmend.learn.schedule import steps_per_round
from allmend.meter import Meter
from allmend.models.adapters import Trainable, add_lora, full, remove_lora
from allmend.models.load import LoadedModel
from allmend.models.mixture import Mixture, apply_mixture, remove_mixture
from allmend.models.mixture_export import export_mixture
from allmend.models.mixture_layers import MixtureConfig
from allmend.models.tensors import Tensors
from allmend.recipe import Adapter, Arm, Privacy
from allmend.recipe import Engine as EngineSettings
from allmend.strategy import Strategy, Turn

Outcomes: TypeAlias = dict[str | None, Tensors | None]
"""What an arm comes to: the model that all share under None, or each member's own under its name."""


FOLDERS = {"lora": "adapter", "full": "model", "mixture": "mixture"}
"""Names of outcomes' folders, by what learned."""


@dataclass(frozen=True)
class Training:
    """An arm's training, over all rounds.

    Attributes:
        outcomes: the models.
        learnt: by record id, over all members: optimiser steps that saw the record, and its tokens under the loss,
            summed over the steps. A record that no step saw is not there.
        layers: what each layer of protection did, in words.
    """

    outcomes: Outcomes
    learnt: dict[str, tuple[int, int]]
    layers: tuple[str, ...]


@contextlib.contextmanager
def trainable_of(model: LoadedModel, adapter: Adapter, *, seed: int) -> Iterator[Trainable]:
    """What learns in an arm; afterwards the base model in memory is as it was."""
    if adapter.kind == "full":
        trainable = full(model.model)
        base = trainable.state()
        try:
            yield trainable
        finally:
            trainable.load(base)
            model.model.requires_grad_(False)
        return
    if adapter.kind == "mixture":
        mixture = apply_mixture(model.model, mixture_of(adapter), seed=seed, specialist_seed=seed, digest=model.digest)
        try:
            yield mixture
        finally:
            remove_mixture(mixture)
        return
    trainable = add_lora(
        model.model,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=adapter.targets,
        dropout=adapter.dropout,
        learns=adapter.learns,
        seed=seed,
    )
    try:
        yield trainable
    finally:
        remove_lora(trainable)


def mixture_of(adapter: Adapter) -> MixtureConfig:
    """The experts that a recipe's `[adapter]` asks for."""
    return MixtureConfig(
        generalists=adapter.generalists,
        specialists=adapter.specialists,
        rank=adapter.rank,
        scale=adapter.alpha / adapter.rank,
        targets=adapter.targets,
    )


def strategy_of(arm: Arm, *, seed: int) -> Strategy:
    """The arm's strategy, in its private form where the recipe asks for the members' guarantee.

    Raises:
        ValueError: there is no such strategy or option, or no private form of it.
        UserError: no noise is enough for the budget.
    """
    strategy = build_strategy(arm.strategy.name, arm.strategy.options, seed=seed)
    if (arm.adapter.kind == "mixture") != isinstance(strategy, CoMiGS):
        raise ValueError("comigs trains a mixture, and nothing else does: set adapter.kind to 'mixture' for it alone")
    if isinstance(strategy, CoMiGS):
        _check_comigs(arm)
    if isinstance(strategy, CoBo):
        _check_cobo(strategy, arm)
    declared = strategy.declare()
    if arm.privacy.record is not None and declared.beyond:
        raise ValueError(
            f"privacy.record promises something for the steps of one training a round, and {strategy.name} draws more "
            f"from records: {declared.beyond}. Remove one of the two"
        )
    if isinstance(strategy, FedAvgProduct) and arm.adapter.kind != "lora":
        raise ValueError(f"{strategy.name} averages products of LoRA's factors: adapter.kind must be 'lora'")
    if isinstance(strategy, FedAvgProduct) and arm.adapter.learns == "b":
        raise ValueError(
            f"with adapter.learns = 'b' the mean of factors is the mean of products: take fedavg instead of "
            f"{strategy.name}"
        )
    if isinstance(strategy, FedAvgProduct) and arm.train.largest_update is not None:
        raise ValueError(f"train.largest_update is about LoRA's factors, and {strategy.name} sends their products")
    if arm.privacy.secure_aggregation and (seen := sorted(set(declared.seen) - declared.beside)):
        raise ValueError(
            f"privacy.secure_aggregation hides what is summed, and {strategy.name!r} looks at each member's "
            f"{', '.join(seen)}: remove one of the two"
        )
    layer = arm.privacy.member
    if layer is None:
        return strategy
    if type(strategy) is not FedAvg:
        raise ValueError(f"privacy.member is for fedavg, and this is {strategy.name!r}: remove one of the two")
    hidden = arm.privacy.secure_aggregation is not None
    if hidden and (layer.quantile is not None or not math.isfinite(layer.clip)):
        raise ValueError(
            "privacy.secure_aggregation sums privacy.member's changes on a grid of its clip, which must be a number "
            "and stay as it is: set clip, and remove quantile"
        )
    return PrivateFedAvg(
        clip=layer.clip,
        noise_multiplier=member_account(arm, layer).release.noise_multiplier,
        participation=strategy.participation,
        quantile=layer.quantile,
        randomness=arm.privacy.randomness,
        seed=seed,
        distributed=hidden,
    )


def _check_cobo(strategy: CoBo, arm: Arm) -> None:
    if strategy.geometry == "product" and arm.adapter.kind != "lora":
        raise ValueError("geometry 'product' mixes products of LoRA's factors: set geometry to 'factors'")
    if strategy.geometry == "product" and arm.adapter.learns == "b":
        raise ValueError(
            "geometry 'product' makes both factors anew, and with adapter.learns = 'b' A stays as it is: set geometry "
            "to 'factors', which mixes the products exactly then"
        )
    if arm.train.largest_update is not None:
        raise ValueError(
            "train.largest_update is about the change of a model that was sent, and cobo's members keep it"
        )


def _check_comigs(arm: Arm) -> None:
    if arm.train.largest_update is not None:
        raise ValueError("train.largest_update is about the change of a whole model, and comigs sends its generalists")
    if arm.privacy.weight_noise:
        raise ValueError("privacy.weight_noise is for adapters and whole models, and comigs leaves mixtures")


def at_member(member: Member, arm: Arm) -> tuple[Member, Ledger]:
    """A member with an arm's layers on its records and its steps, and the ledger of its own guarantee.

    Raises:
        UserError: not even one round fits into its budget.
    """
    (member,), _ = protected([member], arm.privacy)
    ledger = open_ledger(replace(arm, privacy=arm.privacy.model_copy(update={"member": None})), [member])
    return _with_noise(member, arm.privacy, ledger), ledger


def tokens_per_round(arm: Arm, members: Sequence[Member]) -> float:
    """Tokens that members train on in a round if all take part, about."""
    total = 0.0
    for member in members:
        records = len(member.records)
        mean = sum(len(record) for record in member.records) / records
        total += steps_per_round(records, arm.train) * min(arm.train.batch_size, records) * mean
    return total


def train_arm(
    arm: Arm,
    trainable: Trainable,
    members: Sequence[Member],
    *,
    seed: int,
    engine: EngineSettings,
    checkpoints: Checkpoints,
    emit: Callable[[Event], None],
    observe: Observer | None = None,
) -> Training:
    """Run an arm's rounds from its newest checkpoint on, with the layers of protection that it names.

    Args:
        arm: strategy and settings.
        trainable: what learns, at its initial parameters.
        members: training records; one party with all of them where the strategy pools.
        seed: of the strategy's sampling.
        engine: worker processes and threads.
        checkpoints: of this arm.
        emit: writes events.
        observe: told what each party can see in each round.

    Raises:
        UserError: a member's training diverged or a checkpoint cannot be read or written; the last one is whole.
    """
    strategy = strategy_of(arm, seed=seed)
    members, layers = protected(members, arm.privacy)
    ledger = open_ledger(arm, members)
    members = [_with_noise(member, arm.privacy, ledger) for member in members]
    rounds = arm.strategy.rounds
    start = checkpoints.newest() or Checkpoint(0, strategy.init(trainable.state()), {})
    start = replace(start, took_part=checkpoints.begun(start.round + 1) or start.took_part)
    emit(
        ArmStarted(
            arm=arm.name, strategy=strategy.name, round=start.round + 1, rounds=rounds, trainable=trainable.count
        )
    )
    expected = (rounds - start.round) * tokens_per_round(arm, members)
    watch = _Watch(arm.name, emit, Meter(emit, f"train {arm.name}", expected))
    carrier = _engine(engine, trainable, members, arm, watch)
    if layer := arm.privacy.secure_aggregation:
        codes = codes_of_legs(strategy, trainable.state(), layer, len(members))
        carrier = HidingEngine(carrier, codes, _rounding(arm, seed), layer.fewest)
    try:
        last = run_rounds(
            strategy,
            carrier,
            start,
            rounds=rounds,
            arm=arm.name,
            checkpoints=checkpoints,
            emit=emit,
            tokens=watch.trained,
            ledger=ledger,
            observe=observe,
        )
    finally:
        carrier.close()
    watch.meter.done()
    shared = strategy.shared(last.server)
    outcomes: Outcomes = {None: shared} if shared is not None else _personal(strategy, last)
    if arm.privacy.weight_noise:
        outcomes = {name: noisy(tensors, arm.privacy, seed, name) for name, tensors in outcomes.items()}
    return Training(outcomes, _learnt(members, last), layers)


def _rounding(arm: Arm, seed: int) -> Callable[[Turn, str], NoiseSource]:
    return lambda turn, member: rounding(arm.privacy.randomness, seed, arm.name, turn, member)


def _personal(strategy: Strategy, last: Checkpoint) -> Outcomes:
    return {name: strategy.personal(last.server, state) for name, state in sorted(last.members.items())}


def _learnt(members: Sequence[Member], last: Checkpoint) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for member in members:
        counts = last.members[member.name].tensors.get(LEARNT)
        for record, (steps, tokens) in zip(member.records, counts.tolist() if counts is not None else (), strict=False):
            if steps:
                before = found.get(record.id, (0, 0))
                found[record.id] = before[0] + steps, before[1] + tokens
    return found


def _with_noise(member: Member, privacy: Privacy, ledger: Ledger) -> Member:
    if privacy.record is None:
        return member
    return replace(
        member,
        noise=RecordNoise(
            clip=privacy.record.clip,
            noise_multiplier=ledger.accounts[member.name].release.noise_multiplier,
            sampling=privacy.record.sampling,
            randomness=privacy.randomness,
        ),
    )


def save_outcomes(folder: Path, outcomes: Mapping[str | None, Tensors | None], trainable: Trainable, base: str) -> None:
    """Write outcomes as PEFT folders (`adapter`), as model folders (`model`) where everything learned, or as mixtures
    (`mixture`), whose generalists alone are then a PEFT folder besides (`generalist`).

    Args:
        folder: of the arm; personal outcomes go to `members/NAME` in it.
        outcomes: what to write.
        trainable: what learned.
        base: name or folder of the base model, for PEFT.

    Raises:
        UserError: the operating system refused.
    """
    for member, tensors in outcomes.items():
        if tensors is not None:
            place = folder if member is None else folder / "members" / member
            trainable.save(place / FOLDERS[trainable.kind], tensors, base=base)
    if (
        isinstance(trainable, Mixture)
        and trainable.config.generalists
        and (some := next(iter(outcomes.values()), None))
    ):
        export_mixture(trainable, folder / "generalist", some, how="generalist", base=base)


def _engine(
    settings: EngineSettings, trainable: Trainable, members: Sequence[Member], arm: Arm, watch: "_Watch"
) -> Engine:
    workers = min(settings.workers, len(members))
    if workers == 0:
        return InProcessEngine(trainable, members, arm.train, watch.on_step)
    return WorkerEngine(trainable, members, arm.train, watch.on_step, workers=workers, threads=settings.threads)


@dataclass
class _Watch:
    """Turns optimiser steps into events, and remembers a round's for its summary."""

    arm: str
    emit: Callable[[Event], None]
    meter: Meter
    steps: list[Step] = field(default_factory=list)

    def on_step(self, client: str, turn: Turn, step: Step) -> None:
        self.steps.append(step)
        if step.loss is not None:  # a Poisson sample may be empty
            self.emit(
                StepDone(
                    arm=self.arm,
                    client=client,
                    round=turn.round,
                    step=step.number,
                    loss=step.loss,
                    learning_rate=step.learning_rate,
                    gradient_norm=step.gradient_norm,
                    tokens=step.tokens,
                    update=None if step.update is None else UpdateSeen(**asdict(step.update)),
                )
            )
        self.meter.add(step.tokens)

    def trained(self) -> tuple[int, float | None]:
        """Tokens since it was last asked, and the mean loss per target over them."""
        steps, self.steps = self.steps, []
        return sum(step.tokens for step in steps), mean_loss(steps)
