"""The command line: ``snf-ext train | evaluate | sample | reproduce``, each with ``--help``."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cli_reproduce
from .backend import use_backend
from .cli_options import (
    CONTEXT,
    DECIDED,
    MODELS,
    SMALL_IMAGE,
    Evaluate,
    Sample,
    Train,
)
from .cli_reproduce import Reproduce
from .constraint import constrain
from .controllers import CONTROLLERS
from .experiments import Failed
from .flow import Flow
from .training import checkpoint, data, pictures, run
from .training.angle import left_out, mean_angle
from .training.arguments import keyword_arguments
from .training.augment import require_images
from .training.bound import NoiseBound, noise_bound
from .training.config import Config, resolve
from .training.context import context_of
from .training.errors import Diverged, UserError, require
from .training.evaluate import bits_per_dim
from .training.lock import held
from .training.rebuild import rebuilt
from .training.trackers import check_trackers
from .training.world import World, is_first_process, is_restarted, joined, local_device


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status.

    0: done. 2: the request or a file cannot be used, one line on stderr says why. 1: training
    diverged, or a run of an experiment failed. 128 + n: stopped by signal n.
    """
    try:
        options = _parse(argv)
        with _backend(options.backend):
            COMMANDS[type(options)](options)
    except run.Interrupted as stop:
        return _fail(str(stop), 128 + stop.number)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (Diverged, Failed) as error:
        return _fail(str(error), 1)
    except (UserError, OSError) as error:
        return _fail(str(error), 2)
    return 0


