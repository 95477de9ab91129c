"""How much a run has to do, by phase, and how long that takes on this machine."""

import time

import torch

from allmend.attribution.runs import TABLE, planned_influence
from allmend.audit_runs.runs import planned_work
from allmend.check import audited
from allmend.data.packing import pack
from allmend.federation.arm import strategy_of, tokens_per_round
from allmend.federation.beside import tokens_beside
from allmend.learn.objective import log_likelihood
from allmend.mixtures.routing import TABLE as ROUTING
from allmend.mixtures.routing import planned_routing
from allmend.prepare import Prepared, checkpoints_of
from allmend.results import BASE, InfluenceByMember, RoutingTable
from allmend.run import RunFolder

TRAIN_COST = 2.7
"""What a training token costs, in tokens read; used for times only."""


def work_ahead(prepared: Prepared, run: RunFolder | None = None) -> dict[str, float]:
    """The phases still to do and their cost, in tokens read.

    Args:
        prepared: of the run.
        run: what has been done of it; None before it begins.
    """
    recipe = prepared.recipe
    asked = float(sum(len(one) for client in prepared.held_out_encoded.values() for one in client))
    work = {}
    if run is None or not run.scores(BASE).exists():
        work[f"evaluate {BASE}"] = asked
    for name, arm in recipe.arms().items():
        strategy = strategy_of(arm, seed=recipe.seed)
        if run is None or not run.scores(name).exists():
            done = 0 if run is None else checkpoints_of(run, name).newest_round()
            members, whole = prepared.parties(arm)
            left = (arm.strategy.rounds - done) / arm.strategy.rounds
            tokens = arm.strategy.rounds * tokens_per_round(whole, members) + tokens_beside(strategy, whole, members)
            work[f"train {name}"] = TRAIN_COST * left * tokens
            work[f"evaluate {name}"] = asked * (1 if strategy.shares else len(prepared.members))
    if prepared.canaries:
        work |= planned_work(prepared, [BASE, *audited(recipe)], recipe.audit, run)
    if run is None or run.read_table(TABLE, InfluenceByMember) is None:
        work |= planned_influence(prepared)
    if run is None or run.read_table(ROUTING, RoutingTable) is None:
        work |= planned_routing(prepared)
    return work


@torch.inference_mode()
def reading_rate(prepared: Prepared) -> float:
    """Tokens that the model reads in a second here and now, from the second of two passes over training records."""
    records = [record for member in prepared.members for record in member.records if record.learns]
    row = pack(records[:32], prepared.recipe.train.tokens_per_pass)[0].to(prepared.model.model.device)
    for _ in range(2):
        began = time.perf_counter()
        log_likelihood(prepared.model.model, row).sum().item()  # waits for the device
        seconds = time.perf_counter() - began
    return row.tokens / seconds
