"""What the layers of protection did and what their guarantees have cost, from a run's recipe and log."""

import math
from collections.abc import Sequence

from allmend.audit_runs.learnt import read_layers
from allmend.events import RoundDone
from allmend.federation.checkpoint import Checkpoints
from allmend.federation.privacy.ledger import open_ledger
from allmend.prepare import Prepared
from allmend.results import MEMBERS, Budget, PrivacyTable
from allmend.run import RunFolder


def privacy_table(run: RunFolder, prepared: Prepared) -> PrivacyTable:
    """Every arm's layers in words, and what its guarantees have cost, from the recipe and the run's log."""
    layers, budgets = {}, {}
    history = run.history()
    for name, arm in prepared.recipe.arms().items():
        parties, whole = prepared.protected(arm)
        rounds = [event for event in history if isinstance(event, RoundDone) and event.arm == name]
        done = rounds[-1].took_part if rounds else {}
        # a round that the budget kept from being tried again was begun all the same
        trained = Checkpoints(run.arm(name), identity="").begun(len(rounds) + 1) or done
        found = []
        for party, account in open_ledger(whole, parties).accounts.items():
            if account.settings.clip == math.inf:  # neither clip nor noise: training as without the layer
                continue
            by_round = tuple(event.epsilon.get(party) for event in rounds)
            took_part = len(rounds) if party == MEMBERS else trained.get(party, 0)
            spent = account.epsilon(took_part)
            found.append(
                Budget(
                    unit=account.unit,
                    client=None if party == MEMBERS else party,
                    epsilon=spent if math.isfinite(spent) else None,
                    delta=account.settings.delta,
                    noise_multiplier=account.release.noise_multiplier,
                    clip=account.settings.clip,
                    sampling=account.sampling,
                    steps=account.releases(took_part),
                    by_round=by_round,
                    simulated=arm.privacy.randomness == "seeded",
                    stopped=len(rounds) if 0 < len(rounds) < arm.strategy.rounds else None,
                )
            )
        layers[name] = read_layers(run, name)
        if found:
            budgets[name] = tuple(found)
    return PrivacyTable(layers=layers, budgets=budgets)


def largest_delta(budgets: Sequence[Budget]) -> float:
    """The δ that all of a model's guarantees hold at, 0 without any."""
    return max((budget.delta for budget in budgets), default=0.0)


def accounted_epsilon(budgets: Sequence[Budget]) -> float | None:
    """ε of one record, whosesoever it is: by the records' guarantee, or by the members', which implies it."""
    spent = ([budget.epsilon for budget in budgets if budget.unit == unit] for unit in ("record", "member"))
    return min((max(found) for values in spent if (found := _all_known(values))), default=None)


def _all_known(values: Sequence[float | None]) -> list[float]:
    """The values, or none where a client has no guarantee."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []
