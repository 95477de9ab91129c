"""CoBo: every member keeps a model of its own, and is pulled towards those members whose gradients agree with its own.

min over X of Σ f_i(x_i) + (ρ/2) Σ_{i<j} w_ij |x_i − x_j|², where w_ij in [0, 1] maximises w ⟨∇f_i(z), ∇f_j(z)⟩ at the
midpoint z of x_i and x_j. A round has two legs: members train and show their models, which are pulled; then each gets
its own back, and the members of some pairs, drawn by lot, tell their gradients at the midpoint.

Whom one works with is a statement about training and not about friendship: where two members have each fitted their
own records, their gradients at the midpoint disagree even if both sets of records are of one kind. The graph forms
while models are young, and is frozen after some visits of each pair.

Source: Hashemi, He, Jaggi, "CoBo: Collaborative Learning via Bilevel Optimization", arXiv 2409.05539, NeurIPS 2024.
Ours are the implicit pull, the geometry of products, the freezing, the automatic step and the sketches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, Protocol, cast

import torch

from allmend.federation.collaboration.geometry import GEOMETRIES, Geometry
from allmend.federation.collaboration.graph import sample_pairs, update_graph
from allmend.federation.collaboration.sketches import gradient_sketch
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

VISITS = 4
"""Probes in which a product of the usual size takes a weight from one end to the other, where the step is `auto`."""

PATIENCE = 3
"""Probes without a finite gradient after which a member is named."""

PROBED = ("round", "i", "j", "w", "product", "cosine")
"""Columns of the log of probes, `log` in the coordinator's state; members by their places in `members`."""


class ProbingClient(Client, Protocol):
    """A member whose gradient can be asked for anywhere."""

    def gradient(self, at: Tensors, turn: Turn, *, records: int | None = None, held_out: bool = False) -> Tensors: ...


