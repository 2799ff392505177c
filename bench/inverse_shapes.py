"""What kernels of several shapes can make of a convolution's inverse.

    python -m bench.inverse_shapes [--out F.json]

w = Dirac + s N(0, 1) / sqrt(C), 3x3, at three distances s from the identity, on images of several
sizes; for each candidate inverse R of its matrix W, the mean over three weights of

    residual     ||R W - I||_F / ||I||_F
    angle        between the inverse's term of the gradient and that of the exact inverse, degrees

Candidates: flip(w), where the paper starts; least-squares kernels of 3x3, 5x5 and 7x7; and two 3x3
convolutions, one after the other, which reach as far as 5x5, fitted by L-BFGS in float64 from the
least-squares kernel and Dirac.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snf_ext.exact import conv2d_log_abs_det, conv2d_matrix
from snf_ext.reference.convolution import flip
from snf_ext.tracking import least_squares_kernel
from snf_ext.training.angle import degrees

from . import report

IMAGES = ((1, 14, 14), (4, 7, 7), (16, 4, 4))
DISTANCES = (0.03, 0.1, 0.2)
WEIGHTS = 3


def matrix(kernel: Tensor, image: tuple[int, int, int]) -> Tensor:
    return conv2d_matrix(kernel, image[1:])


def least_squares(size: int) -> Callable[..., Tensor]:
    return lambda w, image: matrix(least_squares_kernel(w, (size, size), image[1:]), image)


def composed(w: Tensor, image: tuple[int, int, int]) -> Tensor:
    """The matrix of two 3x3 convolutions, fitted together."""
    first = least_squares_kernel(w, (3, 3), image[1:]).requires_grad_()
    second = torch.nn.init.dirac_(torch.empty_like(w)).requires_grad_()
    of_w = matrix(w, image)
    optimizer = torch.optim.LBFGS(
        [first, second], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = matrix(second, image) @ (matrix(first, image) @ of_w) - torch.eye(len(of_w)).to(
            of_w
        )
        value = error.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return (matrix(second, image) @ matrix(first, image)).detach()


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "flip(w)": lambda w, image: matrix(flip(w), image),
    "3x3": least_squares(3),
    "5x5": least_squares(5),
    "7x7": least_squares(7),
    "3x3 after 3x3": composed,
}


def gradient_of(inverse: Tensor, w: Tensor, image: tuple[int, int, int]) -> Tensor:
    """``<R', dW>`` as a gradient in w: what R makes of that of log |det W|."""
    w = w.detach().requires_grad_()
    return torch.autograd.grad((matrix(w, image) * inverse.T).sum(), w)[0]


def measure(image: tuple[int, int, int], distance: float) -> list[dict[str, Any]]:
    """One row a candidate."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CANDIDATES}
    channels = image[0]
    for seed in range(WEIGHTS):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(channels, channels, 3, 3, generator=generator, dtype=torch.float64)
        w = w * distance / channels**0.5 + torch.nn.init.dirac_(torch.empty_like(w))
        leaf = w.clone().requires_grad_()
        exact = torch.autograd.grad(conv2d_log_abs_det(leaf, image[1:], 1, 1, False), leaf)[0]
        of_w = matrix(w, image)
        eye = torch.eye(len(of_w), dtype=torch.float64)
        for name, make in CANDIDATES.items():
            inverse = make(w, image)
            residual = ((inverse @ of_w - eye).norm() / eye.norm()).item()
            angle = degrees(gradient_of(inverse, w, image), exact)
            found[name].append((residual, angle))
    return [
        {
            "image": list(image),
            "distance": distance,
            "inverse": name,
            "residual": sum(row[0] for row in rows) / len(rows),
            "angle_deg": sum(row[1] for row in rows) / len(rows),
        }
        for name, rows in found.items()
    ]


def table(record: Mapping[str, Any]) -> str:
    """A line an image size and distance, a column a candidate: residual and angle."""
    lines = [
        "| image | s | " + " | ".join(CANDIDATES) + " |",
        "|" + (2 + len(CANDIDATES)) * "---|",
    ]
    cells: dict[tuple[str, float], list[str]] = {}
    for row in record["rows"]:
        key = ("×".join(map(str, row["image"])), row["distance"])
        cells.setdefault(key, []).append(f"{row['residual']:.2g}, {row['angle_deg']:.2g}°")
    lines += [
        f"| {image} | {s:g} | " + " | ".join(found) + " |" for (image, s), found in cells.items()
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.inverse_shapes")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(arguments)
    rows = []
    print(f"{'image':<12}{'distance':>9}  {'inverse':<14}{'residual':>12}{'angle':>11}")
    for image in IMAGES:
        for distance in DISTANCES:
            for row in measure(image, distance):
                rows.append(row)
                size = "x".join(map(str, image))
                print(
                    f"{size:<12}{distance:>9g}  {row['inverse']:<14}{row['residual']:>12.3g}"
                    f"{row['angle_deg']:>10.3g}°",
                    flush=True,
                )
    if args.out:
        environment = report.environment("python -m bench.inverse_shapes")
        report.write_json(
            args.out, {"suite": "inverse_shapes", "environment": environment, "rows": rows}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
