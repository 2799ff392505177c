"""A posterior with a known answer, fitted by reverse KL.

    python docs/examples/variational_inference.py --posterior regression
    python docs/examples/variational_inference.py --posterior banana

Noise goes *forward* through the layers into samples of the posterior: one pass gives the samples
and, by the cache, their exact log-density. Linear layers are unconstrained matrices; the gradient
of their log-determinant, the entropy's, is their tracked inverse's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, TransformedDistribution

import snf_ext


@dataclass
class Posterior:
    """An unnormalised log-density whose integral, mean and covariance are known."""

    log_joint: Callable[[Tensor], Tensor]
    log_evidence: float
    mean: Tensor
    covariance: Tensor


def regression(features: int = 8, points: int = 30, noise: float = 0.7) -> Posterior:
    """Weights w ~ N(0, I) of y = X w + noise, given y: Gaussian."""
    X = torch.randn(points, features) @ torch.randn(features, features) / math.sqrt(features)
    y = X @ torch.randn(features) + noise * torch.randn(points)
    marginal = MultivariateNormal(torch.zeros(points), X @ X.T + noise**2 * torch.eye(points))
    covariance = torch.linalg.inv(torch.eye(features) + X.T @ X / noise**2)

    def log_joint(w: Tensor) -> Tensor:
        return Normal(0, 1).log_prob(w).sum(-1) + Normal(w @ X.T, noise).log_prob(y).sum(-1)

    mean = covariance @ X.T @ y / noise**2
    return Posterior(log_joint, marginal.log_prob(y).item(), mean, covariance)


def banana(features: int = 4, bend: float = 0.7, log_evidence: float = -12.0) -> Posterior:
    """Normal noise whose second coordinate is bent by the square of the first, then turned."""
    turn = torch.linalg.qr(torch.randn(features, features)).Q
    stretch = torch.linspace(0.5, 1.5, features)

    def log_joint(w: Tensor) -> Tensor:
        first, second, *others = (w @ turn / stretch).unbind(-1)
        straight = torch.stack((first, second - bend * (first**2 - 1), *others), -1)
        log_prob = Normal(0, 1).log_prob(straight).sum(-1) - stretch.log().sum()
        return log_prob + log_evidence

    variance = torch.ones(features)
    variance[1] += 2 * bend**2  # that of a squared normal is 2, and it is uncorrelated with it
    covariance = turn @ torch.diag(variance * stretch**2) @ turn.T
    return Posterior(log_joint, log_evidence, torch.zeros(features), covariance)


def guide(features: int, width: int = 32) -> torch.nn.ModuleList:
    """From noise to the posterior: dense linear maps and couplings by turns."""
    layers = [snf_ext.SelfNormLinear(features, inverse="tracked")]
    for flipped in (False, True):
        layers += [
            snf_ext.AffineCoupling(features, width, mask="vector", flipped=flipped),
            snf_ext.SelfNormLinear(features, inverse="tracked"),
        ]
    return torch.nn.ModuleList(layers)


def density(layers: torch.nn.ModuleList, features: int) -> TransformedDistribution:
    """Of normal noise pushed through the layers."""
    base = Independent(Normal(torch.zeros(features), 1.0), 1)
    return TransformedDistribution(
        base, snf_ext.BijectionTransform(layers, (features,), cache_size=1)
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Fit, and compare with the known answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posterior", choices=("regression", "banana"), default="regression")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    posterior = {"regression": regression, "banana": banana}[args.posterior]()
    features = len(posterior.mean)
    layers = guide(features)
    optimizer = torch.optim.Adam(layers.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for step in range(1, args.steps + 1):
        q = density(layers, features)
        w = q.rsample((args.batch,))
        elbo = (posterior.log_joint(w) - q.log_prob(w)).mean()
        optimizer.zero_grad()
        (-elbo).backward()
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step:5d}  ELBO {elbo.item():9.4f} nats")
    return report(posterior, density(layers.eval(), features))


@torch.no_grad()
def report(
    posterior: Posterior, q: TransformedDistribution, count: int = 100_000
) -> dict[str, float]:
    """Errors of evidence, mean and covariance, printed and returned."""
    w = q.sample((count,))
    log_weights = posterior.log_joint(w) - q.log_prob(w)
    weights = (log_weights - log_weights.max()).exp()
    importance = log_weights.logsumexp(0) - math.log(count)
    spread = posterior.covariance.diagonal().sqrt()
    error = torch.linalg.matrix_norm(w.T.cov() - posterior.covariance)
    found = {
        "log evidence": posterior.log_evidence,
        "ELBO": log_weights.mean().item(),
        "standard error": log_weights.std().item() / math.sqrt(count),
        "importance sampling": importance.item(),
        "effective sample size": (weights.mean() ** 2 / weights.square().mean()).item(),
        "mean error": ((w.mean(0) - posterior.mean) / spread).abs().max().item(),
        "covariance error": (error / torch.linalg.matrix_norm(posterior.covariance)).item(),
    }
    print(
        f"log evidence         {found['log evidence']:9.4f} nats, exact\n"
        f"ELBO                 {found['ELBO']:9.4f} ± {found['standard error']:.4f}\n"
        f"importance sampling  {found['importance sampling']:9.4f}, effective sample size "
        f"{found['effective sample size']:.1%} of {count:,}\n"
        f"posterior mean       off by {found['mean error']:.3f} standard deviations at most\n"
        f"posterior covariance off by {found['covariance error']:.2%} (Frobenius)"
    )
    return found


if __name__ == "__main__":
    main()
