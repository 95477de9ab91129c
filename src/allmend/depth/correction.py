"""Correction without training: a folded layer's last projections, fitted to what its layers do one after the other.

Side by side, a layer does not see the updates of the one before it. Part of what it would have made of them is linear
in what it does see, and a ridge regression puts it into the weights that the folded layer has anyway:

    W = argmin ‖U − V Wᵀ‖² + λ ‖W − W₀‖²,  λ = ρ · mean diag(VᵀV),

where V are the inputs of a projection on some text, U what it ought to put out, and W₀ its weights. With R = U − V W₀ᵀ
that is W = W₀ + Rᵀ V (VᵀV + λ I)⁻¹, of which VᵀV and VᵀR are added up window by window.

The attention's projection ought to put out the sum of the layers' attention updates in the sequential model, the
perceptron's what then is missing to the sequential model's stream after the last of them. Layer by layer in order of
depth, both are fitted on what they will read: the streams of the model that is corrected up to there. So a layer also
makes up for what is left of the errors before it, which one that is fitted on the sequential model's streams does not.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allmend.data.chat import Encoded
from allmend.data.packing import Row, pack
from allmend.data.windows import Windows
from allmend.depth.architectures import architecture_of, layers_of
from allmend.depth.decoder import Decoder, common_prefix
from allmend.depth.interventions import shallow
from allmend.depth.measure import Measured, added
from allmend.depth.plan import Plan
from allmend.errors import UserError
from allmend.learn.objective import log_likelihood
from allmend.results import Estimate, Table

GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Values of ρ that are tried."""


class Fit(Table):
    """A projection that was fitted.

    Attributes:
        layers: that run side by side.
        projection: its name in a layer.
        rho: ρ, that of the smallest squared error on the held-out text.
        explained: share of that error (of R, before the fit) that is gone; negative where the fit made it larger.
        loss: of the paired model on the held-out text with the fit and those before it (nats per token).
        applied: whether the fit was kept: it lowered that loss.
    """

    layers: tuple[int, ...]
    projection: str
    rho: float
    explained: float
    loss: float
    applied: bool


class CorrectionReport(Table):
    """What a correction did on the held-out text, which chose ρ and decided what was kept: look at another one, too.

    Attributes:
        fits: in the order in which they were made.
        tokens, held_out_tokens: of the two texts.
        gap_before, gap_after: mean loss of the paired model minus the sequential one's (nats per token); n counts
            windows.
        notes: what to know about it.
    """

    fits: tuple[Fit, ...]
    tokens: int
    held_out_tokens: int
    gap_before: Estimate
    gap_after: Estimate
    notes: tuple[str, ...] = ()


