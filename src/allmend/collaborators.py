"""Who works with whom in a run: the graph that CoBo has found, read from an arm's checkpoint."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from allmend.errors import UserError
from allmend.federation.arm import strategy_of
from allmend.federation.collaboration.graph import DENSE, Graph
from allmend.federation.collaboration.probes import WEIGHT, empty_log
from allmend.federation.collaboration.sketches import numbered
from allmend.federation.strategies.cobo import CoBo, graph_of_state, members_of
from allmend.parquet import write_rows
from allmend.prepare import checkpoints_of
from allmend.recipe import Arm, Recipe
from allmend.results import TOGETHER, ArmGraph, CollaboratorsTable, Pair
from allmend.run import RunFolder
from allmend.strategy import State

TABLE = "collaborators"
LOG = "graph.parquet"
"""In an arm's folder: every probe of a pair."""


@dataclass(frozen=True)
class Probe:
    """Two members' gradients at a point between them.

    Attributes:
        round: counts from 1.
        i, j: names of the members.
        w: the pair's weight afterwards; not a number where it was not moved yet.
        product, cosine: of the gradients; not a number where one was none.
    """

    round: int
    i: str
    j: str
    w: float
    product: float
    cosine: float


def collaborating(recipe: Recipe) -> list[Arm]:
    """Arms of a recipe whose members are pulled towards each other."""
    return [arm for arm in recipe.arms().values() if arm.strategy.name == CoBo.name]


def write_graphs(run: RunFolder, recipe: Recipe) -> None:
    """Keep the graphs of all arms that have one, as a table of the run and a log of probes beside each arm.

    Raises:
        UserError: the operating system refused, or a checkpoint cannot be read.
    """
    arms = collaborating(recipe)
    if not arms:
        return
    found = []
    for arm in arms:
        if (state := _state(run, recipe, arm)) is not None:
            found.append(graph_of(arm.name, state[0], state[1], _strategy(arm, recipe)))
            write_rows(run.arm(arm.name) / LOG, Probe, _probes(state[0]))
    run.write_table(TABLE, CollaboratorsTable(arms=tuple(found)))


def read_graph(run: RunFolder, recipe: Recipe, name: str | None = None, *, round: int | None = None) -> ArmGraph:
    """The graph of an arm as it is, or as it was after a round.

    Args:
        run: finished or not.
        recipe: of the run.
        name: of the arm; the recipe's first one with a graph when None.
        round: counts from 1; the last one when None.

    Raises:
        UserError: no arm has a graph, or not this one; no round is done yet, or not so many.
    """
    arms = {arm.name: arm for arm in collaborating(recipe)}
    if not arms or (name is not None and name not in arms):
        raise UserError(
            f"arm {name!r} has no graph of members" if name else "no arm has a graph of members",
            where=run.path,
            hint=f"Arms that do: {', '.join(arms)}." if arms else "The strategy cobo finds one.",
        )
    arm = arms[name] if name else next(iter(arms.values()))
    state = _state(run, recipe, arm)
    if state is None:
        raise UserError(f"arm {arm.name!r} has no finished round yet", where=run.arm(arm.name))
    server, done = state
    if round is not None and not 1 <= round <= done:
        raise UserError(f"there is no round {round}: {done} are done", where="--round")
    return graph_of(arm.name, server, round or done, _strategy(arm, recipe), past=round is not None and round < done)


def graph_of(arm: str, state: State, round: int, strategy: CoBo, *, past: bool = False) -> ArmGraph:
    """A coordinator's state as a table.

    Args:
        arm: its name.
        state: the coordinator's.
        round: after which the graph is wanted.
        strategy: of the arm.
        past: whether the state is a later one, whose log is then read up to the round.
    """
    members, graph = members_of(state), graph_of_state(state)
    log = state.tensors.get("log", empty_log())
    log = log[log[:, 0] <= round]
    if past:
        graph = _as_it_was(graph, log, strategy.initial_graph)
    last: dict[tuple[int, int], tuple[int, float]] = {}
    visits: dict[tuple[int, int], int] = {}
    for when, i, j, _, product, _ in log.tolist():
        if math.isfinite(product):
            pair = (min(int(i), int(j)), max(int(i), int(j)))
            last[pair] = int(when), product
            visits[pair] = visits.get(pair, 0) + 1
    pairs = []
    for (one, other), weight in zip(graph.pairs.T.tolist(), graph.weights.tolist(), strict=True):
        when, found = last.get((one, other), (0, None))
        pairs.append(
            Pair(one=one, other=other, weight=weight, visits=visits.get((one, other), 0), last=when, product=found)
        )
    mean = sum(visits.values()) / len(pairs) if pairs else 0.0
    step = state.facts.get("step", strategy.graph_step)
    return ArmGraph(
        arm=arm,
        members=tuple(members),
        round=round,
        pairs=tuple(pairs),
        groups=tuple(groups_of(graph)),
        frozen=bool(strategy.freeze_after_visits) and bool(pairs) and mean >= strategy.freeze_after_visits,
        step=float(step) or None,
        discarded=float(state.facts.get("discarded", 0.0)),
        broken={
            key.removeprefix("broken/"): int(count) for key, count in state.facts.items() if key.startswith("broken/")
        },
    )


def _as_it_was(graph: Graph, log: torch.Tensor, initial: float) -> Graph:
    """The graph after the probes of a log, from the weights that they left."""
    weights = torch.full_like(graph.weights, initial)
    for probe in log[log[:, WEIGHT].isfinite()]:
        weights[graph.places(probe[1:3, None].long())] = float(probe[WEIGHT])
    return replace(graph, weights=weights)


def groups_of(graph: Graph) -> list[int]:
    """Groups by average linkage of 1 − w, cut at a half, counted from 0 in the order of their members.

    Among more members than may all have a distance from each other, groups are those who are joined by weights above a
    half.
    """
    if graph.n < 2:
        return [0] * graph.n
    if graph.n > DENSE:
        pairs = graph.pairs[:, graph.weights > TOGETHER].numpy()
        joined = coo_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(graph.n, graph.n))
        return numbered(connected_components(joined, directed=False)[1].tolist())
    distances = (1 - graph.matrix(range(graph.n)).double()).fill_diagonal_(0).numpy()
    tree = linkage(squareform(distances, checks=False), method="average")
    return numbered(fcluster(tree, TOGETHER, criterion="distance").tolist())


def _strategy(arm: Arm, recipe: Recipe) -> CoBo:
    strategy = strategy_of(arm, seed=recipe.seed)
    assert isinstance(strategy, CoBo)
    return strategy


def _state(run: RunFolder, recipe: Recipe, arm: Arm) -> tuple[State, int] | None:
    newest = checkpoints_of(run, recipe, arm.name).newest()
    return (newest.server, newest.round) if newest and newest.server.tensors else None


def _probes(state: State) -> list[Probe]:
    members = members_of(state)
    log = state.tensors.get("log", empty_log())
    return [
        Probe(int(round), members[int(i)], members[int(j)], w, product, cosine)
        for round, i, j, w, product, cosine in log.tolist()
    ]
