"""The command line: ``snf-ext train | evaluate | sample``, each with ``--help``."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from . import models
from .backend import BACKENDS, use_backend
from .constraint import CONTROLLERS, constrain
from .flow import Flow
from .training import checkpoint, data, pictures, run
from .training.angle import left_out, mean_angle
from .training.arguments import keyword_arguments
from .training.bound import NoiseBound, noise_bound
from .training.config import OBJECTIVES, ON_DIVERGENCE, Config, resolve
from .training.context import context_of
from .training.errors import Diverged, UserError, require
from .training.evaluate import bits_per_dim
from .training.optimizers import OPTIMIZERS

# One row a model: what builds it from event_shape, pixel_levels, and its own keyword arguments.
MODELS: dict[str, Callable[..., Flow]] = {
    "fc": models.fc,
    "conv": models.conv,
    "glow": models.glow,
    "autoregressive": models.autoregressive,
}

CONTEXT = "context_features"
# Arguments of a model that the data and other options decide.
DECIDED = ("event_shape", "pixel_levels", "recon_weight", CONTEXT)
SMALL_IMAGE = 256

if TYPE_CHECKING:
    ModelName: TypeAlias = str
    DataName: TypeAlias = str
    BackendName: TypeAlias = str
    OptimizerName: TypeAlias = str
    ObjectiveName: TypeAlias = str
    OnDivergenceName: TypeAlias = str
    ControllerName: TypeAlias = str
else:  # the choices that the help lists
    ModelName = Literal[tuple(MODELS)]
    DataName = Literal[tuple(data.LOADERS)]
    BackendName = Literal[BACKENDS]
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    ObjectiveName = Literal[OBJECTIVES]
    OnDivergenceName = Literal[ON_DIVERGENCE]
    ControllerName = Literal[tuple(CONTROLLERS)]


@dataclass(frozen=True)
class Train:
    """Train a flow; ends with its exact test likelihood, a checkpoint, a log and pictures.

    With no settings but the model it trains on scikit-learn's handwritten digits in less
    than a minute. A setting that is not given takes the default for the model and the data (those
    of the paper but for the epochs, and quick ones for digits) or, with --resume, the earlier
    run's.
    """

    model: ModelName | None = None
    """Architecture; fc if not given."""
    model_args: tuple[str, ...] = ()
    """Arguments of the architecture, as NAME=VALUE, for example layers=3 linear=exact."""
    data: DataName | None = None
    """Images to train on; digits if not given."""
    data_dir: Path | None = None
    """For --data mnist the folder of the IDX files; for --data images an .npz file with train_x,
    test_x (N, H, W, C) uint8 and train_y, test_y, or its folder."""
    limit_train: int | None = None
    """Use only the first N training images."""
    epochs: int | None = None
    """Epochs to train; on digits fc 400, autoregressive 50; otherwise 100 (the paper: fc 6000,
    conv 1000, glow 250)."""
    batch_size: int | None = None
    """Images a step; 100."""
    lr: float | None = None
    """Learning rate; 1e-3, fc on other data than digits 1e-4."""
    recon_weight: float | None = None
    """Weight lambda of the reconstruction penalty. If not given there is no penalty, because
    learned inverses are tracked; with --model-args inverse=penalty it is 1 for fc and conv (digits
    10) and 100 for glow (images 1000), with a controller the one that it starts from, 1."""
    controller: ControllerName | None = None
    """What moves each layer's lambda to hold its relative reconstruction error; a fixed one if not
    given. Learned inverses are then trained by the penalty."""
    kappa: float | None = None
    """Relative reconstruction error E||e||^2 / E||x||^2 that the controller allows; 2e-3."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate rises from 0; 10."""
    clip_norm: float | None = None
    """Largest gradient norm; no limit if not given, but 10,000 for glow on images."""
    optimizer: OptimizerName | None = None
    """Optimizer; adam."""
    objective: ObjectiveName | None = None
    """Unit of the loss: nats, or bits for bits/dim, which the penalty of the determinants is
    meant for; nats."""
    log_det_penalty: float | None = None
    """Weight of the squared log-determinants of the mixing layers; 0."""
    conditional: bool = False
    """Learn the density of images given their class, for models that take a context."""
    actnorm_batches: int | None = None
    """Batches that actnorm is initialised from; 1. More is steadier for small batches."""
    reversible: bool = False
    """Keep no activations for backward, which rebuilds them by the inverses: a fraction of the
    memory, two to four times the time."""
    seed: int | None = None
    """Seed of initialisation, order and noise; 0."""
    shuffle: bool = True
    """Draw a new order of the training images in every epoch."""
    angle_every: int | None = None
    """Epochs between measurements of the gradient angle, 0 for never; digits 5, mnist 1."""
    monitor_every: int | None = None
    """Steps between measurements of each layer's gradient angle on the batch that is trained on,
    0 for never; 0. They go to angles.csv and TensorBoard."""
    check_every: int | None = None
    """Steps between checks that gradients are finite and learned inverses keep up, 0 for never;
    100. The loss is checked in every step."""
    check_inverse: bool = False
    """Also check that no layer's learned inverse is useless for samples."""
    on_divergence: OnDivergenceName | None = None
    """What follows: stop, or rollback, to go on from the last good checkpoint with lambda 10 times
    as large, at most 3 times in a row; stop."""
    run_dir: Path | None = None
    """Folder for the run's files; runs/MODEL-DATA-TIME if not given."""
    resume: bool = False
    """Go on with the run in --run-dir; on the CPU bit for bit as if it had never stopped."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    threads: int | None = None
    """CPU threads; if not given, 1 for images of up to 256 pixels and torch's own for larger."""
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
    """For --data mnist the folder of the IDX files; for --data images an .npz file with train_x,
    test_x (N, H, W, C) uint8 and train_y, test_y, or its folder."""
    split: Literal["test", "val", "train"] = "test"
    """Which images."""
    seed: int | None = None
    """Seed of the dequantization noise; the run's if not given."""
    noise: float | None = None
    """Standard deviation of noise in model space: prints the variational bound of an encoder and a
    decoder with that noise beside the exact likelihood."""
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
    refine: int = 0
    """Improve the learned inverses by up to N steps, each of a pass forward and one back."""
    out: Path = Path("samples.png")
    """The PNG file."""
    label: int | None = None
    """Class of the samples of a conditional flow; one row a class if not given."""
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
        with _backend(options.backend):
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
    device = _device(options.device)
    if options.threads is not None and options.threads < 1:
        raise UserError(f"threads must be at least 1; got {options.threads}")
    folder, resumed = run.open_folder(options.run_dir) if options.resume else (None, None)
    config = _config(options, resumed)
    if config.conditional:
        _require_context(config.model)
    images = data.load(config.data, options.data_dir, config.conditional)
    images = images.limit_train(config.limit_train)
    own = {"event_shape": images.event_shape, "pixel_levels": images.pixel_levels}
    if config.conditional:
        own["context_features"] = images.classes
    model: dict[str, Any] = {"name": config.model, "settings": own | config.model_args}
    if config.controller is not None:
        start = {"kappa": config.kappa, "recon_weight": config.recon_weight}
        model["controller"] = {"name": config.controller, "settings": start}
    build_flow(model)  # what does not fit must not leave a folder behind
    folder = folder or run.new_folder(options.run_dir, f"{config.model}-{config.data}")
    print(f"training {config.model} on {config.data}, {config.epochs} epochs, in {folder}")
    with _threads(options.threads, math.prod(images.event_shape)):
        result = run.train(
            config, images, model, build_flow, folder, resumed, device, options.progress
        )
    start = result["start_test_nll"]
    bits = bits_per_dim(start, images.event_shape)
    print(f"best epoch of {result['epochs']}: {result['best_epoch']}, by validation NLL")
    print(f"untrained test NLL: {start:.2f} nats, {bits:.3f} bits/dim, exact")
    _report("test", result["test"], result["angle"])
    print(f"checkpoint: {folder / 'best.pt'}")
    print(f"pictures: {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    print(f"log: tensorboard --logdir {folder / 'tensorboard'}")


def evaluate(options: Evaluate) -> None:
    """``snf-ext evaluate``."""
    if options.noise is not None and not 0 < options.noise < math.inf:
        raise UserError(f"noise must be positive and finite; got {options.noise}")
    flow, config, levels = _load_flow(options.checkpoint, options.device)
    images = data.load(options.data or config.data, options.data_dir, config.conditional)
    if (images.event_shape, images.pixel_levels) != (flow.event_shape, levels):
        raise UserError(
            f"data must have events {flow.event_shape} of {levels} levels, as the checkpoint's "
            f"model; {images.name} has {images.event_shape} of {images.pixel_levels}"
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
    _report(options.split, asdict(result), mean_angle(angle))
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


COMMANDS: dict[type, Callable[[Any], None]] = {Train: train, Evaluate: evaluate, Sample: sample}


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
    except (TypeError, ValueError) as error:
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
        if setting.name not in ("model_args", "shuffle", *SWITCHES)
    }
    if earlier is None:
        given |= {"model": given["model"] or "fc", "data": given["data"] or "digits"}
    # Not told apart from their defaults, these are asked for only where they differ.
    name = given["model"] or (earlier.model if earlier else "fc")
    pairs = options.model_args
    given["model_args"] = keyword_arguments(name, MODELS[name], pairs, DECIDED) or None
    given["shuffle"] = None if options.shuffle else False
    given |= {name: getattr(options, name) or None for name in SWITCHES}
    config = resolve(given, earlier)
    if resumed is not None and config.epochs < resumed["epoch"]:
        raise UserError(
            f"epochs must be at least the {resumed['epoch']} that are done; got {config.epochs}"
        )
    return config


def _load_flow(path: Path, device: str) -> tuple[Flow, Config, int]:
    """The flow of a checkpoint in evaluation mode, the run's settings, a pixel's levels."""
    content = checkpoint.load(path)
    flow = build_flow(content["model"])
    checkpoint.load_weights(flow, content, path)
    levels = content["model"]["settings"].get("pixel_levels", 256)
    return flow.to(_device(device)).eval(), Config.from_dict(content["config"]), levels


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


def _report(split: str, result: dict[str, Any], angle: float | None) -> None:
    print(
        f"{split} NLL: {result['nll']:.2f} nats, {result['bits_per_dim']:.3f} bits/dim, exact "
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
