"""The coordinator's side of a run among organisations: offer, rounds, scores, audit and report, in one run folder.

The folder is the same as a simulation's but for what members keep to themselves: their records, their states and their
scores on single records. A process that died goes on from the last round when it is started again.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch

import allmend
from allmend.attribution.runs import TABLE, Aim, read_aim
from allmend.audit_runs.guarantees import privacy_table
from allmend.audit_runs.learnt import write_learnt
from allmend.audit_runs.runs import audit_arms, design_digest, write_cards
from allmend.check import audited, influence_problems, smallest_round
from allmend.collaborators import write_collaborators
from allmend.consortium.gathering import Patience, WaitLog, fewest_of, gather
from allmend.consortium.influence import measure
from allmend.consortium.offer import Offer, among, hiding
from allmend.consortium.own import planned
from allmend.consortium.questions import Questions
from allmend.consortium.scoring import Moments, Paired
from allmend.data.canaries import write_canaries
from allmend.errors import UserError
from allmend.events import (
    ArmStarted,
    Event,
    PhaseDone,
    RunFinished,
    RunStarted,
    Warned,
)
from allmend.federation.arm import Outcomes, Training, save_outcomes, strategy_of, trainable_of
from allmend.federation.checkpoint import Checkpoint
from allmend.federation.engines.flower.engine import FlowerEngine
from allmend.federation.engines.flower.exchange import FACTS, Exchange
from allmend.federation.keys import public_line
from allmend.federation.privacy.layers import in_words, noisy
from allmend.federation.privacy.ledger import open_ledger
from allmend.federation.rounds import run_rounds
from allmend.models.tensors import Tensors, nbytes
from allmend.prepare import Prepared, check_prefixes, checkpoints_of, prepare_model, read_frozen, threads
from allmend.recipe import Arm, Recipe, RecipeError
from allmend.results import BASE, InfluenceByMember, UtilityTable
from allmend.run import EventLog, RunFolder, write_atomic
from allmend.session import machine, reported, sessions
from allmend.strategy import Reply, Strategy, whole_layout
from allmend.versions import versions

REPLY = 4
"""Times the size of what learns: room for a strategy that sends more than one tensor for each."""

GOODBYE = 15.0
"""Seconds in which members hear that the run has ended; whoever was away then hears nothing."""

Listener = Callable[[Event], None]

PATIENT = Patience()


@dataclass
class Coordination:
    """A run among organisations, over an exchange that somebody else opens and closes.

    Attributes:
        recipe: with the members for clients (`offer.among`).
        keys: the members' raw public keys.
        run: its folder, locked.
        prepared: model, encoder and canaries; no records.
        exchange: carries questions and answers.
        patience: how long to wait.
        log: of events.
        aim: of influence, where the recipe asks for it.
    """

    recipe: Recipe
    keys: Mapping[str, bytes]
    run: RunFolder
    prepared: Prepared
    exchange: Exchange
    patience: Patience
    log: EventLog
    aim: Aim | None = None
    questions: Questions = field(init=False)

    def __post_init__(self) -> None:
        self.questions = Questions(self.exchange, self.offer.digest, self.patience.leg)

    @property
    def offer(self) -> Offer:
        """What members are asked to agree to."""
        members = tuple((name, public_line(key)) for name, key in sorted(self.keys.items()))
        return Offer(self.recipe.to_toml(), members, self.prepared.model.digest, allmend.__version__)

    @property
    def fewest(self) -> int:
        """Members that must be there: as many as are asked for, and as a sum needs that nobody looks behind."""
        return fewest_of(self.recipe, self.patience)

    def check(self) -> None:
        """Refuse what could only fail later: too small a disk.

        Raises:
            UserError: so it is; nothing has begun.
        """
        needed = 0
        for arm in self.recipe.arms().values():
            strategy = strategy_of(arm, seed=self.recipe.seed)
            with trainable_of(self.prepared.model, arm.adapter, seed=self.recipe.seed) as trainable:
                initial = trainable.state()
            sent = sum(shape.numel() * 4 for shape in whole_layout(strategy, initial).values())
            # the checkpoint, the next one beside it and the outcome; a question to each member and its answer
            needed = max(needed, (3 + len(self.keys)) * nbytes(initial) + len(self.keys) * sent + FACTS)
        if (free := shutil.disk_usage(self.run.path).free) < needed:
            raise UserError(
                f"{free / 1e9:.2f} GB are free on this disk, and a round of {len(self.keys)} members needs up to "
                f"{needed / 1e9:.2f} GB",
                where=self.run.path,
                hint="Free some space, or choose another folder with --out.",
            )

    @property
    def needs_members(self) -> bool:
        """Whether anything is still to be asked; members leave when nothing is."""
        there = [self._sums(model).exists() for model in (BASE, *self.recipe.arms())]
        return not all(there) or self._owes_influence

    @property
    def _owes_influence(self) -> bool:
        return self.aim is not None and self.run.read_table(TABLE, InfluenceByMember) is None

    def arms(self) -> None:
        """Everything after that: score, train, audit, report."""
        self._score(BASE, {})
        for arm in self.recipe.arms().values():
            self._arm(arm)
        self.run.write_table("utility", self._utility())
        self.run.write_table("privacy", privacy_table(self.run, self.prepared))
        write_collaborators(self.run, self.prepared.recipe)
        if self.prepared.canaries:
            audit_arms(self.run, self.prepared, self.log, self.recipe.audit)
        if self.aim is not None and self._owes_influence:
            began = time.perf_counter()
            table = measure(
                self.run,
                self.recipe,
                self.offer,
                self.prepared.model,
                self.aim,
                self.exchange,
                self.questions.names,
                seconds=self.patience.leg,
                fewest=self.fewest,
                emit=self.log.emit,
            )
            self.run.write_table(TABLE, table)
            self.log.emit(PhaseDone(phase="influence", seconds=time.perf_counter() - began, tokens=0))
        write_cards(self.run, self.recipe)
        everybody = [client.name for client in self.recipe.clients]
        self.questions.tell(dict.fromkeys(everybody, self.questions.question("end")), seconds=GOODBYE)

    def _arm(self, arm: Arm) -> None:
        if self._sums(arm.name).exists():
            return
        began = time.perf_counter()
        recipe = self.recipe
        strategy = strategy_of(arm, seed=recipe.seed)
        rounds = arm.strategy.rounds
        checkpoints = checkpoints_of(self.run, arm.name)
        # a guarantee for records is accounted for at each member, which alone knows how many it has
        ledger = open_ledger(replace(arm, privacy=arm.privacy.model_copy(update={"record": None})), [])
        with trainable_of(self.prepared.model, arm.adapter, seed=recipe.seed) as trainable:
            start = checkpoints.newest() or Checkpoint(0, strategy.init(trainable.state()), {})
            self.log.emit(
                ArmStarted(
                    arm=arm.name,
                    strategy=strategy.name,
                    round=start.round + 1,
                    rounds=rounds,
                    trainable=trainable.count,
                )
            )
            engine = FlowerEngine(
                self.exchange,
                self.questions.names,
                arm.name,
                run=self.offer.digest,
                seconds=self.patience.leg,
                fewest=self.fewest,
                emit=self.log.emit,
                largest=_largest_reply(strategy, trainable.state()),
                layout=whole_layout(strategy, trainable.state()),
                largest_update=arm.train.largest_update,
                frozen=trainable.frozen_digest,
                opening=self.run.arm(arm.name) / "opening.json",
                hiding=hiding(self.offer, recipe, arm, strategy, trainable.state()),
            )
            last = run_rounds(
                strategy,
                engine,
                start,
                rounds=rounds,
                arm=arm.name,
                checkpoints=checkpoints,
                emit=self.log.emit,
                tokens=lambda: (0, None),
                ledger=ledger,
            )
            shared = strategy.shared(last.server)
            if arm.privacy.weight_noise:
                shared = noisy(shared, arm.privacy, recipe.seed, None)
            outcomes: Outcomes = {} if shared is None else {None: shared}
            save_outcomes(self.run.arm(arm.name), outcomes, trainable, base=str(self.prepared.model.folder))
        self.log.emit(PhaseDone(phase=f"train {arm.name}", seconds=time.perf_counter() - began, tokens=0))
        learnt = self._learnt(arm, engine.counted) if self.prepared.canaries and shared is not None else {}
        # one record stands for all copies of a canary here
        counts = {f"canary:{canary}#1": pair for canary, pair in learnt.items()}
        training = Training({}, counts, in_words(arm.privacy))
        write_learnt(self.run, arm.name, self.prepared.canaries, training)
        own = {} if shared else engine.counted
        self.questions.tell(self.questions.to_each("keep", {"arm": arm.name}, shared or {}, own))
        self._score(arm.name, shared or {}, own)

    def _learnt(self, arm: Arm, counted: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Steps and tokens that each canary had, as its member tells."""
        counts: dict[str, tuple[int, int]] = {}
        for name, reply in self.questions.ask(self.questions.to_each("learnt", {"arm": arm.name}, {}, counted)):
            if not isinstance(reply, Reply):
                words = f"client {name!r} does not say what it learnt from: {reply or 'no answer'}"
                self.log.emit(Warned(message=words))
                continue
            own = {canary.id for canary in self.prepared.canaries if canary.inserted and canary.client == name}
            for key, value in reply.seen_facts.items():
                canary, _, unit = key.rpartition("/")
                if canary not in own or not isinstance(value, int) or value < 0:
                    raise UserError(
                        f"client {name!r} tells of canaries that it does not have", where=f"arm {arm.name!r}"
                    )
                before = counts.get(canary, (0, 0))
                add = int(value)
                counts[canary] = (before[0] + add, before[1]) if unit == "steps" else (before[0], before[1] + add)
        return counts

    def _score(self, model: str, tensors: Tensors, own: Mapping[str, tuple[int, int]] = {}) -> None:
        """Have the members score a model on their held-out records, and keep the sums."""
        path = self._sums(model)
        if path.exists():
            return
        began = time.perf_counter()
        others = [other for other in (BASE, *self.recipe.arms()) if self._sums(other).exists()]
        questions = self.questions.to_each("score", {"model": model, "others": others}, tensors, own)
        total: dict[str, float] = {}
        answered = 0
        for name, reply in self.questions.ask(questions):
            if not isinstance(reply, Reply):
                self.log.emit(Warned(message=f"client {name!r} has not scored {model!r}: {reply or 'no answer'}"))
                continue
            told = [Moments.from_facts(reply.summed_facts, "held_out")]
            paired = [Paired.from_facts(reply.summed_facts, f"against {other}") for other in others]
            if not all(one.possible for one in (*told, *paired)):
                self.log.emit(Warned(message=f"client {name!r} has scored {model!r} with numbers that cannot be"))
                continue
            answered += 1
            for key, value in reply.summed_facts.items():
                total[key] = total.get(key, 0.0) + value
        if answered < self.fewest:
            raise UserError(
                f"{answered} members have scored {model!r}, and {self.fewest} are the fewest",
                where=self.run.path,
                hint="Run the same command again when more of them are there.",
            )
        write_atomic(path, json.dumps({"members": answered, "sums": total}).encode())
        self.log.emit(PhaseDone(phase=f"evaluate {model}", seconds=time.perf_counter() - began, tokens=0))

    def _sums(self, model: str) -> Path:
        return self.run.path / "scores" / f"{model}.sums.json"

    def _utility(self) -> UtilityTable:
        models = [BASE, *self.recipe.arms()]
        sums = {model: json.loads(self._sums(model).read_bytes())["sums"] for model in models}
        rows = [Moments.from_facts(sums[model], "held_out").utility(model) for model in models]
        found = [
            Paired.from_facts(sums[model], f"against {other}").difference(model, other)
            for place, model in enumerate(models)
            for other in models[:place]
        ]
        differences = [difference for difference in found if difference is not None]
        return UtilityTable(rows=tuple(rows), differences=tuple(differences), seed=self.recipe.seed)