@dataclass
class Normal:
    """The normal equations of R ≈ V Dᵀ, with VᵀV, VᵀR and ‖R‖² in double precision."""

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float = 0.0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> "Normal":
        """Of no text yet. Where the device has no double precision, they are added up on the CPU."""
        corner = torch.zeros(1, 1, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        return cls(corner.new_zeros(inputs, inputs), corner.new_zeros(inputs, outputs))

    def add(self, V: torch.Tensor, R: torch.Tensor) -> None:
        """V is [tokens, inputs], R [tokens, outputs]."""
        V, R = V.to(self.gram), R.to(self.gram)
        self.gram.addmm_(V.T, V)
        self.cross.addmm_(V.T, R)
        self.energy += float(R.square().sum())

    def change(self, rho: float) -> torch.Tensor:
        """D = RᵀV (VᵀV + λ I)⁻¹ with λ = ρ · mean diag(VᵀV), [outputs, inputs].

        Raises:
            UserError: λ is lost in rounding.
        """
        ridge = rho * self.gram.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(self.gram + torch.diag(ridge.expand(len(self.gram))))
        if failed:
            raise UserError(f"ρ = {rho:g} is too small for this text", hint="Choose a larger one, or more text.")
        return torch.cholesky_solve(self.cross, factor).T

    def error(self, D: torch.Tensor) -> float:
        """‖R − V Dᵀ‖²."""
        return self.energy - 2 * float((D.T * self.cross).sum()) + float(((D @ self.gram) * D).sum())


def correct(
    paired: Any,
    model: Any,
    plan: Plan,
    windows: Windows,
    *,
    held_out: Windows,
    grid: Sequence[float] = GRID,
    on_fit: Callable[[Fit], None] = lambda fit: None,
) -> CorrectionReport:
    """Fit the output projections of a paired model's folded layers, in place, where that lowers its held-out loss.

    Memory does not grow with the text; besides the models it takes four square matrices of the widest input in double
    precision. Biases stay as they are.

    Args:
        paired: from `apply_plan`, in evaluation mode.
        model: what it was made from, in evaluation mode; it stays as it is.
        plan: that was applied.
        windows: text to fit on.
        held_out: other windows, to choose ρ on and to see whether a fit helps.
        grid: values of ρ, above 0.
        on_fit: told every fit; there are two for each group of the plan with more than one layer.

    Raises:
        UserError: no layers of the plan are folded; both texts share a window; ρ is out of range or too small for the
            text; the model puts out what is not finite.
    """
    check_fits(paired, model, plan)
    _check(windows, held_out, grid)
    layers = layers_of(model)
    architecture = architecture_of(layers[0])
    alone = Plan(tuple((layer,) for layer in range(len(layers))))
    sequential, before = measured(model, alone, held_out), measured(paired, plan, held_out)
    now, fits, widest = before, list[Fit](), 0
    for place, group in enumerate(plan.groups):
        if len(group) == 1:
            continue
        decoder = Decoder(_until(model, group[-1]))
        for output in (architecture.attention.output, architecture.perceptron.output):
            weight = paired.model.layers[place].get_parameter(f"{output}.weight")
            kept = weight.detach().clone()
            widest = max(widest, kept.shape[1])
            fitted, judged = (normal_of(decoder, paired, plan, place, output, text) for text in (windows, held_out))
            rho, change = _best(fitted, judged, grid)
            with torch.no_grad():
                weight.add_(change.to(weight))
            after = measured(paired, plan, held_out)
            if applied := after.loss < now.loss:
                now = after
            else:
                with torch.no_grad():
                    weight.copy_(kept)
            fits.append(
                Fit(
                    layers=group,
                    projection=output,
                    rho=rho,
                    explained=1 - judged.error(change) / judged.energy if judged.energy else 0.0,
                    loss=after.loss,
                    applied=applied,
                )
            )
            on_fit(fits[-1])
    return CorrectionReport(
        fits=tuple(fits),
        tokens=windows.tokens,
        held_out_tokens=held_out.tokens,
        gap_before=added(before, sequential),
        gap_after=added(now, sequential),
        notes=_notes(fits, windows, widest),
    )


def _notes(fits: Sequence[Fit], windows: Windows, widest: int) -> tuple[str, ...]:
    notes = []
    if windows.tokens < 2 * widest:
        notes.append(
            f"{windows.source}: {windows.tokens:,} tokens are few for projections of {widest:,} inputs; twice as many "
            "or more are better"
        )
    left = [fit for fit in fits if not fit.applied]
    notes += [
        f"layers {fit.layers[0]} to {fit.layers[-1]}: {fit.projection} stays as it was, its fit did not lower the "
        "held-out loss"
        for fit in left
    ]
    return tuple(notes)


def _best(fitted: Normal, judged: Normal, grid: Sequence[float]) -> tuple[float, torch.Tensor]:
    """The ρ whose D has the smallest error on another text, and that D."""
    best: tuple[float, float, torch.Tensor] | None = None
    for rho in grid:
        change = fitted.change(rho)
        error = judged.error(change)
        if best is None or error < best[0]:
            best = error, rho, change
    assert best is not None
    return best[1:]


def _until(model: Any, last: int) -> Any:
    """A model without what comes after layer `last`."""
    changed = shallow(model)
    changed.model = shallow(model.model)
    changed.model.layers = model.model.layers[: last + 1]
    return changed


def check_fits(paired: Any, model: Any, plan: Plan) -> None:
    """See that a paired model was made from this model with this plan, as far as their shapes tell.

    Raises:
        UserError: it was not, or the plan leaves every layer alone.
    """
    plan.check(len(layers_of(model)))
    if not plan.together:
        raise UserError("no layers of the plan run side by side: there is nothing to correct or to recover")
    if (widths := getattr(paired.config, "layer_widths", None)) != plan.widths:
        raise UserError(f"the paired model's layers have widths {widths}, the plan's groups {plan.widths}")


def _check(windows: Windows, held_out: Windows, grid: Sequence[float]) -> None:
    if not grid or not all(0 < rho < math.inf for rho in grid):
        raise UserError(f"the grid of ρ is {list(grid)}: it needs one number or more, each above 0")
    fitted = {tuple(window) for window in windows.ids.tolist()}
    if shared := sum(tuple(window) in fitted for window in held_out.ids.tolist()):
        raise UserError(
            f"{shared} of {len(held_out)} held-out windows are among those that the correction is fitted on",
            where=held_out.source,
            hint="Choose ρ on other windows.",
        )


@torch.inference_mode()
def measured(model: Any, plan: Plan, windows: Windows) -> Measured:
    """What a model comes to on a text as it stands, such as a paired one, which `Decoder` does not take apart.

    Args:
        model: a causal language model in evaluation mode, also with an adapter.
        plan: what it does.
        windows: the text.
    """
    rows = (row_of(window).to(model.device) for window in windows.ids)
    losses = [-log_likelihood(model, row).cpu().numpy() for row in rows]
    return Measured(plan.steps(sum(plan.widths)), losses)


def row_of(ids: torch.Tensor) -> Row:
    """A window as a row whose every token but the first is a target; ids are int64 [tokens]."""
    trunk, places = torch.zeros_like(ids), torch.arange(len(ids))
    (row,) = pack([Encoded("", ids, torch.ones_like(ids, dtype=torch.bool), trunk, places)], len(ids))
    return row


@torch.inference_mode()
def normal_of(decoder: Decoder, paired: Any, plan: Plan, place: int, output: str, windows: Windows) -> Normal:
    """The normal equations of what a folded layer's projection ought to put out beside what it does.

    Args:
        decoder: the sequential model, or as much of it as holds the layer's group.
        paired: the model with folded layers, corrected up to there.
        plan: that was applied.
        place: of the folded layer.
        output: name of the projection.
        windows: the text.
    """
    group, folded = plan.groups[place], paired.model.layers[place]
    layers = [decoder.layers[layer] for layer in group]
    architecture = architecture_of(layers[0])
    projections = [layer.get_submodule(output) for layer in (folded, *layers)]
    weight = folded.get_parameter(f"{output}.weight")
    found = Normal.empty(weight.shape[1], weight.shape[0], weight.device)
    same = common_prefix(plan.steps(sum(plan.widths)))
    for window in windows.ids:
        with _watched(projections) as calls:
            trunk = decoder.trunk(window[None])
            stream = trunk.states[same]
            for step in range(same, place + 1):
                stream = paired.model.layers[step](stream, **trunk.named[plan.groups[step][0]])
        (inputs, out), *apart = calls
        if output == architecture.attention.output:
            missing = torch.stack([update for _, update in apart]).sum(0) - out
        else:
            missing = trunk.states[group[-1] + 1] - stream
        found.add(inputs[0], missing[0])
    if not (math.isfinite(found.energy) and bool(found.gram.isfinite().all())):
        raise UserError(f"layers {list(group)} put out what is not finite on the text", where=windows.source)
    return found


@contextlib.contextmanager
def _watched(modules: Sequence[nn.Module]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What modules were given and put out when they were last called, by their places."""
    nothing = torch.empty(0)
    calls = [(nothing, nothing)] * len(modules)

    def watch(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            calls[place] = (given[0], out)

        return hook

    handles = [module.register_forward_hook(watch(place)) for place, module in enumerate(modules)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
