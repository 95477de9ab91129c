"""From a recipe to everything a run needs in memory: the model, the clients' encoded records, the canaries.

What is wrong with the data is found here, for all clients at once, before anything is trained.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from allmend.audit.memorisation import no_prefix_fits
from allmend.caveats import caveats
from allmend.check import check, source_of
from allmend.data.canaries import Canary, plant, to_records
from allmend.data.chat import Encoded, Encoder, choose_template
from allmend.data.files import load_client
from allmend.data.icd10cm import build_icd10cm
from allmend.data.records import ClientData, Record
from allmend.data.splits import uniform
from allmend.errors import UserError, all_of
from allmend.federation.checkpoint import Checkpoints
from allmend.federation.member import Member
from allmend.federation.privacy.layers import protected
from allmend.federation.strategies import STRATEGIES
from allmend.learn.objective import records_stay_apart
from allmend.models.attention import packs
from allmend.models.load import LoadedModel, load_model
from allmend.recipe import Arm, Problem, Recipe, RecipeError, parse_recipe
from allmend.results import POOLED
from allmend.run import RunFolder

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs.

    Attributes:
        recipe: as given.
        base: folder that the recipe's relative paths start from.
        model: the base model.
        encoder: of records, for this model.
        members: training records by member, canaries included, encoded.
        train: training records by client, without canaries.
        held_out: held-out records by client.
        held_out_encoded: the same, encoded for evaluation.
        canaries: inserted ones and controls; empty without `[canaries]`.
        notes: counts worth telling, by client.
        warnings: what the user should know before the run.
        data_digests: SHA-256 of each client's records as tokens, so that a changed template counts too.
    """

    recipe: Recipe
    base: Path
    model: LoadedModel
    encoder: Encoder
    members: tuple[Member, ...]
    train: dict[str, tuple[Record, ...]]
    held_out: dict[str, tuple[Record, ...]]
    held_out_encoded: dict[str, tuple[Encoded, ...]]
    canaries: tuple[Canary, ...]
    notes: dict[str, dict[str, int]]
    data_digests: dict[str, str]
    warnings: tuple[str, ...] = ()

    def parties(self, arm: Arm) -> tuple[Sequence[Member], Arm]:
        """Who trains in an arm: the members, or one party with all records, which takes as many steps as they all."""
        if not STRATEGIES[arm.strategy.name].pooled:
            return self.members, arm
        records = [record for member in self.members for record in member.records]
        if arm.train.local_steps is not None:
            steps = arm.train.local_steps * len(self.members)
            arm = replace(arm, train=arm.train.model_copy(update={"local_steps": steps}))
        return [Member(POOLED, records, _seed(self.recipe.seed, POOLED))], arm

    def protected(self, arm: Arm) -> tuple[Sequence[Member], Arm]:
        """`parties` with the records that the arm's guarantees are about: those that its layers leave for training."""
        members, arm = self.parties(arm)
        return protected(members, arm.privacy)[0] if arm.privacy.record else members, arm


def prepare(recipe: Recipe, base: Path, *, model: LoadedModel | None = None) -> Prepared:
    """Load the model and all data.

    Args:
        recipe: valid by itself.
        base: folder that relative paths start from.
        model: the recipe's model, where the caller has it in memory already.

    Raises:
        RecipeError: what is wrong with the recipe, all at once.
        UserError: what is wrong with the data, for all clients at once.
    """
    check(recipe, base, model=model)
    clients = _apart(_clients(recipe, base))
    canaries = _canaries(recipe, clients)
    model, encoder = prepare_model(recipe, base, model=model)
    check_prefixes(recipe, canaries, encoder)
    encoded = [encode_client(recipe, client, encoder, canaries) for client in clients]
    prepared = Prepared(
        recipe=recipe,
        base=base,
        model=model,
        encoder=encoder,
        members=tuple(one.member for one in encoded),
        train={one.member.name: one.train for one in encoded},
        held_out={one.member.name: one.held_out for one in encoded},
        held_out_encoded={one.member.name: one.held_out_encoded for one in encoded},
        canaries=tuple(canaries),
        notes={one.member.name: one.notes for one in encoded},
        data_digests={one.member.name: one.digest for one in encoded},
    )
    _check_routers(prepared)
    return replace(prepared, warnings=tuple(caveats(prepared)))


def _check_routers(prepared: Prepared) -> None:
    """See that every member whose router learns has a record for it and one for its experts.

    Raises:
        UserError: of all that have not.
    """
    few = []
    for arm in prepared.recipe.arms().values():
        if arm.adapter.kind != "mixture":
            continue
        for member in prepared.members:
            most = arm.adapter.specialists if member.specialists is None else member.specialists
            if arm.adapter.generalists + most < 2:
                continue
            where = f"client {member.name!r}, arm {arm.name!r}"
            different = len({record.ids.numpy().tobytes() for record in member.records if record.learns})
            if member.target and not any(record.learns for record in member.target):
                what = "no record of its target has a token for its router to learn from"
                few.append(UserError(what, where=where, hint="Give it other records, or set specialists = 0 for it."))
            elif not member.target and different < 2:
                few.append(
                    UserError(
                        f"{different} training record, and its router needs one that its experts do not learn from",
                        where=where,
                        hint="Give it more records or a target, or set specialists = 0 for it.",
                    )
                )
    if few:
        raise all_of(few, "some members have too few records")


