"""All that is wrong with a recipe in the light of its strategies, files and model, found before anything is loaded.

What is wrong with the recipe by itself is found by `allmend.recipe`; what the data hold, by `allmend.prepare`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from allmend.data.canary_kinds import KINDS
from allmend.data.icd10cm import SPECIALTIES
from allmend.errors import UserError
from allmend.federation.arm import mixture_of, strategy_of
from allmend.federation.collaboration.graph import DENSE
from allmend.federation.strategies import STRATEGIES, options_of
from allmend.federation.strategies.clustered import Clustered
from allmend.federation.strategies.cobo import CoBo
from allmend.federation.strategies.grouped import Grouped
from allmend.federation.strategies.private_fedavg import PrivateFedAvg
from allmend.models.load import LoadedModel, linear_layers
from allmend.models.lora_targets import check_lora
from allmend.models.mixture import check_mixture
from allmend.models.sources import resolve
from allmend.recipe import AT_MEMBER, HELD_OUT, Arm, Problem, Recipe, RecipeError
from allmend.results import member_of
from allmend.strategy import Strategy, Turn


def check(recipe: Recipe, base: Path, *, model: LoadedModel | None = None) -> None:
    """Find everything that is wrong with a recipe in the light of its strategies, files and model.

    Args:
        recipe: valid by itself.
        base: folder that relative paths start from.
        model: the recipe's model, where the caller has it in memory; else it is fetched if it is not there yet.

    Raises:
        RecipeError: all problems at once.
    """
    problems: list[Problem] = []
    arms = recipe.arms()
    names = [client.name for client in recipe.clients] or list(SPECIALTIES)
    for name, arm in arms.items():
        problems += _strategy_problems(
            arm, ("strategy",) if name == recipe.strategy.name else ("compare", name, "strategy"), recipe.seed, names
        )
    problems += _audit_problems(recipe, names)
    problems += influence_problems(recipe, base)
    for index, client in enumerate(recipe.clients):
        if client.data == AT_MEMBER:
            continue
        for field in ("data", "held_out", "target"):
            source = getattr(client, field)
            if source is None or source.startswith("hub:") or (path := base / Path(source).expanduser()).is_file():
                continue
            what = "is a folder, not a file" if path.is_dir() else "is not there (paths start from the recipe's folder)"
            problems.append(Problem(("clients", index, field), f"{path} {what}"))
    try:
        _same_model(recipe, base, model)
        layers = linear_layers(model.folder if model else resolve(source_of(recipe, base)))
    except UserError as error:
        problems.append(Problem(("model", "source"), str(error)))
    else:
        for name, arm in arms.items():
            key = ("adapter",) if name == recipe.strategy.name else ("compare", name, "adapter")
            problems += [Problem(key, found) for found in _adapter_problems(arm, layers)]
            most = arm.adapter.specialists if arm.adapter.kind == "mixture" else None
            for index, client in enumerate(recipe.clients):
                if most is not None and (client.specialists or 0) > most:
                    what = f"there is room for {most} specialists ({name}): lower it, or raise adapter.specialists"
                    problems.append(Problem(("clients", index, "specialists"), what))
    if problems:
        raise RecipeError(_without_repeats(problems))


def _adapter_problems(arm: Arm, layers: Mapping[str, tuple[int, int]]) -> list[str]:
    match arm.adapter.kind:
        case "lora":
            return check_lora(layers, rank=arm.adapter.rank, targets=arm.adapter.targets)
        case "mixture":
            return check_mixture(layers, mixture_of(arm.adapter))
        case _:
            return []


def _strategy_problems(arm: Arm, key: tuple[str, ...], seed: int, clients: Sequence[str]) -> list[Problem]:
    name, options = arm.strategy.name, arm.strategy.options
    unknown = sorted(set(options) - set(options_of(name))) if name in STRATEGIES else []
    if unknown:
        has = ", ".join(options_of(name)) or "none"
        return [Problem((*key, option), f"strategy {name!r} has no such option (it has {has})") for option in unknown]
    try:
        strategy = strategy_of(arm, seed=seed)
        if isinstance(strategy, CoBo) and not strategy.neighbours and not strategy.graph and len(clients) > DENSE:
            raise ValueError(
                f"cobo keeps a weight for each two of at most {DENSE:,} clients, and these are {len(clients):,}; with "
                "neighbours = 8, it looks for partners among those whose gradients are nearest"
            )
        if isinstance(strategy, CoBo | Grouped):
            strategy.check(clients)
    except (ValueError, TypeError) as error:
        return [Problem(key, str(error))]
    except UserError as error:  # the members' budget
        return [Problem((*key[:-1], "privacy", "member", "epsilon"), f"{error.what}. {error.hint}")]
    if (layer := arm.privacy.secure_aggregation) is not None:
        number, drawn = smallest_round(strategy, arm.strategy.rounds, clients)
        if drawn < layer.fewest:
            what = (
                f"a sum is over {layer.fewest} clients or more, and round {number} of arm {arm.name!r} has "
                f"{drawn} of {len(clients)}: add clients, let more of them take part, or remove the layer"
            )
            return [Problem((*key[:-1], "privacy", "secure_aggregation"), what)]
        if isinstance(strategy, Clustered) and strategy.min_group < layer.fewest:
            what = f"a sum is over {layer.fewest} clients or more, and so must a group's be: set it to that"
            return [Problem((*key, "min_group"), what)]
        if isinstance(strategy, Grouped) and (least := strategy.fewest(clients)) < layer.fewest:
            what = (
                f"a sum is over {layer.fewest} clients or more, and arm {arm.name!r} has a group with {least} in a "
                "round, whose sum stands alone: make groups larger, or remove the layer"
            )
            return [Problem((*key[:-1], "privacy", "secure_aggregation"), what)]
    return []


def smallest_round(strategy: Strategy, rounds: int, clients: Sequence[str]) -> tuple[int, int]:
    """The round that the fewest clients are drawn for, and how many they are.

    Coins that the operating system tosses fall otherwise in the run: of these it is the number that is expected, so
    that a recipe which was accepted is accepted again when its run goes on.
    """
    if not (isinstance(strategy, PrivateFedAvg) and strategy.randomness == "seeded"):
        return 1, max(1, round(getattr(strategy, "participation", 1.0) * len(clients)))
    state, turns = strategy.init({}), [Turn(number, 0, rounds, len(clients)) for number in range(1, rounds + 1)]
    sizes = {turn.round: len(strategy.plan(state, turn, clients)) for turn in turns}
    return min(sizes.items(), key=lambda pair: pair[1])


def _audit_problems(recipe: Recipe, names: Sequence[str]) -> list[Problem]:
    arms, problems = recipe.arms(), list[Problem]()
    kinds = recipe.canaries.kinds if recipe.canaries else list(KINDS)
    slots = {slot for kind in kinds for slot in KINDS[kind].slots}
    if unknown := sorted(set(recipe.audit.exposure or ()) - slots):
        what = f"{', '.join(kinds)} canaries have no {', '.join(unknown)} (they have {', '.join(sorted(slots))})"
        problems.append(Problem(("audit", "exposure"), what))
    problems += [Problem(("audit", "models"), what) for what in unknown_models(recipe, names)]
    if recipe.canaries and recipe.audit.models is None and not audited(recipe):
        what = (
            "there is no model to audit: every arm ends with a model for each client, which costs a whole audit. Name "
            f"arms ({', '.join(arms)}) or single models ({next(iter(arms))}/{names[0]}), or remove [canaries]"
        )
        problems.append(Problem(("audit", "models"), what))
    return problems


def unknown_models(recipe: Recipe, clients: Sequence[str]) -> Iterator[str]:
    """What is wrong with the names of the models that are to be audited.

    Args:
        recipe: with `audit.models`.
        clients: all names.
    """
    arms, named = recipe.arms(), recipe.audit.models or []
    for index, name in enumerate(named):
        arm, member = member_of(name)
        if arm not in arms:
            yield f"no arm of this recipe is called {arm!r} (it has {', '.join(arms)})"
        elif name in named[:index]:
            yield f"{name!r} is named twice"
        elif member is None:
            continue
        elif not personal(arms[arm]):
            yield f"{name!r} is no model: all clients share that of {arm!r}, which is named alone"
        elif member not in clients:
            yield f"{name!r} is no model: the clients are {', '.join(clients)}"
        elif arm in named:
            yield f"{name!r} is named twice: it is among the models of {arm!r}"


def personal(arm: Arm) -> bool:
    """Whether an arm ends with a model for each client."""
    return arm.strategy.name in STRATEGIES and not STRATEGIES[arm.strategy.name].shares


def audited(recipe: Recipe) -> list[str]:
    """Arms of which some model is audited, as far as the recipe alone tells."""
    if recipe.audit.models is not None:
        return list(dict.fromkeys(member_of(name)[0] for name in recipe.audit.models))
    return [name for name, arm in recipe.arms().items() if not personal(arm)]


def shared_and_audited(recipe: Recipe) -> list[str]:
    """Those of the audited arms whose clients share one model."""
    return [name for name in audited(recipe) if not personal(recipe.arms()[name])]


def audited_members(recipe: Recipe, arm: str, clients: Sequence[str]) -> list[str]:
    """Clients whose own models of an arm are audited; nobody where all share one, or where the recipe names none."""
    named = recipe.audit.models or []
    if not personal(recipe.arms()[arm]):
        return []
    return [client for client in clients if arm in named or f"{arm}/{client}" in named]


def influenced(recipe: Recipe) -> list[str]:
    """Arms whose influence is measured, as far as the recipe alone tells."""
    if recipe.influence is not None and recipe.influence.arms is not None:
        return list(recipe.influence.arms)
    return [name for name, arm in recipe.arms().items() if not _no_influence(arm)]


def _no_influence(arm: Arm) -> str:
    """Why the influence of records on an arm's model is not measured; empty where it can be."""
    if arm.adapter.kind != "lora":
        return "learns everything, and influence is about the factors of a LoRA adapter"
    if arm.strategy.name in STRATEGIES and not STRATEGIES[arm.strategy.name].shares:
        return "ends with a model for each client, and influence is about one that all share"
    if arm.strategy.name in STRATEGIES and STRATEGIES[arm.strategy.name].pooled:
        return "has all records in one place, and belongs to no client"
    if arm.privacy.record or arm.privacy.member:
        return "promises differential privacy, which what influence sums would not keep"
    return ""