def _fail(message: str, status: int) -> int:
    if is_first_process():
        print(f"snf-ext: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parse(argv: Sequence[str] | None) -> Any:
    tyro = require("tyro")
    return tyro.extras.subcommand_cli_from_dict(
        {command.__name__.lower(): command for command in COMMANDS},
        prog="snf-ext",
        description="Train, measure and sample self-normalizing flows.",
        args=argv,
        config=(tyro.conf.DisallowNone,),
    )


def _backend(name: str | None) -> AbstractContextManager[Any]:
    try:
        return use_backend(name) if name else nullcontext()
    except RuntimeError as error:
        raise UserError(str(error)) from error


def train(options: Train) -> None:
    """``snf-ext train``."""
    run.check_extras()
    _check_threads(options.threads)
    device = local_device(_device(options.device))
    with joined(device) as world, ExitStack() as holds:
        _train(options, device, world, holds)


def _train(options: Train, device: torch.device, world: World, holds: ExitStack) -> None:
    """``holds`` keeps the folder, which is for the first process alone to hold."""
    resume = options.resume or (is_restarted() and options.run_dir is not None)
    folder, resumed = None, None
    if resume:
        folder, resumed = world.from_first(lambda: _opened(options.run_dir, holds))
    config = _config(options, resumed)
    check_trackers(config.track)
    if config.conditional:
        _require_context(config.model)
    images = data.load(config.data, options.data_dir, config.conditional, options.verify)
    images = images.limit_train(config.limit_train)
    require_images(config.augment, images.event_shape)
    model = run.model_of(config, images)
    build_flow(model)  # what does not fit must not leave a folder behind
    if folder is None:
        name = f"{config.model}-{config.data}"
        folder = world.from_first(lambda: _made(options.run_dir, name, holds))
    if world.first:
        together = f", {world.size} processes" if world.size > 1 else ""
        print(
            f"training {config.model} on {config.data}, {config.epochs} epochs{together}, "
            f"in {folder}"
        )
    with _threads(options.threads, math.prod(images.event_shape)):
        result = run.train(
            config, images, model, build_flow, folder, resumed, device, options.progress, world
        )
    if not world.first:
        return
    start = result["start_test_nll"]
    levels = images.pixel_levels
    print(f"best epoch of {result['epochs']}: {result['best_epoch']}, by validation NLL")
    print(f"untrained test NLL: {_nats(start, images.event_shape, levels)}, exact")
    _report("test", result["test"], result["angle"], images.event_shape, levels)
    print(f"checkpoint: {folder / 'best.pt'}")
    print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    print(f"log: tensorboard --logdir {folder / 'tensorboard'}")


def _opened(path: Path | None, holds: ExitStack) -> tuple[Path, dict[str, Any] | None]:
    if path is not None and path.is_dir():
        holds.enter_context(held(path))
    return run.open_folder(path)


def _made(path: Path | None, name: str, holds: ExitStack) -> Path:
    folder = run.new_folder(path, name)
    holds.enter_context(held(folder))
    return folder


def evaluate(options: Evaluate) -> None:
    """``snf-ext evaluate``."""
    if options.noise is not None and not 0 < options.noise < math.inf:
        raise UserError(f"noise must be positive and finite; got {options.noise}")
    flow, config, levels = _load_flow(options.checkpoint, options.device)
    name = options.data or config.data
    images = data.load(name, options.data_dir, config.conditional, options.verify)
    if (images.event_shape, images.pixel_levels) != (flow.event_shape, levels):
        raise UserError(
            f"data must have events {flow.event_shape} of {levels or 'no'} levels, as the "
            f"checkpoint's model; {images.name} has {images.event_shape} of "
            f"{images.pixel_levels or 'none'}"
        )
    if images.classes > flow.context_features:
        raise UserError(
            f"data must have at most {flow.context_features} classes, as the checkpoint's model; "
            f"{images.name} has {images.classes}"
        )
    split: Tensor = getattr(images, options.split)
    seed = config.seed if options.seed is None else options.seed
    if note := left_out(flow):
        print(note, file=sys.stderr)
    context = context_of(flow, images.labels(options.split))
    result, angle = run.measure(flow, split, seed, context)
    if not math.isfinite(result.nll):
        raise Diverged(f"the NLL of {options.checkpoint} on {images.name} is {result.nll}")
    _report(options.split, asdict(result), mean_angle(angle), images.event_shape, levels)
    if options.noise is not None:
        _report_bound(options.split, noise_bound(flow, split, options.noise, seed, context))


def sample(options: Sample) -> None:
    """``snf-ext sample``."""
    if options.count < 1:
        raise UserError(f"count must be at least 1; got {options.count}")
    if not 0 < options.temperature < math.inf:
        raise UserError(f"temperature must be positive and finite; got {options.temperature}")
    if options.refine < 0:
        raise UserError(f"refine must be at least 0; got {options.refine}")
    if options.refine and options.exact:
        raise UserError(f"refine must be left out with --exact; got {options.refine}")
    require("matplotlib")
    flow, _, levels = _load_flow(options.checkpoint, options.device)
    _check_label(options.label, flow.context_features)
    if not options.out.parent.is_dir():
        raise FileNotFoundError(f"{options.out.parent} does not exist; --out must be in a folder")
    side = "exact" if options.exact else "refined" if options.refine else "learned"
    pictures.save_samples(
        options.out,
        flow,
        levels,
        options.count,
        options.seed,
        options.temperature,
        (side,),
        options.label,
        options.refine,
    )
    print(f"samples: {options.out}")


def reproduce(options: Reproduce) -> None:
    """``snf-ext reproduce``."""
    run.check_extras()
    _check_threads(options.threads)
    pixels = SMALL_IMAGE if options.scale == "smoke" else SMALL_IMAGE + 1
    with _threads(options.threads, pixels):
        cli_reproduce.reproduce(options, build_flow, _device(options.device))


COMMANDS: dict[type, Callable[[Any], None]] = {
    Train: train,
    Evaluate: evaluate,
    Sample: sample,
    Reproduce: reproduce,
}


def build_flow(model: dict[str, Any]) -> Flow:
    """The flow that a checkpoint's ``model`` part describes.

    Raises:
        UserError: the model or a setting is unknown or out of range.

    >>> build_flow({"name": "fc", "settings": {"event_shape": (1, 2, 2)}}).event_shape
    (1, 2, 2)
    """
    name, settings = model.get("name"), dict(model.get("settings", {}))
    if name not in MODELS:
        raise UserError(f"model must be one of {', '.join(MODELS)}; got {name!r}")
    settings["event_shape"] = tuple(settings.get("event_shape", ()))
    try:
        flow = MODELS[name](**settings)
        if held := model.get("controller"):
            constrain(flow, CONTROLLERS[held["name"]](**held["settings"]))
        return flow
    except UserError:  # a missing extra: the line says it all
        raise
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"the settings of model {name} must fit it; {error}") from error


