"""Where a run's numbers go: TensorBoard always, wandb and MLflow where they are asked for."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from .checkpoint import read_json, write_json
from .errors import UserError, require

Row = Mapping[str, Any]


class Run(NamedTuple):
    """An open run of a tracker: what finds it again, and what takes numbers of a training step."""

    id: str
    log: Callable[[dict[str, float], int], Any]


@contextmanager
def _wandb(folder: Path, settings: dict[str, Any], run_id: str | None) -> Iterator[Run]:
    """WANDB_MODE, WANDB_PROJECT and the like are the user's; files are in the run's folder."""
    logger = require("ignite.handlers.wandb_logger").WandBLogger(
        project=os.environ.get("WANDB_PROJECT", "snf_ext"),
        name=folder.resolve().name,
        dir=str(folder),
        config=settings,
        allow_val_change=True,  # more epochs, say
        id=run_id,
        resume="allow",
    )
    try:
        yield Run(
            logger.run.id,
            # A step is written when the next one comes, unless it is said to be complete.
            lambda values, step: logger.log(values, step=step, commit="epoch" in values),
        )
    except BaseException:
        logger.finish(exit_code=1)
        raise
    logger.close()


@contextmanager
def _mlflow(folder: Path, settings: dict[str, Any], run_id: str | None) -> Iterator[Run]:
    """MLFLOW_TRACKING_URI and the like are the user's; without one, a database in the folder."""
    mlflow: Any = importlib.import_module("mlflow")
    own = not mlflow.is_tracking_uri_set()
    try:
        if own:
            mlflow.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
        # Nested, because the caller may have a run open, which is not ours to log into or to end.
        mlflow.start_run(run_id=run_id, run_name=folder.resolve().name, nested=True)
        logger = require("ignite.handlers.mlflow_logger").MLflowLogger()  # takes the open run
        try:
            if run_id is None:  # parameters of a run cannot change
                logger.log_params(flat(settings))
            run = logger.active_run.info.run_id
            yield Run(run, lambda values, step: logger.log_metrics(values, step=step))
        except BaseException:
            mlflow.end_run(status="FAILED")
            raise
        logger.close()
    finally:
        if own:
            mlflow.set_tracking_uri(None)


TRACKERS: dict[str, Callable[..., AbstractContextManager[Run]]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise before anything is created if a tracker cannot be used.

    Raises:
        UserError: it is unknown, or its package is not installed.

    >>> check_trackers(())
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"track must be of {', '.join(TRACKERS)}; got {name!r}")
        try:
            found = importlib.import_module(name).__file__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise UserError(f"--track {name} cannot load its package; {error}") from error
            found = None
        if found is None:  # also a folder of the package's name, such as wandb makes
            raise UserError(
                f"--track {name} needs a package that is not installed: pip install {name}"
            )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without inner dictionaries.

    >>> flat({"lr": 0.1, "model_args": {"layers": 3}})
    {'lr': 0.1, 'model_args.layers': 3}
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


