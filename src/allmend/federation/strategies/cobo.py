"""CoBo: every member keeps a model of its own, and is pulled towards those members whose gradients agree with its own.

min over X of Σ f_i(x_i) + (ρ/2) Σ_{i<j} w_ij |x_i − x_j|², where w_ij in [0, 1] maximises w ⟨∇f_i(z), ∇f_j(z)⟩ at the
midpoint z of x_i and x_j. A round has two legs: members train and show their models, which are pulled; then each gets
its own back, and the members of some pairs, drawn by lot, tell their gradients at the midpoint.

Whom one works with is a statement about training and not about friendship: where two members have each fitted their
own records, their gradients at the midpoint disagree even if both sets of records are of one kind. The graph forms
while models are young, and is frozen after some visits of each pair.

Among many members a pair is visited too rarely for that. With `neighbours`, members first train one model together, of
which only sums leave them; then each shows a sketch of its gradient there, and the graph has only pairs of members
whose sketches are near each other. Probes decide among these.

Source: Hashemi, He, Jaggi, "CoBo: Collaborative Learning via Bilevel Optimization", arXiv 2409.05539, NeurIPS 2024.
Ours are the implicit pull, the geometry of products, the freezing, the automatic step, the sketches and the neighbours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch

from allmend.federation.collaboration.geometry import GEOMETRIES, Geometry
from allmend.federation.collaboration.given import GivenGraph
from allmend.federation.collaboration.graph import Graph, draw, pair_of, update_graph
from allmend.federation.collaboration.probes import (
    PRODUCT,
    WEIGHT,
    empty_log,
    product_and_cosine,
    replayed,
    usual_step,
)
from allmend.federation.collaboration.sketches import gradient_sketch, nearest
from allmend.federation.collaboration.state import adapters_of, drawn_pairs, graph_of_state, members_of, with_graph
from allmend.federation.strategies.fedavg import FedAvg
from allmend.models.tensors import Tensors, is_finite
from allmend.strategy import (
    Client,
    Declaration,
    Facts,
    Layout,
    Reply,
    Seen,
    State,
    Sums,
    Task,
    Turn,
    grouped,
    of_group,
    shapes,
)

TRAIN, PROBE = range(2)
"""The legs."""

TOGETHER = FedAvg()
"""The rounds of one model for all."""

PLACE = "place"
"""Group of what tells a member's neighbours: the direction of its gradient at the common model."""

PATIENCE = 3
"""Probes without a finite gradient after which a member is named."""


