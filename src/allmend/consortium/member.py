"""A member's side of a run among organisations: what it is asked, and what it answers with its own records.

Its records, its states and its own models stay in its own folder. Questions carry tensors and numbers; whatever a
question makes it do is in the recipe that it has agreed to.
"""

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import allmend
from allmend.consortium.influence import (
    PREFIX,
    hiding_influence,
    influenced_here,
    keep_scores,
    measured,
    open_influence,
    strategy_for,
)
from allmend.consortium.offer import Consents, Offer, hiding
from allmend.consortium.own import OwnRun, Sources, same_data
from allmend.consortium.personal import keep_comparison, keep_work
from allmend.consortium.scoring import Moments, Paired
from allmend.data.canaries import canary_of
from allmend.errors import UserError
from allmend.federation.arm import FOLDERS, at_member, strategy_of, trainable_of
from allmend.federation.engines.flower.hidden import HiddenPart
from allmend.federation.engines.flower.site import ArmAtMember, Site, error_answer
from allmend.federation.engines.wire import dump_reply, error_of
from allmend.federation.member import LEARNT, OnStep
from allmend.federation.privacy.vectors import rounding
from allmend.learn.compare import ModelScores
from allmend.learn.evaluate import score
from allmend.learn.noise import NoiseSource, keyed_source
from allmend.learn.scores import read_scores, write_scores
from allmend.mixtures.own import keep_own
from allmend.models.load import LoadedModel
from allmend.models.mixture import Mixture
from allmend.models.tensors import Tensors, parse
from allmend.prepare import EncodedClient
from allmend.recipe import Arm, Recipe
from allmend.results import BASE
from allmend.run import RunFolder, write_atomic
from allmend.strategy import Reply, State, Turn, of_group

_log = logging.getLogger(__name__)

OFFER = "offer.json"
"""The run that the member is in, in its folder: a process that begins anew goes on with it."""


@dataclass(frozen=True)
class Joined:
    """A run that the member has agreed to, with all that it needs in memory."""

    own: OwnRun
    recipe: Recipe
    model: LoadedModel
    client: EncodedClient
    site: Site

    @property
    def offer(self) -> Offer:
        """What it has agreed to."""
        return self.own.offer


FEWEST_SCORED = 5
"""Held-out records below which a member sends no sums over them: they would tell of each."""


