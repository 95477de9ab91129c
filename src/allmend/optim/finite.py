"""Whether all gradients are numbers, found out before anything moves: a sign keeps NaN in the momentum for good."""

from typing import Any

import torch

from allmend.optim.blocks import whole


def what_is_wrong(groups: list[dict[str, Any]]) -> str:
    """The first gradient that holds NaN or infinite values, in words; empty where all are finite.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    found = [
        (number, index, parameter.grad)
        for number, group in enumerate(groups)
        if group["nonfinite"] != "pass"
        for index, parameter in enumerate(group["params"])
        if parameter.grad is not None
    ]
    norms: dict[torch.device, list[torch.Tensor]] = {}
    for *_, gradient in found:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        norms.setdefault(gradient.device, []).append(whole(torch.linalg.vector_norm(gradient, dtype=wide)))
    # one answer for all that lie on a device, which is waited for with each
    if all(torch.stack([norm.float() for norm in some]).isfinite().all() for some in norms.values()):
        return ""
    for number, index, gradient in found:  # a norm may overflow where no number does
        if not whole(gradient.isfinite().all()):
            return f"{name_of(number, index, gradient)} holds NaN or infinite values, which would stay in the momentum"
    return ""


def refuse_sparse(groups: list[dict[str, Any]]) -> None:
    """Raise where a gradient is sparse.

    Raises:
        RuntimeError: so it is.
    """
    for number, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise RuntimeError(f"{name_of(number, index, parameter.grad)} is sparse, which sign updates cannot use")


def name_of(group: int, index: int, gradient: torch.Tensor) -> str:
    """Of a gradient, in an error message."""
    return f"the gradient of parameter {index} of group {group}, shape {tuple(gradient.shape)},"
