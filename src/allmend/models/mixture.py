"""A mixture of experts as what learns in a model: generalists, which members share, and specialists, which they keep.

All members of a simulation share one model in memory. It has room for the most experts that any of them has, and for
the highest rank; which experts a member has travels with its state, and an expert of lower rank has zeros in the rest
of its room. `mixture_layers` has the formulas, `mixture_export` what plain PEFT can have of it.

Source: Fan, Messmer, Doikov, Jaggi, "On-Device Collaborative Language Modeling via a Mixture of Generalists and
Specialists" (CoMiGS), arXiv 2409.13931.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from allmend.errors import UserError
from allmend.models.adapters import Trainable
from allmend.models.load import LoadedModel, linear_layers_of
from allmend.models.lora_targets import check_lora
from allmend.models.mixture_layers import BlockMixtureMLP, MixtureConfig, MixtureMLP, dtype_of_experts
from allmend.models.tensors import Tensors, read_tensors, write_tensors

Role = Literal["generalist", "specialist", "router", "present"]

PRESENT: Role = "present"
"""Name, in a mixture's state, of which experts there are: [E] of 0 and 1."""

TENSORS, FACTS = "mixture.safetensors", "mixture.json"
"""The files of a saved mixture."""

_MLP = "mlp"
"""What decoder layers of transformers call their MLP."""

_FORMS = {"linear": MixtureMLP, "block": BlockMixtureMLP}

_ROUTER_DEVIATION = 0.02


