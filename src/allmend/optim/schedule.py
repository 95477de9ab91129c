"""The trapezoidal schedule, under which runs with and without warmup are compared: rise, stay, fall to 0."""

import torch


def trapezoidal_schedule(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup: int = 0, cooldown: int | None = None
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises from 0 for `warmup` steps, stays, and falls linearly to 0 over the last `cooldown`.

    This is `transformers.get_wsd_schedule` (warmup, stable, decay) with linear parts.

    Args:
        optimizer: whose groups' learning rates are the peak.
        steps: of the whole run.
        warmup: the first of them.
        cooldown: the last of them; half of all when None.

    Raises:
        ValueError: the parts are longer than the whole, or negative.
    """
    from transformers import get_wsd_schedule

    cooldown = steps // 2 if cooldown is None else cooldown
    if min(warmup, cooldown) < 0 or warmup + cooldown > steps:
        raise ValueError(f"{steps} steps have no room for a warmup of {warmup} and a cooldown of {cooldown}")
    made: torch.optim.lr_scheduler.LambdaLR = get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=cooldown,
        num_training_steps=steps,
        decay_type="linear",
    )
    return made
