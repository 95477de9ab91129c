"""The picture of `warmup.py --figure`: length, angle, what representations feel, and noise, over a training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

import torch

from allmend.optim import GradientNoiseScale, UpdateMonitor, build_optimizer, trapezoidal_schedule
from allmend.optim.comparison import Method
from allmend.optim.small_model import Sequences, Shape, loss_of, make_model
from allmend.report.charts import Axis, Series, line_chart
from allmend.report.picture import picture

STEPS = 300
SHOWN = (
    ("AdamW, none", Method("adamw", 4e-3), 0.0),
    ("AdamW, 25 %", Method("adamw", 4e-3), 0.25),
    ("LionAR, none", Method("lionar", 3.2e-2), 0.0),
)
"""Name, method and warmup."""


@dataclass
class Trajectory:
    """What was seen of a training, by step."""

    name: str
    length: dict[int, float] = field(default_factory=dict)
    angle: dict[int, float] = field(default_factory=dict)
    output: dict[int, float] = field(default_factory=dict)
    noise: dict[int, float] = field(default_factory=dict)


def trajectories(data: Sequences, *, seed: int) -> list[Trajectory]:
    """Of attention's query, key and value matrices: updates; of all: the critical batch size, in sequences.

    Gradients are not clipped here, since that would falsify the last.
    """
    return [_one(data, name, method, warmup, seed) for name, method, warmup in SHOWN]


def _one(data: Sequences, name: str, method: Method, warmup: float, seed: int) -> Trajectory:
    shape, found = Shape(), Trajectory(name)
    model = make_model(shape, seed)
    betas = {"betas": (0.9, 0.95)} if method.name == "adamw" else {}
    optimizer = build_optimizer(method.name, model, lr=method.lr, weight_decay=0.1, **betas)
    schedule = trapezoidal_schedule(optimizer, steps=STEPS, warmup=round(warmup * STEPS))
    noise = GradientNoiseScale(beta=0.9, batch_size=shape.batch)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed + 1))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with UpdateMonitor(model, optimizer, every=1, outputs=True) as monitor:
        for step in range(1, STEPS + 1):
            batch = order[(step - 1) * shape.batch : step * shape.batch]
            loss_of(model, data.train[batch]).backward()
            gradients = [parameter.grad.clone() for parameter in learning if parameter.grad is not None]
            optimizer.step()
            noise.see_gradients(gradients, [optimizer.state[parameter]["exp_avg"] for parameter in learning])
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            some = [one for one in monitor.newest if any(part in one.name for part in ("q_proj", "k_proj", "v_proj"))]
            found.length[step] = sum(one.length**2 for one in some) ** 0.5
            found.angle[step] = mean(one.angle for one in some if one.angle is not None)
            found.output[step] = mean(one.output_change for one in some if one.output_change is not None)
            if step >= 10 and noise.estimate is not None:
                found.noise[step] = noise.estimate.critical_batch_size
    return found


def draw(shown: Sequence[Trajectory]) -> str:
    """Four charts as one SVG, light or dark as its reader's."""
    charts = (
        ("length", "length of the update, ‖Δ‖", (0.01, 0.1, 1.0)),
        ("angle", "angle of a row, rad", (0.001, 0.01, 0.1)),
        ("output", "change of a layer's output, ‖Δy‖ / ‖y‖", (0.001, 0.01, 0.1, 1.0)),
        ("noise", "critical batch size, sequences", (1.0, 10.0, 100.0, 1000.0)),
    )
    parts = []
    for key, label, ticks in charts:
        series = []
        for look, one in enumerate(shown):
            values = {
                step: value for step, value in getattr(one, key).items() if ticks[0] / 3 <= value <= ticks[-1] * 5
            }
            series.append(Series(one.name, one.name, look, trace=tuple((float(a), b) for a, b in values.items())))
        steps = Axis("step", ticks=(1.0, 3.0, 10.0, 30.0, 100.0, 300.0), log=True)
        parts.append(line_chart(label, series, steps, Axis(label, ticks=ticks, log=True)))
    return picture(parts)
