"""The main job: train in a folder of its own, measure the best epoch, draw it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..flow import Flow
from . import checkpoint, pictures
from .angle import gradient_angle, left_out, mean_angle
from .config import Config
from .context import context_of
from .data import Dataset
from .errors import UserError, require
from .evaluate import Evaluation, device_of, evaluate
from .loop import MONITORED, Trainer
from .scatter import POINTS
from .seeds import seeded
from .world import ALONE, World

EXTRAS = ("ignite", "tqdm", "tensorboard", "matplotlib")
PICTURED = 64

BuildFlow = Callable[[dict[str, Any]], Flow]


class Interrupted(Exception):
    """A signal ended training; ``number`` is the signal's."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def new_folder(path: Path | None, name: str) -> Path:
    """Make the folder of a new run.

    Args:
        path: the folder asked for; it may exist if it is empty. None: ``runs/<name>-<time>``.
        name: of the default folder.

    Raises:
        UserError: it holds something already, or cannot be written.
    """
    folder = path or _unused(Path("runs"), f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(
                f"run folder {folder} must be new or empty; "
                "go on with --resume, or choose another --run-dir"
            )
        with checkpoint.write_aside(folder / "probe") as part:
            part.write_bytes(b"")
        (folder / "probe").unlink()
    except OSError as error:
        raise UserError(f"run folder {folder} must be writable; {error.strerror}") from error
    return folder


def _unused(parent: Path, name: str) -> Path:
    number, folder = 1, parent / name
    while os.path.lexists(folder):  # unlike Path.exists, no error where nothing may be seen
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def open_folder(path: Path | None) -> tuple[Path, dict[str, Any] | None]:
    """The folder of a run that goes on, and its last checkpoint.

    A run that was killed before it wrote one begins again: of the checkpoint there is only
    ``config`` then, and ``epoch`` 0; or nothing, where the folder is still empty.

    Raises:
        UserError: no folder was named, or its checkpoint cannot be used.
        FileNotFoundError: there is nothing to resume.
    """
    if path is None:
        raise UserError("--resume needs --run-dir: the folder of the run to go on with")
    if (path / "last.pt").is_file():
        content: dict[str, Any] | None = checkpoint.load(path / "last.pt", resume=True)
    elif (path / "config.json").is_file() and not (path / "history.json").exists():
        content = {"config": checkpoint.read_json(path / "config.json"), "epoch": 0}
    elif path.is_dir() and all(_is_left_over(entry) for entry in path.iterdir()):
        content = None
    else:
        raise FileNotFoundError(f"{path / 'last.pt'} does not exist; there is nothing to resume")
    for part in path.glob(".*.part"):  # what SIGKILL in mid-write leaves
        part.unlink()
    return path, content


def model_of(config: Config, data: Dataset) -> dict[str, Any]:
    """What checkpoints keep to build the flow of a run again."""
    own: dict[str, Any] = {"event_shape": data.event_shape, "pixel_levels": data.pixel_levels}
    if config.conditional:
        own["context_features"] = data.classes
    model: dict[str, Any] = {"name": config.model, "settings": own | config.model_args}
    if config.controller is not None:
        start = {"kappa": config.kappa, "recon_weight": config.recon_weight}
        model["controller"] = {"name": config.controller, "settings": start}
    return model


def _is_left_over(path: Path) -> bool:
    """Whether a new run that was killed left this before it wrote anything."""
    return path.name == "probe" or (path.name.startswith(".") and path.suffix == ".part")


def train(
    config: Config,
    data: Dataset,
    model: dict[str, Any],
    build: BuildFlow,
    folder: Path,
    resume: dict[str, Any] | None = None,
    device: torch.device | None = None,
    progress: bool = True,
    world: World = ALONE,
    pictured: bool = True,
) -> dict[str, Any]:
    """Train, then measure the best epoch on the test images and draw pictures.

    Args:
        config: settings; ``recon_weight`` is given to the flow, unless that has controllers.
        data: images.
        model: what ``build`` makes the flow from; stored in the checkpoints.
        build: makes a flow.
        folder: from :func:`new_folder` or :func:`open_folder`.
        resume: from :func:`open_folder`, None for a new run.
        device: where to train; the CPU if None.
        progress: show it on stderr.
        world: the processes that train together; each calls this, and gets the same.
        pictured: draw pictures.

    Returns:
        What ``result.json`` holds: the best epoch, exact test NLL before and after (nats and
        bits/dim), reconstruction error, gradient angle.

    Raises:
        Interrupted: by SIGINT or SIGTERM; the folder can be resumed.
        Diverged: see :meth:`Trainer.fit`.
    """
    device = device or torch.device("cpu")
    with seeded(device, config.seed, "initialize"):
        flow = build(model).to(device)
    if config.controller is None:
        flow.recon_weight = config.recon_weight
    angles = world.first and (config.angle_every or config.monitor_every)
    if angles and (note := left_out(flow)):
        print(note, file=sys.stderr)
    trainer = Trainer(flow, model, data, config, folder, progress, world)
    if resume is None or "state" not in resume:
        if world.first:
            checkpoint.write_json(folder / "config.json", config.to_dict())
        trainer.begin()
    else:
        trainer.resume(resume, folder / "last.pt")
    if not trainer.fit():
        raise Interrupted(
            trainer.stopped_by or 0,
            f"stopped after {trainer.epoch} of {config.epochs} epochs; "
            f"go on with --resume --run-dir {folder}",
        )
    return finish(trainer, pictured)


def finish(trainer: Trainer, pictured: bool = True) -> dict[str, Any]:
    """Measure and draw the best epoch; writes ``result.json`` and the pictures."""
    flow, data, folder = trainer.flow, trainer.data, trainer.folder
    seed, best = trainer.config.seed, folder / "best.pt"
    world = trainer.world
    checkpoint.load_weights(flow, world.from_first(lambda: checkpoint.load(best)), best)
    context = context_of(flow, data.test_labels)
    test, angles = measure(flow, data.test, seed, context, world)
    result = {
        "epochs": trainer.epoch,
        "best_epoch": trainer.best["epoch"],
        "val_nll": trainer.best["val_nll"],
        "start_test_nll": trainer.start["test_nll"],
        "test": asdict(test),
        "angle": mean_angle(angles),
        "layer_angle": angles,
        "checkpoint": str(best),
        "seconds": trainer.history[-1]["seconds"],
        "rollbacks": trainer.rollbacks,
    }
    if world.first:
        checkpoint.write_json(folder / "result.json", result)
        if pictured:
            draw(trainer)
    return result


def draw(trainer: Trainer) -> None:
    """The pictures of the flow as it is: curves, samples, reconstructions."""
    flow, data, folder = trainer.flow, trainer.data, trainer.folder
    seed, context = trainer.config.seed, context_of(flow, data.test_labels)
    title = f"{trainer.config.model} on {data.name}"
    pictures.save_curves(folder / "curves.png", trainer.history, title)
    rows = flow.context_features or 1  # one a class, all of the same length
    count = -(-PICTURED // rows) * rows
    points = data.test[:POINTS] if data.pixel_levels is None else None
    pictures.save_samples(
        folder / "samples.png",
        flow,
        data.pixel_levels,
        count if points is None else len(points),
        seed,
        data=points,
    )
    pictures.save_reconstructions(
        folder / "reconstructions.png",
        flow,
        data.test[:PICTURED] if points is None else points,
        data.pixel_levels,
        seed,
        None if context is None else context[:PICTURED],
    )


def measure(
    flow: Flow, images: Tensor, seed: int, context: Tensor | None = None, world: World = ALONE
) -> tuple[Evaluation, dict[str, float]]:
    """Likelihood and reconstruction on ``images``, and each layer's gradient angle on the first."""
    device = device_of(flow)
    result = evaluate(flow, images, seed, context, world)
    first = None if context is None else context[:MONITORED]
    with seeded(device, seed, "angle"):
        return result, gradient_angle(flow, images[:MONITORED].to(device), first)


def check_extras() -> None:
    """Raise before an hour of training, not after, if a package of the extra is missing."""
    for module in EXTRAS:
        require(module)
