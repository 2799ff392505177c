"""The options of ``snf-ext reproduce``, and what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from . import experiments
from .cli_options import BackendName
from .flow import Flow

if TYPE_CHECKING:
    ExperimentName: TypeAlias = str
else:
    # Read by tyro alone, which is missed, with advice, when the command line is parsed.
    with suppress(ModuleNotFoundError):
        from tyro.conf import Positional

        ExperimentName = Positional[Literal[tuple(experiments.EXPERIMENTS)]]

SEEDS = {"full": 3, "cpu": 3, "smoke": 1}


@dataclass(frozen=True)
class Reproduce:
    """Reproduce a table or figure of the papers, every row from data to number.

    What is done is not done again, and what was cut off goes on: repeat the command. Results are
    OUT/NAME.json, .md and .png, written after every run; each run has a folder OUT/NAME/ROW/seed-S.
    """

    name: ExperimentName
    """A table or figure of SNF (table1 .. figure5) or of SFM (sfm-...)."""
    scale: Literal["full", "cpu", "smoke"] = "full"
    """full: the paper's settings; cpu: what a small CPU does in hours; smoke: on scikit-learn's
    digits in a minute, to see that it runs. What is reduced is printed and in the results."""
    seeds: int | None = None
    """Runs a row, with seeds 0, 1, ...; 3, at smoke 1. Times have one."""
    data_dir: Path | None = None
    """Folder of the data sets' files, as for train."""
    out: Path = Path("reproduced")
    """Folder for results and runs."""
    only: tuple[str, ...] = ()
    """Rows to run; all if not given. Rows that are timed in turn go together."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    threads: int | None = None
    """CPU threads; if not given, 1 at smoke and torch's own otherwise."""
    backend: BackendName | None = None
    """Which code runs; the compiled one if it is built."""
    progress: bool = True
    """Show progress on stderr."""


def reproduce(
    options: Reproduce, build: Callable[[dict[str, Any]], Flow], device: torch.device
) -> None:
    """Run the experiment, and say where its results are."""
    seeds = SEEDS[options.scale] if options.seeds is None else options.seeds
    experiments.reproduce(
        experiments.Request(
            options.name,
            options.scale,
            seeds,
            options.out,
            options.data_dir,
            options.only,
            device,
            options.progress,
        ),
        experiments.EXPERIMENTS,
        build,
    )
    results = (options.out / f"{options.name}{ending}" for ending in (".md", ".json", ".png"))
    print(f"results: {', '.join(str(path) for path in results)}")