def influence_problems(recipe: Recipe, base: Path) -> list[Problem]:
    """What is wrong with the recipe's `[influence]`."""
    settings, problems = recipe.influence, list[Problem]()
    if settings is None:
        return problems
    arms = recipe.arms()
    for name in settings.arms or ():
        if why := _no_influence(arms[name]):
            problems.append(Problem(("influence", "arms"), f"arm {name!r} {why}"))
    if settings.arms is None and not influenced(recipe):
        reasons = "; ".join(f"{name} {_no_influence(arm)}" for name, arm in arms.items())
        problems.append(Problem(("influence",), f"there is no arm to measure: {reasons}"))
    if settings.target != HELD_OUT and not (base / Path(settings.target).expanduser()).is_file():
        what = f"{base / settings.target} is no file (paths start from the recipe's folder), nor {HELD_OUT}"
        problems.append(Problem(("influence", "target"), what))
    if settings.modules is not None:
        try:
            re.compile(settings.modules)
        except re.error as error:
            problems.append(Problem(("influence", "modules"), f"is no regular expression: {error}"))
    return problems


def _same_model(recipe: Recipe, base: Path, model: LoadedModel | None) -> None:
    if model and model.source not in (recipe.model.source, source_of(recipe, base)):
        raise UserError(
            f"the model in memory is {model.source!r}, and the recipe names {recipe.model.source!r}",
            hint="Name the one that is meant in both places: a run that goes on later loads the recipe's.",
        )


def _without_repeats(problems: Sequence[Problem]) -> list[Problem]:
    """Arms of `[compare]` inherit the recipe's mistakes; say each once."""
    first: dict[Any, Problem] = {}
    for problem in problems:
        first.setdefault(problem.what, problem)
    return list(first.values())


def source_of(recipe: Recipe, base: Path) -> str:
    """The model's source, with a local path made to start from the recipe's folder."""
    local = base / recipe.model.source
    return str(local) if local.exists() else recipe.model.source
