"""What lives in an optimiser's hooks, and leaves with them."""

from types import TracebackType
from typing import Any, Protocol, Self

import torch


class _Removable(Protocol):
    def remove(self) -> None: ...


class Hooked:
    """A context whose end, or `close`, takes its hooks away. Subclasses say what happens around a step.

    Args:
        optimizer: any of torch's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._hooks: list[_Removable] = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
        ]

    def _begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        raise NotImplementedError

    def _end(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take all hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
