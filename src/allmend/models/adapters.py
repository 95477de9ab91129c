"""What learns in a model: low-rank adapters (LoRA) through PEFT, or all parameters; mixtures have a file of their own.

A `Trainable` gives what learns as named tensors in a fixed order, takes such tensors back, and saves them as a folder
that plain `from_pretrained` loads. One base model in memory serves many adapters: swap them with `state` and `load`,
or take them off with `remove_lora`.

Source: Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models. A layer W x becomes W x + (α / r) B A x
with A of shape (r, in) and B of shape (out, r).

Where B alone learns and A stays as it began, the same for all, a layer is linear in what learns: the mean of several
B is the factor of the mean of their products, about half the numbers travel, and noise is never multiplied with noise
(FFA-LoRA; Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024).
"""

import contextlib
import copy
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from allmend.errors import UserError
from allmend.models.factors import A, B
from allmend.models.load import linear_layers_of
from allmend.models.lora_targets import ALL_LINEAR, check_lora
from allmend.models.quiet import quiet
from allmend.models.tensors import Tensors, dump, os_error
from allmend.run import folder_atomic

Learns = Literal["both", "b"]
"""Which of LoRA's factors learn: A and B, or B alone."""

_ADAPTER = "default"
"""PEFT's own name for a single adapter; it is part of the parameters' names in memory and not on disk."""

_TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


