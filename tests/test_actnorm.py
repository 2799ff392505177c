"""ActNorm: where it starts from, and when."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import snf_ext
from snf_ext import ActNorm
from snf_ext.layers.actnorm import EPS


def batches(count, shape=(6, 3, 2, 4), seed=1):
    """Batches that differ much from each other, and from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1)
    return [
        (torch.randn(shape, generator=generator) + 2 * m) * scale * (1 + m) for m in range(count)
    ]


def mean_and_std(xs):
    """Of all elements of each channel, by numpy in float64."""
    columns = np.concatenate([x.double().numpy().swapaxes(0, 1).reshape(3, -1) for x in xs], 1)
    return torch.from_numpy(columns.mean(1)), torch.from_numpy(columns.std(1))


def assert_started_from(layer, xs):
    mean, std = mean_and_std(xs)
    torch.testing.assert_close(layer.shift.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.log_scale.double(), (std + EPS).log(), rtol=1e-5, atol=1e-6)


def test_first_batch():
    layer, xs = ActNorm(3), batches(2)
    z = layer(xs[0]).z
    assert layer.initialized
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    layer(xs[1])
    assert_started_from(layer, xs[:1])


def test_cumulative_over_batches_of_unequal_size():
    xs = batches(5)
    xs[1], xs[3] = xs[1][:1], xs[3][:4, :, :1]
    layer = ActNorm(3, init_batches=4)
    for m in range(4):
        assert not layer.initialized
        layer(xs[m])
        assert_started_from(layer, xs[: m + 1])
    assert layer.initialized
    layer(xs[4])
    assert_started_from(layer, xs[:4])


def test_large_mean_keeps_its_spread():
    """The sums are wide: in float32 the difference of the squares would be noise."""
    x = 1e4 + torch.randn(64, 3, 4, 4)
    layer = ActNorm(3)
    layer(x)
    assert_started_from(layer, [x])


def test_evaluation_mode_never_initialises():
    layer, x = ActNorm(3).eval(), batches(1)[0]
    z, log_det, _ = layer(x)
    assert torch.equal(z, x)
    assert not log_det.any()
    assert torch.equal(layer.inverse(x), x)
    assert torch.equal(layer.train().inverse(x), x)
    assert not layer.initialized
    assert not layer.sums.any()


def test_empty_batches_are_not_counted():
    layer, x = ActNorm(3), batches(1)[0]
    assert layer(x[:0]).z.shape == (0, 3, 2, 4)
    assert not layer.initialized
    layer(x)
    assert_started_from(layer, [x])


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_constant_channels_keep_their_scale(value):
    layer = ActNorm(2)
    x = torch.randn(50, 2, 3)
    x[:, 0] = value
    z = layer(x).z
    assert layer.log_scale[0].item() == 0.0
    assert layer.shift[0].item() == pytest.approx(value)
    assert z[:, 0].abs().max() < 1e-6 * max(1, abs(value))
    assert z[:, 1].std().item() == pytest.approx(1, rel=0.05)


def test_a_single_pixel_then_more():
    """One value a channel says nothing about the scale; the next ones do."""
    layer = ActNorm(3, init_batches=3)
    xs = batches(3, shape=(1, 3, 1, 1))
    layer(xs[0])
    assert not layer.log_scale.any()
    assert torch.equal(layer.shift, xs[0].flatten())
    layer(xs[1])
    layer(xs[2])
    assert_started_from(layer, xs)


def test_nearly_constant_channels_are_not_blown_up():
    z = ActNorm(1)(1e-9 * torch.randn(100, 1)).z
    assert z.abs().max() < 0.01
    assert ActNorm(1)(torch.randn(100, 1)).z.abs().max() > 1


@pytest.mark.parametrize("seen", [0, 1, 2])
@pytest.mark.parametrize("how", ["state_dict", "assign", "deepcopy", "pickle", "file"])
def test_counting_goes_on_after_loading(how, seen):
    xs = batches(4)
    layer = ActNorm(3, init_batches=2)
    for x in xs[:seen]:
        layer(x)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how in ("state_dict", "assign"):
        other = ActNorm(3, init_batches=5)  # what was saved counts
        other.load_state_dict(layer.state_dict(), assign=how == "assign")
    else:
        buffer = io.BytesIO()
        torch.save(layer if how == "pickle" else layer.state_dict(), buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=how == "file")
        other = loaded if how == "pickle" else ActNorm(3)
        if how == "file":
            other.load_state_dict(loaded)
    for x in xs[seen:]:
        other(x)
    assert other.initialized
    assert_started_from(other, xs[:2])


def test_casts_do_not_cost_the_sums_their_digits():
    xs = batches(2)
    layer = ActNorm(3, init_batches=2)
    layer(xs[0])
    layer.bfloat16().float().type(torch.float16).float()
    assert layer.sums.dtype == torch.float64
    layer(xs[1])
    assert_started_from(layer, xs)


def test_reset():
    layer, xs = ActNorm(3, init_batches=2), batches(3)
    for x in xs[:2]:
        layer(x)
    layer.reset_initialization()
    assert not layer.initialized
    assert not layer.shift.any()
    for x in xs[1:]:
        layer(x)
    assert_started_from(layer, xs[1:])


