import pytest
import torch

from averaging.outer import Algorithm, OuterConfig, outer_step
from protocol.manifest import gamma_bound


def vectors(count: int, numel: int = 64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


def test_nesterov_diloco_is_torchs_sgd_on_minus_delta() -> None:
    (start, *deltas) = vectors(21)
    config = OuterConfig(algorithm="diloco", alpha=0.9, beta=0.7, gamma=0.0)
    phi, momentum = start.clone(), torch.zeros_like(start)
    parameter = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for delta in deltas:
        parameter.grad = -delta
        sgd.step()
        outer_step(phi, momentum, delta.clone(), None, config)
        torch.testing.assert_close(phi, parameter.detach(), rtol=1e-6, atol=1e-6)


def test_noloco_is_heavy_ball_with_a_pull() -> None:
    phi, momentum, delta, pull = vectors(4)
    expected_momentum = 0.5 * momentum + 0.7 * delta + 0.6 * pull
    expected_phi = phi + expected_momentum
    outer_step(phi, momentum, delta, pull, OuterConfig(alpha=0.5, beta=0.7, gamma=0.6))
    torch.testing.assert_close(momentum, expected_momentum)
    torch.testing.assert_close(phi, expected_phi)


def test_heavy_ball_diloco_is_torchs_sgd_and_noloco_without_a_pull() -> None:
    (start, *deltas) = vectors(21)
    diloco = OuterConfig(algorithm="diloco", momentum="heavy-ball", alpha=0.3, beta=0.7, gamma=0.0)
    phi, momentum = start.clone(), torch.zeros_like(start)
    other, other_momentum = start.clone(), torch.zeros_like(start)
    parameter = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.3)
    for delta in deltas:
        parameter.grad = -delta
        sgd.step()
        outer_step(phi, momentum, delta.clone(), None, diloco)
        outer_step(other, other_momentum, delta.clone(), None, OuterConfig(alpha=0.3, beta=0.7))
        torch.testing.assert_close(phi, parameter.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other, phi, rtol=1e-5, atol=1e-5)


def test_sparseloco_is_a_plain_step_with_a_pull() -> None:
    phi, momentum, delta, pull = vectors(4)
    expected, before = phi + 0.9 * delta + 0.4 * pull, momentum.clone()
    outer_step(phi, momentum, delta, pull, OuterConfig(algorithm="sparseloco", beta=0.9, gamma=0.4))
    torch.testing.assert_close(phi, expected)
    assert torch.equal(momentum, before)


@pytest.mark.parametrize("algorithm", ["noloco", "diloco", "sparseloco"])
def test_one_step_from_rest_goes_downhill(algorithm: Algorithm) -> None:
    """The paper's printed sign would move φ against Δ."""
    phi, delta = torch.zeros(8), torch.ones(8)
    outer_step(phi, torch.zeros(8), delta, None, OuterConfig(algorithm=algorithm))
    assert (phi > 0).all()


def test_pair_average_and_local() -> None:
    theta, pull = vectors(2)
    phi = theta.clone()
    outer_step(phi, torch.zeros(0), torch.zeros(64), pull, OuterConfig(algorithm="pair-average"))
    assert torch.equal(phi, theta + pull)
    phi = theta.clone()
    outer_step(phi, torch.zeros(0), torch.zeros(64), None, OuterConfig(algorithm="local"))
    assert torch.equal(phi, theta)


def spread_after(gamma: float, alpha: float, *, rounds: int = 600, num_peers: int = 32) -> float:
    """RMS distance of φ to the swarm's mean, relative to the start, after random pairings without any training."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(num_peers, 64, generator=generator, dtype=torch.float64)
    momentum = torch.zeros_like(phi)
    config = OuterConfig(algorithm="local")  # validated constants would refuse the divergent case
    object.__setattr__(config, "algorithm", "noloco")
    object.__setattr__(config, "alpha", alpha)
    object.__setattr__(config, "gamma", gamma)
    before = (phi - phi.mean(0)).norm()
    for _ in range(rounds):
        order = torch.randperm(num_peers, generator=generator)
        partner = torch.empty_like(order)
        partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
        outer_step(phi, momentum, torch.zeros_like(phi), (phi[partner] - phi) / 2, config)
    return float((phi - phi.mean(0)).norm() / before)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_monte_carlo_limit_of_gamma(alpha: float) -> None:
    bound = gamma_bound(alpha)
    assert spread_after(0.85 * bound, alpha) < 0.1
    assert spread_after(1.25 * bound, alpha) > 10.0


def test_papers_bound_is_wrong() -> None:
    """α = 0.9 with γ = 0.7, inside the paper's Eq. 74, diverges; the default constants converge."""
    assert spread_after(0.7, 0.9) > 10.0
    assert spread_after(0.7, 0.5) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, "γ < 2"),
        ({"gamma": 0.0}, "0 < γ"),
        ({"gamma": 0.7, "alpha": 0.9}, "0.380"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"algorithm": "diloco", "gamma": 2.0}, "γ < 2"),
        ({"algorithm": "sparseloco", "gamma": 2.0}, "γ < 2"),
        ({"algorithm": "magic"}, "unknown algorithm"),
        ({"momentum": "nesterov"}, "nesterov momentum is diloco's"),
        ({"algorithm": "pair-average", "momentum": "nesterov"}, "nesterov momentum is diloco's"),
        ({"theta_only": True, "gamma": 0.6}, "gamma = beta"),
        ({"algorithm": "diloco", "theta_only": True}, "noloco"),
        ({"staleness_penalty": 0.0}, "staleness_penalty"),
        ({"staleness_penalty": 1.1}, "staleness_penalty"),
        ({"momentum_clip": -1.0}, "momentum_clip"),
        ({"algorithm": "sparseloco", "momentum_clip": 1.0}, "needs a momentum"),
    ],
)
def test_constants_that_can_not_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OuterConfig(**changes)  # type: ignore[arg-type]  # wrong values on purpose
