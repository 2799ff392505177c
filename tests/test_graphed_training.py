"""Training by replayed graphs is training: the same runs as by eager steps.

On the CPU against a stand-in for CUDA that keeps what a graph keeps, and on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from training_runs import CONFIG, DATA, SHAPE

import snf_ext
from snf_ext.training import checkpoint, graph
from snf_ext.training.errors import Diverged
from snf_ext.training.loop import Trainer
from snf_ext.training.world import ALONE, World

# 50 images by 8: six batches and a rest.
RUN = replace(CONFIG, lr=2.0**-7, warmup_epochs=0, check_every=5, epochs=4)


@pytest.fixture
def graphs(world, monkeypatch):
    monkeypatch.setattr(graph, "DEVICE", world.device)
    return world


def run(graphs, folder, config, make=None, data=DATA, resume=False):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    flow = (make or (lambda: snf_ext.models.fc(SHAPE, pixel_levels=17)))().to(graphs.device)
    trainer = Trainer(flow, {"name": "fc", "settings": {}}, data, config, folder, progress=False)
    if resume:
        trainer.resume(checkpoint.load(folder / "last.pt", resume=True), folder / "last.pt")
    else:
        trainer.begin()
    assert trainer.fit()
    return trainer


def assert_same(one, two):
    states = one.flow.state_dict(), two.flow.state_dict()
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)  # rates are float32 in a graph
    for name in ("val_nll", "train_loss", "angle", "recon", "lr"):
        pairs = zip(one.history[1:], two.history[1:], strict=True)
        for a, b in ((a[name], b[name]) for a, b in pairs):
            assert a == b if a is None else a == pytest.approx(b, rel=1e-4), name


MODELS = {
    "fc": lambda: snf_ext.models.fc(SHAPE, pixel_levels=17),
    "tracked": lambda: snf_ext.models.fc(SHAPE, pixel_levels=17, inverse="tracked"),
    "held": lambda: snf_ext.constrain(
        snf_ext.models.fc(SHAPE, pixel_levels=17), snf_ext.Relative()
    ),
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_norm": 1.0},
        {"clip_norm": None, "objective": "bits", "optimizer": "radam"},
        {"monitor_every": 7},
        {"warmup_epochs": 2},
        {"check_every": 0, "shuffle": False},
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_the_same_run_as_by_eager_steps(graphs, tmp_path, model, settings):
    if settings.get("optimizer") == "radam" and graphs.device == "cpu":
        pytest.skip("torch's RAdam is capturable on a GPU only")
    config = replace(RUN, **settings)
    graphed = run(graphs, tmp_path / "graph", config, MODELS[model])
    eager = run(graphs, tmp_path / "eager", replace(config, graph=False), MODELS[model])
    assert graphs.captures >= 1  # the last one of an epoch is monitored
    assert graphed.graphed is not None
    assert graphed.graphed.graphed, graphed.graphed.reason
    assert eager.graphed is None
    assert_same(graphed, eager)
    rows = [(tmp_path / side / "angles.csv") for side in ("graph", "eager")]
    assert rows[0].exists() == rows[1].exists() == bool(config.monitor_every)


def test_a_graphed_run_goes_on(graphs, tmp_path):
    whole = run(graphs, tmp_path / "whole", RUN)
    run(graphs, tmp_path / "cut", replace(RUN, epochs=2))
    cut = run(graphs, tmp_path / "cut", RUN, resume=True)
    assert_same(cut, whole)


def test_the_checkpoint_is_of_any_device(graphs, tmp_path):
    run(graphs, tmp_path / "run", replace(RUN, epochs=2))
    (group,) = checkpoint.load(tmp_path / "run/last.pt")["optimizer"]["param_groups"]
    assert isinstance(group["lr"], float)
    # On with plain steps, as on a CPU.
    on = run(graphs, tmp_path / "run", replace(RUN, graph=False), resume=True)
    assert not any(group["capturable"] for group in on.optimizer.param_groups)


def test_a_loss_that_is_not_finite_is_found_at_the_next_check(graphs, tmp_path):
    class Breaks(snf_ext.SmoothLeakyReLU):
        """Gives nan in its ninth step."""

        def forward(self, x, context=None):
            z, log_det, recon = super().forward(x, context)
            self.seen = getattr(self, "seen", 0) + self.training
            wrong = (self.weight - 1).abs() > 0.07  # after six steps or so
            return snf_ext.FlowStep(
                z + self.weight + torch.where(wrong, math.nan, 0.0), log_det, recon
            )

    def make():
        layer = Breaks(0.3)
        layer.weight = torch.nn.Parameter(torch.tensor(1.0))
        return snf_ext.Flow([*snf_ext.models.preprocessing(17), layer], SHAPE)

    with pytest.raises(Diverged, match=r"the loss is nan .* in epoch 2, step 10;"):
        run(graphs, tmp_path / "run", replace(RUN, clip_norm=None), make)
    assert math.isfinite(checkpoint.load(tmp_path / "run/last.pt")["val_nll"])


@pytest.mark.parametrize(
    ("settings", "world_of"),
    [
        ({"graph": False}, ALONE),
        ({"accumulate": 2}, ALONE),
        ({"reversible": True}, ALONE),
        ({}, World(0, 2)),
    ],
)
def test_what_keeps_a_run_from_graphs(graphs, settings, world_of):
    device = torch.device(graphs.device)
    assert graph.can_be_graphed(RUN, ALONE, device)
    assert not graph.can_be_graphed(replace(RUN, **settings), world_of, device)


def test_no_graphs_on_a_cpu(tmp_path):
    assert not graph.can_be_graphed(RUN, ALONE, torch.device("cpu"))