def test_parameters_are_trained_afterwards():
    layer, x = ActNorm(3), batches(1)[0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    z, log_det, _ = layer(x)
    (z.mean() - log_det.mean()).backward()
    optimizer.step()
    stepped = layer.shift.detach().clone()
    mean, _ = mean_and_std([x])
    assert (stepped - mean).abs().max() > 1e-4
    layer(x)
    assert torch.equal(layer.shift, stepped)


def test_a_started_layer_does_not_ask_its_buffers():
    """On a GPU reading a buffer would wait: the meta device, where values cannot be read, shows."""
    layer = ActNorm(3)
    layer(batches(1)[0])
    layer.to("meta")
    assert layer(torch.empty(2, 3, 4, 4, device="meta")).z.shape == (2, 3, 4, 4)


def test_errors():
    with pytest.raises(ValueError, match="channels must be at least 1; got 0"):
        ActNorm(0)
    with pytest.raises(ValueError, match="init_batches must be at least 1; got 0"):
        ActNorm(3, init_batches=0)
    with pytest.raises(ValueError, match=r"x must have shape \[B, C, ...\] with C = 3; got \[2, 4"):
        ActNorm(3)(torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"z must have shape .* C = 3; got \[3\]"):
        ActNorm(3).inverse(torch.zeros(3))


def deep_flow(context_features=0):
    coupling = snf_ext.AffineCoupling(
        4, 8, mask="vector", flipped=True, context_features=context_features
    )
    flow = snf_ext.Flow(
        [ActNorm(4), coupling, snf_ext.SmoothLeakyReLU(0.1), ActNorm(4), snf_ext.SelfNormLinear(4)],
        event_shape=(4,),
        context_features=context_features,
    )
    with torch.no_grad():
        for p in coupling.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return flow


@pytest.mark.parametrize("context_features", [0, 2])
def test_initialize_is_exact_for_deep_layers(context_features):
    """All batches in one, through first-batch layers, is what it must equal."""
    flow = deep_flow(context_features)
    twin = copy.deepcopy(flow)
    xs = [(m + 1) * torch.randn(5 + m, 4) + m for m in range(4)]
    contexts = [torch.randn(len(x), context_features) for x in xs] if context_features else None
    snf_ext.initialize(flow, xs, contexts)
    twin(torch.cat(xs), None if contexts is None else torch.cat(contexts))
    torch.testing.assert_close(flow.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
    assert all(m.initialized for m in flow.modules() if isinstance(m, ActNorm))
    before = copy.deepcopy(flow.state_dict())
    flow(xs[0], None if contexts is None else contexts[0])
    torch.testing.assert_close(flow.state_dict(), before, rtol=0, atol=0)


def test_initialize_in_evaluation_mode_and_anew():
    flow = deep_flow().eval()
    xs = [torch.randn(5, 4) for _ in range(3)]
    snf_ext.initialize(flow, [10 * x for x in xs])
    snf_ext.initialize(flow, xs)
    assert not flow.training
    assert flow.bijections[0].shift.tolist() == pytest.approx(torch.cat(xs).mean(0).tolist())


def test_initialize_inside_a_split():
    inner = ActNorm(8)
    flow = snf_ext.Flow(
        [ActNorm(4), snf_ext.SplitPrior((4, 4, 4), [snf_ext.Squeeze(), inner], 8)], (4, 4, 4)
    )
    snf_ext.initialize(flow, [torch.randn(2, 4, 4, 4) + 1 for _ in range(3)])
    assert inner.initialized
    assert inner.shift.any()


def test_initialize_errors():
    flow = deep_flow()
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        snf_ext.initialize(flow, [])
    with pytest.raises(ValueError, match=r"batches must hold .* none that is empty"):
        snf_ext.initialize(flow, [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match=r"context must have one entry .* of 1 batches; got 2"):
        snf_ext.initialize(flow, [torch.zeros(2, 4)], [torch.zeros(2, 1)] * 2)
    unused = torch.nn.Identity()
    unused.spare = ActNorm(4)
    with pytest.raises(ValueError, match="one was not reached"):
        snf_ext.initialize(unused, [torch.randn(2, 4)])
    assert not unused.spare._forward_pre_hooks


def test_compiles_while_starting_and_after():
    torch.compiler.reset()
    xs = batches(4)
    layer = ActNorm(3, init_batches=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in xs:
        z = compiled(x).z
    assert layer.initialized
    assert_started_from(layer, xs[:2])
    torch.testing.assert_close(z, layer(xs[-1]).z)


RANK = """
import sys
import torch
import torch.distributed as dist
import snf_ext
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
layer = snf_ext.ActNorm(2, init_batches=2)
for m in range(2):
    x = torch.load(f"{out}/x{m}{rank}.pt")
    layer(x)
torch.save(layer.state_dict(), f"{out}/state{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.slow
def test_ranks_agree(tmp_path):
    xs = {
        (m, rank): (1 + rank) * torch.randn(3 + 4 * rank + m, 2, 3) + 5 * rank + m
        for m in range(2)
        for rank in range(2)
    }
    for (m, rank), x in xs.items():
        torch.save(x, tmp_path / f"x{m}{rank}.pt")
    root = Path(snf_ext.__file__).parents[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), str(tmp_path)],
            cwd=root,
        )
        for rank in range(2)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    first, second = (torch.load(tmp_path / f"state{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    every = torch.cat([x.transpose(0, 1).flatten(1) for x in xs.values()], 1).double()
    torch.testing.assert_close(first["shift"].double(), every.mean(1), rtol=1e-5, atol=1e-6)
    log_std = every.std(1, correction=0).log()
    torch.testing.assert_close(first["log_scale"].double(), log_std, rtol=1e-5, atol=1e-5)
    assert math.prod(first["elements"].shape) == 1
    assert first["elements"].item() == every.shape[1]