@dataclass(frozen=True)
class EncodedClient:
    """One client's data, ready for training and evaluation.

    Attributes:
        member: training records, canaries included, encoded.
        train: training records without canaries.
        held_out: held-out records.
        held_out_encoded: the same, encoded for evaluation.
        notes: counts worth telling.
    """

    member: Member
    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    held_out_encoded: tuple[Encoded, ...]
    notes: dict[str, int]

    @property
    def digest(self) -> str:
        """`data_digest` of all that the client learns from and is measured on."""
        return data_digest((*self.member.records, *self.held_out_encoded, *self.member.target))


def encode_client(recipe: Recipe, client: ClientData, encoder: Encoder, canaries: Sequence[Canary]) -> EncodedClient:
    """A client's records and canaries as training and evaluation take them.

    Raises:
        UserError: no training record fits.
        RecipeError: a canary does not fit.
    """
    counts = dict(client.notes)
    train = [encoder.for_training(record) for record in client.train]
    train, fitting = _fit(train, client.train, recipe, counts, "training")
    if not train:
        raise UserError(
            f"no training record fits data.max_tokens = {recipe.data.max_tokens}",
            where=f"client {client.name!r}",
            hint='Raise it, or set data.too_long = "truncate".',
        )
    train += _planted(canaries, client.name, encoder)
    asked = sorted(client.held_out, key=lambda record: uniform(record.id))[: recipe.evaluation.max_held_out]
    test, kept = _fit([encoder.for_evaluation(record) for record in asked], asked, recipe, counts, "held-out")
    aims = [encoder.for_training(record) for record in client.target]
    aims, _ = _fit(aims, client.target, recipe, counts, "target")
    if client.target:
        counts["records of its target"] = len(aims)
    source = next((source for source in recipe.clients if source.name == client.name), None)
    member = Member(
        client.name,
        train,
        _seed(recipe.seed, client.name),
        rank=source.rank if source else None,
        held_out=[encoder.for_training(record) for record in kept],
        specialists=source.specialists if source else None,
        target=aims,
    )
    return EncodedClient(member, tuple(fitting), tuple(kept), tuple(test), counts)


def read_frozen(run: RunFolder) -> Recipe:
    """The recipe that a run was started with.

    Raises:
        UserError: it was changed or cannot be read.
    """
    try:
        text = run.recipe.read_text(encoding="utf-8")
        recipe = parse_recipe(text)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"the frozen recipe cannot be read: {error}", where=run.recipe) from error
    # of the text, not of what is read from it: a later version may have keys that this one did not
    if hashlib.sha256(text.encode()).hexdigest() != run.facts.get("recipe"):
        raise UserError(
            "the frozen recipe was changed after the run was started",
            where=run.recipe,
            hint="Start a new run with the changed recipe: `allmend tune RECIPE.toml --out FOLDER`.",
        )
    return recipe


def checkpoints_of(run: RunFolder, arm: str) -> Checkpoints:
    """An arm's checkpoints, bound to the recipe as it was frozen."""
    return Checkpoints(run.arm(arm), identity=f"{run.facts['recipe']}/{arm}")


def differs(what: str, run: RunFolder) -> UserError:
    """A run's recipe, model or data are not those it was started with."""
    return UserError(
        f"{what} differs from what the run was started with",
        where=run.path,
        hint="Restore it, or start a new run in another folder.",
    )


