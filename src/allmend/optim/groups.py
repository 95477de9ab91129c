"""Which parameters of a model rotate, decay or do neither: groups for any optimiser, with a reason for each tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

Chooser: TypeAlias = Callable[[str, nn.Module, nn.Parameter], bool]


@dataclass(frozen=True)
class Placed:
    """Where a parameter is, and why.

    Attributes:
        name: in the model.
        shape: of the tensor.
        rotational: whether its rows are to turn by an angle.
        decays: whether it has weight decay.
        neuron_dim: of a rotational one: 0 for [out, in], 1 for [in, out].
        why: in a few words.
    """

    name: str
    shape: tuple[int, ...]
    rotational: bool
    decays: bool
    neuron_dim: int
    why: str


def placed(model: nn.Module, *, rotational: Literal["linear", "none"] | Chooser = "linear") -> list[Placed]:
    """Every parameter that learns, each once, and where it belongs.

    Args:
        model: any module; frozen parameters are left out.
        rotational: `linear` for the weights of linear layers but for LoRA's factors and output layers that are tied to
            an embedding; `none`; or a function of name, module and parameter.

    Raises:
        ValueError: `rotational` is none of these.
    """
    if not callable(rotational) and rotational not in ("linear", "none"):
        raise ValueError(f"rotational must be 'linear', 'none' or a function, got {rotational!r}")
    of_embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found, seen = [], set[int]()
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{own}" if prefix else own
            turned = type(module).__name__ == "Conv1D"  # transformers' [in, out]
            if callable(rotational):
                turns, why = rotational(name, module, parameter), "chosen"
            elif rotational == "none":
                turns, why = False, "nothing rotates"
            else:
                turns, why = _turns(name, module, parameter, of_embeddings)
            decays = parameter.dim() >= 2
            found.append(Placed(name, tuple(parameter.shape), turns, decays, int(turns and turned), why))
    return found


def _turns(name: str, module: nn.Module, parameter: nn.Parameter, of_embeddings: set[int]) -> tuple[bool, str]:
    if parameter.dim() < 2:
        return False, "a vector has no rows"
    if id(parameter) in of_embeddings:
        return False, "an embedding's rows are tokens, whose norms carry the logits or stand still for long"
    if "lora_" in name:
        return False, "a factor's angle is not that of the change that both factors make"
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return True, "the weight of a linear layer"
    return False, "not the weight of a linear layer"


def parameter_groups(
    model: nn.Module, *, rotational: Literal["linear", "none"] | Chooser = "linear", weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Groups with names for an optimiser: what rotates, what decays, what does neither.

    Keys that an optimiser does not know (`rotational`, `neuron_dim`) do no harm to it.

    Args:
        model: as of `placed`.
        rotational: as of `placed`.
        weight_decay: of rotational parameters and of other matrices; vectors have none.

    Raises:
        ValueError: nothing in the model learns.
    """
    parameters = dict(model.named_parameters())
    groups: dict[tuple[bool, bool, int], list[tuple[str, nn.Parameter]]] = {}
    for one in placed(model, rotational=rotational):
        groups.setdefault((one.rotational, one.decays, one.neuron_dim), []).append((one.name, parameters[one.name]))
    if not groups:
        raise ValueError("no parameter of the model learns: set requires_grad on some")
    return [
        {
            "params": named,
            "weight_decay": weight_decay if decays else 0.0,
            "rotational": turns,
            "neuron_dim": dim,
        }
        for (turns, decays, dim), named in groups.items()
    ]
