"""Applying a plan: a model of transformers whose groups of layers are one wider layer each, and its folder."""

import contextlib
import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from allmend.depth.architectures import architecture_of, check_kinds, kinds_of, layers_of
from allmend.depth.fold import Gain, fold_group
from allmend.depth.plan import Plan, write_plan
from allmend.errors import UserError
from allmend.models.quiet import quiet
from allmend.models.tensors import os_error
from allmend.run import fault, folder_atomic


@torch.no_grad()
def apply_plan(model: Any, plan: Plan, *, gain: Gain = "geometric") -> Any:
    """A model in which each group of the plan is one layer, equal to the group side by side.

    Layers that stay alone, embeddings and the last norm share their weights with `model`, which stays as it is.

    Args:
        model: as `architectures.layers_of` asks for.
        plan: which covers every layer once, in groups of neighbours.
        gain: see `fold_group`.

    Returns:
        An instance of one of `modeling_paired.PAIRED`.

    Raises:
        UserError: the plan does not fit the model, or the model cannot be folded.
    """
    layers = layers_of(model)
    plan.check(len(layers))
    check_kinds(model.config, len(layers), plan.together)
    architecture = architecture_of(layers[0])
    config = _config(model.config, architecture.paired.config_class, plan, len(layers))
    with torch.device("meta"):
        changed: Any = architecture.paired(config)
    elsewhere = ("model.layers.", "model.rotary_emb.")
    state = {name: tensor for name, tensor in _tensors(model).items() if not name.startswith(elsewhere)}
    for place, group in enumerate(plan.groups):
        some = [layers[layer] for layer in group]
        layer = some[0] if len(some) == 1 else fold_group(some, gain=gain)
        state |= {f"model.layers.{place}.{name}": tensor for name, tensor in _tensors(layer).items()}
    for name, parameter in changed.named_parameters():  # or what is shared would be given the new model's
        parameter.requires_grad_(name in state and state[name].requires_grad)
    strange = changed.load_state_dict(state, assign=True, strict=False).unexpected_keys
    if strange:
        raise RuntimeError(f"{strange[0]} and {len(strange) - 1} more tensors have no place in the paired model")
    # not saved with the weights, so nothing above made them
    changed.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    if left := [name for name, tensor in _tensors(changed).items() if tensor.is_meta]:
        raise RuntimeError(f"{left[0]} and {len(left) - 1} more tensors were left without a value")
    changed.generation_config = copy.deepcopy(model.generation_config)
    return changed.train(model.training)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())


def _config(config: Any, kind: type[Any], plan: Plan, layers: int) -> Any:
    facts: dict[str, Any] = config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        facts.pop(name, None)
    kinds = kinds_of(config, layers)
    if "layer_types" in facts:
        facts["layer_types"] = [kinds[group[0]] for group in plan.groups]
    facts |= {"num_hidden_layers": plan.depth, "layer_widths": plan.widths}
    return kind(**facts, attn_implementation=config._attn_implementation)


def check_new(out: Path) -> None:
    """See that nothing is lost when a folder is written.

    Raises:
        UserError: something is there already.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            raise UserError("this folder is not empty", where=out, hint="Choose another with --out.")
        if out.exists() and not out.is_dir():
            raise UserError("a file stands where the folder is to be", where=out, hint="Choose another with --out.")
    except OSError as error:
        raise fault(error, out) from error


def save_paired(model: Any, tokenizer: Any, out: Path, plan: Plan, facts: Mapping[str, object] | None = None) -> None:
    """Write a paired model's folder: weights, tokenizer, plan, and the file that it loads with elsewhere.

    Args:
        model: from `apply_plan`.
        tokenizer: the original's.
        out: a folder that is not there yet, or is empty.
        plan: that was applied.
        facts: what else `plan.json` says.

    Raises:
        UserError: something is there already, or the operating system refused; nothing is left of what was written.
    """
    check_new(out)
    with folder_atomic(out) as folder, quiet():
        with _os_errors():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_plan(folder / "plan.json", plan, dict(facts or {}))
        # safetensors keeps its files to their owner
        for path in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", path)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """The operating system's errors as such: libraries in Rust raise them as exceptions of their own."""
    try:
        yield
    except SafetensorError as error:
        raise os_error(error) from error
    except Exception as error:
        if type(error) is Exception and "(os error " in str(error):  # tokenizers
            raise os_error(SafetensorError(str(error))) from error
        raise
