"""Who takes part in a run among organisations: the offer, members' consent, and how long and for how many one waits."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from allmend.consortium.influence import influenced_here, layer_of
from allmend.consortium.offer import Offer
from allmend.consortium.questions import Questions
from allmend.errors import UserError
from allmend.events import Joined, Offered, Waiting, Warned
from allmend.models.tensors import dump
from allmend.recipe import Recipe
from allmend.run import EventLog
from allmend.strategy import Reply

ASK_AGAIN = 15.0
"""Seconds after which members are asked anew while somebody has declined: those who have come back hear of it."""

TELL_AGAIN = 60.0
"""Seconds after which the log tells again who is waited for, while nothing has changed."""


@dataclass(frozen=True)
class Patience:
    """How long a coordinator waits, and for how many.

    Attributes:
        join: seconds for members to agree.
        leg: seconds for a leg of a round.
        fewest: members that must agree, and answer in each round.
    """

    join: float = 3600.0
    leg: float = 3600.0
    fewest: int = 2


def fewest_of(recipe: Recipe, patience: Patience) -> int:
    """Members that a run needs: as many as are asked for, and as a sum needs that nobody looks behind."""
    layers = [arm.privacy.secure_aggregation for arm in recipe.arms().values()]
    layers += [layer_of(recipe.arms()[name]) for name in influenced_here(recipe)]
    return max([patience.fewest, *(layer.fewest for layer in layers if layer is not None)])


@dataclass
class WaitLog:
    """Tells the log who is waited for, as seldom as a reader can do with."""

    log: EventLog
    clock: Callable[[], float] = time.monotonic
    _away: Sequence[str] = ()
    _told: float = field(init=False)

    def __post_init__(self) -> None:
        self._told = self.clock()

    def __call__(self, waiting: list[str], away: list[str]) -> None:
        now = self.clock()
        if away != list(self._away) or now - self._told >= TELL_AGAIN:
            self._away, self._told = away, now
            self.log.emit(Waiting(members=waiting, away=away))


def gather(offer: Offer, questions: Questions, *, fewest: int, seconds: float, log: EventLog) -> list[str]:
    """Offer a run to all its members, and wait for their consent.

    Args:
        offer: what they are asked to agree to.
        questions: puts the offer to them.
        fewest: members that must agree.
        seconds: how long to wait.
        log: of events.

    Returns:
        Who has joined, in order.

    Raises:
        UserError: too few agree in time; the message says what came of each.
    """
    everybody = [name for name, _ in offer.members]
    log.emit(Offered(digest=offer.digest, members=everybody))
    question = dump({}, {"ask": "offer", **offer.about})
    told = dict.fromkeys(everybody, "did not come")
    joined, declined, waiting, pause = list[str](), set[str](), set(everybody), 1.0
    end = questions.exchange.clock() + seconds
    # who has declined may think again, as long as others are waited for or too few have joined
    while (waiting or (declined and len(joined) < fewest)) and (left := end - questions.exchange.clock()) > 0:
        left = min(left, ASK_AGAIN) if declined else left
        for name, reply in questions.ask(dict.fromkeys(waiting | declined, question), seconds=left):
            if reply is None:
                continue
            if not isinstance(reply, Reply):  # it may come again, with what was amiss put right
                if told[name] != reply:
                    log.emit(Warned(message=f"{name}: {reply}"))
                told[name] = reply
                continue
            waiting.discard(name)
            if reply.seen_facts.get("accepted") == offer.digest:
                declined.discard(name)
                joined.append(name)
                del told[name]
            elif name not in declined:
                declined.add(name)
                told[name] = "declined"
                log.emit(Warned(message=f"{name}: declined; it may join as long as others are waited for"))
        questions.exchange.sleep(pause)
        pause = min(60.0, 2 * pause)
    joined.sort()
    reasons = [f"{name}: {words}" for name, words in told.items()]
    for name in told:
        if told[name] == "did not come":  # other reasons were told when they came
            log.emit(Warned(message=f"{name}: {told[name]}"))
    if len(joined) < fewest:
        raise UserError(
            f"{len(joined)} of {len(everybody)} members have joined, and {fewest} are the "
            f"fewest" + "".join(f"\n  {words}" for words in reasons),
            where="members",
            hint="Run the same command again: it goes on where it stopped.",
        )
    log.emit(Joined(members=joined))
    return joined