@contextlib.contextmanager
def threads(recipe: Recipe) -> Iterator[None]:
    """torch's threads as the recipe has them; afterwards as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.engine.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_model(recipe: Recipe, base: Path, *, model: LoadedModel | None = None) -> tuple[LoadedModel, Encoder]:
    """The recipe's model, loaded unless the caller has it already, and the encoder of records for it.

    Raises:
        UserError: the model cannot be had, or it lacks the chat template that the recipe asks for.
    """
    dtype = _DTYPES[recipe.model.dtype]
    if any(arm.adapter.kind == "full" for arm in recipe.arms().values()):
        if dtype == torch.bfloat16:
            # a step of 5e-5 is less than half the distance of two bfloat16 numbers near most weights
            what = "full fine-tuning in bfloat16 would round most updates away: set float32 or auto"
            raise RecipeError([Problem(("model", "dtype"), what)])
        dtype = torch.float32
    model = model or load_model(source_of(recipe, base), dtype=dtype)
    if recipe.engine.workers and model.model.device.type != "cpu":
        what = f"worker processes need the model on the CPU, and it is on {model.model.device}: set it to 0"
        raise RecipeError([Problem(("engine", "workers"), what)])
    if not (packs(model.model) and records_stay_apart(model.model)):
        raise UserError(
            f"records cannot be packed for this architecture ({model.model.config.model_type})",
            where="model.source",
            hint="Use a decoder in which attention alone mixes tokens, and transformers can replace it, such as Llama, "
            "Qwen, Mistral or SmolLM.",
        )
    # the mask of a packed row would let tokens look further back than a sliding window does
    reaches = (getattr(model.model.config, key, None) for key in ("sliding_window", "max_position_embeddings"))
    window = min((reach for reach in reaches if reach is not None), default=None)
    if window is not None and recipe.data.max_tokens > window:
        raise UserError(
            f"records may have {recipe.data.max_tokens} tokens, but the model looks back no more than {window}",
            where="data.max_tokens",
            hint=f"Set it to {window} or less.",
        )
    template = choose_template(recipe.data.template, model.tokenizer)
    return model, Encoder(model.tokenizer, template, recipe.data.max_tokens)


def _clients(recipe: Recipe, base: Path) -> list[ClientData]:
    if recipe.data.icd10cm:
        return build_icd10cm(train=recipe.data.icd10cm.train, held_out=recipe.data.icd10cm.held_out, seed=recipe.seed)
    clients, problems = [], []
    for source in recipe.clients:
        try:
            clients.append(
                load_client(
                    source.name,
                    source.data,
                    fields=recipe.data.fields,
                    held_out=recipe.data.held_out,
                    base=base,
                    own_held_out=source.held_out,
                    target=source.target,
                )
            )
        except UserError as error:
            problems.append(error)
    if problems:
        raise all_of(problems, f"the data of {len(problems)} clients cannot be used")
    return clients


def _canaries(recipe: Recipe, clients: Sequence[ClientData]) -> list[Canary]:
    if recipe.canaries is None:
        return []
    names = recipe.canaries.clients or [client.name for client in clients]
    if strangers := sorted(set(names) - {client.name for client in clients}):
        raise RecipeError([Problem(("canaries", "clients"), f"no such client: {', '.join(strangers)}")])
    records = [record for client in clients for record in client.records]
    try:
        canaries = plant(
            clients=names,
            copies=recipe.canaries.copies,
            per_cell=recipe.canaries.count_by_copies,
            seed=recipe.seed,
            kinds=recipe.canaries.kinds,
            avoid=[text for record in records for text in record.texts],
        )
    except UserError as error:
        raise RecipeError([Problem(("canaries", "count"), str(error))]) from error
    if len({canary.inserted for canary in canaries}) < 2:
        what = f"all {len(canaries)} coins fell alike, which leaves nothing to compare: plant more, or change the seed"
        raise RecipeError([Problem(("canaries", "count"), what)])
    return canaries


def check_prefixes(recipe: Recipe, canaries: Sequence[Canary], encoder: Encoder) -> None:
    """Raise unless the audit has something to bring out of some canary.

    Raises:
        RecipeError: all prefixes are too long.
    """
    if canaries and (what := no_prefix_fits(canaries, encoder, recipe.audit)):
        raise RecipeError([Problem(("audit", "prefix_tokens"), f"{what}: name a shorter one")])


def _planted(canaries: Sequence[Canary], client: str, encoder: Encoder) -> list[Encoded]:
    """A client's inserted canaries, encoded whole: what is cut off could not be memorised, and would count as kept."""
    records = to_records([canary for canary in canaries if canary.client == client])
    encoded = [encoder.for_training(record) for record in records]
    if any(one.cut for one in encoded):
        longest = max(len(one) + one.cut for one in encoded)
        what = f"canaries have up to {longest} tokens: set it to that or more, or remove [canaries]"
        raise RecipeError([Problem(("data", "max_tokens"), what)])
    return encoded


def _apart(clients: Sequence[ClientData]) -> list[ClientData]:
    """The clients without held-out records that stand word for word in another client's training data."""
    learnt: dict[tuple[object, ...], set[str]] = {}
    for client in clients:
        for record in client.train:
            learnt.setdefault(record.content, set()).add(client.name)
    found = []
    for client in clients:
        kept = tuple(record for record in client.held_out if not learnt.get(record.content, set()) - {client.name})
        notes = dict(client.notes)
        if len(kept) < len(client.held_out):
            notes["held-out records in others' training"] = len(client.held_out) - len(kept)
        found.append(replace(client, held_out=kept, notes=notes))
    return found


def _fit(
    encoded: Sequence[Encoded], records: Sequence[Record], recipe: Recipe, counts: dict[str, int], what: str
) -> tuple[list[Encoded], list[Record]]:
    """Leave out what is too long if the recipe says so, and count what was cut or left out."""
    too_long = sum(one.cut > 0 for one in encoded)
    if recipe.data.too_long == "truncate":
        if too_long:
            counts[f"{what} records truncated"] = too_long
        return list(encoded), list(records)
    if too_long:
        counts[f"{what} records rejected (too long)"] = too_long
    kept = [pair for pair in zip(encoded, records, strict=True) if pair[0].cut == 0]
    return [one for one, _ in kept], [record for _, record in kept]


def _seed(seed: int, name: str) -> int:
    """A seed of its own for each member, from its name and not from its place."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=6).digest())


def data_digest(records: Iterable[Encoded]) -> str:
    """SHA-256 of records as tokens, in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr((record.id, record.ids.tolist(), record.target.tolist(), record.branch.tolist())).encode())
    return digest.hexdigest()
