"""A member's own folder of a run: what it has agreed to, and where its records lie on its machine.

```
FOLDER/
  offer.json                       the offer that the member goes on with when it joins again
  consents.json                    what it has agreed to
  runs/<hash>/member.json          the offer, the member's name, and where its records and its model lie
  runs/<hash>/data.json            digest of the records
  runs/<hash>/arms/<arm>/          states, answers, and the model that the arm came to
  runs/<hash>/scores/<arm>.json    what each model made of the member's held-out records
  runs/<hash>/personalised.html    these side by side; personalised.json has the figures
```
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from allmend.consortium.offer import Offer
from allmend.data.canaries import Canary, plant
from allmend.data.files import load_client
from allmend.data.records import ClientData
from allmend.errors import UserError
from allmend.models.load import LoadedModel
from allmend.prepare import EncodedClient, encode_client, prepare_model
from allmend.recipe import Recipe
from allmend.run import RunFolder, write_atomic

MEMBER = "member.json"

DATA = "data.json"


@dataclass(frozen=True)
class Sources:
    """Where a member has what it takes part with. None of it is told to anybody.

    Attributes:
        data: its records.
        held_out: records that it is measured on, where they are no part of `data`.
        target: records of what its model is to be good at.
        model: where to take the base model from instead of the place that the recipe names.
        base: folder that relative paths start from.
    """

    data: str
    held_out: str | None = None
    target: str | None = None
    model: str | None = None
    base: str = ""

    def read(
        self, name: str, offer: Offer, recipe: Recipe, *, model: LoadedModel | None = None
    ) -> tuple[LoadedModel, EncodedClient]:
        """The base model and the member's records as the run takes them.

        Args:
            name: the member's.
            offer, recipe: of the run.
            model: the base model, where the caller has it in memory already.

        Raises:
            UserError: one of them cannot be read, the model is not the offer's, or a canary's secret is in a record.
        """
        base, local = Path(self.base), recipe
        if self.model is not None:
            local = recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": self.model})})
        loaded, encoder = prepare_model(local, base, model=model)
        if loaded.digest != offer.model:
            raise UserError(
                "the base model here has other weights than the coordinator's",
                where=f"member {name!r}",
                hint="Fetch it again, or name the same one with --model.",
            )
        data = load_client(
            name,
            self.data,
            fields=recipe.data.fields,
            held_out=recipe.data.held_out,
            base=base,
            own_held_out=self.held_out,
            target=self.target,
        )
        return loaded, encode_client(recipe, data, encoder, _planted(recipe, data))


@dataclass(frozen=True)
class OwnRun:
    """A run at one of its members.

    Attributes:
        run: its folder there: arms and scores lie as in a run.
        member: its name.
        offer: what it has agreed to.
        sources: its records.
    """

    run: RunFolder
    member: str
    offer: Offer
    sources: Sources

    @property
    def recipe(self) -> Recipe:
        """What the run does."""
        return self.offer.read()

    def save(self) -> None:
        """Write it into its folder, for its member alone to read.

        Raises:
            UserError: the operating system refused.
        """
        sources = replace(self.sources, base=str(Path(self.sources.base).resolve()))
        about = {"member": self.member, "offer": self.offer.about, "sources": asdict(sources)}
        write_atomic(self.run.path / MEMBER, json.dumps(about, indent=1).encode(), mode=0o600)

    def read(self, *, model: LoadedModel | None = None) -> tuple[LoadedModel, EncodedClient]:
        """The base model and the member's records, which must be those that the run was begun with.

        Raises:
            UserError: they are not, or cannot be read.
        """
        loaded, client = self.sources.read(self.member, self.offer, self.recipe, model=model)
        same_data(self.run.path, client.digest, self.sources.data)
        return loaded, client


def is_own(path: Path) -> bool:
    """Whether a folder is a member's, or one of its runs."""
    return (path / MEMBER).is_file() or any(path.glob(f"runs/*/{MEMBER}"))


def open_own(path: Path) -> OwnRun:
    """A run in a member's folder, or the folder of the run itself.

    Raises:
        UserError: no run is there, the folder has several with a model or a score, or what is there cannot be read.
    """
    found = path / MEMBER
    if not found.is_file():
        every = sorted(path.glob(f"runs/*/{MEMBER}"))
        # a member may have been asked for influence afterwards, which is a run without a model of its own
        some = [one for one in every if any(one.parent.glob("scores/*.json"))] or every
        if len(some) != 1:
            raise UserError(
                f"{len(some)} runs are in this member's folder" if some else "no run is in this folder",
                where=path,
                hint=f"Name one of them: {', '.join(str(one.parent) for one in some)}."
                if some
                else "`allmend join` makes one.",
            )
        (found,) = some
    try:
        about: dict[str, Any] = json.loads(found.read_bytes())
        return OwnRun(
            RunFolder(found.parent), str(about["member"]), Offer.of(about["offer"]), Sources(**about["sources"])
        )
    except (OSError, ValueError, TypeError, KeyError, UserError) as error:
        raise UserError(f"is not what a member keeps of a run: {error}", where=found) from error


def same_data(run: Path, digest: str, data: str) -> None:
    """Refuse records that are not those that the run was begun with here: states and counts are about these.

    Raises:
        UserError: so they are.
    """
    path = run / DATA
    if not path.exists():
        write_atomic(path, json.dumps(digest).encode())
    elif path.read_text() != json.dumps(digest):
        raise UserError(
            "the records differ from those that this run was begun with",
            where=data,
            hint="Restore them, or take part in a new run.",
        )


def planned(recipe: Recipe, avoid: tuple[str, ...] = ()) -> list[Canary]:
    """The canaries of a recipe among organisations: the same at the coordinator and at every member."""
    if recipe.canaries is None:
        return []
    return plant(
        clients=recipe.canaries.clients or [client.name for client in recipe.clients],
        copies=recipe.canaries.copies,
        per_cell=recipe.canaries.count_by_copies,
        seed=recipe.seed,
        kinds=recipe.canaries.kinds,
        avoid=avoid,
    )


def _planted(recipe: Recipe, data: ClientData) -> list[Canary]:
    """The canaries, none of whose large secrets stands in the member's records."""
    canaries = planned(recipe)
    texts = tuple(text for record in data.records for text in record.texts)
    if canaries and planned(recipe, texts) != canaries:
        raise UserError(
            "a canary's secret stands in this member's records by chance",
            where=f"member {data.name!r}",
            hint="Ask the coordinator to begin again with another seed.",
        )
    return canaries