@dataclass(frozen=True, eq=False)
class Trainable:
    """The part of a model that learns.

    Attributes:
        model: the module to call: a `PeftModel` for LoRA, the bare model when everything learns or experts are mixed.
        kind: `lora`, `full` or `mixture`.
    """

    model: nn.Module
    kind: Literal["lora", "full", "mixture"]
    _parameters: dict[str, nn.Parameter] = field(repr=False)
    _frozen: dict[str, nn.Parameter] = field(default_factory=dict, repr=False, kw_only=True)
    """Factors that are part of what is saved and do not learn."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, in order of the names; the names are those of the saved file."""
        return dict(self._parameters)

    @property
    def count(self) -> int:
        """Number of scalars that learn."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def state(self) -> Tensors:
        """Copies on the CPU, in the parameters' types, order and shapes."""
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self._travelling().items()}

    @property
    def frozen_digest(self) -> str:
        """SHA-256 of the factors that do not learn and so never travel, 64 hexadecimal digits; empty without any."""
        if not self._frozen:
            return ""
        return hashlib.sha256(dump({name: factor.detach() for name, factor in self._frozen.items()}, {})).hexdigest()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the parameters to `tensors`, which have exactly their names and shapes; types are converted.

        Raises:
            UserError: a name or shape differs; says which first. No parameter has changed then.
        """
        self._check(tensors)
        with torch.no_grad():
            for name, own in self._travelling().items():
                own.copy_(tensors[name])

    def save(self, folder: Path, tensors: Mapping[str, torch.Tensor], *, base: str) -> None:
        """Write `tensors` as an outcome: a PEFT folder for LoRA, a Hugging Face model folder when everything learned.

        Factors that do not learn are written with them. A folder that is there already is replaced as a whole. The
        tokenizer's files are copied into a model folder where the model was loaded from a folder.

        Args:
            folder: where to write.
            tensors: names and shapes of `parameters`; they need not be the parameters' present values.
            base: name or folder of the base model, which a PEFT folder records.

        Raises:
            UserError: a name or shape differs, or the operating system refused.
        """
        self._check(tensors)
        with folder_atomic(folder) as partial:
            self._write(partial, tensors, base)

    def _travelling(self) -> Mapping[str, torch.Tensor]:
        """What `state` gives and `load` takes: what learns, and whatever has to go with it."""
        return self._parameters

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        own = self._travelling()
        for name in sorted({*own, *tensors}):
            if name not in tensors:
                raise UserError(f"{name} is missing among the tensors", hint=_SAME_RECIPE)
            if name not in own:
                raise UserError(f"{name} is no parameter that learns here", hint=_SAME_RECIPE)
            found, expected = list(tensors[name].shape), list(own[name].shape)
            if found != expected:
                raise UserError(f"{name} has shape {found} instead of {expected}", hint=_SAME_RECIPE)

    def _write(self, folder: Path, tensors: Mapping[str, torch.Tensor], base: str) -> None:
        if self.kind == "full":
            self._save_model(folder, tensors)
        else:
            assert isinstance(self.model, PeftModel)
            learns: Learns = "b" if self._frozen else "both"
            config = self.model.peft_config[_ADAPTER]
            write_adapter(folder, config, {**tensors, **self._frozen}, base=base, learns=learns)

    def _save_model(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        model = self.model
        assert isinstance(model, PreTrainedModel)
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        # a tied parameter has several names in the model and one here
        state = model.state_dict() | {
            name: tensors[names[id(parameter)]].detach()
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        try:
            with quiet():
                model.save_pretrained(folder, state_dict=state)
        except SafetensorError as error:
            raise os_error(error) from error
        for path in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", path)
        origin = Path(model.name_or_path or "")
        if model.name_or_path and origin.is_dir():
            for path in sorted({path for pattern in _TOKENIZER_PATTERNS for path in origin.glob(pattern)}):
                shutil.copyfile(path, folder / path.name)


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor], *, base: str, learns: Learns = "both"
) -> None:
    """Fill a folder with a LoRA as PEFT keeps it.

    Args:
        folder: there already.
        config: left as it is.
        tensors: by the names of the file.
        base: name or folder of the base model.
        learns: kept beside the tensors, where PEFT does not look, for `learning_adapter`.
    """
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    path = folder / _CONFIG
    fields = json.loads(path.read_bytes())
    # PEFT keeps the targets in a set, whose order changes from process to process
    fields["target_modules"] = sorted(fields["target_modules"])
    path.write_text(json.dumps(fields, indent=2, sort_keys=True))
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    noted = {} if learns == "both" else {_LEARNS: learns}
    (folder / _WEIGHTS).write_bytes(_ordered(save_safetensors(plain, metadata={"format": "pt"} | noted)))


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order, which changes from process to process otherwise."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


@contextlib.contextmanager
def of_other_rank(trainable: Trainable, tensors: Mapping[str, torch.Tensor]) -> Iterator[Trainable]:
    """A LoRA with factors of another rank in the place of its own, scaled as these are; afterwards they are back.

    Args:
        trainable: a LoRA.
        tensors: its names, each with a shape that differs in the rank alone.
    """
    own = trainable.parameters()
    other = {name: nn.Parameter(tensors[name].to(parameter.device, parameter.dtype)) for name, parameter in own.items()}

    def put(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            layer: Any = trainable.model.get_submodule(f"{name.removesuffix('.weight')}.{_ADAPTER}")
            layer.weight = parameter

    put(other)
    try:
        yield Trainable(trainable.model, "lora", other)
    finally:
        put(own)


_SAME_RECIPE = "The tensors must come from the same model with the same adapter settings."


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | Literal["all-linear"],
    dropout: float = 0.0,
    learns: Learns = "both",
    seed: int,
) -> Trainable:
    """Put LoRA on the linear layers that `targets` name and freeze everything else.

    A starts as Kaiming-uniform with a = √5 and B as zero, as in PEFT, but from a generator of its own in order of the
    names: the same `seed` gives the same adapter whatever ran before, and the global generators are left as they were.
    In a bfloat16 or float16 model the adapter is float32.

    Args:
        model: a bare causal language model; its layers are wrapped in place until `remove_lora`.
        rank: r, the inner dimension of B A.
        alpha: α; the product B A is scaled by α / r.
        targets: layer names or their last parts (`q_proj`), or `all-linear` for every one but the output embedding.
        dropout: share of the adapter's inputs that is zeroed in training.
        learns: which factors do; with `b` A stays at its start, which is the same as with `both`.
        seed: of A.

    Raises:
        UserError: `check_lora` has something to say.
    """
    problems = check_lora(linear_layers_of(model), rank=rank, targets=targets)
    if problems:
        raise UserError("\n".join(problems))
    training = model.training
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=ALL_LINEAR if targets == ALL_LINEAR else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), warnings.catch_warnings():  # PEFT draws A too
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers; no user can act on it
        wrapped = get_peft_model(model, config)
    wrapped.train(training)
    parameters = dict(
        sorted(
            (name.replace(f".{_ADAPTER}.", "."), parameter)
            for name, parameter in wrapped.named_parameters()
            if parameter.requires_grad
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            start = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            parameter.copy_(start)
    return _learning(wrapped, parameters, learns)


def _learning(wrapped: PeftModel, factors: Mapping[str, nn.Parameter], learns: Learns) -> Trainable:
    """The factors of an adapter, of which those that learn have gradients and the others have none."""
    frozen = {name: factor for name, factor in factors.items() if learns == "b" and name.endswith(A)}
    for name, factor in factors.items():
        factor.requires_grad_(name not in frozen)
    return Trainable(wrapped, "lora", {name: factors[name] for name in factors if name not in frozen}, _frozen=frozen)


def remove_lora(trainable: Trainable) -> PreTrainedModel:
    """The bare base model, with its own layers back in place and unchanged; the adapter is gone.

    Its parameters stay frozen, as PEFT left them; `full` unfreezes them.

    Raises:
        ValueError: `trainable` is not a LoRA.
    """
    if not isinstance(trainable.model, PeftModel):
        raise ValueError(f"there is no LoRA to remove: everything learns (kind {trainable.kind!r})")
    base: PreTrainedModel = trainable.model.unload()
    return base


@contextlib.contextmanager
def applied(model: PreTrainedModel, folder: Path) -> Iterator[PeftModel]:
    """`model` with the PEFT adapter of a folder, for reading; afterwards the bare base is back.

    Raises:
        UserError: the folder holds no adapter, or one for another model.
    """
    check_adapter(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers; no user can act on it
            wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"cannot be applied to the model: {_first_of(str(error))}",
            where=folder,
            hint="Use the base model that it was trained on.",
        ) from error
    try:
        yield wrapped
    finally:
        wrapped.unload()


def _first_of(message: str) -> str:
    """The first of torch's mismatches, of which it tells every one, and how many more there are."""
    found = [line.strip() for line in message.splitlines() if line.strip().startswith("size mismatch")]
    if len(found) < 2:
        return message
    return f"{found[0]} ({len(found) - 1:,} more)"


