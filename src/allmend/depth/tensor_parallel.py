"""Tensor parallelism: which matrices of a decoder go to several processes in slices, and what stays whole.

Queries, keys, values, gate and up are cut by output rows, so that a process has whole heads and whole neurons; what
writes back to the stream is cut by input columns, and the processes' shares of an update are summed: one all-reduce for
a layer's attention and one for its perceptron. A layer that stands for several side by side is cut as any other, and
asks for two sums where the several asked for two each.

Embeddings, norms and the head stay whole on every process.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from allmend.depth.architectures import KNOWN, Architecture, architecture_of
from allmend.errors import UserError
from allmend.models.modeling_paired import LayerConfig

MOST = 16
"""Processes up to which numbers that would work are named."""


@dataclass(frozen=True)
class LayerSharding:
    """How one layer goes to the processes.

    Attributes:
        layer: its index.
        width: layers of the original that it stands for.
        heads: its key-value heads.
        neurons: of its perceptron.
        attention: whether each process has a share of the heads; all of them otherwise.
    """

    layer: int
    width: int
    heads: int
    neurons: int
    attention: bool

    @property
    def all_reduces(self) -> int:
        """Sums over processes in a pass: one for the perceptron, and one for the attention where it is shared out."""
        return 1 + self.attention


@dataclass(frozen=True)
class ShardingReport:
    """How a decoder goes to several processes.

    Attributes:
        world: processes.
        layers: one after the other.
    """

    world: int
    layers: tuple[LayerSharding, ...]

    @property
    def all_reduces(self) -> int:
        """In a pass of the whole decoder, so for each token of a decoding."""
        return sum(layer.all_reduces for layer in self.layers)

    @property
    def whole_attention(self) -> tuple[LayerSharding, ...]:
        """Layers whose attention every process computes in full."""
        return tuple(layer for layer in self.layers if not layer.attention)

    def __str__(self) -> str:
        whole, parts = self.whole_attention, list[str]()
        if shared := len(self.layers) - len(whole):
            parts.append(f"the heads and neurons of {_counted(shared)}")
        if whole:
            heads = ", ".join(str(one) for one in sorted({layer.heads for layer in whole}))
            parts.append(
                f"the neurons alone of {_counted(len(whole))} ({spans(layer.layer for layer in whole)}), since "
                f"{heads} key-value heads do not divide by {self.world}: every process has all of them"
            )
        return f"{self.world} processes share {', and '.join(parts)}. All-reduces for each token: {self.all_reduces}"


def spans(numbers: Iterable[int]) -> str:
    """Numbers in few words: `0 to 3, 7, 8`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    parts = [[f"{some[0]} to {some[-1]}"] if len(some) > 2 else map(str, some) for some in found]
    return ", ".join(part for some in parts for part in some)


def sharding_report(model: Any, world: int) -> ShardingReport:
    """How a decoder goes to so many processes.

    A layer's heads are shared out if its key-value heads divide by `world`. A layer that stands for itself alone may
    keep its attention whole where they do not; one that stands for several may not.

    Args:
        model: a causal language model, paired or not, of an architecture in `architectures.ARCHITECTURES`; its tensors
            may be on the device `meta`.
        world: processes, 1 or more.

    Raises:
        UserError: a perceptron's neurons do not divide by `world`, or the heads of a layer that stands for several; the
            message has the layers and the numbers that work. Or the architecture is not known, or the model quantised.
    """
    layers, architecture = _decoder(model)
    widths: Sequence[int] = getattr(model.config, "layer_widths", None) or [1] * len(layers)
    found = []
    for place, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        heads: int = layer.self_attn.config.num_key_value_heads
        neurons: int = layer.get_submodule(architecture.perceptron.output).in_features
        found.append(LayerSharding(place, width, heads, neurons, attention=heads % world == 0))
    neurons_fit = _divisors(layer.neurons for layer in found)
    if unfit := [layer for layer in found if layer.neurons % world]:
        raise UserError(
            f"the {unfit[0].neurons:,} neurons of {_named(unfit)} do not divide by {world} processes",
            hint=f"Perceptrons go to {_numbers(neurons_fit)}.",
        )
    if unfit := [layer for layer in found if layer.width > 1 and not layer.attention]:
        heads_fit = _divisors(layer.heads for layer in found if layer.width > 1)
        both = [number for number in heads_fit if number in neurons_fit]
        raise UserError(
            f"the {unfit[0].heads} key-value heads of {_named(unfit)} do not divide by {world} processes",
            hint=f"These heads go to {_numbers(heads_fit)}, all perceptrons to {_numbers(neurons_fit)}: use "
            f"{_numbers(both)}.",
        )
    return ShardingReport(world, tuple(found))


