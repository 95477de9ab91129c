"""Influence in a run that has ended: its members are asked once more, for their consent and then for sums."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import allmend
from allmend.attribution.runs import TABLE, read_aim, with_influence
from allmend.check import influence_problems
from allmend.consortium.gathering import Patience, WaitLog, fewest_of, gather
from allmend.consortium.influence import measure
from allmend.consortium.offer import Offer, among
from allmend.consortium.questions import Questions
from allmend.events import Event
from allmend.federation.engines.flower.exchange import Exchange
from allmend.federation.keys import public_line
from allmend.prepare import differs, prepare_model, read_frozen, threads
from allmend.recipe import RecipeError
from allmend.report.page import write_report
from allmend.results import InfluenceByMember
from allmend.run import RunFolder

GOODBYE = 15.0
"""Seconds in which members hear that there is no more to do."""


def attribute_members(
    out: Path | str,
    members: Mapping[str, bytes],
    *,
    changes: Mapping[str, object],
    open_exchange: Callable[[Path], contextlib.AbstractContextManager[Exchange]],
    patience: Patience,
    again: bool = False,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> InfluenceByMember:
    """Whose data helped, in a finished run among organisations; writes the table and the report.

    Args:
        out: the coordinator's run.
        members: registered members, name → raw public key: those of the run.
        changes: keys of the recipe's `[influence]` and their values for this time; paths are absolute.
        open_exchange: opens the door to the members.
        patience: how long to wait, and for how many.
        again: whether a sum may be formed over other members, or other of their records, than one before.
        listeners: told every event.

    Raises:
        UserError: there is no such run, influence cannot be measured in it, or too few members are there.
    """
    run = RunFolder.open(Path(out))
    with run.lock():
        recipe = with_influence(read_frozen(run), changes)
        if run.facts.get("members") != {name: key.hex() for name, key in members.items()}:
            raise differs("who the members are", run)
        base = Path(str(run.facts["base"]))
        if problems := influence_problems(recipe, base):
            raise RecipeError(problems)
        assert recipe.influence is not None
        model, encoder = prepare_model(recipe, base)
        if model.digest != run.facts.get("model"):
            raise differs("the base model", run)
        aim = read_aim(recipe.influence, recipe, base, encoder)
        recipe = among(recipe, list(members))
        lines = tuple((name, public_line(key)) for name, key in sorted(members.items()))
        offer = Offer(recipe.to_toml(), lines, model.digest, allmend.__version__)
        with threads(recipe), run.log(listeners) as log, open_exchange(run.path) as exchange:
            exchange.on_wait = WaitLog(log)
            questions = Questions(exchange, offer.digest, patience.leg)
            fewest = fewest_of(recipe, patience)
            questions.names = gather(offer, questions, fewest=fewest, seconds=patience.join, log=log)
            table = measure(
                run,
                recipe,
                offer,
                model,
                aim,
                exchange,
                questions.names,
                seconds=patience.leg,
                fewest=fewest,
                emit=log.emit,
                again=again,
            )
            run.write_table(TABLE, table)
            questions.tell(dict.fromkeys(members, questions.question("end")), seconds=GOODBYE)
        write_report(run.path)
    return table
