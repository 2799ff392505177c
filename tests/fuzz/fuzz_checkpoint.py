#!/usr/bin/env python
"""Fuzzes what resuming, evaluating and sampling read: a flow, or a :class:`UserError`.

    PYTHONPATH=.:tests python tests/fuzz/fuzz_checkpoint.py CORPUS -dict=tests/fuzz/checkpoint.dict

The first byte of an input chooses one of ``TARGETS``. A checkpoint's archive has checksums, which
would stop every change, so an input is the whole file, the pickle in it, or JSON that replaces
parts of the content; ``{"zeros": [2, 3]}`` stands for a tensor there. What loads is used: weights
go into a flow, and the optimizer takes a step.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from harness import chosen, run, scratch
from training_runs import CONFIG, DATA, SHAPE, trainer

from snf_ext import cli
from snf_ext.experiments import folders
from snf_ext.training import checkpoint
from snf_ext.training.angle_log import AngleLog
from snf_ext.training.config import Config, resolve
from snf_ext.training.run import model_of, open_folder
from snf_ext.training.trackers import Records

INSTRUMENTED = [
    "snf_ext",
    "zipfile",
    "json",
    "csv",
    "torch.serialization",
    "torch._weights_only_unpickler",
    "torch._utils",
    "torch.optim.optimizer",
]

SETTINGS = {"lr": 0.1, "model_args": {"layers": 2}}
MODEL = {"name": "fc", "settings": {"event_shape": SHAPE, "pixel_levels": 17}}


@cache
def whole() -> dict[str, Any]:
    """What a short run leaves in ``last.pt``."""
    run = trainer(scratch() / "run")
    run.begin()
    flow, optimizer = run.flow, run.optimizer
    flow.train()
    flow.loss(DATA.train[:4].float()).backward()
    optimizer.step()
    content = checkpoint.load(scratch() / "run" / "last.pt", resume=True)
    state = optimizer.state_dict()
    return content | {"model": MODEL, "optimizer": state, "config": CONFIG.to_dict()}


@cache
def resuming() -> Any:
    """A run that takes any checkpoint; made once, as each has all its state from there."""
    return trainer(scratch() / "resumed")


def load(path: Path) -> None:
    """As evaluate and sample do, and as --resume does."""
    try:
        cli._load_flow(path, "cpu")
    finally:
        content = checkpoint.load(path, resume=True)
        use(Config.from_dict(content["config"]))
        trained = resuming()
        trained.resume(content, path)
        trained.optimizer.zero_grad()
        for parameter in trained.flow.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trained.optimizer.step()
        repr(trained.history), json.dumps(trained.history)


def use(settings: Config) -> None:
    json.dumps(resolve({"epochs": settings.epochs}, settings).to_dict())
    settings.lr_at(3, 10)
    model_of(settings, DATA)


def last() -> Path:
    return scratch() / "last.pt"


def raw(content: bytes) -> None:
    last().write_bytes(content)
    load(last())


def pickled(content: bytes) -> None:
    """In place of the pickle in a whole archive."""
    _, members = parts()
    with zipfile.ZipFile(last(), "w") as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), content if "data.pkl" in name else member)
    load(last())


@cache
def parts() -> tuple[bytes, dict[str, bytes]]:
    stream = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **whole()}, stream)
    with zipfile.ZipFile(stream) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return stream.getvalue(), members


def replaced(content: bytes) -> None:
    """JSON in place of parts, whose names may lead into parts: ``{"model/settings/layers": 3}``."""
    try:
        changes = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(changes, dict):
        return
    changed = torch.load(io.BytesIO(parts()[0]), weights_only=True)
    for name, value in changes.items():
        *way, end = name.split("/")
        place: Any = changed
        for step in way:
            place = place.get(_key(place, step)) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[_key(place, end)] = tensors(value)
    with open(last(), "wb") as stream:
        torch.save(changed, stream)
    load(last())


def _key(place: dict[Any, Any], text: str) -> Any:
    return next((key for key in place if str(key) == text), text)


def tensors(value: Any) -> Any:
    if isinstance(value, dict):
        shape = value.get("zeros")
        if isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**40 for n in shape):
            if "wide" in value:
                return torch.zeros(()).expand(shape[:8])
            return torch.zeros([min(n, 2**16) for n in shape[:1]])  # that many are in the file
        return {key: tensors(part) for key, part in value.items()}
    return [tensors(part) for part in value] if isinstance(value, list) else value


def config(content: bytes) -> None:
    folder = scratch() / "unborn"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    _, found = open_folder(folder)
    assert found is not None
    use(Config.from_dict(found["config"]))


def trackers(content: bytes) -> None:
    path = scratch() / "trackers.json"
    path.write_bytes(content)
    Records(path).write("wandb", "1", 2)


def angles(content: bytes) -> None:
    path = scratch() / "angles.csv"
    path.write_bytes(content)
    log = AngleLog(path, done=20)
    log.add(30, {"a": 1.0})
    log.write()


def settings(content: bytes) -> None:
    folder = scratch() / "claimed"
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_bytes(content)
    folders.claim(folder, SETTINGS)


def outcome(content: bytes) -> None:
    folder = scratch() / "done"
    folder.mkdir(exist_ok=True)
    checkpoint.write_json(folder / "settings.json", SETTINGS)
    (folder / "outcome.json").write_bytes(content)
    found = folders.outcome(folder, SETTINGS)
    assert found is not None
    if "diverged" not in found:
        assert all(row.get("nll") or True for row in found["rows"].values())


TARGETS: dict[str, Callable[[bytes], None]] = {
    "raw": raw,
    "pickle": pickled,
    "parts": replaced,
    "config": config,
    "trackers": trackers,
    "angles": angles,
    "settings": settings,
    "outcome": outcome,
}


def one_input(content: bytes) -> None:
    chosen(content, TARGETS)


def seeds() -> dict[str, bytes]:
    """Whole files, and what has broken readers of such files before."""
    small = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "version": 1, "state": {"w": torch.ones(2)}}, small)
    stuff: dict[str, list[bytes | Any]] = {
        "raw": [small.getvalue(), b"\x80\x02}q\x00."],
        "pickle": [next(m for n, m in parts()[1].items() if "data.pkl" in n)],
        "parts": [
            {},
            {"model/settings/layers": 3},
            {"model/settings/layers": 10**9},
            {"model/settings/event_shape": [1, 10**6, 10**6]},
            {"model": {"name": "glow", "settings": {"event_shape": [1, 8, 8], "levels": 10**8}}},
            {"model": {"name": "conv", "settings": {"event_shape": [1, 8, 8], "layers": 10**8}}},
            {
                "model": {
                    "name": "autoregressive",
                    "settings": {"event_shape": [1, 2, 3], "width": 10**7},
                }
            },
            {"model/controller": {"name": "relative", "settings": {"kappa": 1}}},
            {"optimizer/state/0/exp_avg": {"zeros": [1]}},
            {"optimizer/state/0/exp_avg": {"zeros": [6, 6], "wide": 1}},
            {"state/bijections.4.weight": {"zeros": [6, 6], "wide": 1}, "history": [{"epoch": 0}]},
            {"guard": {"a": 1}, "rollbacks": [{"epoch": 1}], "best": {}, "start": {"test_nll": 1}},
            {"config": {"epochs": "many"}, "epoch": -1, "val_nll": None, "version": 2},
        ],
        "config": [CONFIG.to_dict(), {}, []],
        "trackers": [{"wandb": {"run": "a", "epoch": 3}}, {"mlflow": {"run": 1, "epoch": 1e400}}],
        "angles": [b"step,mean,a\n10,1.5,2\n30,1,1\n", b'step,"a\n1,2,3\n'],
        "settings": [SETTINGS, [1]],
        "outcome": [
            {"rows": {"fc": {"nll": 1.0}}, "where": {"torch": "2"}},
            {"diverged": "the loss is nan"},
            {"rows": [1]},
        ],
    }
    places = {name: place for place, name in enumerate(TARGETS)}
    return {
        f"{name}-{number}": bytes([places[name]])
        + (content if isinstance(content, bytes) else json.dumps(content).encode())
        for name, contents in stuff.items()
        for number, content in enumerate(contents)
    } | {
        f"{name}-deep": bytes([places[name]]) + b"[" * 20_000
        for name in ("config", "trackers", "settings", "outcome")
    }


if __name__ == "__main__":
    parts(), resuming()  # not on the clock of the first input
    run(one_input, seeds, INSTRUMENTED)
