"""A whole recipe, what makes no run of it although each section is valid, and its arms."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Self

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from allmend.recipe.problems import Key, Problem, RecipeError, problems_of
from allmend.recipe.sections import (
    HELD_OUT,
    Adapter,
    Audit,
    Canaries,
    Change,
    ClientSource,
    Data,
    Engine,
    Evaluation,
    Influence,
    Model,
    Name,
    Privacy,
    Section,
    StrategyChoice,
    Train,
)
from allmend.results import BASE, MEMBERS, POOLED, member_of


class Recipe(Section):
    """A whole run. See `docs/recipe.md` for the file with comments."""

    name: Name = "run"
    """The run's; without `--out` the run folder is `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of everything random: the adapter's start, the order of records, sampling, canaries."""
    model: Model = Model()
    data: Data = Data()
    clients: list[ClientSource] = Field(default=[])
    adapter: Adapter = Adapter()
    train: Train = Train()
    strategy: StrategyChoice = StrategyChoice()
    compare: dict[Name, Change] = Field(default={})
    """Further arms next to the recipe's own, trained on the same data: `[compare.local] strategy.name = "local"`."""
    privacy: Privacy = Privacy()
    canaries: Canaries | None = None
    evaluation: Evaluation = Evaluation()
    audit: Audit = Audit()
    influence: Influence | None = None
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        problems = [Problem(key, what) for key, what in self._impossible()]
        try:
            self.arms()
        except RecipeError as error:
            problems += error.problems
        if problems:
            text = "; ".join(map(str, problems))
            raise PydanticCustomError("whole", "{text}", {"text": text, "problems": problems})
        return self

    def _impossible(self) -> Iterator[tuple[Key, str]]:
        """Combinations of valid values that make no run."""
        if self.data.icd10cm and self.clients:
            yield ("clients",), "[data.icd10cm] brings its own clients: remove it or the [[clients]]"
        if not self.data.icd10cm and not self.clients:
            yield ("clients",), "there are none: add [[clients]] with name and data, or [data.icd10cm]"
        # names become file names, which do not differ by case everywhere
        names = [client.name.lower() for client in self.clients]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield ("clients", index, "name"), f"another client has this name: {self.clients[index].name!r}"
            if name in (POOLED, MEMBERS):
                yield ("clients", index, "name"), f"{name!r} stands for all clients in the tables: name it otherwise"
        taken = {self.strategy.name.lower(), BASE}
        for name in self.compare:
            if name.lower() in taken:
                yield ("compare", name), f"there is a model called {name!r} already: give this arm another name"
            taken.add(name.lower())
        if self.canaries and self.canaries.clients and self.clients:
            strangers = sorted(set(self.canaries.clients) - {client.name for client in self.clients})
            if strangers:
                yield ("canaries", "clients"), f"no client of this recipe is called {', '.join(strangers)}"
        named: dict[Key, list[str] | None] = {
            ("audit", "models"): [member_of(name)[0] for name in self.audit.models or ()]
        }
        if self.influence is not None:
            named["influence", "arms"] = self.influence.arms
        for key, models in named.items():
            if unknown := sorted(set(models or ()) - {self.strategy.name, *self.compare}):
                arms = ", ".join(dict.fromkeys((self.strategy.name, *self.compare)))
                yield key, f"no arm of this recipe is called {', '.join(unknown)} (it has {arms})"
        if self.influence is not None and (self.influence.target, self.influence.targets) == (HELD_OUT, "kind"):
            what = "clients' held-out records are summed, and have no kinds then: name a file as target"
            yield ("influence", "targets"), what
        if (it := self.influence) is not None and it.method == "hessian_free" and it.clip is not None:
            what = f"hessian_free has no curvature whose gradients are clipped to {it.clip:g}: remove it"
            yield ("influence", "clip"), what

    def arms(self) -> dict[str, "Arm"]:
        """The recipe's own arm (named after its strategy) and those of `[compare]`, in order.

        Raises:
            RecipeError: a change makes a section invalid.
        """
        arms = {self.strategy.name: Arm(self.strategy.name, self.adapter, self.train, self.strategy, self.privacy)}
        problems: list[Problem] = []
        for name, change in self.compare.items():
            sections: dict[str, Any] = {}
            for section in ("adapter", "train", "strategy"):
                current: BaseModel = getattr(self, section)
                changed: dict[str, Any] = getattr(change, section)
                inherited = current.model_dump(exclude_unset=True)
                lengths = {"local_epochs", "local_steps"}  # to name one replaces the other
                if changed.keys() & lengths:
                    inherited = {key: value for key, value in inherited.items() if key not in lengths}
                merged = inherited | changed
                if section == "strategy" and changed.get("name", self.strategy.name) != self.strategy.name:
                    merged = {"rounds": self.strategy.rounds} | changed  # options belong to the other strategy
                if section == "adapter" and changed.get("kind", self.adapter.kind) != self.adapter.kind:
                    merged = changed  # so do those of an adapter of another kind
                try:
                    sections[section] = type(current).model_validate(merged)
                except ValidationError as error:
                    problems += problems_of(error, type(self), prefix=("compare", name, section))
            try:
                sections["privacy"] = self.privacy if change.privacy is None else Privacy.model_validate(change.privacy)
            except ValidationError as error:
                problems += problems_of(error, type(self), prefix=("compare", name, "privacy"))
            if len(sections) == 4:
                arms[name] = Arm(name, **sections)
        for name, arm in arms.items():
            if arm.train.optimizer == "lionar" and arm.adapter.kind == "full" and not arm.train.weight_decay:
                where: Key = ("train", "weight_decay") if name == self.strategy.name else ("compare", name, "train")
                what = "lionar turns weights by an angle that weight decay sets: set it above 0, such as 0.1"
                problems.append(Problem(where, what))
            if arm.privacy.record and arm.adapter.dropout:
                key = ("adapter", "dropout") if name == self.strategy.name else ("compare", name, "adapter", "dropout")
                what = "what one record changes cannot be bounded with dropout: set it to 0, or remove privacy.record"
                problems.append(Problem(key, what))
            limited = [index for index, client in enumerate(self.clients) if client.rank is not None]
            if arm.privacy.record and arm.adapter.kind == "lora" and limited:
                what = f"noise for records ({name}) goes to all components: remove rank, or privacy.record"
                problems += [Problem(("clients", index, "rank"), what) for index in limited]
            if arm.adapter.learns == "b" and limited:
                what = f"A has all components for every client ({name}): remove rank, or adapter.learns = 'b'"
                problems += [Problem(("clients", index, "rank"), what) for index in limited]
        if problems:
            raise RecipeError(problems)
        return arms

    def to_toml(self) -> str:
        """The recipe as TOML, defaults included, so that a frozen copy does not change with them."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def digest(self) -> str:
        """SHA-256 of what the run's outcome depends on."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


@dataclass(frozen=True)
class Arm:
    """One training of a run: a strategy with its adapter and training settings."""

    name: str
    adapter: Adapter
    train: Train
    strategy: StrategyChoice
    privacy: Privacy
