"""Runs layers short of memory at ever later moments; what is then right is printed.

    python tests/starved.py [LAYER ...]

The limit is on the address space, so that it is the system that refuses. Layers of torch's own
convolutions alone are left out: where oneDNN was once refused memory it answers "could not create
a primitive" for good.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

import snf_ext

BATCH = 256
LAYERS = {
    "linear": (lambda: snf_ext.SelfNormLinear(784), (784,)),
    "conv2d": (lambda: snf_ext.SelfNormConv2d(4, 3), (4, 14, 14)),
    "conv2d of many channels": (lambda: snf_ext.SelfNormConv2d(192, 3), (192, 4, 4)),
    "spline": (lambda: snf_ext.RationalQuadraticSpline((4, 14, 14)), (4, 14, 14)),
    "activation": (lambda: snf_ext.SmoothLeakyReLU(0.3), (4, 14, 14)),
    "coupling": (lambda: snf_ext.AffineCoupling(4, 32), (4, 14, 14)),
}
STEPS = 12
LEAST, MOST = 2**17, 2**25  # bytes that are left


def outputs(layer, x):
    """Of a step and of the way back: numbers to compare."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    z, log_det, recon = layer(x)
    (z.square().mean() - log_det.mean() + recon.mean()).backward()
    with torch.no_grad():
        back = layer.inverse(z.detach()[:2])
    return [z.detach(), recon.detach(), x.grad, back, *(p.grad for p in layer.parameters())]


def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def starved(layer, x, left):
    """What is raised with so many bytes left, as its type and message; None if nothing was."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + left, hard))
    try:
        outputs(layer, x)
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return None


def main(names):
    torch.set_num_threads(2)
    torch.zeros(
        10**6
    ).exp_()  # starts the threads: where they cannot start, OpenMP ends the process
    for name in names or LAYERS:
        run(name)


def run(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, small = make(), torch.randn(8, *shape)
    layer.train()
    large = torch.randn(BATCH, *shape)
    outputs(layer, small)  # starts actnorm and the like, threads and pools
    before, told = outputs(layer, small), []
    for step in range(STEPS):
        told.append(starved(layer, large, int(LEAST * (MOST / LEAST) ** (step / (STEPS - 1)))))
        after = outputs(layer, small)
        for one, two in zip(before, after, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
    whole = outputs(layer, large)  # what was not possible before
    assert all(bool(value.isfinite().all()) for value in whole)
    kinds = {text.partition(":")[0] for text in told if text}
    print(name, sum(text is not None for text in told), *sorted(kinds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