def _largest_reply(strategy: Strategy, initial: Tensors) -> int:
    """Bytes: room for what is summed in float64, and for a few tensors of each that learns that are seen."""
    summed = sum(shape.numel() * 8 for shape in whole_layout(strategy, initial).values())
    return FACTS + max(REPLY * nbytes(initial), summed)


def coordinate(
    recipe: Recipe,
    members: Mapping[str, bytes],
    out: Path,
    *,
    base: Path,
    open_exchange: Callable[[Path], contextlib.AbstractContextManager[Exchange]],
    patience: Patience = PATIENT,
    listeners: Sequence[Listener] = (),
) -> RunFolder:
    """Carry out a recipe among organisations, or go on with a run that stopped; a finished one is left as it is.

    Args:
        recipe: what to do; its clients are the members.
        members: registered members, name → raw public key.
        out: the run folder.
        base: folder that the recipe's relative paths start from.
        open_exchange: opens the door to the members, with what it keeps in the run folder.
        patience: how long to wait.
        listeners: told every event.

    Raises:
        UserError: the recipe or the folder is at fault, or too few members are there; the run can be gone on with.
    """
    if problems := influence_problems(recipe, base):
        raise RecipeError(problems)
    asked, recipe = recipe, among(recipe, list(members))
    if pooled := [name for name, arm in recipe.arms().items() if strategy_of(arm, seed=recipe.seed).pooled]:
        raise UserError(
            f"{', '.join(pooled)} needs all records in one place, which only a simulation has",
            where="compare",
            hint="Leave it out of the recipe.",
        )
    if own := [name for name in audited(recipe) if not strategy_of(recipe.arms()[name], seed=recipe.seed).shares]:
        raise UserError(
            f"{', '.join(own)} ends with a model of each member's own, which stays with it, so that it cannot be "
            "audited here",
            where="audit.models",
            hint="Leave it out. A simulation of the same recipe tells what such models keep.",
        )
    if recipe.canaries and not audited(recipe):
        raise UserError(
            "every arm ends with a model of each member's own, which stays with it, so that nothing can be audited "
            "here",
            where="canaries",
            hint="Remove [canaries], or compare with an arm whose members share one model.",
        )
    for name, arm in recipe.arms().items():
        if arm.privacy.weight_noise and not strategy_of(arm, seed=recipe.seed).shares:
            raise UserError(
                f"privacy.weight_noise is for the model that all share, and {name} makes each member its own",
                where="privacy.weight_noise",
                hint="Leave it out of that arm.",
            )
    model, encoder = prepare_model(recipe, base)
    canaries = tuple(planned(recipe))
    check_prefixes(recipe, canaries, encoder)
    aim = None if asked.influence is None else read_aim(asked.influence, asked, base, encoder)
    prepared = Prepared(
        recipe=recipe,
        base=base,
        model=model,
        encoder=encoder,
        members=(),
        train={},
        held_out={},
        held_out_encoded={},
        canaries=canaries,
        notes={},
        data_digests={},
    )
    facts = {
        "allmend": allmend.__version__,
        "base": str(base.resolve()),
        "recipe": recipe.digest(),
        "model": model.digest,
        "members": {name: key.hex() for name, key in members.items()},
        "audit": design_digest(recipe.audit, canaries) if canaries else None,
    }
    run = RunFolder(out)
    if run.marker.exists():
        run = RunFolder.open(out)
        changed = [key for key in ("model", "members") if run.facts.get(key) != facts[key]]
        if read_frozen(run).digest() != recipe.digest():  # as read today: a later version has keys more
            changed.insert(0, "recipe")
        if changed:
            raise UserError(
                f"{' and '.join(changed)} {'differ' if changed[1:] else 'is not'} "
                f"{'from what' if changed[1:] else 'what'} the run was started with",
                where=run.path,
                hint="Restore them, or choose another folder with --out.",
            )
    else:
        run.check_free()
    fewest = fewest_of(recipe, patience)
    if len(members) < fewest:
        raise UserError(
            f"{fewest} members are the fewest, and {len(members)} are registered",
            where="members",
            hint="Register more, or lower --fewest and privacy.secure_aggregation.fewest.",
        )
    for name, arm in recipe.arms().items():
        strategy = strategy_of(arm, seed=recipe.seed)
        number, drawn = smallest_round(strategy, arm.strategy.rounds, sorted(members))
        if drawn < fewest:
            raise UserError(
                f"round {number} of arm {name!r} has {drawn} of {len(members)} members, and {fewest} are the fewest",
                where="strategy.participation",
                hint="Raise it, register more members, or lower --fewest.",
            )
    with run.lock(), threads(recipe):
        resumed = run.marker.exists()
        finished = resumed and any(isinstance(event, RunFinished) for event in run.history())
        if finished and (run.path / "report.html").exists():
            return run
        if not resumed:
            RunFolder.create(run.path, recipe.to_toml(), facts)
            run.path.chmod(0o700)
        with run.log(listeners) as log, open_exchange(run.path) as exchange:
            exchange.on_wait = WaitLog(log)
            _live(Coordination(recipe, members, run, prepared, exchange, patience, log, aim), resumed=resumed)
    return run


def _live(it: Coordination, *, resumed: bool) -> None:
    began, before = time.perf_counter(), sum(session.seconds for session in sessions(it.run))
    with reported(it.run, it.log):
        it.check()
        it.log.emit(_started(it, resumed=resumed))
        if it.prepared.canaries and not it.run.canaries.exists():
            write_canaries(it.run.canaries, list(it.prepared.canaries))
        if it.needs_members:
            it.questions.names = gather(it.offer, it.questions, fewest=it.fewest, seconds=it.patience.join, log=it.log)
        it.arms()
        it.log.emit(RunFinished(seconds=before + time.perf_counter() - began))


def _started(it: Coordination, *, resumed: bool) -> RunStarted:
    return RunStarted(
        run=it.recipe.name,
        allmend=allmend.__version__,
        versions=versions(["flwr"]) if find_spec("flwr") else versions(),
        machine=machine(it.prepared.model.model.device),
        threads=torch.get_num_threads(),
        model=it.recipe.model.source,
        clients={},
        held_out={},
        notes={},
        work=dict.fromkeys((f"train {arm}" for arm in it.recipe.arms()), 1.0),
        resumed=resumed,
    )
