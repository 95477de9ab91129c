"""What a coordinator offers a member before anything else, and the consent that is bound to it."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allmend.errors import UserError
from allmend.federation.engines.flower.hidden import Hiding
from allmend.federation.keys import parse_public
from allmend.federation.privacy.vectors import codes_of_legs
from allmend.models.tensors import Tensors
from allmend.recipe import AT_MEMBER, HELD_OUT, Arm, ClientSource, Recipe, parse_recipe
from allmend.run import write_atomic
from allmend.strategy import Strategy


@dataclass(frozen=True)
class Offer:
    """A run that members may join.

    Attributes:
        recipe: as TOML, its clients named, their data not.
        members: names and public keys (OpenSSH lines), in order of the names.
        model: digest of the base model's weights.
        allmend: the coordinator's version.
    """

    recipe: str
    members: tuple[tuple[str, str], ...]
    model: str
    allmend: str

    @property
    def digest(self) -> str:
        """SHA-256, 64 hexadecimal digits: what a member agrees to."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def keys(self) -> dict[str, bytes]:
        """The members' raw public keys.

        Raises:
            UserError: one is none.
        """
        return {name: parse_public(line, where=f"member {name!r}") for name, line in self.members}

    @property
    def about(self) -> dict[str, Any]:
        """As a message's facts."""
        return {**asdict(self), "members": [list(pair) for pair in self.members]}

    def read(self) -> Recipe:
        """The recipe.

        Raises:
            UserError: it is none that this version can read.
        """
        return parse_recipe(self.recipe)

    @classmethod
    def of(cls, about: dict[str, Any]) -> "Offer":
        """From a message's facts.

        Raises:
            UserError: they are no offer.
        """
        try:
            recipe, model, version = (about[key] for key in ("recipe", "model", "allmend"))
            members = tuple((str(name), str(line)) for name, line in about["members"])
            if not all(isinstance(value, str) for value in (recipe, model, version)):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "the coordinator's offer lacks a part", hint="Its version may be another: compare them."
            ) from None
        return cls(recipe, members, model, version)


def among(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with the registered members for clients, whose data is theirs alone to know.

    Raises:
        UserError: the recipe asks for what only a simulation can do.
    """
    known = {client.name: client for client in recipe.clients}
    clients = [
        known[name].model_copy(update={"data": AT_MEMBER, "held_out": None, "target": None})
        if name in known
        else ClientSource(name=name, data=AT_MEMBER)
        for name in sorted(names)
    ]
    values = recipe.model_dump()
    values["clients"] = [client.model_dump() for client in clients]
    values["data"]["icd10cm"] = None
    if recipe.influence is not None and (recipe.influence.method, recipe.influence.targets) == ("datainf", "kind"):
        raise UserError(
            "datainf sums something for each target, and members agree to sums before they know the kinds",
            where="influence.targets",
            hint="One target, or gfim, whose sums are the same for any number of them.",
        )
    if recipe.influence is not None and recipe.influence.target != HELD_OUT:
        values["influence"]["target"] = Path(recipe.influence.target).name  # where it lies is the coordinator's affair
    return Recipe.model_validate(values)


def hiding(offer: Offer, recipe: Recipe, arm: Arm, strategy: Strategy, initial: Tensors) -> Hiding | None:
    """What is agreed on about an arm's sums, or None where they are formed in sight; the same at both sides."""
    layer = arm.privacy.secure_aggregation
    if layer is None:
        return None
    codes = codes_of_legs(strategy, initial, layer, len(recipe.clients))
    return Hiding(offer.digest, arm.name, offer.keys, codes, layer)


@dataclass(frozen=True)
class Consents:
    """What a member has agreed to, in a file of its own.

    Attributes:
        path: JSON, one object an offer.
    """

    path: Path

    def given(self, offer: Offer) -> bool:
        """Whether this very offer was agreed to.

        Raises:
            UserError: the file cannot be read.
        """
        return any(entry.get("offer") == offer.digest for entry in self._entries())

    def give(self, offer: Offer) -> None:
        """Keep that it is agreed to."""
        entries = [*self._entries(), {"offer": offer.digest, "time": time.time()}]
        write_atomic(self.path, json.dumps(entries, indent=1).encode(), mode=0o600)

    def _entries(self) -> list[dict[str, Any]]:
        try:
            entries = json.loads(self.path.read_bytes()) if self.path.exists() else []
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError("not a list of objects")
        except (OSError, ValueError) as error:
            raise UserError(f"the consents cannot be read: {error}", where=self.path) from error
        return entries