@dataclass(frozen=True, eq=False)
class Mixture(Trainable):
    """The experts and routers of a model.

    Parameters have the names of the bare model's layers with `.generalist_A`, `.generalist_B`, `.specialist_A` or
    `.specialist_B` behind them, or of its MLPs with `.router`; `role` tells which. A layer's own name says nothing:
    `gate_proj` has no gate of ours. The state has `PRESENT` besides, which never learns.

    Attributes:
        config: of the experts.
        digest: of the base's weights (`weights_digest`).
        present: [E] of 0 and 1.
    """

    config: MixtureConfig
    digest: str
    present: nn.Parameter = field(repr=False)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the experts, the routers, and which experts are present.

        Raises:
            UserError: a name or shape differs, or no expert is present. No parameter has changed then.
        """
        self._check(tensors)
        present = tensors[PRESENT]
        if not (((present == 0) | (present == 1)).all() and present.any()):
            raise UserError(
                f"{PRESENT} is {present.tolist()} instead of 0 or 1 for each expert, and 1 for at least one"
            )
        super().load(tensors)

    def _travelling(self) -> Mapping[str, torch.Tensor]:
        return {**self._parameters, PRESENT: self.present}

    def _write(self, folder: Path, tensors: Mapping[str, torch.Tensor], base: str) -> None:
        """Fill a folder with the mixture, which `load_mixture` reads."""
        config = self.config
        roles = ["generalist"] * config.generalists + ["specialist"] * config.specialists
        there = (tensors[PRESENT] > 0).tolist()
        experts = [
            {"role": role, "rank": r, "present": present}
            for role, r, present in zip(roles, config.ranks, there, strict=True)
        ]
        facts = {
            "version": 1,
            "base": base,
            "base_digest": self.digest,
            "experts": experts,
            "scale": config.scale,
            "targets": config.targets if isinstance(config.targets, str) else list(config.targets),
            "form": config.form,
        }
        write_tensors(folder / TENSORS, tensors, {})
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def role(name: str) -> Role:
    """What a tensor of a mixture's state belongs to, by its name.

    Raises:
        ValueError: it is no tensor of a mixture.
    """
    own = name.rpartition(".")[2].removesuffix("_A").removesuffix("_B")
    if own not in get_args(Role):
        raise ValueError(f"{name} is no tensor of a mixture")
    return own  # type: ignore[return-value]


def apply_mixture(
    model: PreTrainedModel, config: MixtureConfig, *, seed: int, specialist_seed: int, digest: str
) -> Mixture:
    """Put experts on the MLPs that `config.targets` name, and freeze everything else.

    Args:
        model: a bare causal language model; its MLPs are wrapped in place until `remove_mixture`.
        config: of the experts, all of which are present at first.
        seed: of what members have in common at the start (see `initial`).
        specialist_seed: of what is a member's own.
        digest: of the model's weights (`weights_digest`), for whoever loads the mixture from a folder.

    Raises:
        UserError: `check_mixture` has something to say, an MLP is not made of linear layers alone, or the model has
            experts already.
    """
    if any(isinstance(module, MixtureMLP) for module in model.modules()):
        raise UserError("the model has experts already", hint="Take them off with `remove_mixture`.")
    layers = linear_layers_of(model)
    if problems := check_mixture(layers, config):
        raise UserError("\n".join(problems))
    places: dict[str, list[str]] = {}
    for layer in _in_mlps(layers):
        if isinstance(config.targets, str) or any(_names(target, layer) for target in config.targets):
            places.setdefault(layer.rpartition(".")[0], []).append(layer.rpartition(".")[2])
    for place in places:
        _check_mlp(place, model.get_submodule(place))
    model.requires_grad_(False)
    weight = next(model.parameters())
    ones = torch.ones(config.experts, device=weight.device, dtype=dtype_of_experts(weight))
    present = nn.Parameter(ones, requires_grad=False)
    parameters: dict[str, nn.Parameter] = {}
    for place, names in places.items():
        mlp = _FORMS[config.form](model.get_submodule(place), names, present, config).train(model.training)
        model.set_submodule(place, mlp)
        if mlp.router is not None:
            parameters[f"{place}.router"] = mlp.router
        for name, linear in mlp.linears.items():
            parameters |= {f"{place}.{name}.{own}": one for own, one in linear.named_parameters(recurse=False)}
    mixture = Mixture(model, "mixture", dict(sorted(parameters.items())), config, digest, present)
    mixture.load(initial(mixture, seed=seed, specialist_seed=specialist_seed))
    return mixture


def remove_mixture(mixture: Mixture) -> PreTrainedModel:
    """The bare base model, with its own layers back in place and unchanged; the experts are gone.

    Its parameters stay frozen; `full` unfreezes them.
    """
    model = mixture.model
    assert isinstance(model, PreTrainedModel)
    for name, mlp in list(model.named_modules()):
        if isinstance(mlp, MixtureMLP):
            model.set_submodule(name, mlp.taken_off())
    return model


def load_mixture(base: LoadedModel, folder: Path) -> Mixture:
    """Put the mixture of a folder on its base, in place until `remove_mixture`.

    Args:
        base: the model that the mixture was trained on.
        folder: where `Mixture.save` wrote it.

    Raises:
        UserError: the folder holds no mixture, or one for another base.
    """
    facts, path = read_facts(folder), folder / FACTS
    try:
        config, digest = _config(facts), str(facts["base_digest"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"does not describe a mixture ({type(error).__name__}: {error})", where=path) from error
    if digest != base.digest:
        raise UserError(
            f"this mixture is for another base: {facts.get('base')} with the digest {digest[:12]}…, and "
            f"{base.source} has {base.digest[:12]}…",
            where=folder,
            hint="Load the base that it was trained on.",
        )
    tensors, _ = read_tensors(folder / TENSORS)
    mixture = apply_mixture(base.model, config, seed=0, specialist_seed=0, digest=digest)
    try:
        mixture.load(tensors)
    except UserError as error:
        remove_mixture(mixture)
        raise UserError(f"does not fit {FACTS}: {error.what}", where=folder / TENSORS) from error
    return mixture


@contextlib.contextmanager
def mixed(base: LoadedModel, folder: Path) -> Iterator[Mixture]:
    """The mixture of a folder on its base, for reading; afterwards the bare base is back.

    Raises:
        UserError: the folder holds no mixture, or one for another base.
    """
    mixture = load_mixture(base, folder)
    try:
        yield mixture
    finally:
        remove_mixture(mixture)


def read_facts(folder: Path) -> dict[str, Any]:
    """What a mixture's folder says of it: the name of its `base` and that base's digest, its experts and their scale.

    Raises:
        UserError: the folder holds no mixture.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"no mixture is here ({FACTS}: {error.strerror or error})", where=folder) from error
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", where=path) from error
    if not isinstance(facts, dict) or not isinstance(facts.get("base"), str):
        raise UserError("does not describe a mixture (it names no base)", where=path)
    return facts


def _config(facts: Mapping[str, Any]) -> MixtureConfig:
    ranks = {role: [int(e["rank"]) for e in facts["experts"] if e["role"] == role] for role in get_args(Role)[:2]}
    rank, own = (next(iter(ranks[role]), None) for role in get_args(Role)[:2])
    return MixtureConfig(
        generalists=len(ranks["generalist"]),
        specialists=len(ranks["specialist"]),
        rank=rank or own or 0,
        specialist_rank=own,
        scale=float(facts["scale"]),
        targets=facts["targets"],
        form=facts["form"],
    )


