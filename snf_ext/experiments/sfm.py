"""Table 2 and Figures 4 and 5 of SFM: Glow that stays stable on natural images."""

from __future__ import annotations

from typing import Any

from . import draw
from .plan import Experiment, Measure, Paper, Row
from .stability import FirstSteps
from .tables import BITS
from .trained import Trained

# SFM 5.1. No warm-up is mentioned. The width is that of Glow's code.
SETTINGS: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 32,
    "lr": 1e-4,
    "warmup_epochs": 0.0,
    "recon_weight": 1.0,  # of no learned inverse: there is none
    "optimizer": "radam",
    "objective": "bits",
    "actnorm_batches": 256,
    "limit_train": None,
}
SIZE = {"levels": 4, "steps": 32, "width": 512, "mixing": "lu"}

PENALISED_REDUCED: dict[str, dict[str, Any]] = {
    "cpu": {
        "data": "images",
        "limit_train": 3200,
        "epochs": 2,
        "actnorm_batches": 16,
        "levels": 3,
        "steps": 4,
        "width": 32,
    },
    "smoke": {
        "data": "digits",
        "limit_train": 96,
        "epochs": 2,
        "actnorm_batches": 2,
        "levels": 2,
        "steps": 2,
        "width": 8,
    },
}


def _penalised(coupling: str, penalty: float, bits: Paper) -> Row:
    return Row(
        f"{coupling}-{penalty:g}",
        f"{coupling} coupling, λ = {penalty:g}",
        "glow",
        {**SIZE, "coupling": coupling},
        "cifar10",
        {**SETTINGS, "log_det_penalty": penalty},
        {"bits_per_dim": bits},
        reduced=PENALISED_REDUCED,
    )


TABLE2 = Experiment(
    "Table 2 of SFM: bits per dimension with and without the log-determinant penalty",
    Trained(),
    (
        _penalised("additive", 0.0, Paper(None)),
        _penalised("additive", 1e-5, Paper(3.60)),
        _penalised("affine", 0.0, Paper(None)),
        _penalised("affine", 1e-5, Paper(3.56)),
    ),
    (BITS,),
    draw.bars,
    (
        "'-': training diverged (in the paper, nan).",
        "The paper measures every tenth epoch of at most 200 and stops after two without an "
        "improvement; here all epochs run, and the best one on validation images counts.",
        "The paper does not print the couplings' width; 512 is that of Glow.",
    ),
)

START_REDUCED: dict[str, dict[str, Any]] = {
    "cpu": {"data": "images", "steps": 16, "width": 64},
    "smoke": {"data": "digits", "levels": 3, "steps": 2, "width": 8},
}
UPDATES = {"cpu": 400, "smoke": 10}


def _start(name: str, title: str, images: int, updates: int, **paper: Paper) -> Row:
    settings = {"batch_size": 1, "lr": 1e-5, "penalty": 1e-3, "init_images": images}
    size = {"levels": 4, "steps": 32, "width": 512, "coupling": "additive"}
    return Row(
        name,
        title,
        "glow",
        size,
        "cifar10",
        {**settings, "updates": updates},
        paper,
        reduced={
            scale: {**changes, "updates": min(updates, UPDATES[scale])}
            for scale, changes in START_REDUCED.items()
        },
    )


ONE, MANY = ("one-batch", "from 1 batch", 1), ("cumulative", "cumulative, from 256 batches", 256)
WHERE = "The paper uses CelebA and CIFAR-10; here it is CIFAR-10 alone."
FIGURE4 = Experiment(
    "Figure 4 of SFM: batch size 1 with two starts of actnorm",
    FirstSteps(),
    (_start(*ONE, 10_000, last_bits=Paper(None)), _start(*MANY, 10_000)),
    (Measure("last_bits", "bits/dim, mean of the last 50 steps", 3), Measure("steps", "steps", 0)),
    draw.first_steps("bits_per_dim", "step", "bits/dim"),
    (
        "'-': the objective was not finite or over 1,000 bits/dim, where the run ends.",
        "The number of steps is ours: the paper's axis has none that could be read.",
        WHERE,
    ),
)
FIGURE5 = Experiment(
    "Figure 5 of SFM: largest |output| of each coupling after one update, batch size 1",
    FirstSteps(),
    (_start(*ONE, 2, largest_output=Paper(1e8)), _start(*MANY, 2)),
    (Measure("largest_output", "largest |output|", 1),),
    draw.first_steps("largest_outputs_after_one_update", "coupling", "largest |output|"),
    ("The paper says 'about 10^8' of the largest, on CelebA.", WHERE),
)
