"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..controllers import CONTROLLERS, KAPPA
from .augment import AUGMENTATIONS
from .errors import UserError
from .optimizers import OPTIMIZERS
from .toy import DENSITIES
from .trackers import TRACKERS

OBJECTIVES = ("nats", "bits")
ON_DIVERGENCE = ("stop", "rollback")
AUGMENTS = ("none", *AUGMENTATIONS)  # as asked for: "none" is a request, where None is not one


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run.

    Attributes:
        model: a name in the table of models.
        model_args: keyword arguments for it, beyond those that the data decide.
        data: a name in the table of data sets.
        augment: how training images are changed at random, a name in the table of augmentations;
            None for not at all.
        limit_train: use only that many training images.
        epochs: how many times the training images are seen.
        batch_size: images a step; the last step of an epoch may have fewer.
        lr: learning rate after warm-up.
        recon_weight: lambda, the weight of the reconstruction penalty; with a controller the one
            that it starts from.
        controller: what moves each layer's lambda, a name in the table of controllers; None for
            one lambda that stays.
        kappa: the relative reconstruction error that it allows; None without one.
        warmup_epochs: the learning rate rises from 0 step by step over that many epochs.
        clip_norm: largest gradient norm, None to leave it.
        seed: of initialisation, order and noise.
        shuffle: new order in every epoch, or the order of the file.
        evaluate_every: epochs between measurements on validation images and checkpoints; the last
            epoch has one always.
        angle_every: the gradient angle is measured there too in epochs that this divides, 0 for
            never.
        monitor_every: steps between measurements of each layer's gradient angle on the batch that
            is trained on, 0 for never.
        check_every: steps between checks for divergence besides that of the loss, 0 for never.
        check_inverse: whether these look at ``||I - R W||``, for samples by the learned inverse.
        on_divergence: ``"stop"``, or ``"rollback"``: go on from the last good checkpoint with
            lambda 10 times as large, until three times in a row did not lead to the next one. Of
            use where inverses are trained by the penalty.
        optimizer: ``"adam"`` or ``"radam"``.
        objective: ``"nats"``, the loss in nats as in SNF, or ``"bits"``, in bits/dim as in SFM.
            lr, clip_norm and log_det_penalty are of the objective's gradient.
        log_det_penalty: weight of the squared log-determinants of the mixing layers (SFM 4.1).
        conditional: whether the class of an image is the flow's context.
        actnorm_batches: how many batches actnorm is initialised from (SFM: 256).
        accumulate: into how many pieces a step takes its batch, one after the other, to hold the
            activations of one at a time.
        graph: whether steps on a GPU are replayed as CUDA graphs where that is possible.
        reversible: whether backward rebuilds activations instead of keeping them; see
            :class:`snf_ext.Reversible`.
        track: where the numbers go besides TensorBoard, names in the table of trackers.

    Raises:
        UserError: a value is out of range.
    """

    model: str
    data: str
    epochs: int
    batch_size: int
    lr: float
    recon_weight: float
    warmup_epochs: float
    controller: str | None = None
    kappa: float | None = None
    clip_norm: float | None = None
    seed: int = 0
    shuffle: bool = True
    limit_train: int | None = None
    evaluate_every: int = 1
    angle_every: int = 1
    monitor_every: int = 0
    check_every: int = 100
    check_inverse: bool = False
    on_divergence: str = "stop"
    optimizer: str = "adam"
    objective: str = "nats"
    log_det_penalty: float = 0.0
    conditional: bool = False
    actnorm_batches: int = 1
    accumulate: int = 1
    graph: bool = True
    reversible: bool = False
    track: tuple[str, ...] = ()
    augment: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._require("epochs", self.epochs >= 1, "at least 1")
        self._require("batch_size", self.batch_size >= 1, "at least 1")
        self._require("lr", 0 < self.lr < math.inf, "positive and finite")
        self._require("recon_weight", 0 <= self.recon_weight < math.inf, "finite, not negative")
        self._require(
            "controller",
            self.controller in (None, *CONTROLLERS),
            f"one of {', '.join(CONTROLLERS)}",
        )
        if self.controller is None:
            self._require("kappa", self.kappa is None, "left out without a controller")
        else:
            kappa = self.kappa or 0.0
            self._require("kappa", 0 < kappa < math.inf, "positive and finite with a controller")
        self._require("warmup_epochs", 0 <= self.warmup_epochs < math.inf, "finite, not negative")
        self._require("clip_norm", self.clip_norm is None or self.clip_norm > 0, "positive")
        self._require("evaluate_every", self.evaluate_every >= 1, "at least 1")
        self._require("angle_every", self.angle_every >= 0, "at least 0")
        self._require("monitor_every", self.monitor_every >= 0, "at least 0")
        self._require("check_every", self.check_every >= 0, "at least 0")
        for name, choices in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("objective", OBJECTIVES),
            ("on_divergence", ON_DIVERGENCE),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        known = self.augment is None or self.augment in AUGMENTATIONS
        self._require("augment", known, f"one of {', '.join(AUGMENTS)}")
        penalty = self.log_det_penalty
        self._require("log_det_penalty", 0 <= penalty < math.inf, "finite, not negative")
        self._require("actnorm_batches", self.actnorm_batches >= 1, "at least 1")
        self._require("accumulate", self.accumulate >= 1, "at least 1")
        self._require("track", set(self.track) <= set(TRACKERS), f"of {', '.join(TRACKERS)}")
        if self.on_divergence == "rollback":
            self._require("recon_weight", self.recon_weight > 0, "positive for rollback")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{name} must be {rule}; got {getattr(self, name)}")

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step 1, 2, ...: a straight line up, then constant.

        >>> config = Config("fc", "digits", 9, 100, 1.0, 1.0, warmup_epochs=2)
        >>> [config.lr_at(step, 2) for step in (1, 2, 4, 5)]
        [0.25, 0.5, 1.0, 1.0]
        """
        warmup = self.warmup_epochs * steps_per_epoch
        return self.lr if step >= warmup else self.lr * step / warmup

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`.

        Raises:
            UserError: a setting is unknown, missing, of another type or out of range.
        """
        try:
            config = cls(**values)
            for name, kind in get_type_hints(cls).items():
                value = getattr(config, name)
                if not _is_a(value, kind):
                    raise TypeError(f"{name} must be of type {kind}; got {value!r}")
            return config
        except TypeError as error:
            raise UserError(f"the run's settings must fit this version; {error}") from error


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value that was JSON fits an annotation of :class:`Config`."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return isinstance(value, int | float if kind is float else kind)


# Which settings may differ when a run goes on: those that leave the finished epochs as they are.
_FREE = {
    "epochs",
    "evaluate_every",
    "angle_every",
    "monitor_every",
    "check_every",
    "check_inverse",
    "on_divergence",
    "graph",
    "track",
}

# What a run takes where neither the model nor the request says otherwise.
_COMMON = {"batch_size": 100, "warmup_epochs": 10.0, "lr": 1e-3, "recon_weight": 1.0}
_POINTS = {"epochs": 15, "batch_size": 200, "warmup_epochs": 1.0, "lr": 1e-2, "angle_every": 5}
_DATA: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 400, "angle_every": 5},
    "mnist": {"epochs": 100},
    "cifar10": {"epochs": 100, "augment": "flip-jitter"},
    "imagenet32": {"epochs": 15, "batch_size": 64, "warmup_epochs": 0.0},
    "images": {"epochs": 100},
    **{name: dict(_POINTS) for name in DENSITIES},
}

# The argument of each model that names its mixing layers, of which "self_norm" learns inverses.
LAYERS = {"fc": "linear", "conv": "conv", "glow": "mixing"}

# How those are kept where nobody asked otherwise. Who names a weight of the penalty, or what moves
# it, wants the penalty, as the papers have it.
INVERSE = "tracked"

# With a controller no lambda is taken from a table: that is its point.
_CONTROLLED = {"recon_weight": 1.0, "kappa": KAPPA}

_COLOUR = {"recon_weight": 1000.0, "clip_norm": 10_000.0}

# The papers' settings (SNF A.3) but for epochs, and quick ones for digits. There, lambda = 1 lets
# the angle of fc drift to 30 degrees and back at this learning rate; 10 holds it below 1 and ends
# nearer to the exact gradient's likelihood.
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("fc", "digits"): {"recon_weight": 10.0},
    ("fc", "mnist"): {"lr": 1e-4},
    ("fc", "cifar10"): {"lr": 1e-4},
    ("fc", "imagenet32"): {"lr": 1e-4},
    ("fc", "images"): {"lr": 1e-4},
    ("conv", "digits"): {"recon_weight": 10.0, "epochs": 100},
    ("glow", "digits"): {
        "recon_weight": 100.0,
        "epochs": 100,
        "model_args": {"levels": 2, "steps": 4, "width": 16},
    },
    ("glow", "mnist"): {"recon_weight": 100.0},
    ("autoregressive", "digits"): {"epochs": 50},
    ("glow", "cifar10"): _COLOUR | {"model_args": {"levels": 3, "steps": 32}},
    ("glow", "imagenet32"): _COLOUR | {"model_args": {"levels": 3, "steps": 48}},
    ("glow", "images"): _COLOUR | {"model_args": {"levels": 3, "steps": 32}},
}


def defaults(model: str, data: str) -> dict[str, Any]:
    """The settings of a run of ``model`` on ``data`` that nobody asked to be otherwise.

    >>> defaults("glow", "images")["recon_weight"], defaults("fc", "mnist")["lr"]
    (1000.0, 0.0001)
    """
    return {**_COMMON, **_DATA[data], **DEFAULTS.get((model, data), {})}


def _learns_freely(asked: dict[str, Any], model_args: dict[str, Any]) -> bool:
    """Whether the model learns inverses, and nothing asks for the penalty."""
    layers = LAYERS.get(asked["model"])
    learns = layers is not None and model_args.get(layers, "self_norm") == "self_norm"
    weighs = {"recon_weight", "controller"} & asked.keys()
    return learns and not weighs and asked.get("on_divergence") != "rollback"


def resolve(given: dict[str, Any], earlier: Config | None = None) -> Config:
    """The settings of a run from what was asked for.

    Args:
        given: settings by name; None is not asked for, and ``augment`` may be "none".
        earlier: the settings of the run that goes on, which fill in what was not asked for.

    Raises:
        UserError: a value is out of range, or differs from the earlier run's where that would
            make it another run.

    >>> resolve({"model": "fc", "data": "mnist", "epochs": None, "lr": 0.5}).lr
    0.5
    >>> resolve({"model": "glow", "data": "mnist", "controller": "relative"}).recon_weight
    1.0
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if asked.get("augment") == "none":
        asked["augment"] = None
    if earlier is None:
        usual = defaults(asked["model"], asked["data"])
        if "controller" in asked:
            usual |= _CONTROLLED
        own = {**usual.get("model_args", {}), **asked.get("model_args", {})}
        if _learns_freely(asked, own):
            own = {"inverse": INVERSE, **own}
        return Config(**{**usual, **asked, "model_args": own})
    if "model_args" in asked:  # asked for in part: the rest stays as it was
        asked["model_args"] = {**earlier.model_args, **asked["model_args"]}
    for setting in fields(Config):
        name = setting.name
        before = getattr(earlier, name)
        if name in asked and name not in _FREE and asked[name] != before:
            raise UserError(
                f"{name} must stay {before!r} when a run is resumed; got {asked[name]!r} "
                "(start a new run with another --run-dir)"
            )
    return replace(earlier, **{name: asked[name] for name in _FREE if name in asked})
