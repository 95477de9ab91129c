"""CoBo's state at the coordinator: who its members are, their models and their graph, as tensors and facts by name."""

import torch

from allmend.federation.collaboration.graph import Graph
from allmend.models.tensors import Tensors
from allmend.strategy import State, grouped, of_group


def members_of(state: State) -> list[str]:
    """Names of all members that ever took part, in the order of the graph's rows."""
    return [name for name in str(state.facts["members"]).split("\n") if name]


def graph_of_state(state: State) -> Graph:
    """The graph as the coordinator keeps it; its members are those of `members_of`, in their order."""
    own = of_group("graph", state.tensors)
    return Graph(len(members_of(state)), own["numbers"], own["weights"], own["visits"])


def with_graph(state: State, graph: Graph) -> State:
    """A state with another graph."""
    own = {"numbers": graph.numbers, "weights": graph.weights, "visits": graph.visits}
    return State(state.tensors | grouped("graph", own), state.facts)


def drawn_pairs(state: State) -> torch.Tensor:
    """Pairs that are compared in this round, by the places of their members, int64 [2, P]."""
    return graph_of_state(state).pairs[:, state.tensors["drawn"]]


def adapters_of(state: State) -> dict[str, Tensors]:
    """Every member's model, by name, in the order of the graph's rows."""
    found: dict[str, Tensors] = {name: {} for name in members_of(state)}
    names = list(found)
    for key, tensor in of_group("adapter", state.tensors).items():
        place, _, parameter = key.partition("/")
        found[names[int(place)]][parameter] = tensor
    return found