@contextlib.contextmanager
def learning_adapter(model: PreTrainedModel, folder: Path) -> Iterator[Trainable]:
    """`model` with the PEFT adapter of a folder as what learns; afterwards the bare base is back.

    Where B alone learned when the adapter was made, it alone learns here. Adapters of other makers do not say: both
    factors learn then.

    Raises:
        UserError: the folder holds no adapter, one for another model, or one that is no plain LoRA.
    """
    with applied(model, folder) as wrapped:
        parameters = {
            name.replace(f".{_ADAPTER}.", "."): parameter
            for name, parameter in wrapped.named_parameters()
            if f".{_ADAPTER}." in name
        }
        if strange := [name for name in parameters if not name.endswith((A, B))]:
            raise UserError(
                f"has weights that are no factors of LoRA ({strange[0]})", where=folder, hint="Name a plain LoRA."
            )
        yield _learning(wrapped, dict(sorted(parameters.items())), _learned(folder))


def _learned(folder: Path) -> Learns:
    """Which factors of a folder's adapter learned when it was made, as far as it says."""
    path = folder / _WEIGHTS
    if not path.is_file():  # PEFT reads another format, too
        return "both"
    with safe_open(path, "pt") as file:
        return "b" if (file.metadata() or {}).get(_LEARNS) == "b" else "both"


def check_adapter(folder: Path) -> None:
    """Raise unless a folder holds a PEFT adapter; PEFT itself would look for its name on the Hub.

    Raises:
        UserError: it does not.
    """
    if (folder / _CONFIG).is_file():
        return
    near = sorted(path.parent for path in (*folder.glob(f"*/{_CONFIG}"), *folder.glob(f"arms/*/*/{_CONFIG}")))
    raise UserError(
        f"no adapter is here (there is no {_CONFIG})",
        where=folder,
        hint=f"Did you mean {near[0]}?" if near else "Check the path.",
    )


_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_LEARNS = "learns"
"""Among the metadata of an adapter's weights: which factors learned."""


def full(model: nn.Module) -> Trainable:
    """All parameters of `model` learn; tied ones count once, under their first name.

    Training changes the base in memory: load it again before it serves as the base of something else.
    """
    model.requires_grad_(True)
    return Trainable(model, "full", dict(sorted(model.named_parameters())))