def _require_context(name: str) -> None:
    takers = [
        model for model, make in MODELS.items() if CONTEXT in inspect.signature(make).parameters
    ]
    if name not in takers:
        others = f"; models that do: {', '.join(takers)}" if takers else ""
        raise UserError(f"model {name} takes no context; leave out --conditional{others}")


def _check_label(label: int | None, classes: int) -> None:
    if label is None:
        return
    if not classes:
        raise UserError(
            f"label must be left out: the checkpoint's flow is not conditional; got {label}"
        )
    if not 0 <= label < classes:
        raise UserError(f"label must lie in 0..{classes - 1}; got {label}")


# Settings that are off unless asked for.
SWITCHES = ("conditional", "check_inverse", "reversible")


def _config(options: Train, resumed: dict[str, Any] | None) -> Config:
    earlier = None if resumed is None else Config.from_dict(resumed["config"])
    given = {
        setting.name: getattr(options, setting.name)
        for setting in fields(Config)
        if setting.name not in ("model_args", "shuffle", "graph", *SWITCHES)
    }
    if earlier is None:
        given |= {"model": given["model"] or "fc", "data": given["data"] or "digits"}
    # Not told apart from their defaults, these are asked for only where they differ.
    name = given["model"] or (earlier.model if earlier else "fc")
    pairs = options.model_args
    given["model_args"] = keyword_arguments(name, MODELS[name], pairs, DECIDED) or None
    given["track"] = options.track or None
    given["shuffle"] = None if options.shuffle else False
    given["graph"] = None if options.graph else False
    given |= {name: getattr(options, name) or None for name in SWITCHES}
    config = resolve(given, earlier)
    if resumed is not None and config.epochs < resumed["epoch"]:
        raise UserError(
            f"epochs must be at least the {resumed['epoch']} that are done; got {config.epochs}"
        )
    return config


def _load_flow(path: Path, device: str) -> tuple[Flow, Config, int | None]:
    """The flow of a checkpoint in evaluation mode, the run's settings, a pixel's levels."""
    content = checkpoint.load(path)
    flow = rebuilt(content, path, build_flow)
    levels = content["model"]["settings"].get("pixel_levels", 256)
    return flow.to(_device(device)).eval(), Config.from_dict(content["config"]), levels


def _check_threads(asked: int | None) -> None:
    if asked is not None and asked < 1:
        raise UserError(f"threads must be at least 1; got {asked}")


@contextmanager
def _threads(asked: int | None, pixels: int) -> Iterator[None]:
    """One thread for small images: more gain nothing there, and wait for each other when the
    machine is busy (10 times slower was seen)."""
    before = torch.get_num_threads()
    torch.set_num_threads(asked or (1 if pixels <= SMALL_IMAGE else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device must be cpu, cuda, cuda:N or auto; got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name} is not there; this machine offers "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return device


def _nats(nll: float, event_shape: tuple[int, ...], levels: int | None) -> str:
    """With bits/dim of pixels; of continuous data they would depend on the unit of measure."""
    if levels is None:
        return f"{nll:.3f} nats"
    return f"{nll:.2f} nats, {bits_per_dim(nll, event_shape):.3f} bits/dim"


def _report(
    split: str,
    result: dict[str, Any],
    angle: float | None,
    event_shape: tuple[int, ...],
    levels: int | None,
) -> None:
    print(
        f"{split} NLL: {_nats(result['nll'], event_shape, levels)}, exact "
        f"(standard error {result['nll_error']:.2f}, {result['images']} images)"
    )
    layers = ", ".join(f"{name} {value:.3g}" for name, value in result["layer_recon"].items())
    print(
        f"reconstruction error: {result['reconstruction']:.4g} = mean ||g(f(u)) - u||^2 in model "
        f"space by the learned inverse" + (f" (each layer's own: {layers})" if layers else "")
    )
    if angle is not None:
        print(f"angle between self-normalizing and exact gradient: {angle:.3f} degrees")


def _report_bound(split: str, result: NoiseBound) -> None:
    print(
        f"{split} NLL bound with noise {result.sigma:g}: {result.bound:.2f} nats (standard error "
        f"{result.error:.2g}), {result.bound - result.nll:+.2f} to the exact {result.nll:.2f}"
    )
