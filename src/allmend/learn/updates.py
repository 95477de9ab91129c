"""How large an optimiser's steps are, in a few numbers for a run's log."""

from dataclasses import dataclass

from allmend.optim import UpdateMonitor

FAR = 3.0
"""Times its angle in equilibrium from which on a matrix turns far."""


@dataclass(frozen=True)
class UpdateSize:
    """The size of one step.

    Attributes:
        length: ‖Δ‖ over everything that learns.
        angle: the largest angle (radians) of a matrix, as the root mean square over its rows; None without a matrix.
        farthest: the matrix that turned by it.
        far: matrices that turned more than `FAR` times as far as this optimiser does in equilibrium.
        matrices: of which an equilibrium is known; 0 without weight decay.
    """

    length: float
    angle: float | None
    farthest: str
    far: int
    matrices: int


def size_of(monitor: UpdateMonitor) -> UpdateSize | None:
    """The size of the step that the optimiser has just taken; None where the monitor did not look at it."""
    seen = monitor.newest
    if not seen:
        return None
    angles = {one.name: one.angle for one in seen if one.angle}
    rest = {name: angle for name in angles if (angle := monitor.equilibrium(name))}
    farthest = max(angles, key=lambda name: angles[name], default="")
    return UpdateSize(
        length=sum(one.length**2 for one in seen) ** 0.5,
        angle=angles.get(farthest),
        farthest=farthest,
        far=sum(angles[name] > FAR * angle for name, angle in rest.items()),
        matrices=len(rest),
    )
