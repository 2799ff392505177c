"""Draws the pictures of concepts.md from small runs: `python docs/images/concepts.py`, a minute."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

import snf_ext
from snf_ext.training import toy

HERE = Path(__file__).parent


def plane_flow(layers: int = 8) -> snf_ext.Flow:
    """Linear maps of the plane, with a spline along each axis between them."""
    steps: list[snf_ext.Bijection] = []
    for _ in range(layers):
        steps += [
            snf_ext.SelfNormLinear(2),
            snf_ext.RationalQuadraticSpline((2,), bins=8, tail_bound=5.0),
        ]
    return snf_ext.Flow([*steps, snf_ext.SelfNormLinear(2)], (2,))


def draw_layers(flow: snf_ext.Flow, x: Tensor) -> None:
    """The points after some of the layers, coloured by where they came from."""
    shown = {0: "data x", 4: "after 4 layers", 10: "after 10", 14: "after 14", 17: "noise z"}
    figure = Figure(figsize=(12, 2.9), layout="constrained")
    stage = iter(figure.subplots(1, len(shown), sharex=True, sharey=True))
    colour = x[:, 0] + 0.7 * x[:, 1]
    for number, layer in enumerate([*flow.bijections, None]):
        if number in shown:
            axes = next(stage)
            axes.scatter(*x.T.numpy(), s=2, c=colour.numpy(), cmap="viridis", linewidths=0)
            axes.set(title=shown[number], xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
        x = layer(x).z if layer is not None else x
    figure.savefig(HERE / "concepts-layers.png", dpi=80)


def draw_surrogate(steps: list[int], surrogate: list[float], exact: list[float]) -> None:
    """What training minimises beside the likelihood of the same points."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, exact, label="−log p(x), exact: a likelihood")
    axes.plot(steps, surrogate, label="value of Flow.loss: none")
    axes.set(xlabel="step", ylabel="nats")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "concepts-surrogate.png", dpi=100)


def draw_plane() -> None:
    """Train on two moons, and draw both pictures of that run."""
    torch.manual_seed(0)
    flow = plane_flow()
    test = toy.moons(3000)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=600)
    steps, surrogate, exact = [], [], []
    for step in range(600):
        if step % 20 == 0:
            with torch.no_grad():
                steps.append(step)
                surrogate.append(flow.loss(test).item())
                exact.append(-flow.log_prob(test).mean().item())
        optimizer.zero_grad()
        flow.loss(toy.moons(256)).backward()
        optimizer.step()
        schedule.step()
    draw_surrogate(steps, surrogate, exact)
    with torch.no_grad():
        draw_layers(flow, test)


def draw_inverses() -> None:
    """How far images come back by the learned, the refined and the exact inverse."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None]).float()
    flow = snf_ext.models.conv((1, 8, 8), layers=6, blocks=2, pixel_levels=17)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for _ in range(15):
        for batch in images[torch.randperm(len(images))].split(100):
            optimizer.zero_grad()
            flow.loss(batch).backward()
            optimizer.step()
    inner = snf_ext.Flow(list(flow.bijections)[3:], (1, 8, 8))  # without the preprocessing
    with torch.no_grad():
        x = images[:200]
        for layer in list(flow.bijections)[:3]:
            x = layer(x).z
        z = inner(x).z
        error = [((inner.inverse(z, refine=n) - x).norm() / x.norm()).item() for n in range(13)]
        true = ((inner.inverse(z, exact=True) - x).norm() / x.norm()).item()
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(range(13), error, "o-", label="learned inverse, refined")
    axes.axhline(true, color="tab:orange", label="exact inverse")
    axes.set(xlabel="refine", ylabel="relative error of an image")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "concepts-inverses.png", dpi=100)


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_plane()
    draw_inverses()