@dataclass(frozen=True, kw_only=True)
class CoBo:
    """Personal models and the graph between them.

    Args:
        rho: the pull of a round on the difference to a neighbour of weight 1, relative to it. Where local training is
            plain gradient descent, this is the learning rate times the steps times the ρ of the source.
        initial_graph: the weight of every pair in the beginning.
        graph_step: γ, by which a product of gradients moves a weight; 0 chooses it from the first products, so that
            the usual one takes four visits from one end to the other.
        pairs_per_member: pairs that a member is in, on average and round.
        probe_records: records of a gradient at most.
        probe_split: whose gradient: of the records that it trains on, or of those that it holds out.
        freeze_after_visits: probes of each pair, on average, after which the graph stays as it is; 0: never.
        geometry: whether midpoint and pull are of the adapters' products or of their factors.
        exchange: whether gradients travel as they are, or as sketches of `sketch_size` numbers.
        sketch_size: numbers of a sketch.
        seed: of the pairs and the sketches.
    """

    rho: float = 0.05
    initial_graph: float = 1.0
    graph_step: float = 0.0
    pairs_per_member: float = 2.0
    probe_records: int = 32
    probe_split: Literal["train", "held_out"] = "train"
    freeze_after_visits: int = 10
    geometry: Literal["product", "factors"] = "product"
    exchange: Literal["gradient", "sketch"] = "gradient"
    sketch_size: int = 256
    seed: int = 0

    name = "cobo"
    legs = 2
    pooled = False
    shares = False

    def __post_init__(self) -> None:
        for option in ("rho", "graph_step", "pairs_per_member", "freeze_after_visits"):
            if not getattr(self, option) >= 0:
                raise ValueError(f"{option} must be 0 or more, got {getattr(self, option)}")
        if not 0 <= self.initial_graph <= 1:
            raise ValueError(f"initial_graph must lie in [0, 1], got {self.initial_graph}")
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
        return Declaration(
            sent="the member's own model after the pull, and for each pair that it is in the other member's model: "
            f"about {self.pairs_per_member:g} others see a member's model in a round",
            summed={
                "weight": "number of training records",
                "loss": "training loss times number of records",
            },
            seen={
                "adapter": "personal models are mixed with weights that differ by member",
                self.exchange: f"{told}: it says which members agree",
            },
            kept="the member's model and its optimiser",
            numbers=frozenset({"weight", "loss"}),
            seen_by="the coordinator (the adapter also by the other members of its pairs)",
        )

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return {}

    def init(self, initial: Tensors) -> State:
        return State(
            {"w": torch.zeros(0, 0), "visits": torch.zeros(0, 0, dtype=torch.int64)} | grouped("initial", initial),
            {"members": ""},
        )

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        return self._to_train(state, turn, members) if turn.leg == TRAIN else self._to_probe(state, turn, members)

    def _to_train(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        known = members_of(state)
        late = set(members) - set(known)
        start = grouped("model", self._mean(state)) if late and known and self.initial_graph else {}
        shown = shapes(grouped("adapter", of_group("initial", state.tensors)))
        return {name: Task(turn, start if name in late else {}, seen=shown) for name in sorted(members)}

    def _to_probe(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        known, adapters = members_of(state), _adapters(state)
        here = {known[place] for place in state.tensors["present"].nonzero()[:, 0].tolist()} & set(members)
        probes: dict[str, list[tuple[int, str, bool]]] = {name: [] for name in sorted(here)}
        for number, (i, j) in enumerate(state.tensors["pairs"].T.tolist()):
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
        member = cast(ProbingClient, client)
        seen: Tensors = {}
        for fact, first in task.facts.items():
            number = fact.removeprefix("first/")
            other = of_group(f"other/{number}", task.tensors)
            point = self._geometry.midpoint(*((model, other) if first else (other, model)))
            found = member.gradient(
                point, task.turn, records=self.probe_records, held_out=self.probe_split == "held_out"
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
        start = of_group("model", client.state.tensors) or of_group("model", task.tensors) or client.initial
        optimizer = of_group("optimizer", client.state.tensors)
        trained = client.train(start, task.turn, optimizer=optimizer or None)
        self._keep(client, trained.tensors)
        client.state.tensors = client.state.tensors | grouped("optimizer", trained.optimizer)
        weight = float(client.examples)
        loss = {} if trained.loss is None else {"loss": trained.loss * weight}
        return Reply(summed_facts={"weight": weight} | loss, seen=grouped("adapter", trained.tensors))

    @staticmethod
    def _keep(client: Client, model: Tensors) -> None:
        client.state.tensors = client.state.tensors | grouped("model", model)

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        return self._pulled(state, turn, seen) if turn.leg == TRAIN else self._probed(state, turn, seen)

    def _pulled(self, state: State, turn: Turn, seen: Mapping[str, Seen]) -> State:
        """Newcomers are let in, models take their places, are pulled, and pairs are drawn among those who are here.

        Who shows no whole model is taken for absent.
        """
        whole = {f"adapter/{name}" for name in of_group("initial", state.tensors)}
        seen = {name: one for name, one in seen.items() if one.tensors.keys() == whole}
        state = self._with_newcomers(state, sorted(seen))
        known = members_of(state)
        here = [known.index(name) for name in sorted(seen)]
        models = [of_group("adapter", seen[name].tensors) for name in sorted(seen)]
        w = state.tensors["w"]
        found = self._geometry.pulled(models, w[here][:, here], self.rho)
        tensors = dict(state.tensors)
        for place, model in zip(here, found.models, strict=True):
            tensors |= grouped(f"adapter/{place}", model)
        present = torch.zeros(len(known), dtype=torch.bool)
        present[here] = True
        pairs = torch.empty(2, 0, dtype=torch.int64)
        if not self._frozen(state):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn.round) % 2**63)
            among = sample_pairs(len(here), self.pairs_per_member / max(len(here), 1), generator)
            pairs = torch.tensor(here, dtype=torch.int64)[among]
        return State(tensors | {"present": present, "pairs": pairs}, state.facts | {"discarded": found.lost})

    def _probed(self, state: State, turn: Turn, seen: Mapping[str, Seen]) -> State:
        """Products move the graph."""
        known = members_of(state)
        pairs = state.tensors["pairs"]
        facts = dict(state.facts)
        products, cosines = [], []
        for number, pair in enumerate(pairs.T.tolist()):
            names = [known[place] for place in pair]
            told = [_of_number(seen[name].tensors, str(number)) if name in seen else [] for name in names]
            for name, one in zip(names, told, strict=True):
                if name in seen and not one:
                    facts[f"broken/{name}"] = int(facts.get(f"broken/{name}", 0)) + 1
            product, cosine = _product(*told) if all(told) else (math.nan, math.nan)
            products.append(product / (self.sketch_size if self.exchange == "sketch" else 1))
            cosines.append(cosine)
        found = torch.tensor(products, dtype=torch.float64)
        log = state.tensors.get("log", torch.zeros(0, len(PROBED), dtype=torch.float64))
        columns = [torch.full_like(found, turn.round), *pairs.double(), found.new_full(found.shape, math.nan), found]
        rows = torch.stack([*columns, torch.tensor(cosines, dtype=torch.float64)], dim=1)
        log = torch.cat([log, rows])
        w, step = state.tensors["w"], float(facts.get("step", self.graph_step))
        if step:
            w = update_graph(w, pairs, found, step)
            log[len(log) - len(rows) :, 3] = w[pairs[0], pairs[1]].double()
        elif (step := _usual_step(log[:, 4], len(known))) > 0:
            # all that waited for a step, in their order
            w = self._replayed(w, log, step)
        visits = state.tensors["visits"].clone()
        ones = found.isfinite().long()
        visits[pairs[0], pairs[1]] += ones
        visits[pairs[1], pairs[0]] += ones
        tensors = state.tensors | {"w": w, "visits": visits, "log": log}
        return State(tensors, facts | ({"step": step} if step else {}))

    @staticmethod
    def _replayed(w: torch.Tensor, log: torch.Tensor, step: float) -> torch.Tensor:
        for round in dict.fromkeys(log[:, 0].tolist()):
            rows = (log[:, 0] == round).nonzero()[:, 0]
            pairs = log[rows, 1:3].long().T
            w = update_graph(w, pairs, log[rows, 4], step)
            log[rows, 3] = w[pairs[0], pairs[1]].double()
        return w

    def _with_newcomers(self, state: State, names: Sequence[str]) -> State:
        known = members_of(state)
        new = [name for name in names if name not in known]
        if not new:
            return state
        n, more = len(known), len(new)
        w = torch.full((n + more, n + more), self.initial_graph).fill_diagonal_(0)
        w[:n, :n] = state.tensors["w"]
        visits = torch.zeros(n + more, n + more, dtype=torch.int64)
        visits[:n, :n] = state.tensors["visits"]
        return State(state.tensors | {"w": w, "visits": visits}, state.facts | {"members": "\n".join([*known, *new])})

    def _frozen(self, state: State) -> bool:
        visits = state.tensors["visits"]
        n = len(visits)
        return (
            bool(self.freeze_after_visits) and n > 1 and float(visits.sum()) / (n * (n - 1)) >= self.freeze_after_visits
        )

    def _mean(self, state: State) -> Tensors:
        """What who comes late begins with: the mean of all, since it is taken to work with each of them."""
        return self._geometry.mean(list(_adapters(state).values()))

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        return of_group("adapter", reply.seen) or None

    def shared(self, state: State) -> Tensors | None:
        return None

    def personal(self, state: State, client: State) -> Tensors | None:
        return of_group("model", client.tensors) or None


def members_of(state: State) -> list[str]:
    """Names of all members that ever took part, in the order of the graph's rows."""
    return [name for name in str(state.facts["members"]).split("\n") if name]


def _adapters(state: State) -> dict[str, Tensors]:
    """Every member's model, by name, in the order of the graph's rows."""
    found: dict[str, Tensors] = {name: {} for name in members_of(state)}
    names = list(found)
    for key, tensor in of_group("adapter", state.tensors).items():
        place, _, parameter = key.partition("/")
        found[names[int(place)]][parameter] = tensor
    return found


def _of_number(tensors: Tensors, number: str) -> list[torch.Tensor]:
    """What was told of a pair, in order of the names."""
    return [tensors[name] for name in sorted(tensors) if name.split("/")[1] == number]


def _product(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, float]:
    """⟨g, h⟩, and the cosine."""
    pairs = list(zip(one, other, strict=True))
    product = sum(float((a.double() * b.double()).sum()) for a, b in pairs)
    squares = [sum(float(part.double().square().sum()) for part in some) for some in (one, other)]
    size = math.sqrt(squares[0] * squares[1])
    return product, product / size if size else 0.0


def _usual_step(products: torch.Tensor, members: int) -> float:
    """γ with which the median of the first products crosses [0, 1] in four visits; 0 while there are too few."""
    sizes = [abs(one) for one in products.tolist() if math.isfinite(one) and one]
    return 1 / (VISITS * median(sizes)) if sizes and len(sizes) >= members else 0.0
