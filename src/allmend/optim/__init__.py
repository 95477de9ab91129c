"""Optimisers that need no warmup of the learning rate, for anybody's training loop.

Nothing here needs the rest of Allmend.
"""

from allmend.optim.build import build_optimizer
from allmend.optim.closed_forms import adamw_angle as equilibrium_angle
from allmend.optim.groups import parameter_groups
from allmend.optim.liona import LionA
from allmend.optim.lionar import LionAR
from allmend.optim.monitor import UpdateMonitor
from allmend.optim.noise_scale import GradientNoiseScale
from allmend.optim.ramp import MomentumRamp
from allmend.optim.schedule import trapezoidal_schedule

__all__ = [
    "GradientNoiseScale",
    "LionA",
    "LionAR",
    "MomentumRamp",
    "UpdateMonitor",
    "build_optimizer",
    "equilibrium_angle",
    "parameter_groups",
    "trapezoidal_schedule",
]
