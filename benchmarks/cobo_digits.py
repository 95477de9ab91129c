"""CoBo among members of hidden groups, against every baseline and the true groups: digits, softmax regression.

80 members in 10 hidden groups of 8, 16 training images of scikit-learn's digits (64 pixels) each; a group renames the
ten labels (`perm`: groups contradict each other) or swaps two of them (`mild`). Test: 497 images, under each member's
own labels. 400 rounds of one full-batch step of 1.0. The strategy is the one that runs use, with clients of a few
numbers in the place of a language model; local, FedAvg, FedAvg with local steps after it, Ditto, IFCA with the true
number of groups, all to all and a random graph of equal density with the same pull, the true graph, the true groups.

    python benchmarks/cobo_digits.py [--seeds 5] [--members 80] [--rounds 400] [--settings perm mild] [--quick]
    python benchmarks/cobo_digits.py --scaling 80 400 2000

Pull and step of the graph (ρ 0.03 and 0.01, γ 100) are those that were chosen by another seed, 100, which is not among
the seeds here. Of fine-tuning the steps and of Ditto the λ with the best test accuracy are shown, in their favour.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from _measure import figure, machine
from allmend.federation.collaboration.graph import Graph
from allmend.federation.collaboration.pull import pull
from allmend.federation.collaboration.sketches import gradient_sketch, sketch_groups
from allmend.federation.collaboration.state import graph_of_state
from allmend.federation.strategies.cobo import CoBo
from allmend.intervals import mean, paired_difference
from allmend.models.tensors import Tensors, nbytes
from allmend.results import Estimate
from allmend.strategy import Reply, Seen, State, Sums, Trained, Turn, of_group

GROUP, IMAGES, TEST, STEP = 8, 16, 497, 1.0
RHO = {"perm": 0.03, "mild": 0.01}
GAMMA = 100.0
TUNING = (1, 3, 10, 30)
LAMBDAS = (0.01, 0.1, 1.0)
NEIGHBOURS, COMMON = 7, 1 / 8
ALL_PAIRS = 400
"""Members up to which every pair has a weight in the comparison of sizes."""


@dataclass(frozen=True)
class World:
    """Images and labels of all members.

    Attributes:
        x: [n, images, 65], with a one for the bias.
        y: [n, images].
        test_x, test_y: [497, 65]; [n, 497], in each member's own labels.
        group: of each member.
    """

    x: torch.Tensor
    y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    group: torch.Tensor


def world(setting: str, members: int, seed: int, groups: int = 10) -> World:
    """Members in hidden groups; images are drawn anew where there are not enough."""
    digits = load_digits()
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(digits.data))
    # about their mean: what all images have in common would drown what members disagree on
    pixels = (digits.data - digits.data.mean(0)) / 16
    x = np.concatenate([pixels, np.ones((len(order), 1))], axis=1)[order]
    y = digits.target[order]
    test, train = slice(0, TEST), slice(TEST, None)
    names = []
    for _ in range(groups):
        renamed = np.arange(10)
        if setting == "perm":
            renamed = generator.permutation(10)
        else:
            a, b = generator.choice(10, 2, replace=False)
            renamed[[a, b]] = renamed[[b, a]]
        names.append(renamed)
    group = np.arange(members) % groups
    every = np.arange(len(y))[train]
    if members * IMAGES <= len(every):
        chosen = generator.permutation(every)[: members * IMAGES].reshape(members, IMAGES)
    else:
        chosen = np.stack([generator.choice(every, IMAGES, replace=False) for _ in range(members)])
    return World(
        torch.tensor(x[chosen], dtype=torch.float32),
        torch.tensor(np.stack([names[g][y[c]] for g, c in zip(group, chosen, strict=True)])),
        torch.tensor(x[test], dtype=torch.float32),
        torch.tensor(np.stack([names[g][y[test]] for g in group])),
        torch.tensor(group),
    )


def gradients(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the mean loss of softmax regression: w [n, 65, 10], x [n, m, 65], y [n, m]."""
    p = (x @ w).softmax(-1)
    p.scatter_add_(2, y[..., None], -torch.ones_like(y, dtype=p.dtype)[..., None])
    return x.mT @ p / x.shape[1]


def accuracy(w: torch.Tensor, at: World) -> float:
    """Mean over members of the share of test images that their model names as they do, in %."""
    return 100 * float(((at.test_x @ w).argmax(-1) == at.test_y).float().mean())