class ProbingClient(Client, Protocol):
    """A member whose gradient can be asked for anywhere."""

    def gradient(
        self,
        at: Tensors,
        turn: Turn,
        *,
        records: int | None = None,
        held_out: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Tensors: ...


@dataclass(frozen=True, kw_only=True)
class CoBo:
    """Personal models and the graph between them.

    Args:
        rho: the pull of a round on the difference to a neighbour of weight 1, relative to it. Where local training is
            plain gradient descent, this is the learning rate times the steps times the ρ of the source.
        initial_graph: the weight of every pair in the beginning.
        graph: pairs and their weights in the beginning, `"de-1 de-2 1, de-1 fr-1 0.2"`; of all members that it names,
            no other pairs may work together. Who is not named begins with `initial_graph` towards everybody.
        graph_step: γ, by which a product of gradients moves a weight; 0 chooses it from the first products, so that
            the usual one takes four visits from one end to the other.
        pairs_per_member: pairs that a member is in, on average and round.
        probe_records: records of a gradient at most.
        probe_split: whose gradient: of the records that it trains on, or of those that it holds out.
        freeze_after_visits: probes of each pair, on average, after which the graph stays as it is; 0: never.
        geometry: whether midpoint and pull are of the adapters' products or of their factors.
        neighbours: members that each may be pulled towards, found by sketches, and those that find it; 0: everybody.
        common_rounds: share of the rounds in which there is one model for all, where there are neighbours to find.
        exchange: whether gradients travel as they are, or as sketches of `sketch_size` numbers.
        sketch_size: numbers of a sketch.
        seed: of the pairs and the sketches.
    """

    rho: float = 0.05
    initial_graph: float = 1.0
    graph: str = ""
    graph_step: float = 0.0
    pairs_per_member: float = 2.0
    probe_records: int = 32
    probe_split: Literal["train", "held_out"] = "train"
    freeze_after_visits: int = 10
    geometry: Literal["product", "factors"] = "product"
    neighbours: int = 0
    common_rounds: float = 0.1
    exchange: Literal["gradient", "sketch"] = "gradient"
    sketch_size: int = 256
    seed: int = 0

    name = "cobo"
    legs = 2
    pooled = False
    shares = False

    def __post_init__(self) -> None:
        for option in ("rho", "graph_step", "pairs_per_member", "freeze_after_visits", "neighbours"):
            if not getattr(self, option) >= 0:
                raise ValueError(f"{option} must be 0 or more, got {getattr(self, option)}")
        if not 0 <= self.initial_graph <= 1:
            raise ValueError(f"initial_graph must lie in [0, 1], got {self.initial_graph}")
        if GivenGraph.parsed(self.graph).members and self.neighbours:
            raise ValueError("graph says who may work together, and neighbours looks for it: remove one of the two")
        if not 0 < self.common_rounds <= 1:
            raise ValueError(f"common_rounds must be above 0 and at most 1, got {self.common_rounds}")
        for option in ("probe_records", "sketch_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be 1 or more, got {getattr(self, option)}")
        for option, known in (
            ("probe_split", ("train", "held_out")),
            ("geometry", tuple(GEOMETRIES)),
            ("exchange", ("gradient", "sketch")),
        ):
            if getattr(self, option) not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {getattr(self, option)!r}")

    @property
    def _geometry(self) -> Geometry:
        return GEOMETRIES[self.geometry]

    def declare(self) -> Declaration:
        told = (
            f"a sketch of {self.sketch_size} numbers of the gradient at a midpoint"
            if self.exchange == "sketch"
            else f"the gradient at a midpoint{', twice this size,' if self.geometry == 'product' else ''} for each pair"
        )
        found = {PLACE: f"{self.sketch_size} numbers of the gradient at the common model: it says who is near whom"}
        return Declaration(
            sent="the member's own model after the pull, and for each pair that it is in the other member's model: "
            f"about {self.pairs_per_member:g} others see a member's model in a round",
            summed=({"update": "change of the common model times number of records"} if self.neighbours else {})
            | {
                "weight": "number of training records",
                "loss": "training loss times number of records",
            },
            seen={
                "adapter": "personal models are mixed with weights that differ by member",
                self.exchange: f"{told}: it says which members agree",
            }
            | (found if self.neighbours else {}),
            kept="the member's model and its optimiser",
            numbers=frozenset({"weight", "loss"}),
            seen_by="the coordinator (the adapter also by the other members of its pairs)",
            beyond="gradients at midpoints tell more",
        )

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return shapes(grouped("update", initial)) if self.neighbours and leg == TRAIN else {}

    def init(self, initial: Tensors) -> State:
        found = State(grouped("initial", initial), {"members": ""})
        if self.neighbours:
            sketches = torch.zeros(0, self.sketch_size)
            found.tensors |= grouped("common", initial) | {"sketches": sketches}
        return with_graph(found, Graph.empty())

    def check(self, clients: Sequence[str]) -> None:
        """See that a graph is of these clients.

        Raises:
            ValueError: it names somebody else, or one of them is not named.
        """
        named = GivenGraph.parsed(self.graph).members
        if unknown := sorted(set(named) - set(clients)):
            raise ValueError(f"graph names {', '.join(unknown)}, and there are the clients {', '.join(clients)}")
        if named and (left := sorted(set(clients) - set(named))):
            raise ValueError(
                f"graph does not name {', '.join(left)}: a name alone stands for a client without partners"
            )

    def rounds_together(self, rounds: int) -> int:
        """How many of a run's rounds have one model for all."""
        return max(1, round(self.common_rounds * rounds)) if self.neighbours else 0

    def probes_of_a_pair(self, members: int) -> float:
        """How often a pair is compared in a round with all of these members, on average; with neighbours at least."""
        every = members * (members - 1) / 2
        candidates = min(every, members * self.neighbours) if self.neighbours else every
        if self.graph:
            candidates = min(every, len(GivenGraph.parsed(self.graph).weights))
        return min(1.0, self.pairs_per_member * (members - 1) / 2 / candidates) if candidates else 0.0

    def _together(self, turn: Turn) -> bool:
        return turn.round <= self.rounds_together(turn.rounds)

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        if self._together(turn):
            common = grouped("model", of_group("common", state.tensors))
            return {name: Task(turn, common, {"together": True}, seen={}) for name in sorted(members)}
        return self._to_train(state, turn, members) if turn.leg == TRAIN else self._to_probe(state, turn, members)

    def _to_train(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        known = members_of(state)
        late = set(members) - set(known)
        start: dict[str, Tensors] = {}
        facts: Facts = {}
        shown = shapes(grouped("adapter", of_group("initial", state.tensors)))
        all_shown = shown
        if self.neighbours:
            start = dict.fromkeys(late, grouped("model", of_group("common", state.tensors)))
            facts = {"place": True}
            all_shown = shown | {f"{PLACE}/all": torch.Size([self.sketch_size])}
        elif late and known:
            start = self._means_of_partners(state, sorted(late))
        return {
            name: Task(turn, start.get(name, {}), facts, all_shown) if name in late else Task(turn, seen=shown)
            for name in sorted(members)
        }

    def _to_probe(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        known, adapters = members_of(state), adapters_of(state)
        here = {known[place] for place in state.tensors["present"].nonzero()[:, 0].tolist()} & set(members)
        probes: dict[str, list[tuple[int, str, bool]]] = {name: [] for name in sorted(here)}
        for number, (i, j) in enumerate(drawn_pairs(state).T.tolist()):
            for own, other, first in ((known[i], known[j], True), (known[j], known[i], False)):
                if own in here:
                    probes[own].append((number, other, first))
        like = of_group("initial", state.tensors)
        point = shapes(self._geometry.midpoint(like, like))
        tasks = {}
        for name, mine in probes.items():
            tensors = grouped("model", adapters[name])
            facts: Facts = {}
            seen: Layout = {}
            for number, other, first in mine:
                tensors |= grouped(f"other/{number}", adapters[other])
                facts[f"first/{number}"] = first
                if self.exchange == "sketch":
                    seen[f"sketch/{number}"] = torch.Size([self.sketch_size])
                else:
                    seen |= {f"gradient/{number}/{parameter}": shape for parameter, shape in point.items()}
            tasks[name] = Task(turn, tensors, facts, seen)
        return tasks

    def work(self, task: Task, client: Client) -> Reply:
        if task.turn.leg == TRAIN:
            return self._train(task, client)
        model = of_group("model", task.tensors)
        self._keep(client, model)
        seen: Tensors = {}
        for fact, first in task.facts.items():
            if not fact.startswith("first/"):
                continue
            number = fact.removeprefix("first/")
            other = of_group(f"other/{number}", task.tensors)
            found = self._gradient(
                self._geometry.midpoint(*((model, other) if first else (other, model))), task, client
            )
            if self.exchange == "sketch":
                seen[f"sketch/{number}"] = gradient_sketch(found, self.sketch_size, self.seed)
            else:
                seen |= grouped(f"gradient/{number}", found)
        # one that is not finite would end the run; without it the pair is passed over
        numbers = dict.fromkeys(name.split("/")[1] for name in seen)
        broken = {number for number in numbers if not all(map(is_finite, _of_number(seen, number)))}
        return Reply(seen={name: tensor for name, tensor in seen.items() if name.split("/")[1] not in broken})

    def _train(self, task: Task, client: Client) -> Reply:
        if "together" in task.facts:
            return TOGETHER.work(Task(task.turn, of_group("model", task.tensors)), client)
        start = of_group("model", task.tensors) or of_group("model", client.state.tensors) or client.initial
        place = self._place(start, task, client) if "place" in task.facts else {}
        optimizer = of_group("optimizer", client.state.tensors)
        trained = client.train(start, task.turn, optimizer=optimizer or None)
        self._keep(client, trained.tensors)
        client.state.tensors = client.state.tensors | grouped("optimizer", trained.optimizer)
        weight = float(client.examples)
        loss = {} if trained.loss is None else {"loss": trained.loss * weight}
        return Reply(summed_facts={"weight": weight} | loss, seen=grouped("adapter", trained.tensors) | place)

    def _place(self, common: Tensors, task: Task, client: Client) -> Tensors:
        """A sketch of the direction of the member's gradient at the common model, without its size."""
        sketch = gradient_sketch(self._gradient(common, task, client), self.sketch_size, self.seed)
        return {f"{PLACE}/all": torch.nn.functional.normalize(sketch, dim=0)} if is_finite(sketch) else {}

    def _gradient(self, at: Tensors, task: Task, client: Client) -> Tensors:
        member = cast(ProbingClient, client)
        return member.gradient(at, task.turn, records=self.probe_records, held_out=self.probe_split == "held_out")

    @staticmethod
    def _keep(client: Client, model: Tensors) -> None:
        client.state.tensors = client.state.tensors | grouped("model", model)

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        if self._together(turn):
            if turn.leg == PROBE:
                return state
            common = TOGETHER.combine(State(grouped("model", of_group("common", state.tensors))), turn, sums, seen)
            return State(state.tensors | grouped("common", of_group("model", common.tensors)), state.facts)
        return self._pulled(state, turn, seen) if turn.leg == TRAIN else self._probed(state, turn, seen)

    def _pulled(self, state: State, turn: Turn, seen: Mapping[str, Seen]) -> State:
        """Newcomers are let in, models take their places, are pulled, and pairs are drawn among those who are here.

        Who shows no whole model is taken for absent.
        """
        whole = {f"adapter/{name}" for name in of_group("initial", state.tensors)}
        seen = {name: one for name, one in seen.items() if whole <= one.tensors.keys()}
        state = self._with_newcomers(state, {name: seen[name] for name in sorted(seen)})
        known, graph = members_of(state), graph_of_state(state)
        here = [known.index(name) for name in sorted(seen)]
        models = [of_group("adapter", seen[name].tensors) for name in sorted(seen)]
        found = self._geometry.pulled(models, graph.matrix(here), self.rho)
        tensors = dict(state.tensors)
        for place, model in zip(here, found.models, strict=True):
            tensors |= grouped(f"adapter/{place}", model)
        present = torch.zeros(len(known), dtype=torch.bool)
        present[here] = True
        drawn = torch.empty(0, dtype=torch.int64)
        if not self._frozen(graph):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn.round) % 2**63)
            among = graph.among(here)
            # as many pairs as among everybody, where each is drawn with pairs_per_member / n
            wanted = self.pairs_per_member * (len(here) - 1) / 2
            drawn = among[draw(len(among), wanted / max(len(among), 1), generator)]
        return State(tensors | {"present": present, "drawn": drawn}, state.facts | {"discarded": found.lost})

    def _probed(self, state: State, turn: Turn, seen: Mapping[str, Seen]) -> State:
        """Products move the graph."""
        known, graph = members_of(state), graph_of_state(state)
        drawn, pairs = state.tensors["drawn"], drawn_pairs(state)
        facts = dict(state.facts)
        products, cosines = [], []
        for number, pair in enumerate(pairs.T.tolist()):
            names = [known[place] for place in pair]
            told = [_of_number(seen[name].tensors, str(number)) if name in seen else [] for name in names]
            for name, one in zip(names, told, strict=True):
                if name in seen and not one:
                    facts[f"broken/{name}"] = int(facts.get(f"broken/{name}", 0)) + 1
            product, cosine = product_and_cosine(*told) if all(told) else (math.nan, math.nan)
            products.append(product / (self.sketch_size if self.exchange == "sketch" else 1))
            cosines.append(cosine)
        found = torch.tensor(products, dtype=torch.float64)
        log = state.tensors.get("log", empty_log())
        columns = [torch.full_like(found, turn.round), *pairs.double(), found.new_full(found.shape, math.nan), found]
        rows = torch.stack([*columns, torch.tensor(cosines, dtype=torch.float64)], dim=1)
        log = torch.cat([log, rows])
        step = float(facts.get("step", self.graph_step))
        graph = update_graph(graph, drawn, found, step)
        if step:
            log[len(log) - len(rows) :, WEIGHT] = graph.weights[drawn].double()
        elif (step := usual_step(log[:, PRODUCT], len(known))) > 0:
            # all that waited for a step, in their order
            graph, log = replayed(graph, log, step)
        return with_graph(State(state.tensors | {"log": log}, facts | ({"step": step} if step else {})), graph)

    def _with_newcomers(self, state: State, shown: Mapping[str, Seen]) -> State:
        known, graph = members_of(state), graph_of_state(state)
        new = [name for name in shown if name not in known]
        if not new:
            return state
        n, more = len(known), len(new)
        tensors = dict(state.tensors)
        if self.neighbours:
            nowhere = torch.zeros(self.sketch_size)
            places = [shown[name].tensors.get(f"{PLACE}/all", nowhere) for name in new]
            tensors["sketches"] = torch.cat([tensors["sketches"], torch.stack(places)])
            graph = graph.grown(n + more, nearest(tensors["sketches"], self.neighbours, first=n), self.initial_graph)
        else:
            graph = graph.grown(n + more, *GivenGraph.parsed(self.graph).among([*known, *new], n, self.initial_graph))
        return with_graph(State(tensors, state.facts | {"members": "\n".join([*known, *new])}), graph)

    def _frozen(self, graph: Graph) -> bool:
        return bool(self.freeze_after_visits) and graph.n > 1 and graph.visits_of_a_pair >= self.freeze_after_visits

    def _means_of_partners(self, state: State, late: Sequence[str]) -> dict[str, Tensors]:
        """What those who come late begin with: the mean of whom each is taken to work with; nothing without any."""
        models, given = adapters_of(state), GivenGraph.parsed(self.graph)
        means: dict[tuple[int, ...], Tensors] = {}
        found = {}
        for name in late:
            names = [*models, name]
            numbers, weights = given.among(names, len(models), self.initial_graph)
            partners = tuple(pair_of(numbers[weights > 0])[0].tolist())
            if partners and partners not in means:  # most have the same
                means[partners] = grouped("model", self._geometry.mean([models[names[place]] for place in partners]))
            found[name] = means.get(partners, {})
        return found

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        if "together" in task.facts:
            model = of_group("model", task.tensors)
            return TOGETHER.revealed(Task(task.turn, model), reply) if reply.summed else None
        return of_group("adapter", reply.seen) or None

    def shared(self, state: State) -> Tensors | None:
        return None

    def personal(self, state: State, client: State) -> Tensors | None:
        return of_group("model", client.tensors) or None


def _of_number(tensors: Tensors, number: str) -> list[torch.Tensor]:
    """What was told of a pair, in order of the names."""
    return [tensors[name] for name in sorted(tensors) if name.split("/")[1] == number]
