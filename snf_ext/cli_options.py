"""What the commands can be told: the options of ``snf-ext train | evaluate | sample``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from . import models
from .backend import BACKENDS
from .controllers import CONTROLLERS
from .flow import Flow
from .training import data
from .training.config import AUGMENTS, OBJECTIVES, ON_DIVERGENCE
from .training.optimizers import OPTIMIZERS
from .training.trackers import TRACKERS

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
    TrackerName: TypeAlias = str
    AugmentName: TypeAlias = str
else:  # the choices that the help lists
    ModelName = Literal[tuple(MODELS)]
    DataName = Literal[tuple(data.LOADERS)]
    BackendName = Literal[BACKENDS]
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    ObjectiveName = Literal[OBJECTIVES]
    OnDivergenceName = Literal[ON_DIVERGENCE]
    ControllerName = Literal[tuple(CONTROLLERS)]
    TrackerName = Literal[tuple(TRACKERS)]
    AugmentName = Literal[AUGMENTS]


@dataclass(frozen=True)
class Train:
    """Train a flow; ends with its exact test likelihood, a checkpoint, a log and pictures.

    With no settings but the model it trains on scikit-learn's handwritten digits in less
    than a minute. A setting that is not given takes the default for the model and the data (those
    of the paper but for the epochs, and quick ones for digits) or, with --resume, the earlier
    run's. Started by torchrun, once for each GPU or core, the processes share every batch.
    """

    model: ModelName | None = None
    """Architecture; fc if not given."""
    model_args: tuple[str, ...] = ()
    """Arguments of the architecture, as NAME=VALUE, for example layers=3 linear=exact."""
    data: DataName | None = None
    """What to train on; digits if not given. moons, rings and checkerboard are points in a plane,
    for fc and autoregressive."""
    data_dir: Path | None = None
    """Where the files are, or a folder that holds the one in brackets. mnist (mnist): IDX files;
    cifar10 (cifar-10-batches-bin): data_batch_1.bin .. 5, test_batch.bin; imagenet32
    (Imagenet32_train_npz, Imagenet32_val_npz): npz batches; images (images): an .npz file with
    train_x, test_x (N, H, W, C) uint8 and train_y, test_y, or its folder. Others need none."""
    verify: bool = True
    """Check that files are those of mnist and cifar10 by their checksums; without, other data in
    the same form will do."""
    augment: AugmentName | None = None
    """Random changes of training images: flip left to right, flip-jitter with shifts by up to a
    pixel too; flip-jitter on cifar10, otherwise none."""
    limit_train: int | None = None
    """Use only the first N training images."""
    epochs: int | None = None
    """Epochs to train; on digits fc 400, autoregressive 50; on imagenet32 15, on points 15;
    otherwise 100 (the paper: fc 6000, conv 1000, glow 250, on cifar10 1000)."""
    batch_size: int | None = None
    """Images a step; 100, on imagenet32 64, on points 200."""
    lr: float | None = None
    """Learning rate; 1e-3, fc on images other than digits 1e-4, on points 1e-2."""
    recon_weight: float | None = None
    """Weight lambda of the reconstruction penalty. If not given there is no penalty, because
    learned inverses are tracked; with --model-args inverse=penalty it is 1 for fc and conv (digits
    10) and 100 for glow (colour images 1000), with a controller the one that it starts from, 1."""
    controller: ControllerName | None = None
    """What moves each layer's lambda to hold its relative reconstruction error; a fixed one if not
    given. Learned inverses are then trained by the penalty."""
    kappa: float | None = None
    """Relative reconstruction error E||e||^2 / E||x||^2 that the controller allows; 2e-3."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate rises from 0; 10, on imagenet32 0, on points 1."""
    clip_norm: float | None = None
    """Largest gradient norm; no limit if not given, but 10,000 for glow on colour images."""
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
    accumulate: int | None = None
    """Pieces that each batch is taken in, one after the other, with the memory of one; 1."""
    graph: bool = True
    """Replay steps on a GPU as CUDA graphs where that is possible."""
    reversible: bool = False
    """Keep no activations for backward, which rebuilds them by the inverses: a fraction of the
    memory, two to four times the time."""
    seed: int | None = None
    """Seed of initialisation, order and noise; 0."""
    shuffle: bool = True
    """Draw a new order of the training images in every epoch."""
    evaluate_every: int | None = None
    """Epochs between measurements on validation images, each with a checkpoint; 1. More where steps
    are so fast that these take longer."""
    angle_every: int | None = None
    """Epochs between measurements of the gradient angle, 0 for never; on digits and
    points 5, else 1."""
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
    track: tuple[TrackerName, ...] = ()
    """Where the run's numbers go besides TensorBoard: wandb, mlflow, or both. Each is a package of
    its own, and takes its settings from the environment (WANDB_MODE, MLFLOW_TRACKING_URI, ...);
    without them MLflow keeps a database in the run's folder."""
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
    """What to measure on; that of the run if not given."""
    data_dir: Path | None = None
    """Where the files are, or a folder that holds the one in brackets. mnist (mnist): IDX files;
    cifar10 (cifar-10-batches-bin): data_batch_1.bin .. 5, test_batch.bin; imagenet32
    (Imagenet32_train_npz, Imagenet32_val_npz): npz batches; images (images): an .npz file with
    train_x, test_x (N, H, W, C) uint8 and train_y, test_y, or its folder. Others need none."""
    verify: bool = True
    """Check that files are those of mnist and cifar10 by their checksums; without, other data in
    the same form will do."""
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