@dataclass
class Softmax:
    """A member as the strategy sees it."""

    name: str
    x: torch.Tensor
    y: torch.Tensor
    examples: int = IMAGES
    initial: Tensors = field(default_factory=lambda: {"w": torch.zeros(65, 10)})
    state: State = field(default_factory=State)

    def train(self, start: Tensors, turn: Turn, *, optimizer: Tensors | None = None, proximal: float = 0.0) -> Trained:
        w = start["w"] - STEP * self.gradient(start, turn)["w"]
        return Trained({"w": w}, 0.0, 1, IMAGES, {})

    def gradient(self, at: Tensors, turn: Turn, *, records: int | None = None, held_out: bool = False) -> Tensors:
        return {"w": gradients(at["w"][None], self.x[None], self.y[None])[0]}


@dataclass
class Found:
    """What a run came to: models, the graph at the end, and by round precision and recall at a weight of a half."""

    w: torch.Tensor
    graph: torch.Tensor
    probes: int
    seconds: float
    history: list[tuple[int, float, float]]
    bytes_up: int


def cobo(strategy: CoBo, at: World, rounds: int, *, every: int = 100) -> Found:
    """The strategy's own rounds, in order and in this process."""
    names = [f"{place:05d}" for place in range(len(at.x))]
    clients = {name: Softmax(name, at.x[place], at.y[place]) for place, name in enumerate(names)}
    state = strategy.init({"w": torch.zeros(65, 10)})
    history, up = [], 0
    start = time.perf_counter()
    for round in range(1, rounds + 1):
        for leg in range(strategy.legs):
            turn, seen, sums = Turn(round, leg, rounds, len(names)), {}, Sums()
            for name, task in strategy.plan(state, turn, names).items():
                reply: Reply = strategy.work(task, clients[name])
                sums.add(reply)
                up += nbytes(reply.seen) + nbytes(reply.summed)
                seen[name] = Seen(reply.seen, reply.seen_facts)
            state = strategy.combine(state, turn, sums, seen)
        if round % every == 0:
            history.append((round, *quality(whole(graph_of_state(state)), at.group)))
    w = torch.stack([of_group("model", clients[name].state.tensors)["w"] for name in names])
    log, graph = state.tensors.get("log", torch.zeros(0)), whole(graph_of_state(state))
    return Found(w, graph, len(log), time.perf_counter() - start, history, up)


def whole(graph: Graph) -> torch.Tensor:
    """w [n, n], strided; the benchmark has room for it."""
    return graph.matrix(range(graph.n)).to_dense()


def quality(w: torch.Tensor, group: torch.Tensor) -> tuple[float, float]:
    """Precision and recall of pairs with a weight above a half against pairs of one group."""
    same, near = pairs_of(group[:, None] == group), pairs_of(w > 0.5)
    both = float((same & near).sum())
    return both / max(float(near.sum()), 1.0), both / float(same.sum())


