"""Several optimisers over different parameters that step as one."""

from collections.abc import Callable
from typing import Any

import torch


class Together(torch.optim.Optimizer):
    """Optimisers with disjoint parameters behind one `step`, with all their groups for schedulers.

    Args:
        parts: in the order in which they step.

    Raises:
        ValueError: a parameter is in two of them.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": list(group["params"])} for group in groups], {})
        self.param_groups = groups  # the parts' own, so that what schedulers write reaches them

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Every part's step; gives the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' own, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            ValueError: it is of other optimisers.
        """
        saved = state_dict.get("parts", ())
        if len(saved) != len(self.parts):
            raise ValueError(f"the state is of {len(saved)} optimisers, and there are {len(self.parts)}")
        for part, state in zip(self.parts, saved, strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
