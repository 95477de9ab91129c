"""A decoder taken apart, so that candidates which differ only later on share what comes before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allmend.depth.architectures import architecture_of, check_kinds, layers_of
from allmend.depth.interventions import shallow, step_of
from allmend.depth.plan import Step


@dataclass(frozen=True)
class Trunk:
    """What the layers make of some tokens when they run one after the other.

    Attributes:
        ids: int64 [batch, tokens].
        states: before each layer and after the last, [batch, tokens, width] each.
        named: what each layer is given beside the stream.
    """

    ids: torch.Tensor
    states: tuple[torch.Tensor, ...]
    named: tuple[Mapping[str, Any], ...]


class _Listener(nn.Module):
    """Stands where a layer does, and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.named: dict[str, Any] = {}
        self.hidden_states = torch.empty(0)

    def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        self.hidden_states, self.named = hidden_states, named
        return hidden_states


class Decoder:
    """A causal language model as embeddings, layers, and a loss.

    Args:
        model: as `architectures.layers_of` asks for; in evaluation mode.

    Raises:
        UserError: its layers cannot be rearranged.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, layers_of(model)
        self._norm = model.model.get_submodule(architecture_of(self.layers[0]).last_norm)

    @torch.inference_mode()
    def trunk(self, ids: torch.Tensor) -> Trunk:
        """Run the layers one after the other.

        Args:
            ids: int64 [batch, tokens], without padding.
        """
        listening = shallow(self.model.model)
        listening.layers = nn.ModuleList([_Listener() for _ in self.layers])
        ids = ids.to(self.model.device)
        listening(ids, use_cache=False)
        listeners: Sequence[Any] = list(listening.layers)
        states = [listeners[0].hidden_states]
        named = tuple(one.named for one in listeners)
        for layer, given in zip(self.layers, named, strict=True):
            states.append(layer(states[-1], **given))
        return Trunk(ids, tuple(states), named)

    def modules(self, steps: Sequence[Step]) -> list[nn.Module]:
        """The modules that do the steps, on the layers' own weights.

        Raises:
            UserError: the layers of a step attend differently.
        """
        together = tuple(step.layers for step in steps if len(step.layers) > 1)
        check_kinds(self.model.config, len(self.layers), together)
        return [step_of(step, self.layers) for step in steps]

    @torch.inference_mode()
    def losses(self, trunk: Trunk, steps: Sequence[Step], modules: Sequence[nn.Module]) -> torch.Tensor:
        """Of each token but a window's first, −log p given those before it (nats), float32 [batch, tokens − 1].

        What runs as in the trunk, up to the first step that differs, is taken from there.

        Args:
            trunk: of the tokens.
            steps: what the decoder does.
            modules: of the steps.
        """
        same = common_prefix(steps)
        hidden = trunk.states[same]
        for step, module in zip(steps[same:], modules[same:], strict=True):
            hidden = module(hidden, **trunk.named[step.layers[0]])
        logits = self.model.lm_head(self._norm(hidden[:, :-1])).float()
        found: torch.Tensor = nn.functional.cross_entropy(
            logits.flatten(0, 1), trunk.ids[:, 1:].flatten(), reduction="none"
        )
        return found.view(len(trunk.ids), -1)


def common_prefix(steps: Sequence[Step]) -> int:
    """How many of the first steps are a decoder's own: layer 0, layer 1, …"""
    return next((place for place, step in enumerate(steps) if step.layers != (place,)), len(steps))