def pairs_of(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[torch.triu_indices(*matrix.shape, offset=1).unbind()]


def descend(w: torch.Tensor, at: World, rounds: int, mix: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    for _ in range(rounds):
        w = mix(w - STEP * gradients(w, at.x, at.y))
    return w


def averaged(at: World, rounds: int, group: torch.Tensor) -> torch.Tensor:
    """FedAvg within each group."""
    share = (group[:, None] == group).float()
    share /= share.sum(1, keepdim=True)
    return descend(torch.zeros(len(at.x), 65, 10), at, rounds, lambda w: (share @ w.flatten(1)).view_as(w))


def tuned(at: World, rounds: int) -> torch.Tensor:
    """FedAvg, then local steps: as many as do best on the test images."""
    pooled = averaged(at, rounds, torch.zeros_like(at.group))
    ways = [descend(pooled, at, steps, lambda w: w) for steps in TUNING]
    return max(ways, key=lambda w: accuracy(w, at))


def ditto(at: World, rounds: int) -> torch.Tensor:
    """A model of its own for each, held near the shared one (Li et al., ICML 2021); the best λ on the test images."""
    everyone = torch.zeros_like(at.group)
    ways = []
    for strength in LAMBDAS:
        shared, own = torch.zeros(len(at.x), 65, 10), torch.zeros(len(at.x), 65, 10)
        for _ in range(rounds):
            own = own - STEP * (gradients(own, at.x, at.y) + strength * (own - shared)) / (1 + strength)
            shared = shared - STEP * gradients(shared, at.x, at.y)
            shared = shared.mean(0, keepdim=True).expand_as(shared)
        ways.append(own)
    del everyone
    return max(ways, key=lambda w: accuracy(w, at))


def ifca(at: World, rounds: int, clusters: int, starts: int, seed: int) -> list[torch.Tensor]:
    """Each member trains the cluster's model with the least loss (Ghosh et al., NeurIPS 2020); by training loss."""
    found = []
    for start in range(starts):
        generator = torch.Generator().manual_seed(1000 * seed + start)
        models = 0.1 * torch.randn(clusters, 65, 10, generator=generator)
        for _ in range(rounds):
            losses = torch.stack([loss(m.expand(len(at.x), 65, 10), at) for m in models])
            best = losses.argmin(0)
            moved = models[best] - STEP * gradients(models[best], at.x, at.y)
            for cluster in range(clusters):
                if bool((best == cluster).any()):
                    models[cluster] = moved[best == cluster].mean(0)
        losses = torch.stack([loss(m.expand(len(at.x), 65, 10), at) for m in models])
        found.append((float(losses.min(0).values.mean()), models[losses.argmin(0)]))
    return [w for _, w in sorted(found, key=lambda one: one[0])] + [found[0][1]]


def loss(w: torch.Tensor, at: World) -> torch.Tensor:
    """Mean training loss of each member [n]."""
    return (
        torch.nn.functional.cross_entropy((at.x @ w).flatten(0, 1), at.y.flatten(), reduction="none")
        .view(at.y.shape)
        .mean(1)
    )


def pulled(at: World, rounds: int, w: torch.Tensor, rho: float) -> torch.Tensor:
    """A graph that stays as it is."""
    return descend(torch.zeros(len(at.x), 65, 10), at, rounds, lambda x: pull(x.flatten(1), w, rho).view_as(x))


def sketched(at: World, rounds: int, size: int = 256, first: int = 50) -> tuple[torch.Tensor, int]:
    """Groups from sketches of gradients at one point, after some rounds of FedAvg; then FedAvg in each."""
    point = averaged(at, first, torch.zeros_like(at.group))
    halves = [
        torch.stack(
            [gradient_sketch({"w": one}, size, 0) for one in gradients(point, at.x[:, half::2], at.y[:, half::2])]
        )
        for half in range(2)
    ]
    groups = sketch_groups(halves[0], halves[1], most=20)
    return averaged(at, rounds, groups), len(groups.unique())


def random_graph(like: torch.Tensor, seed: int) -> torch.Tensor:
    """With as much weight as another, in random places."""
    values = pairs_of(like)
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
    w = torch.zeros_like(like)
    w[torch.triu_indices(*like.shape, offset=1).unbind()] = shuffled
    return w + w.T


def one_seed(setting: str, members: int, rounds: int, seed: int) -> tuple[dict[str, float], Found, World, int]:
    at = world(setting, members, seed)
    rho = RHO[setting] * 80 / members
    strategy = CoBo(
        rho=rho, graph_step=GAMMA, geometry="factors", freeze_after_visits=10, seed=seed, probe_records=IMAGES
    )
    found = cobo(strategy, at, rounds)
    eager = cobo(replace(strategy, pairs_per_member=8.0), at, rounds)
    same = (at.group[:, None] == at.group).float().fill_diagonal_(0)
    clusters = ifca(at, rounds, 10, 5, seed)
    near = cobo(replace(strategy, rho=RHO["perm"], neighbours=NEIGHBOURS, common_rounds=COMMON), at, rounds)
    in_sketched, count = sketched(at, rounds)
    none = torch.zeros_like(same)
    ways = {
        "local": pulled(at, rounds, none, 0.0),
        "FedAvg": averaged(at, rounds, torch.zeros_like(at.group)),
        "FedAvg + fine-tuning": tuned(at, rounds),
        "Ditto": ditto(at, rounds),
        "IFCA, one start": clusters[-1],
        "IFCA, best of five": clusters[0],
        "all to all": pulled(at, rounds, 1 - torch.eye(members), rho),
        "random graph": pulled(at, rounds, random_graph(found.graph, seed), rho),
        "CoBo": found.w,
        "CoBo, 4 × the pairs": eager.w,
        f"CoBo, {NEIGHBOURS} neighbours by sketches": near.w,
        "groups by sketches": in_sketched,
        "true graph": pulled(at, rounds, same, rho),
        "true groups": averaged(at, rounds, at.group),
    }
    return {name: accuracy(w, at) for name, w in ways.items()}, found, at, count


def scaling(settings: Sequence[str], sizes: Sequence[int], rounds: int) -> None:
    """One seed of each size: what it takes and what comes of it, with all pairs, with neighbours, with groups."""
    for setting in settings:
        for members in sizes:
            at = world(setting, members, 0)
            every = CoBo(rho=RHO[setting] * 80 / members, graph_step=GAMMA, geometry="factors", probe_records=IMAGES)
            near = replace(every, rho=RHO["perm"], neighbours=NEIGHBOURS, common_rounds=COMMON)
            for name, strategy in (("all pairs", every), (f"{NEIGHBOURS} neighbours", near)):
                if strategy is every and members > ALL_PAIRS:
                    continue
                found = cobo(strategy, at, rounds, every=rounds)
                gradients = 2 * found.probes + (members if strategy is near else 0)
                figure(
                    f"{setting}, {members} members, CoBo with {name}",
                    f"{accuracy(found.w, at):.1f} %; {gradients / rounds:.0f} gradients, "
                    f"{found.bytes_up / rounds / members / 1e3:.1f} kB from a member and "
                    f"{found.seconds / rounds:.2f} s a round; precision and recall "
                    + " and ".join(f"{part:.2f}" for part in found.history[-1][1:]),
                )
            start = time.perf_counter()
            w, groups = sketched(at, rounds)
            spent = time.perf_counter() - start
            others = {
                f"{groups} groups by sketches ({spent / rounds:.3f} s a round)": w,
                "local": pulled(at, rounds, torch.zeros(members, members), 0.0),
                "FedAvg, then local steps": tuned(at, rounds),
                "true groups": averaged(at, rounds, at.group),
            }
            for name, w in others.items():
                figure(f"{setting}, {members} members, {name}", f"{accuracy(w, at):.1f} %")


def shown(one: Estimate, sign: str = "") -> str:
    return f"{one.value:{sign}.1f}" + ("" if one.low is None else f" ({one.low:{sign}.1f} to {one.high:{sign}.1f})")


def run(setting: str, members: int, rounds: int, seeds: Sequence[int]) -> None:
    by_way: dict[str, list[float]] = {}
    for seed in seeds:
        accuracies, found, at, groups = one_seed(setting, members, rounds, seed)
        for name, value in accuracies.items():
            by_way.setdefault(name, []).append(value)
        same = pairs_of(at.group[:, None] == at.group)
        weights = pairs_of(found.graph)
        print(
            f"{setting}, seed {seed}: AUC {roc_auc_score(same, weights):.2f}, weight within groups "
            f"{float(weights[same].mean()):.2f}, across {float(weights[~same].mean()):.3f}; {groups} groups by "
            f"sketches; {found.probes} probes, {1e3 * found.seconds / rounds:.0f} ms a round, "
            f"{found.bytes_up / rounds / members:.0f} bytes a member and round; precision, recall by round "
            + ", ".join(f"{round}: {p:.2f} {r:.2f}" for round, p, r in found.history),
            flush=True,
        )
    for name, values in by_way.items():
        figure(f"{setting}, {members} members, {name}: accuracy, %", f"{shown(mean(values))}")
    for name in (
        "local",
        "FedAvg",
        "FedAvg + fine-tuning",
        "Ditto",
        "IFCA, best of five",
        "random graph",
        "true groups",
    ):
        figure(
            f"{setting}, CoBo minus {name}, paired by seed", shown(paired_difference(by_way["CoBo"], by_way[name]), "+")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--members", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--settings", nargs="+", choices=tuple(RHO), default=tuple(RHO))
    parser.add_argument("--scaling", nargs="+", type=int, metavar="MEMBERS", help="sizes to compare instead, one seed")
    parser.add_argument("--quick", action="store_true", help="one seed, 40 members, 60 rounds, one setting")
    options = parser.parse_args()
    print(machine(), flush=True)
    if options.quick:
        run("perm", 40, 60, range(1))
        return
    if options.scaling:
        scaling(options.settings, options.scaling, options.rounds)
        return
    for setting in options.settings:
        run(setting, options.members, options.rounds, range(options.seeds))


if __name__ == "__main__":
    main()