def tensor_parallel_plan(model: Any, world: int) -> dict[str, ParallelStyle]:
    """The plan of a decoder for `torch.distributed.tensor.parallel.parallelize_module`.

        mesh = init_device_mesh("cuda", (2,))
        parallelize_module(model, mesh, tensor_parallel_plan(model, 2))

    Afterwards the model takes and gives ordinary tensors, the same on every process, and its cache holds the heads of
    the process. `sharding_report` says which layers are cut how. Fused projections (Phi-3) have their rows in another
    order afterwards, so such a model is for running, and not for saving.

    Args:
        model: as in `sharding_report`.
        world: processes of the mesh.

    Returns:
        Styles by the name of a module.

    Raises:
        UserError: as `sharding_report` does.
    """
    report = sharding_report(model, world)
    layers, architecture = _decoder(model)
    plan: dict[str, ParallelStyle] = {}
    for layer, cut in zip(layers, report.layers, strict=True):
        at, config = f"model.layers.{cut.layer}.", LayerConfig(layer.self_attn.config, 1)
        for branch in (
            (architecture.attention, architecture.perceptron) if cut.attention else (architecture.perceptron,)
        ):
            for name, parts in branch.inputs:
                if sizes := parts(config):
                    plan[at + name] = FusedColwise(sizes, world)
                    if branch is architecture.attention:
                        plan[at + name.rpartition(".")[0]] = LocalHeads()
                else:
                    plan[at + name] = ColwiseParallel()
            plan[at + branch.output] = RowwiseParallel()
        if cut.attention:
            for name in architecture.head_norms:
                if layer.get_parameter(f"{name}.weight").dim() > 1:  # one gain for all heads is for any share of them
                    plan[at + name] = LocalGains()
    return plan


class FusedColwise(ColwiseParallel):
    """Output rows of several projections in one: each process has its rows of every part, in the parts' order.

    Args:
        sizes: rows of each part.
        world: processes.
    """

    def __init__(self, sizes: Sequence[int], world: int) -> None:
        super().__init__()
        self.sizes, self.world = sizes, world

    @torch.no_grad()
    def rearrange(self, module: nn.Linear) -> None:
        """Put the rows of each process next to each other."""
        parts = torch.split(torch.arange(sum(self.sizes)), list(self.sizes))
        shares = [part.chunk(self.world) for part in parts]
        order = torch.cat([share[rank] for rank in range(self.world) for share in shares])
        for name, parameter in list(module.named_parameters()):
            rows = parameter.detach()[order.to(parameter.device)]
            module.register_parameter(name, nn.Parameter(rows, requires_grad=parameter.requires_grad))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        self.rearrange(module)
        return super()._apply(module, device_mesh)


class LocalHeads(ParallelStyle):
    """An attention that splits a fused projection by its numbers of heads: they become those of the process."""

    def apply(self, module: Any, *, world: int) -> None:
        """Divide the numbers; the configuration stays the model's in all else."""
        config = LayerConfig(module.config, 1)
        config.num_attention_heads //= world
        config.num_key_value_heads //= world
        module.config, module.num_key_value_heads = config, config.num_key_value_heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.apply(module, world=device_mesh.size())
        return module


class LocalGains(ParallelStyle):
    """A norm with gains for each head, [heads, head_dim]: the process has those of its heads."""

    def apply(self, module: Any, *, rank: int, world: int) -> None:
        """Keep a share of the rows."""
        gains = module.weight.detach().chunk(world)[rank].clone()
        module.weight = nn.Parameter(gains, requires_grad=module.weight.requires_grad)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.apply(module, rank=device_mesh.get_local_rank(), world=device_mesh.size())
        return module


def _decoder(model: Any) -> tuple[list[Any], Architecture]:
    layers = list(getattr(getattr(model, "model", None), "layers", ()))
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no decoder layers that are known here", hint=f"Use one of {KNOWN}."
        )
    architecture = architecture_of(layers[0])
    output = layers[0].get_submodule(architecture.perceptron.output)
    if type(output) is not nn.Linear or not torch.is_floating_point(output.weight):
        raise UserError(
            f"{architecture.perceptron.output} is a {type(output).__name__}, and only plain matrices are cut here",
            hint="Use the model before it was quantised, and merge an adapter first.",
        )
    return layers, architecture


def _named(layers: Sequence[LayerSharding]) -> str:
    one = f"layer {layers[0].layer}" if len(layers) == 1 else f"the layers {spans(layer.layer for layer in layers)}"
    return one + (" (of several side by side)" if all(layer.width > 1 for layer in layers) else "")


def _counted(layers: int) -> str:
    return "1 layer" if layers == 1 else f"{layers} layers"


def _divisors(numbers: Iterable[int]) -> list[int]:
    common = math.gcd(*numbers)
    return [number for number in range(2, MOST + 1) if common % number == 0]


def _numbers(numbers: Sequence[int]) -> str:
    if not numbers:
        return "no number of processes"
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last} processes" if most else f"{last} processes"
