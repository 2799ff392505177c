"""The tables and figures of the papers: settings as data, one command for each.

``EXPERIMENTS`` has them by the names that ``snf-ext reproduce`` takes. A new one is rows of
settings (:mod:`.plan`) and how they are run: as training runs (:mod:`.trained`), timed
(:mod:`.timed`), or in their first steps (:mod:`.stability`).
"""

from __future__ import annotations

from . import figures, sfm, tables
from .plan import SCALES, Experiment
from .runner import Failed, Request, reproduce

__all__ = ["EXPERIMENTS", "SCALES", "Failed", "Request", "reproduce"]

EXPERIMENTS: dict[str, Experiment] = {
    "table1": tables.TABLE1,
    "table2": tables.TABLE2,
    "table3": tables.TABLE3,
    "table4": tables.TABLE4,
    "table5": tables.TABLE5,
    "figure2": figures.FIGURE2,
    "figure3": figures.FIGURE3,
    "figure4": figures.FIGURE4,
    "figure5": figures.FIGURE5,
    "sfm-table2": sfm.TABLE2,
    "sfm-figure4": sfm.FIGURE4,
    "sfm-figure5": sfm.FIGURE5,
}