def check_mixture(layers: Mapping[str, tuple[int, int]], config: MixtureConfig) -> list[str]:
    """What is wrong with a mixture for a model with these layers, as messages; empty if nothing is.

    Args:
        layers: names and shapes (out, in), as `linear_layers` gives them.
        config: of the experts.
    """
    if min(config.generalists, config.specialists) < 0 or not config.experts:
        return [f"{config.generalists} generalists and {config.specialists} specialists are no mixture"]
    if config.form not in _FORMS:
        return [f"form {config.form!r} is none of {', '.join(_FORMS)}"]
    if min(config.ranks) < 1:
        return [f"rank {min(config.ranks)} is not positive"]
    within = _in_mlps(layers)
    if not within:
        return ["the model has no MLP of linear layers to put experts on"]
    if deeper := [name for name in layers if f".{_MLP}." in name and name not in within]:
        return [f"experts need MLPs that are made of linear layers alone, and this model has {deeper[0]}"]
    if not isinstance(config.targets, str):
        for target in config.targets:
            if any(_names(target, name) for name in layers) and not any(_names(target, name) for name in within):
                own = sorted({name.rpartition(".")[2] for name in within})
                return [f"target {target!r} is no layer of an MLP, where experts are (the MLPs have: {', '.join(own)})"]
    return check_lora(within, rank=max(config.ranks), targets=config.targets)


def _in_mlps(layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in layers.items() if name.split(".")[-2:-1] == [_MLP]}


def _names(target: str, layer: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _check_mlp(name: str, mlp: nn.Module) -> None:
    children = (child.parameters() for child in mlp.children() if isinstance(child, nn.Linear))
    linear = {id(one) for one in chain.from_iterable(children)}
    if other := [own for own, one in mlp.named_parameters() if id(one) not in linear]:
        raise UserError(
            f"experts need MLPs that are made of linear layers alone, and {name} ({type(mlp).__name__}) has {other[0]}",
            hint="Choose a dense model of the Llama, Mistral, Qwen or Phi families.",
        )


def initial(mixture: Mixture, *, seed: int, specialist_seed: int, ranks: Sequence[int] | None = None) -> Tensors:
    """The state that a member starts from.

    B is zero, A is Kaiming-uniform with a = √5, and R ~ N(0, 0.02²). Generalists have one A for all members and
    specialists one for each, which is all that tells them apart: as long as B is zero no router has a gradient. An
    expert's A and its row of R are the same however many experts there are besides.

    Args:
        mixture: for the names and shapes; it is left as it is.
        seed: of the generalists' A and of R.
        specialist_seed: of the specialists' A.
        ranks: of the member's experts, as in `of_ranks`; by default all of them are present, with all of their rank.

    Raises:
        ValueError: the mixture has no room for `ranks`.
    """
    config = mixture.config
    state = {name: torch.zeros(parameter.shape) for name, parameter in mixture.parameters().items()}
    for own, own_ranks, start in (
        ("generalist", config.generalist_ranks, seed),
        ("specialist", config.specialist_ranks, specialist_seed * 1_000_003 + 1),  # equal seeds make other experts
    ):
        generator = torch.Generator().manual_seed(start % 2**63)
        for expert, r in enumerate(own_ranks):
            for name, tensor in state.items():
                if name.endswith(f".{own}_A"):
                    rows = tensor[expert * r : (expert + 1) * r]
                    nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + 2) % 2**63)
    for expert in range(config.experts):
        for name, tensor in state.items():
            if role(name) == "router":
                tensor[expert].normal_(0, _ROUTER_DEVIATION, generator=generator)
    state[PRESENT] = torch.ones(config.experts)
    typed = {name: tensor.to(mixture.present.dtype) for name, tensor in state.items()}
    return of_ranks(typed, config, config.ranks if ranks is None else ranks)


def of_ranks(tensors: Tensors, config: MixtureConfig, ranks: Sequence[int]) -> Tensors:
    """A state with the first `ranks[e]` components of expert e, and zeros in the rest of its room.

    Its product B A is that of these components. Where both sides of a component are zero so are its gradients, and
    training leaves it alone. An expert of rank 0 is absent: its gate is exactly 0 whatever its row of R, which is zero.

    Args:
        tensors: a mixture's state, or some of it.
        config: of its experts.
        ranks: of each expert, generalists first.

    Raises:
        ValueError: there is no room for these ranks.
    """
    if len(ranks) != config.experts or any(not 0 <= r <= most for r, most in zip(ranks, config.ranks, strict=True)):
        raise ValueError(f"ranks {list(ranks)} for experts of at most {list(config.ranks)}")
    there = torch.tensor([r > 0 for r in ranks])
    kept = [torch.arange(most) < r for r, most in zip(ranks, config.ranks, strict=True)]
    rows = {"generalist": kept[: config.generalists], "specialist": kept[config.generalists :]}
    found = {}
    for name, tensor in tensors.items():
        own = role(name)
        mask = (there if own in ("router", PRESENT) else torch.cat(rows[own])).to(tensor.device)
        shape = (1, -1) if name.endswith("_B") else (-1, *[1] * (tensor.dim() - 1))
        found[name] = torch.where(mask.view(shape), tensor, 0)
    return found
