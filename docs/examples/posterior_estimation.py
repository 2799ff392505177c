"""Neural posterior estimation: one flow learns the posterior for every observation.

    python docs/examples/posterior_estimation.py --simulator linear
    python docs/examples/posterior_estimation.py --simulator moons

Parameters are drawn from the prior and simulated; a flow conditioned on the simulation is trained
to give the parameters' density. It never sees a likelihood. Both posteriors are known, so the error
can be measured: the mean KL divergence, coverage, and ranks (simulation-based calibration).
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import snf_ext


class Linear:
    """theta ~ N(0, I), x = A theta + noise: the posterior is Gaussian."""

    features, observed = 6, 10

    def __init__(self) -> None:
        self.A = torch.randn(self.observed, self.features) / math.sqrt(self.features)
        self.noise = 0.5
        precision = torch.eye(self.features) + self.A.T @ self.A / self.noise**2
        self.covariance = torch.linalg.inv(precision)

    def __call__(self, count: int) -> tuple[Tensor, Tensor]:
        theta = torch.randn(count, self.features)
        return theta, theta @ self.A.T + self.noise * torch.randn(count, self.observed)

    def log_posterior(self, theta: Tensor, x: Tensor) -> Tensor:
        mean = x @ self.A @ self.covariance / self.noise**2
        return MultivariateNormal(mean, self.covariance).log_prob(theta)

    def flow(self) -> snf_ext.Flow:
        """As the posterior is: a dense map, shifted and scaled by what was observed."""
        layers = [
            snf_ext.SelfNormLinear(self.features, inverse="tracked"),
            snf_ext.ComponentwiseAffine((self.features,), context_features=self.observed),
        ]
        return snf_ext.Flow(layers, (self.features,), context_features=self.observed)


class Moons:
    """theta uniform on a square, x on a crescent: the posterior is a pair of crescents."""

    features, observed = 2, 2
    radius, width, side = 0.5, 0.1, 1.5

    def __call__(self, count: int) -> tuple[Tensor, Tensor]:
        theta = self.side * (2 * torch.rand(count, 2) - 1)
        angle = math.pi * (torch.rand(count) - 0.5)
        radius = self.radius + self.width * torch.randn(count)
        crescent = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
        return theta, crescent + self.shift(theta)

    def shift(self, theta: Tensor) -> Tensor:
        a, b = theta.unbind(-1)
        return torch.stack((-(a + b).abs(), b - a), -1) / math.sqrt(2)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        right, up = (x - self.shift(theta)).unbind(-1)
        radius = torch.hypot(right, up)
        log_prob = Normal(self.radius, self.width).log_prob(radius) - (math.pi * radius).log()
        return torch.where(right > 0, log_prob, -math.inf)

    def log_posterior(self, theta: Tensor, x: Tensor) -> Tensor:
        """The evidence is summed over a grid of the prior's square."""
        ticks = self.side * ((torch.arange(200) + 0.5) / 100 - 1)
        grid = torch.cartesian_prod(ticks, ticks)
        cell = (ticks[1] - ticks[0]).item() ** 2
        evidence = [self.log_likelihood(grid, row).logsumexp(0) + math.log(cell) for row in x]
        return self.log_likelihood(theta, x) - torch.stack(evidence)

    def flow(self) -> snf_ext.Flow:
        """Couplings behind a logit, which keeps every sample on the square."""
        couplings = (
            snf_ext.AffineCoupling(2, 64, mask="vector", flipped=odd, context_features=2)
            for odd in (False, True) * 6
        )
        to_reals = [snf_ext.Normalize(-self.side, 2 * self.side), snf_ext.Logit(1e-3)]
        return snf_ext.Flow([*to_reals, *couplings], (2,), context_features=2)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and compare with the known posterior."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulator", choices=("linear", "moons"), default="linear")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--observations", type=int, default=1000, help="to compare on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    simulator = {"linear": Linear, "moons": Moons}[args.simulator]()
    flow = simulator.flow()
    optimizer = torch.optim.Adam(flow.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in range(1, args.steps + 1):
        theta, x = simulator(args.batch)
        optimizer.zero_grad()
        flow.loss(theta, x).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 10) == 0:
            with torch.no_grad():
                nats = -flow.as_distribution(x).log_prob(theta).mean()
            print(f"step {step:5d}  -log q(theta | x) {nats:8.4f} nats")
    return report(simulator, flow.eval(), args.observations)


@torch.no_grad()
def report(simulator: Linear | Moons, flow: snf_ext.Flow, count: int) -> dict[str, float]:
    """How far the flow is from the posterior, over ``count`` new observations."""
    theta, x = simulator(count)
    q = flow.as_distribution(x)  # batch_shape (count,)
    excess = simulator.log_posterior(theta, x) - q.log_prob(theta)
    samples = q.sample((199,))
    ranks = (samples < theta).float().mean(0)  # of each parameter: uniform if calibrated
    levels = (q.log_prob(samples) > q.log_prob(theta)).float().mean(0)  # of the highest density
    found = {
        "KL": excess.mean().item(),
        "standard error": excess.std().item() / math.sqrt(count),
        "rank deviation": deviation_from_uniform(ranks).max().item(),
        "limit": 1.63 / math.sqrt(count),  # of Kolmogorov and Smirnov, at 1 %
    }
    print(
        f"mean KL(p(theta | x) || q)  {found['KL']:7.4f} ± {found['standard error']:.4f} nats\n"
        f"ranks' deviation            {found['rank deviation']:7.4f}, limit at 1 % "
        f"{found['limit']:.4f}"
    )
    for level in (0.5, 0.8, 0.95):
        found[f"coverage {level}"] = (levels < level).float().mean().item()
        print(f"{level:4.0%} regions hold          {found[f'coverage {level}']:7.1%}")
    return found


def deviation_from_uniform(ranks: Tensor) -> Tensor:
    """Largest distance between the ranks' distribution function and the uniform one."""
    count = len(ranks)
    steps = torch.arange(count).view(-1, *(1,) * (ranks.dim() - 1)) / count
    ordered = ranks.sort(0).values
    return torch.maximum((ordered - steps).abs(), (ordered - steps - 1 / count).abs()).amax(0)


if __name__ == "__main__":
    main()