class Trackers:
    """Takes the numbers of a run, as a context that opens and closes what they go to.

    TensorBoard gets them at once: rows of the history by epoch in ``tensorboard/``, numbers of
    single steps in ``tensorboard/steps/``; what an interrupted run logged beyond its checkpoint is
    hidden when the run goes on.

    The others get them with the row of their epoch, when that is in a checkpoint: what a resumed
    run does again was never sent. All by training step, the epoch being a number of the row.
    ``trackers.json`` has each tracker's run and the last epoch that it got, so that a resumed run
    goes on in the same one and sends what is missing of its history: all, to a tracker that is new.
    One that cannot be reached while training goes on gets a warning, and its numbers later.

    Args:
        folder: the run's.
        names: of :data:`TRACKERS`.
        settings: what they show as the run's parameters.
        history: rows so far, at least one; see :class:`Trainer`.
        steps: numbers of single steps will come.

    Raises:
        UserError: a tracker is unknown, not installed, or, on entering, cannot be opened.

    >>> import tempfile
    >>> row = {"epoch": 0, "step": 0, "val_nll": 3.5}
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Trackers(folder, (), {"lr": 1e-3}, [row], steps=True) as trackers:
    ...     trackers.log_step({"step_angle/mean": 0.5}, 1)
    ...     trackers.log({"epoch": 1, "step": 1, "val_nll": 3.25})
    >>> [path.name for path in folder.iterdir()]
    ['tensorboard']
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        settings: dict[str, Any],
        history: Sequence[Row],
        steps: bool = False,
    ) -> None:
        check_trackers(names)
        require("tensorboard")
        self.folder, self.names, self.settings = Path(folder), tuple(names), settings
        self.history, self.steps = list(history), steps
        self._stack = ExitStack()
        self._remotes: list[_Remote] = []

    def __enter__(self) -> Trackers:
        last = self.history[-1]
        path = self.folder / "tensorboard"
        with ExitStack() as stack:
            self._scalars = self._tensorboard(stack, path, last["epoch"] + 1)
            if self.steps:  # apart: these are counted in steps, and purging is of all tags
                self._step_scalars = self._tensorboard(stack, path / "steps", last["step"] + 1)
            records = Records(self.folder / "trackers.json")
            self._remotes = [
                stack.enter_context(_opened(name, self.folder, self.settings, records))
                for name in self.names
            ]
            for remote in self._remotes:
                for row in self.history:
                    remote.add(row)
                remote.send()
            if last["epoch"] == 0:
                self._add_scalars(last)
            self._stack = stack.pop_all()  # all is open, and stays so
        return self

    @staticmethod
    def _tensorboard(stack: ExitStack, path: Path, purge_step: int) -> Any:
        logger = require("ignite.handlers.tensorboard_logger").TensorboardLogger
        return stack.enter_context(closing(logger(log_dir=str(path), purge_step=purge_step))).writer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def log(self, row: Row) -> None:
        """Take the row of an epoch that is in a checkpoint; None is left out."""
        self._add_scalars(row)
        for remote in self._remotes:
            remote.add(row)
            remote.send()

    def log_step(self, values: Mapping[str, float | None], step: int) -> None:
        """Take numbers of a training step, by tag; needs ``steps=True``."""
        known = {tag: value for tag, value in values.items() if value is not None}
        for tag, value in known.items():
            self._step_scalars.add_scalar(tag, value, step)
        for remote in self._remotes:
            remote.pending.append((known, step, None))

    def _add_scalars(self, row: Row) -> None:
        for name, value in _numbers(row).items():
            self._scalars.add_scalar(name, value, row["epoch"])


def _numbers(row: Row) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if name not in ("epoch", "step") and value is not None
    }


class Records:
    """``trackers.json``: by name ``{"run": its id, "epoch": the last one that was sent}``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            self.content = read_json(path)
            for record in self.content.values():
                record["run"], record["epoch"] = str(record["run"]), int(record["epoch"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} must have a run and an epoch for each tracker; got another file "
                "(without it the run's numbers go to new runs)"
            ) from error

    def write(self, name: str, run: str, epoch: int) -> None:
        self.content[name] = {"run": run, "epoch": epoch}
        write_json(self.path, self.content)


class _Remote:
    """One tracker's run, and what it has not got yet."""

    def __init__(self, name: str, run: Run, records: Records) -> None:
        self.name, self.run, self.records = name, run, records
        self.sent = records.content.get(name, {}).get("epoch", -1)
        self.pending: list[tuple[dict[str, float], int, int | None]] = []
        self._warned = False

    def add(self, row: Row) -> None:
        if row["epoch"] > self.sent:
            values = {"epoch": row["epoch"], **_numbers(row)}
            self.pending.append((values, row["step"], row["epoch"]))

    def send(self) -> None:
        before = self.sent
        try:
            while self.pending:
                values, step, epoch = self.pending[0]
                self.run.log(values, step)
                del self.pending[0]
                self.sent = self.sent if epoch is None else epoch
        except Exception as error:  # whatever a client raises: training is worth more
            if not self._warned:
                _warn(self.name, "could not take the run's numbers, and will get them later", error)
            self._warned = True
        # After sending: what is cut off between the two is sent again, the same, and not missing.
        if self.sent > before:
            self.records.write(self.name, self.run.id, self.sent)


@contextmanager
def _opened(
    name: str, folder: Path, settings: dict[str, Any], records: Records
) -> Iterator[_Remote]:
    earlier = records.content.get(name)
    context = TRACKERS[name](folder, settings, None if earlier is None else earlier["run"])
    try:
        run = context.__enter__()
    except Exception as error:
        where = "" if earlier is None else f" with its run {earlier['run']}"
        raise UserError(f"--track {name} cannot be opened{where}; {error}") from error
    if earlier is None:  # at once: a run that is cut off early goes on in it too
        records.write(name, run.id, -1)
    remote = _Remote(name, run, records)
    try:
        yield remote
    except BaseException as error:
        _closed(name, context, error)
        raise
    _closed(name, context, None)


def _closed(name: str, context: AbstractContextManager[Run], error: BaseException | None) -> None:
    trace = None if error is None else error.__traceback__
    try:
        context.__exit__(None if error is None else type(error), error, trace)
    except Exception as failure:
        _warn(name, "could not be closed", failure)


def _warn(name: str, what: str, error: Exception) -> None:
    warnings.warn(f"{name} {what}: {error}", RuntimeWarning, stacklevel=2)