@dataclass
class MemberSide:
    """Answers a coordinator's questions.

    Attributes:
        name: the member's, as the coordinator knows it.
        identity: its private key.
        data: its records.
        folder: where it keeps what is its own.
        agree: asks whoever decides, shown the offer, its recipe, the strategies' declarations and the counts of the
            member's own records.
        model: the base model, where the caller has it in memory already.
        source: where to take the base model from instead of the place that the recipe names.
        on_step: told of every optimiser step.
        held_out: records that it is measured on, where they are no part of `data`.
        target: records of what its model is to be good at, for its routers.
    """

    name: str
    identity: Ed25519PrivateKey
    data: Path
    folder: Path
    agree: Callable[[Offer, Recipe, EncodedClient], bool]
    model: LoadedModel | None = None
    source: str | None = None
    on_step: OnStep = lambda name, turn, step: None
    held_out: Path | None = None
    target: Path | None = None
    _joined: Joined | None = field(init=False, default=None)
    declined: bool = field(init=False, default=False)
    refused: UserError | None = field(init=False, default=None)
    """Why this member cannot be in the run that it was offered."""
    _parts: dict[str, HiddenPart] = field(init=False, default_factory=dict)

    def answer(self, question: bytes) -> bytes:
        """The answer to a question; what goes wrong is told in it."""
        about: dict[str, Any] = {}
        try:
            tensors, about = parse(question, where="the coordinator's question")
            match about.get("ask"):
                case "offer":
                    return self._offered(Offer.of(about))
                case "work":
                    return self._worked(self._in(about), about, question)
                case "secure":
                    return self._hidden(self._in(about), about).answer(about, tensors)
                case "score":
                    return dump_reply(self._scored(self._in(about), about, of_group("model", tensors)))
                case "learnt":
                    return dump_reply(self._learnt(self._in(about), about))
                case "keep":
                    return dump_reply(self._keep(self._in(about), about, of_group("model", tensors)))
                case "end":
                    return dump_reply(Reply())
                case other:
                    raise UserError(f"this version cannot answer the question {other!r}", where=f"member {self.name!r}")
        except UserError as error:
            if about.get("ask") == "offer":
                self.refused = error
            return error_answer(error)
        except Exception as error:  # must not end the process; its words may hold a record's, and stay in the own log
            _log.exception("a question could not be answered")
            return error_answer(UserError(f"the question could not be answered ({type(error).__name__})"))

    def resume(self) -> bool:
        """Go on with the run that the member was in; False where it was in none that it has agreed to."""
        path = self.folder / OFFER
        if not path.exists():
            return False
        try:
            offer = Offer.of(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read: {error}", where=path, hint="Delete it and join again.") from error
        if not self._consents.given(offer):
            return False
        self._joined = self._prepare(offer)
        self._joined.own.save()  # its records may lie elsewhere now
        return True

    def close(self) -> None:
        """Let go of the model."""
        if self._joined is not None:
            self._joined.site.close()

    @property
    def _sources(self) -> Sources:
        held_out, target = (None if path is None else str(path) for path in (self.held_out, self.target))
        return Sources(str(self.data), held_out, target, model=self.source)

    @property
    def _consents(self) -> Consents:
        return Consents(self.folder / "consents.json")

    def _in(self, about: dict[str, Any]) -> Joined:
        if self._joined is None or about.get("run") != self._joined.offer.digest:
            raise UserError("this member has not joined that run", where=f"member {self.name!r}")
        return self._joined

    def _offered(self, offer: Offer) -> bytes:
        if self._joined is None or self._joined.offer != offer:
            joined = self._prepare(offer)
            if not self._consents.given(offer):
                if not self.agree(offer, joined.recipe, joined.client):
                    joined.site.close()
                    self.declined = True
                    return dump_reply(Reply(seen_facts={"declined": True}))
                self._consents.give(offer)
            joined.own.save()
            write_atomic(self.folder / OFFER, json.dumps(offer.about).encode(), mode=0o600)
            self.close()
            self._joined = joined
            self._parts.clear()
        return dump_reply(Reply(seen_facts={"accepted": offer.digest}))

    def _prepare(self, offer: Offer) -> Joined:
        where = f"member {self.name!r}"
        if offer.allmend != allmend.__version__:
            raise UserError(
                f"the coordinator has allmend {offer.allmend}, and this member {allmend.__version__}",
                where=where,
                hint="Install the same version at both.",
            )
        recipe = offer.read()
        if self.name not in {client.name for client in recipe.clients}:
            raise UserError("the coordinator's recipe has no client of this name", where=where)
        if offer.keys.get(self.name) != self.identity.public_key().public_bytes_raw():
            raise UserError("the coordinator has another key for this member", where=where)
        sources = self._sources
        model, client = sources.read(self.name, offer, recipe, model=self.model)
        site = Site(
            self.folder / "runs" / offer.digest[:16],
            lambda arm: _open_arm(recipe, model, client, arm),
            self.on_step,
        )
        same_data(site.folder, client.digest, sources.data)
        return Joined(OwnRun(RunFolder(site.folder), self.name, offer, sources), recipe, model, client, site)

    def _worked(self, joined: Joined, about: dict[str, Any], question: bytes) -> bytes:
        answer = joined.site.answer(question)
        if (arm := measured(str(about.get("arm")))) is not None and error_of(parse(answer)[1]) is None:
            state = joined.site.state(PREFIX + arm, {})
            method = strategy_for(joined.recipe).method
            keep_scores(joined.site.folder, joined.client, joined.recipe.arms()[arm], state, method=method)
        return answer

    def _hidden(self, joined: Joined, about: dict[str, Any]) -> HiddenPart:
        """The member's part in an arm's sums."""
        name, recipe = str(about.get("arm")), joined.recipe
        of = measured(name)
        arm = recipe.arms()[self._arm(joined, name if of is None else of)]
        if name not in self._parts:
            joined.site.close()
            with trainable_of(joined.model, arm.adapter, seed=recipe.seed) as trainable:
                initial = trainable.state()
            if of is None:
                agreed = hiding(joined.offer, recipe, arm, strategy_of(arm, seed=recipe.seed), initial)
            else:
                agreed = hiding_influence(joined.offer, recipe, arm, initial) if recipe.influence else None
            if agreed is None:
                raise UserError(f"the recipe forms no sums of arm {name!r} out of sight", where=f"member {self.name!r}")
            self._parts[name] = HiddenPart(
                self.name,
                self.identity,
                agreed,
                joined.site.folder,
                lambda round, leg: joined.site.work(name, round, leg),
                lambda turn: self._source(joined, arm, name, turn),
            )
        return self._parts[name]

    def _source(self, joined: Joined, arm: Arm, name: str, turn: Turn) -> NoiseSource:
        """Random numbers of a leg, the same whenever it is asked for: a sum that is formed again must tell no more."""
        if arm.privacy.randomness == "seeded":
            return rounding("seeded", joined.recipe.seed, name, turn, self.name)
        path = joined.site.folder / "noise.key"
        if not path.exists():
            write_atomic(path, secrets.token_bytes(32), mode=0o600)
        return keyed_source(path.read_bytes(), name, turn.round, turn.leg)

    def _scored(self, joined: Joined, about: dict[str, Any], tensors: Tensors) -> Reply:
        """Sums over the held-out records under a model, and of the differences to others scored before."""
        name, others = str(about.get("model")), [str(other) for other in about.get("others") or ()]
        recipe = joined.recipe
        if name != BASE:
            self._arm(joined, name)
        path = joined.site.folder / "scores" / f"{name}.json"
        if not path.exists():
            held_out, encoded = joined.client.held_out, joined.client.held_out_encoded
            with contextlib.ExitStack() as stack:
                module: Any = joined.model.model
                joined.site.close()
                if name != BASE:
                    adapter = recipe.arms()[name].adapter
                    trainable = stack.enter_context(trainable_of(joined.model, adapter, seed=recipe.seed))
                    trainable.load(tensors or self._personal(joined, name, about))
                    module = trainable.model
                    module.eval()
                found = score(module, held_out, encoded, tokens_per_pass=recipe.evaluation.tokens_per_pass)
            write_scores(path, [ModelScores(name, None, {self.name: found})])
        keep_comparison(joined.own)
        mine = read_scores(path)[0].by_client[self.name]
        if len(mine) < FEWEST_SCORED:
            return Reply()
        facts = Moments.of(mine).facts("held_out")
        for other in others:
            before = joined.site.folder / "scores" / f"{other}.json"
            if (other == BASE or other in recipe.arms()) and before.exists():
                facts |= Paired.of(mine, read_scores(before)[0].by_client[self.name]).facts(f"against {other}")
        return Reply(summed_facts=facts)

    def _arm(self, joined: Joined, name: Any) -> str:
        if name not in joined.recipe.arms():
            raise UserError(f"no arm is called {name!r}", where="the coordinator's question")
        return str(name)

    def _personal(self, joined: Joined, arm: str, about: dict[str, Any]) -> Tensors:
        strategy = strategy_of(joined.recipe.arms()[arm], seed=joined.recipe.seed)
        tensors = strategy.personal(State(), joined.site.state(arm, about))
        if tensors is None:
            raise UserError(f"there is no model of arm {arm!r} here", where=f"member {self.name!r}")
        return tensors

    def _learnt(self, joined: Joined, about: dict[str, Any]) -> Reply:
        """Steps and tokens that each of the member's canaries had; nothing about its own records."""
        arm = self._arm(joined, about.get("arm"))
        counts = joined.site.state(arm, about).tensors.get(LEARNT)
        found: dict[str, list[int]] = {}
        member, _ = at_member(joined.client.member, joined.recipe.arms()[arm])
        for record, (steps, tokens) in zip(member.records, counts.tolist() if counts is not None else (), strict=False):
            if (canary := canary_of(record.id)) is not None:
                before = found.setdefault(canary, [0, 0])
                before[0], before[1] = before[0] + steps, before[1] + tokens
        facts = {f"{canary}/{what}": n for canary, (a, b) in found.items() for what, n in (("steps", a), ("tokens", b))}
        return Reply(seen_facts=dict(facts))

    def _keep(self, joined: Joined, about: dict[str, Any], tensors: Tensors) -> Reply:
        """Save the model that an arm came to, as others would load it, and who answers in a mixture of one's own."""
        arm, recipe = self._arm(joined, about.get("arm")), joined.recipe
        joined.site.close()
        with trainable_of(joined.model, recipe.arms()[arm].adapter, seed=recipe.seed) as trainable:
            outcome, place = tensors or self._personal(joined, arm, about), joined.site.folder / "arms" / arm
            trainable.save(place / FOLDERS[trainable.kind], outcome, base=str(joined.model.folder))
            keep_work(place, joined.site.state(arm, about), trainable=trainable.count)
            if isinstance(trainable, Mixture):
                trainable.load(outcome)
                keep_own(place, trainable, joined.client.member, joined.model.tokenizer, arm=arm)
        return Reply()


@contextlib.contextmanager
def _open_arm(recipe: Recipe, model: LoadedModel, client: EncodedClient, name: str) -> Iterator[ArmAtMember]:
    arms, of = recipe.arms(), measured(name)
    if (name if of is None else of) not in arms or (of is not None and of not in influenced_here(recipe)):
        raise UserError(f"no arm is called {name!r}", where="the coordinator's question")
    if of is not None:
        with open_influence(recipe, model, client, of) as at:
            yield at
        return
    arm = arms[name]
    member, ledger = at_member(client.member, arm)
    hides = arm.privacy.secure_aggregation is not None
    with trainable_of(model, arm.adapter, seed=recipe.seed) as trainable:
        strategy = strategy_of(arm, seed=recipe.seed)
        yield ArmAtMember(strategy, trainable, member, arm.train, hides, ledger, arm.strategy.rounds)
