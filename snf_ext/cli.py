"""The command line: ``snf-ext train | evaluate | sample``, each with ``--help``."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import models
from .backend import use_backend
from .flow import Flow
from .training import checkpoint, data, pictures, run
from .training.angle import gradient_angle, mean_angle
from .training.config import Config, resolve
from .training.errors import Diverged, UserError, require
from .training.evaluate import evaluate
from .training.loop import MONITORED
from .training.seeds import seeded

# One row a model: what builds it from event_shape, levels, and its own keyword arguments.
MODELS: dict[str, Callable[..., Flow]] = {"fc": models.fc}

ModelName = Literal["fc"]
DataName = Literal["digits", "mnist"]
BackendName = Literal["native", "reference"]


@dataclass(frozen=True)
class Train:
    """Train a flow; ends with its exact test likelihood, a checkpoint, a log and pictures.

    With no settings but the model it trains on scikit-learn's handwritten digits in about a
    minute. Settings left at None take their default for the data (MNIST: the paper's), or, with
    --resume, the earlier run's.
    """

    model: ModelName | None = None
    """Architecture; fc if not given."""
    model_args: tuple[str, ...] = ()
    """Arguments of the architecture, as NAME=VALUE, for example layers=3 linear=exact."""
    data: DataName | None = None
    """Images to train on; digits if not given."""
    data_dir: Path | None = None
    """Folder of the IDX files, for --data mnist."""
    limit_train: int | None = None
    """Use only the first N training images."""
    epochs: int | None = None
    """Epochs to train; digits 200, mnist 100 (the paper's fc: 6000)."""
    batch_size: int | None = None
    """Images a step; 100."""
    lr: float | None = None
    """Adam's learning rate; digits 1e-3, mnist 1e-4."""
    recon_weight: float | None = None
    """Weight lambda of the reconstruction penalty; 1."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate rises from 0; 10."""
    clip_norm: float | None = None
    """Largest gradient norm; no limit if not given."""
    seed: int | None = None
    """Seed of initialisation, order and noise; 0."""
    shuffle: bool = True
    """Draw a new order of the training images in every epoch."""
    angle_every: int | None = None
    """Epochs between measurements of the gradient angle; 1, or 0 for never."""
    run_dir: Path | None = None
    """Folder for the run's files; runs/MODEL-DATA-TIME if not given."""
    resume: bool = False
    """Go on with the run in --run-dir; on the CPU bit for bit as if it had never stopped."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    backend: BackendName | None = None
    """Which code runs; the compiled one if it is built."""
    progress: bool = True
    """Show progress on stderr."""


@dataclass(frozen=True)
class Evaluate:
    """Measure a checkpoint: exact likelihood, reconstruction error, gradient angle."""

    checkpoint: Path
    """best.pt or last.pt of a run."""
    data: DataName | None = None
    """Images to measure on; those of the run if not given."""
    data_dir: Path | None = None
    """Folder of the IDX files, for --data mnist."""
    split: Literal["test", "val", "train"] = "test"
    """Which images."""
    seed: int | None = None
    """Seed of the dequantization noise; the run's if not given."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    backend: BackendName | None = None
    """Which code runs; the compiled one if it is built."""


@dataclass(frozen=True)
class Sample:
    """Draw samples of a checkpoint into a PNG file."""

    checkpoint: Path
    """best.pt or last.pt of a run."""
    count: int = 64
    """How many samples."""
    exact: bool = False
    """Invert exactly; otherwise by the learned inverses, in one pass."""
    out: Path = Path("samples.png")
    """The PNG file."""
    temperature: float = 1.0
    """Standard deviation of the noise."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    backend: BackendName | None = None
    """Which code runs; the compiled one if it is built."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status.

    0: done. 2: the request or a file cannot be used, one line on stderr says why. 1: training
    diverged. 128 + n: stopped by signal n.
    """
    try:
        options = _parse(argv)
        with use_backend(options.backend) if options.backend else nullcontext():
            COMMANDS[type(options)](options)
    except run.Interrupted as stop:
        return _fail(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Diverged as error:
        return _fail(str(error), 1)
    except (UserError, OSError) as error:
        return _fail(str(error), 2)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"snf-ext: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parse(argv: Sequence[str] | None) -> Any:
    tyro = require("tyro")
    return tyro.extras.subcommand_cli_from_dict(
        {command.__name__.lower(): command for command in COMMANDS},
        prog="snf-ext",
        description="Train, measure and sample self-normalizing flows.",
        args=argv,
    )


def train(options: Train) -> None:
    """``snf-ext train``."""
    run.check_extras()
    device = _device(options.device)
    resumed = folder = None
    if options.resume:
        folder, resumed = run.open_folder(options.run_dir)
    config = _config(options, resumed)
    images = data.load(config.data, options.data_dir).limit_train(config.limit_train)
    model = {
        "name": config.model,
        "settings": {
            "event_shape": images.event_shape,
            "levels": images.levels,
            **config.model_args,
        },
    }
    build_flow(model)  # a setting that does not fit must not leave a folder behind
    folder = folder or run.new_folder(options.run_dir, f"{config.model}-{config.data}")
    _say(f"training {config.model} on {config.data} for {config.epochs} epochs in {folder}")
    result = run.train(
        config, images, model, build_flow, folder, resumed, device, options.progress
    )
    test, start = result["test"], result["start_test_nll"]
    bits = start * test["bits_per_dim"] / test["nll"]
    _say(f"best epoch {result['best_epoch']} of {result['epochs']} (lowest validation NLL)")
    _say(f"untrained test NLL     {start:.2f} nats, {bits:.3f} bits/dim")
    _report(test, result["angle"], "test")
    for name in ("best.pt", "samples.png", "reconstructions.png", "curves.png", "tensorboard"):
        _say(f"{folder / name}")
