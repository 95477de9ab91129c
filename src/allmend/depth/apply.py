"""Applying a plan: a model of transformers whose groups of layers are one wider layer each, and its folder."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allmend.depth.architectures import architecture_of, check_kinds, kinds_of, layers_of
from allmend.depth.fold import Gain, fold_group
from allmend.depth.plan import Plan, write_plan
from allmend.models import modeling_paired
from allmend.models.quiet import quiet
from allmend.run import folder_atomic

MODULE = Path(inspect.getfile(modeling_paired))


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
    state = {name: parameter for name, parameter in _tensors(model).items() if not name.startswith("model.layers.")}
    for place, group in enumerate(plan.groups):
        some = [layers[layer] for layer in group]
        layer = some[0] if len(some) == 1 else fold_group(some, gain=gain)
        state |= {f"model.layers.{place}.{name}": tensor for name, tensor in _tensors(layer).items()}
    changed.load_state_dict(state, assign=True, strict=False)
    changed.tie_weights()
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


def save_paired(model: Any, tokenizer: Any, out: Path, plan: Plan, facts: Mapping[str, object] | None = None) -> None:
    """Write a paired model's folder: weights, tokenizer, plan, and the file that it loads with elsewhere.

    Args:
        model: from `apply_plan`.
        tokenizer: the original's.
        out: a folder that is not there yet.
        plan: that was applied.
        facts: what else `plan.json` says.

    Raises:
        UserError: the folder is there already, or the operating system refused.
    """
    kind = type(model)
    model.config.auto_map = {
        "AutoConfig": f"{MODULE.stem}.{kind.config_class.__name__}",
        "AutoModelForCausalLM": f"{MODULE.stem}.{kind.__name__}",
    }
    with folder_atomic(out) as folder, quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / MODULE.name).write_text(MODULE.read_text(encoding="utf-8"), encoding="utf-8")
        write_plan(folder / "plan.json", plan, dict(facts or {}))
