"""Experiments made small: few images, one epoch, no pictures of single runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from snf_ext import cli, experiments
from snf_ext.training import run

LESS = {"limit_train": 40, "epochs": 1}
SHALLOW = {"conv": {"layers": 3}}  # by model


def small(experiment, drawn=False, **changes):
    """``experiment`` with less to do at smoke scale, and no picture unless ``drawn``."""
    rows = []
    for row in experiment.rows:
        less = {name: v for name, v in {**LESS, **changes}.items() if name in row.settings}
        smoke = {**row.reduced["smoke"], **less, **SHALLOW.get(row.model, {})}
        rows.append(replace(row, reduced={**row.reduced, "smoke": smoke}))
    draw = experiment.draw if drawn else lambda *args: None
    return replace(experiment, rows=tuple(rows), draw=draw)


def reproduce(out, name="table1", only=(), seeds=1, scale="smoke", **changes):
    """The record of an experiment that was made small."""
    known = {name: small(experiments.EXPERIMENTS[name], **changes)}
    request = experiments.Request(name, scale, seeds, out, only=tuple(only), progress=False)
    record = experiments.reproduce(request, known, cli.build_flow)
    assert record == json.loads((out / f"{name}.json").read_text())
    return record


def row_of(record, name):
    return next(row for row in record["rows"] if row["name"] == name)


@pytest.fixture
def trained(monkeypatch):
    """The (model, seed) of every call of the training loop."""
    calls = []
    train = run.train

    def remember(config, *args, **kwargs):
        calls.append((config.model, config.seed))
        return train(config, *args, **kwargs)

    monkeypatch.setattr(run, "train", remember)
    return calls
