"""Who works with whom in a run: graphs and groups that members have found, read from an arm's checkpoint."""

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
from allmend.federation.collaboration.sketches import cosines, numbered
from allmend.federation.collaboration.state import graph_of_state, members_of
from allmend.federation.strategies.clustered import ALONE, Clustered, groups_in, has_groups, members_told
from allmend.federation.strategies.cobo import CoBo
from allmend.parquet import write_rows
from allmend.prepare import checkpoints_of
from allmend.recipe import Arm, Recipe
from allmend.results import TOGETHER, ArmGraph, ArmGroups, CollaboratorsTable, Grouped, Pair
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
    """Arms of a recipe whose members are pulled towards each other, or find groups."""
    return [arm for arm in recipe.arms().values() if arm.strategy.name in (CoBo.name, Clustered.name)]


def write_collaborators(run: RunFolder, recipe: Recipe) -> None:
    """Keep the graphs and groups of all arms that have them, as a table of the run, and a log of probes beside an arm.

    Raises:
        UserError: the operating system refused, or a checkpoint cannot be read.
    """
    found: list[ArmGraph | ArmGroups] = []
    for arm in collaborating(recipe):
        if (state := _state(run, recipe, arm)) is None:
            continue
        strategy = strategy_of(arm, seed=recipe.seed)
        if isinstance(strategy, CoBo):
            found.append(graph_of(arm.name, *state, strategy))
            write_rows(run.arm(arm.name) / LOG, Probe, _probes(state[0]))
        elif isinstance(strategy, Clustered) and has_groups(state[0]):
            found.append(groups_of_state(arm.name, state[0], strategy.rounds_together(arm.strategy.rounds)))
    if found:
        graphs = tuple(one for one in found if isinstance(one, ArmGraph))
        grouped = tuple(one for one in found if isinstance(one, ArmGroups))
        run.write_table(TABLE, CollaboratorsTable(arms=graphs, grouped=grouped))


def read_collaborators(
    run: RunFolder, recipe: Recipe, name: str | None = None, *, round: int | None = None
) -> ArmGraph | ArmGroups:
    """The graph of an arm as it is, or as it was after a round; or its groups, which are found once.

    Args:
        run: finished or not.
        recipe: of the run.
        name: of the arm; the recipe's first one with a graph or groups when None.
        round: counts from 1; the last one when None.

    Raises:
        UserError: no arm has a graph or groups, or not this one; no round is done yet, or not so many; groups are not
            found yet, or were not after that round.
    """
    arms = {arm.name: arm for arm in collaborating(recipe)}
    if not arms or (name is not None and name not in arms):
        raise UserError(
            f"arm {name!r} has no graph or groups of members" if name else "no arm has a graph or groups of members",
            where=run.path,
            hint=f"Arms that do: {', '.join(arms)}." if arms else "The strategies cobo and clustered find them.",
        )
    arm = arms[name] if name else next(iter(arms.values()))
    state = _state(run, recipe, arm)
    if state is None:
        raise UserError(f"arm {arm.name!r} has no finished round yet", where=run.arm(arm.name))
    server, done = state
    if round is not None and not 1 <= round <= done:
        raise UserError(f"there is no round {round}: {done} are done", where="--round")
    strategy = strategy_of(arm, seed=recipe.seed)
    if isinstance(strategy, CoBo):
        return graph_of(arm.name, server, round or done, strategy, past=round is not None and round < done)
    assert isinstance(strategy, Clustered)
    first = strategy.rounds_together(arm.strategy.rounds)
    if not has_groups(server) or (round or done) < first:
        raise UserError(f"groups of arm {arm.name!r} are found after round {first}", where=run.arm(arm.name))
    return groups_of_state(arm.name, server, first)


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


def groups_of_state(arm: str, state: State, round: int) -> ArmGroups:
    """The groups that a coordinator's state has, with cosines of the gradients that they come from.

    Args:
        arm: its name.
        state: the coordinator's, once groups are found.
        round: after which they were.
    """
    group = groups_in(state)
    told = members_told(state)
    near = cosines(state.tensors["sketches"])
    rows = []
    for name in sorted(group, key=lambda name: (group[name] < 0, group[name], name)):
        means: dict[int, float] = {}
        if name in told:
            others = [other for other in told if other != name]
            for of in {group[other] for other in others} - {ALONE}:
                places = [told.index(other) for other in others if group[other] == of]
                means[of] = float(near[told.index(name), places].mean())
        rest = [mean for of, mean in means.items() if of != group[name]]
        own = means.get(group[name])
        rows.append(Grouped(member=name, group=group[name], own=own, next=max(rest, default=None)))
    return ArmGroups(arm=arm, round=round, members=tuple(rows))


def _state(run: RunFolder, recipe: Recipe, arm: Arm) -> tuple[State, int] | None:
    newest = checkpoints_of(run, arm.name).newest()
    return (newest.server, newest.round) if newest and newest.server.tensors else None


def _probes(state: State) -> list[Probe]:
    members = members_of(state)
    log = state.tensors.get("log", empty_log())
    return [
        Probe(int(round), members[int(i)], members[int(j)], w, product, cosine)
        for round, i, j, w, product, cosine in log.tolist()
    ]
