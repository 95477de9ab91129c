"""What momentum and weight decay come to in a noisy run, in closed form: step sizes, angles, norms.

Letters: β is the momentum's coefficient, m_t = β m_{t−1} + (1 − β) g_t with m_0 = 0; η the learning rate, λ the
decoupled weight decay (w ← (1 − ηλ) w), C the elements of a row. "Noisy" means that gradients are independent from step
to step with mean 0, so that what stands here is the part of an update that noise makes.

The equilibrium of SGD, AdamW and Lion is that of Kosson, Messmer, Jaggi, "Rotational Equilibrium", ICML 2024. All else,
the exact law for signs among it, is derived here and checked against simulation in the tests.
"""

import math


def noise_share(beta: float, step: int | None = None) -> float:
    """κ_t = (1−β)/(1+β) · (1+β^t)/(1−β^t): variance of a bias-corrected average of t gradients, over that of one.

    Args:
        beta: β, in [0, 1).
        step: t, from 1; None for its limit (1−β)/(1+β).
    """
    _check_beta(beta)
    limit = (1 - beta) / (1 + beta)
    if step is None:
        return limit
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    power = beta**step
    return limit * (1 + power) / (1 - power)


def direction_scale(beta: float, *, nesterov: bool = False) -> float:
    """s(β) = √κ_∞: the size of AdamW's update over η in a noisy run; with Nesterov's direction √((1−β²)² + β⁴ κ_∞).

    A sign update of this size is as long as AdamW's with the same learning rate.
    """
    limit = noise_share(beta)
    return math.sqrt((1 - beta**2) ** 2 + beta**4 * limit) if nesterov else math.sqrt(limit)


def first_step_spike(beta: float) -> float:
    """How many times longer AdamW's first step is than its later ones in a noisy run: 1/√κ_∞ = √((1+β)/(1−β)).

    Bias correction makes the first step that of a single gradient, without the averaging that later ones have.
    """
    return 1 / math.sqrt(noise_share(beta))


def inflation(beta: float, steps: int) -> float:
    """Mean length of the first steps after AdamW's state was reset, over that of later ones: mean √κ_t / √κ_∞.

    This is what members of a federation pay who begin every round with a fresh optimiser.

    Args:
        beta: β.
        steps: H, of a round.
    """
    if steps < 1:
        raise ValueError(f"a round has at least one step, got {steps}")
    limit = noise_share(beta)
    return sum(math.sqrt(noise_share(beta, step) / limit) for step in range(1, steps + 1)) / steps


def adamw_angle(lr: float, weight_decay: float, beta: float) -> float:
    """The angle (radians) by which AdamW turns a row in a step, in equilibrium: √(2ηλ) s(β)."""
    return math.sqrt(2 * lr * weight_decay) * direction_scale(beta)


def sgdm_angle(lr: float, weight_decay: float, momentum: float) -> float:
    """The same of SGD with momentum α and a decay that goes through the momentum, as in torch: √(2ηλ / (1 + α))."""
    _check_beta(momentum)
    return math.sqrt(2 * lr * weight_decay / (1 + momentum))


def lion_angle(lr: float, weight_decay: float, beta1: float, beta2: float) -> float:
    """The same of Lion, which steps by η sign(β₁ m_{t−1} + (1 − β₁) g_t): √(2ηλ / T).

    T = 1 + (4/π) Σ_k asin(ρ_k) is how much longer a walk of correlated signs is than one of independent ones, with ρ_k
    the correlation of directions k steps apart (arcsine law of Gaussian variables). LionA has β₁ = β₂ = β, or β² and β
    with Nesterov's direction.
    """
    return math.sqrt(2 * lr * weight_decay / sign_persistence(beta1, beta2))


def lion_norm(
    lr: float, weight_decay: float, beta1: float, beta2: float, *, elements: int, scale: float = 1.0
) -> float:
    """Norm of a row of C elements in equilibrium, where steps are `scale` · η long in each: scale √(η C T / 2λ)."""
    return scale * math.sqrt(lr * elements * sign_persistence(beta1, beta2) / (2 * weight_decay))


def sign_persistence(beta1: float, beta2: float) -> float:
    """T of `lion_angle`."""
    _check_beta(beta1)
    _check_beta(beta2)
    # c_t = Σ_j a_j g_{t−j} with a_0 = 1 − β₁ and a_j = β₁ (1 − β₂) β₂^{j−1}
    of_mean = beta1**2 * (1 - beta2) / (1 + beta2)
    variance = (1 - beta1) ** 2 + of_mean
    total, lag, power = 1.0, 0, 1.0
    while power > 1e-12:
        lag += 1
        at_once = (1 - beta1) * beta1 * (1 - beta2) * power
        power *= beta2
        correlation = (at_once + of_mean * power) / variance
        total += 4 / math.pi * math.asin(min(1.0, correlation))
    return total


def alignment(noise_scale: float, batch_size: float) -> float:
    """Cosine of a batch's gradient and that of one of its own examples, in expectation: √((φ + 1/B) / (φ + 1)).

    Args:
        noise_scale: φ = ‖E g‖² / tr Cov(g) of a single example; its inverse is the critical batch size.
        batch_size: B.
    """
    return math.sqrt((noise_scale + 1 / batch_size) / (noise_scale + 1))


def compensation(signal: float, batch_size: float) -> float:
    """ρ = √((1 + Φ/B) / (1 + Φ)), in [1/√B, 1]: the factor that undoes what aligned gradients do to representations.

    Args:
        signal: Φ = B φ, signal over noise of a batch's gradient, 0 or more; infinite for no noise.
        batch_size: B.
    """
    if math.isinf(signal):
        return 1 / math.sqrt(batch_size)
    return math.sqrt((1 + signal / batch_size) / (1 + signal))


def _check_beta(beta: float) -> None:
    if not 0 <= beta < 1:
        raise ValueError(f"a momentum coefficient lies in [0, 1), got {beta}")
