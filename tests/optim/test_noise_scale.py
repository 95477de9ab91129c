"""Signal and noise on gradients whose signal and noise are known."""

import math

import pytest
import torch

from allmend.optim.noise_scale import GradientNoiseScale, NoiseScale, from_two_sizes

SIZE = 20_000


def gradients(batch: int, *, signal: float, noise: float, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches' gradients with ‖E g‖² = signal and tr Cov = noise / batch."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(SIZE, generator=generator)
    mean *= math.sqrt(signal) / mean.norm()
    spread = math.sqrt(noise / batch / SIZE)
    return [mean + spread * torch.randn(SIZE, generator=generator) for _ in range(steps)]


def test_two_batch_sizes_give_signal_and_noise_without_bias() -> None:
    found = []
    for seed in range(60):
        small = gradients(4, signal=0.2, noise=8.0, steps=8, seed=seed)
        large = torch.stack(small).mean(0).norm().item() ** 2
        found.append(from_two_sizes([g.norm().item() ** 2 for g in small], large, small_size=4, large_size=32))
    assert sum(one.noise for one in found) / 60 == pytest.approx(8.0, rel=0.03)
    assert sum(one.signal for one in found) / 60 == pytest.approx(0.2, rel=0.05)


def test_without_a_signal_the_estimate_may_be_below_zero_and_is_told_as_it_is() -> None:
    small = gradients(1, signal=0.0, noise=1.0, steps=4)
    squares = [g.norm().item() ** 2 for g in small]
    found = [
        from_two_sizes(squares, torch.stack(small).mean(0).norm().item() ** 2, small_size=1, large_size=4),
        NoiseScale(-0.1, 1.0),
    ]
    assert abs(found[0].signal) < 0.05
    assert found[1].critical_batch_size == math.inf
    assert found[1].per_example == 0.0
    assert NoiseScale(0.5, 2.0).critical_batch_size == 4.0


def test_a_momentum_gives_the_same() -> None:
    batch, beta = 16, 0.9
    scale = GradientNoiseScale(beta=beta, batch_size=batch)
    momentum = torch.zeros(SIZE)
    assert scale.estimate is None
    for g in gradients(batch, signal=0.8, noise=16.0, steps=200):  # Φ = 0.8 for a batch
        momentum.lerp_(g, 1 - beta)
        scale.see_gradients([g[:5000], g[5000:]], [momentum[:5000], momentum[5000:]])
    found = scale.estimate
    assert found is not None
    assert found.signal == pytest.approx(0.8, rel=0.05)
    assert found.noise == pytest.approx(16.0, rel=0.05)
    assert found.per_example * batch == pytest.approx(0.8, rel=0.06)


@pytest.mark.parametrize(("small", "sizes"), [([], (1, 2)), ([1.0], (2, 2)), ([1.0], (0, 2)), ([1.0], (3, 2))])
def test_what_gives_no_estimate_is_refused(small: list[float], sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="small batch"):
        from_two_sizes(small, 1.0, small_size=sizes[0], large_size=sizes[1])
