"""The training loop: one epoch after another, each ending with a checkpoint."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..constraint import controllers
from ..flow import Flow
from ..layers.actnorm import ActNorm, initialize
from ..reversible import NotReversible, Reversible
from . import checkpoint
from .angle import gradient_angle, mean_angle
from .angle_log import AngleLog
from .batches import Batch, Batches
from .config import Config
from .context import context_of
from .data import Dataset
from .errors import Diverged, UserError, require
from .evaluate import bits_per_dim, device_of, negative_log_likelihood, reconstruction_error
from .graph import can_be_graphed, graphed_step
from .guard import ADVICE, DivergenceGuard
from .monitor import GradientMonitor
from .optimizers import OPTIMIZERS, restore, set_lr, state_of
from .progress import Progress
from .rollback import roll_back
from .seeds import derive_seed, seeded
from .signals import StopRequest
from .step import Gradients, OwnShare
from .trackers import Trackers, check_trackers
from .world import ALONE, World

# Validation images for the figures that describe training and do not choose the best epoch.
MONITORED = 500


class Trainer:
    """Trains a flow and leaves a folder from which training can always go on.

    After every epoch, or every so many (``evaluate_every``), the folder holds ``last.pt`` (all that
    resuming needs), ``best.pt`` (the weights of the lowest validation NLL), ``history.json`` and,
    if steps are monitored, ``angles.csv`` (see :class:`AngleLog`).

    An epoch depends on the seed, its number and the state before it, and on nothing else: a run
    that was killed and resumed has on the CPU the same bits as one that was not. What
    :class:`DivergenceGuard` finds ends training, or rolls it back (:func:`roll_back`;
    ``rollbacks`` has the rows).

    Where several processes train together each has its own trainer, all take the same steps and
    come to the same decisions, and the first one writes. On a GPU steps are replayed as CUDA graphs
    where that is possible (:mod:`.graph`), but for those that are monitored or checked; there a
    loss that is not finite is found at the next check.

    A row of the history has

        epoch, step     counted from 1; row 0 is the untrained flow
        lr              learning rate of the last step
        train_loss      mean objective of that epoch (no likelihood), in the objective's unit; None
                        in row 0
        val_nll         exact, in nats; val_bits_per_dim the same in bits
        recon           reconstruction error on the first validation images
        angle           between the self-normalizing and the exact gradient there, degrees; or None
        seconds         time spent in training steps so far

    and, where layers have controllers, means over these at the end of the epoch:

        recon_weight    lambda
        relative_error  E||e||^2 / E||x||^2 in the last training batches; None in row 0

    Args:
        flow: on the device where it shall train.
        model: what checkpoints keep to build the flow again, ``{"name", "settings"}``.
        data: images to train and to validate on.
        config: settings.
        folder: an existing folder for the files.
        progress: show it on stderr.
        world: the processes that train together; ``config.batch_size`` counts images of all.

    Raises:
        UserError: the flow cannot be trained so; see :class:`Gradients`.
    """

    def __init__(
        self,
        flow: Flow,
        model: dict[str, Any],
        data: Dataset,
        config: Config,
        folder: Path,
        progress: bool = True,
        world: World = ALONE,
    ) -> None:
        check_trackers(config.track)
        self.flow, self.model, self.data, self.config = flow, model, data, config
        flow.reversible = Reversible() if config.reversible else None
        self.folder, self.world = Path(folder), world
        self.device = device_of(flow)
        self.val, self.val_context = data.val.to(self.device), context_of(flow, data.val_labels)
        self.batches = Batches(
            data.train,
            config.batch_size,
            config.seed,
            config.shuffle,
            context_of(flow, data.train_labels),
            device=self.device,
            augment=config.augment,
        )
        self.gradients = Gradients(flow, config, world)
        graph = can_be_graphed(config, world, self.device) and self.batches.resident
        lr = torch.tensor(config.lr, device=self.device) if graph else config.lr
        self.optimizer = OPTIMIZERS[config.optimizer](flow.parameters(), lr, graph)
        self.graphed = None
        if graph:
            self.graphed = graphed_step(flow, self.optimizer, self.batches, config)
        self.progress = progress and world.first
        self.monitor: GradientMonitor | None = None
        if config.monitor_every:
            self.monitor = GradientMonitor(flow, config.monitor_every)
        self.guard = DivergenceGuard(flow, config.check_every, config.check_inverse)
        self.angles = AngleLog(self.folder / "angles.csv")
        self.rollbacks: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.start: dict[str, Any] = {}
        self._trackers: Trackers | None = None  # the first process has them
        self._failure: Diverged | None = None
        self._stop, self._told = StopRequest(), False

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return self.history[-1]["epoch"] if self.history else 0

    def begin(self) -> None:
        """Initialise by the data, measure the untrained flow, write the first checkpoint."""
        self._initialize()
        context = context_of(self.flow, self.data.test_labels)
        nll = negative_log_likelihood(
            self.flow, self.data.test, self.config.seed, context, self.world
        )
        self.start = {"test_nll": nll.mean().item()}
        self._finish_epoch({"epoch": 0, "step": 0, "lr": 0.0, "train_loss": None, "seconds": 0.0})

    def _initialize(self) -> None:
        """Show the first batches to the layers that set themselves up by the data.

        Before the first measurement, which runs in evaluation mode, so that it and all
        checkpoints are of the flow that training starts from.
        """
        layers = [module for module in self.flow.modules() if isinstance(module, ActNorm)]
        if all(layer.initialized for layer in layers):
            return
        self.flow.train()
        with seeded(self.device, self.config.seed, "actnorm"):
            shown = list(islice(self.batches.stream(1), self.config.actnorm_batches))
            images = [batch.images for batch in shown]
            contexts = [batch.context for batch in shown if batch.context is not None] or None
            initialize(OwnShare(self.flow, self.world), images, contexts)

    def resume(self, content: dict[str, Any], path: Path) -> None:
        """Go on from ``content``, read from ``path`` with ``checkpoint.load(path, resume=True)``.

        Raises:
            UserError: it does not fit the flow.
        """
        checkpoint.load_weights(self.flow, content, path)
        try:
            restore(self.optimizer, content["optimizer"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} must fit the optimizer; {error}") from error
        self.history, self.best = content["history"], content["best"]
        self.start = content["start"]
        self.guard.start = content.get("guard", {})
        self.rollbacks = content.get("rollbacks", [])
        if self.rollbacks:
            self.flow.recon_weight = self.rollbacks[-1]["recon_weight"]
        self.angles = AngleLog(self.folder / "angles.csv", done=self.history[-1]["step"])
        if self.world.first:
            checkpoint.write_json(self.folder / "history.json", self.history)

    def fit(self) -> bool:
        """Train up to ``config.epochs``; False if SIGINT or SIGTERM ended it before.

        The caller's random numbers are left as they were.

        Raises:
            Diverged: :class:`DivergenceGuard` found something, or after an epoch a weight, the
                validation NLL or the reconstruction error is not finite; and ``on_divergence`` is
                "stop", or :func:`roll_back` did not help. The message names the layer, epoch and
                step, the last good checkpoint, and what to change.
        """
        while self.epoch < self.config.epochs and not self._stopping:
            self._run()
            if self._failure and self.config.on_divergence == "stop":
                raise self._failure
            if self._failure:
                path, failure, self._failure = self.folder / "last.pt", self._failure, None
                back = partial(roll_back, path, failure, self.flow.recon_weight)
                self.resume(self.world.from_first(back), path)
        return not self._stopping

    @property
    def _stopping(self) -> bool:
        """Whether a signal came, to this process or, as all know of since a step, to another."""
        return self._told or (self.world.size == 1 and self._stop.number is not None)

    def _run(self) -> None:
        """Train on, to the last epoch, a signal, or a failure."""
        engine, self._clock = self._engine(), 0.0  # that of the steps since the last measurement
        with ExitStack() as stack:  # one that cannot be opened is everyone's error
            self.world.from_first(partial(self._open_trackers, stack))
            with (
                self._stop,
                seeded(self.device, self.config.seed, "fit"),
                Progress(engine, self.progress),
            ):
                engine.run(self._stream(self.epoch + 1), max_epochs=self.config.epochs)

    def _stream(self, first: int) -> Iterator[Batch | Tensor]:
        """The batches of epoch ``first`` and of all that follow, or the places of their images."""
        for number in count(first):
            if self.batches.resident:
                yield from self.batches.order(number).split(self.config.batch_size)
            else:
                yield from self.batches.epoch(number)

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended :meth:`fit`, as far as this process knows."""
        return self._stop.number or (signal.SIGTERM if self._told else None)

    def _engine(self) -> Any:
        ignite = require("ignite.engine")
        engine = ignite.Engine(self._step)
        engine.load_state_dict(
            {
                "epoch": self.epoch,
                "epoch_length": len(self.batches),
                "max_epochs": self.config.epochs,
            }
        )
        events = ignite.Events
        engine.add_event_handler(events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(events.ITERATION_COMPLETED, self._after_step)
        engine.add_event_handler(events.EPOCH_COMPLETED, self._after_epoch)
        return engine

    def _open_trackers(self, stack: ExitStack) -> None:
        names, settings = self.config.track, self.config.to_dict()
        trackers = Trackers(self.folder, names, settings, self.history, steps=bool(self.monitor))
        self._trackers = stack.enter_context(trackers)

    def _start_epoch(self, engine: Any) -> None:
        torch.manual_seed(derive_seed(self.config.seed, "epoch", engine.state.epoch))
        self.flow.train()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._clock = self._clock or time.perf_counter()

    def _step(self, engine: Any, item: Batch | Tensor) -> float | Tensor:
        step = engine.state.iteration
        set_lr(self.optimizer, self.config.lr_at(step, len(self.batches)))
        looked_at = self.guard.due(step) or (self.monitor is not None and self.monitor.due(step))
        if self.graphed is not None and isinstance(item, Tensor) and not looked_at:
            loss = self.graphed(item)
            self._loss_sum += loss * len(item)
            return loss
        batch = item if isinstance(item, Batch) else self.batches.take(item)
        value = self._eager_step(engine, batch)
        self._loss_sum += value * len(batch.images)
        return value

    def _eager_step(self, engine: Any, batch: Batch) -> float:
        state = engine.state
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.steps = state.iteration - 1
        try:
            with self._monitored(state.iteration), self.guard.step():
                value, told = self.gradients(batch, self._stop.number is not None)
                self._told = self._told or told
        except NotReversible as error:
            if self.world.size > 1:  # the others wait
                raise
            cause = f"the input of {error.layer} was rebuilt with a relative error of "
            where = ADVICE["rebuilt"], state.epoch, state.iteration
            self._failure = self._diverged(f"{cause}{error.error:.2g}", *where)
            return math.nan
        clip, norm = self.config.clip_norm, None
        if clip is not None:  # apart from clipping, which would hide where NaN is
            norm = get_total_norm([p.grad for p in self.flow.parameters() if p.grad is not None])
        found = None
        try:
            self.guard.check(value, *batch, grad_norm=norm)
        except Diverged as error:
            found = error
        if self.guard.due(state.iteration) or found is not None:
            found = self.world.first_of(found)
        if found is not None:  # raised after the engine ended, which would log it again
            self._failure = self._diverged(found.cause, found.advice, state.epoch, found.step)
            return value
        if clip is not None and norm is not None:
            clip_grads_with_norm_(self.flow.parameters(), clip, norm)
        self.optimizer.step()
        return value

    @contextmanager
    def _monitored(self, step: int) -> Iterator[None]:
        """Measure the gradient angles of step 1, 2, ... if it is due."""
        if self.monitor is None:
            yield
            return
        self.monitor.steps = step - 1
        with self.monitor.step() as due:
            yield
        angles = self.monitor.angles
        if due and angles and self._trackers:
            self.angles.add(step, angles)
            shown = {"mean": mean_angle(angles), **angles}
            self._trackers.log_step({f"step_angle/{k}": v for k, v in shown.items()}, step)

    def _after_step(self, engine: Any) -> None:
        if self._failure or self._stopping:
            engine.terminate()

    def _after_epoch(self, engine: Any) -> None:
        state = engine.state
        if state.epoch % self.config.evaluate_every and state.epoch < self.config.epochs:
            return
        loss = self._loss_sum.item() / len(self.batches.images)  # waits for a GPU
        row = {
            "epoch": state.epoch,
            "step": state.iteration,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "train_loss": loss,
            "seconds": self.history[-1]["seconds"] + time.perf_counter() - self._clock,
        }
        self._clock = 0.0
        try:
            self._finish_epoch(row)
        except Diverged as failure:
            self._failure = failure
            engine.terminate()
            return
        if self._trackers:
            self._trackers.log(row)
        shown = {"loss": row["train_loss"], "val_nats": row["val_nll"], "recon": row["recon"]}
        angles = [earlier["angle"] for earlier in self.history if earlier["angle"] is not None]
        if angles:
            shown["angle"] = angles[-1]
        if self.monitor and self.monitor.angles:
            shown["step_angle"] = mean_angle(self.monitor.angles)
        if "recon_weight" in row:
            shown |= {"lambda": row["recon_weight"], "error": row["relative_error"]}
        state.metrics = shown

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        """Measure, complete the row, and write the files."""
        self._measure(row)
        self.history.append(row)
        better = not self.best or row["val_nll"] < self.best["val_nll"]
        if better:
            self.best = {"epoch": row["epoch"], "val_nll": row["val_nll"]}
        if self.world.first:
            self._write(row, better)

    def _write(self, row: dict[str, Any], better: bool) -> None:
        common = {
            "model": self.model,
            "state": self.flow.state_dict(),
            "epoch": row["epoch"],
            "val_nll": row["val_nll"],
            "config": self.config.to_dict(),
        }
        if better:
            checkpoint.save(self.folder / "best.pt", common)
        self.angles.write()
        # Last, so that a run cut off before it does this epoch again and finds the same.
        resumable = {
            "optimizer": state_of(self.optimizer),
            "history": self.history,
            "best": self.best,
            "start": self.start,
            "guard": self.guard.start,
            "rollbacks": self.rollbacks,
        }
        checkpoint.save(self.folder / "last.pt", common | resumable)
        checkpoint.write_json(self.folder / "history.json", self.history)

    def _measure(self, row: dict[str, Any]) -> None:
        where = ADVICE["loss"], row["epoch"], row["step"]
        for name, parameter in self.flow.named_parameters():
            if not parameter.isfinite().all():
                raise self._diverged(f"the parameter {name} is not finite", *where)
        seed, monitored = self.config.seed, self.val[:MONITORED]
        context = None if self.val_context is None else self.val_context[:MONITORED]
        nll = negative_log_likelihood(self.flow, self.val, seed, self.val_context, self.world)
        row["val_nll"] = nll.mean().item()
        row["val_bits_per_dim"] = bits_per_dim(row["val_nll"], self.flow.event_shape)
        if not math.isfinite(row["val_nll"]):
            raise self._diverged(f"the validation NLL is {row['val_nll']}", *where)
        if held := controllers(self.flow).values():
            row["recon_weight"] = sum(c.recon_weight.item() for c in held) / len(held)
            error = sum(c.error.item() for c in held) / len(held)
            row["relative_error"] = error if math.isfinite(error) else None
        row["angle"] = None
        every = self.config.angle_every
        if every and row["epoch"] % every == 0:
            with seeded(self.device, seed, "angle"):
                angle = mean_angle(gradient_angle(self.flow, monitored, context))
            row["angle"] = angle if angle is None or math.isfinite(angle) else None
        self.flow.fit_inverses(tracked_alone=True)  # some steps behind; for samples and checkpoints
        row["recon"], _ = reconstruction_error(self.flow, monitored, seed, context)
        if not math.isfinite(row["recon"]):
            raise self._diverged(f"the reconstruction is {row['recon']}", *where)

    def _diverged(self, cause: str, advice: str, epoch: int, step: int) -> Diverged:
        message = (
            f"training diverged: {cause} in epoch {epoch}, step {step}; "
            f"{self._last_good()}; {advice}"
        )
        return Diverged(message, cause=cause, advice=advice, step=step)

    def _last_good(self) -> str:
        if not self.history:
            return "there is no checkpoint"
        nll = self.history[-1]["val_nll"]
        last = self.folder / "last.pt"
        return f"the last good checkpoint is {last} (epoch {self.epoch}, {nll:.6g} nats)"
