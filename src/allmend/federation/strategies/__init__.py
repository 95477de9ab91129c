"""The strategies by name. Adding one takes a file beside this one and a line here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from allmend.federation.strategies.centralised import Centralised
from allmend.federation.strategies.clustered import Clustered
from allmend.federation.strategies.cobo import CoBo
from allmend.federation.strategies.comigs import CoMiGS
from allmend.federation.strategies.ditto import Ditto
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.fedopt import FedAdam, FedYogi
from allmend.federation.strategies.fedprox import FedProx
from allmend.federation.strategies.finetuned import FineTuned
from allmend.federation.strategies.grouped import Grouped
from allmend.federation.strategies.ifca import IFCA
from allmend.federation.strategies.local import Local
from allmend.federation.strategies.product import FedAvgProduct
from allmend.federation.strategies.robust import Krum, Median, TrimmedMean
from allmend.strategy import Strategy

STRATEGIES: dict[str, type[Any]] = {
    "fedavg": FedAvg,
    "fedavg_product": FedAvgProduct,
    "fedprox": FedProx,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "trimmed_mean": TrimmedMean,
    "median": Median,
    "krum": Krum,
    "cobo": CoBo,
    "comigs": CoMiGS,
    "clustered": Clustered,
    "ditto": Ditto,
    "finetuned": FineTuned,
    "ifca": IFCA,
    "grouped": Grouped,
    "local": Local,
    "centralised": Centralised,
}


def options_of(name: str) -> dict[str, Any]:
    """Names and defaults of a strategy's options, `seed` aside (it is the recipe's)."""
    return {option.name: option.default for option in dataclasses.fields(STRATEGIES[name]) if option.name != "seed"}


def build_strategy(name: str, options: Mapping[str, Any], *, seed: int) -> Strategy:
    """A strategy from its name and the recipe's options.

    Raises:
        ValueError: no such strategy, an option that it does not have, or a value that it refuses.
    """
    if name not in STRATEGIES:
        raise ValueError(f"no strategy {name!r}; there are {', '.join(sorted(STRATEGIES))}")
    kind = STRATEGIES[name]
    known = options_of(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        has = f"has {', '.join(known)}" if known else "has no options"
        raise ValueError(f"strategy {name!r} has no option {', '.join(unknown)} (it {has})")
    for option, value in options.items():
        number = isinstance(known[option], float)
        if isinstance(value, bool) or not isinstance(value, (int, float) if number else type(known[option])):
            expected = "a number" if number else f"of type {type(known[option]).__name__}"
            raise ValueError(f"{option} of strategy {name!r} must be {expected}, got {value!r}")
    seeded = {"seed": seed} if any(option.name == "seed" for option in dataclasses.fields(kind)) else {}
    built: Strategy = kind(**options, **seeded)
    return built
