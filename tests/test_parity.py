"""Gradients of the paper's public code, as numbers, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import snf_ext


def load(path, device="cpu"):
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]).to(device) for name in file.files}


@pytest.mark.parametrize("penalty", [True, False], ids=["with-recon", "without-recon"])
@pytest.mark.parametrize("name", ["fc", "conv"])
def test_public_code(name, penalty, shared, backend, device):
    data = load(shared / "parity" / f"{name}.npz", device)
    leaves = {k: data[k].clone().requires_grad_() for k in ("x", "W", "R", "bias")}
    if name == "fc":
        weights = [leaves[k][:, :, 0, 0] for k in ("W", "R")]
        step = snf_ext.ops.snf_linear(leaves["x"], *weights, leaves["bias"])
    else:
        step = snf_ext.ops.snf_conv2d(leaves["x"], leaves["W"], leaves["R"], leaves["bias"])
    z, log_det, recon = step
    torch.testing.assert_close(z.flatten(), data["z"].flatten(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(recon.mean().item(), data["recon_loss"].item(), rtol=1e-12)
    loss = (0.5 * z.flatten(1).square().sum(1) - log_det).mean()
    if penalty:
        loss = loss + recon.mean()
    loss.backward()
    suffix = "snf_recon" if penalty else "snf"
    for key, short in (("W", "W"), ("R", "R"), ("bias", "b"), ("x", "x")):
        want = data[f"grad_{short}_{suffix}"]
        error = (leaves[key].grad - want).abs().max()
        assert error < 1e-12, f"gradient of {key}: {error}"


@pytest.mark.parametrize("penalty", [True, False], ids=["with-recon", "without-recon"])
def test_public_code_symmetric(penalty, shared, backend, device):
    """Its reconstruction by both sides, lambda = 100."""
    data = load(shared / "parity" / "conv_sym_w100.npz", device)
    layer = snf_ext.SelfNormConv2d(3, 3, inverse="symmetric").double().to(device)
    layer.load_state_dict({"weight": data["W"], "weight_inv": data["R"], "bias": data["bias"]})
    x = data["x"].clone().requires_grad_()
    z, log_det, recon = layer(x)
    np.testing.assert_allclose(100 * recon.mean().item(), data["recon_loss"].item(), rtol=1e-12)
    loss = (0.5 * z.flatten(1).square().sum(1) - log_det).mean()
    (loss + 100 * penalty * recon.mean()).backward()
    suffix = "snf_recon" if penalty else "snf"
    leaves = {"W": layer.weight, "R": layer.weight_inv, "b": layer.bias, "x": x}
    for short, leaf in leaves.items():
        want = data[f"grad_{short}_{suffix}"]
        assert (leaf.grad - want).abs().max() < 1e-11, f"gradient of {short}"


@pytest.mark.parametrize("name", ["fc", "conv"])
def test_public_code_exact_values(name, shared):
    data = load(shared / "parity" / f"{name}.npz")
    if name == "fc":
        layer = snf_ext.SelfNormLinear(16).double()
        state = {"weight": data["W"][:, :, 0, 0], "weight_inv": data["R"][:, :, 0, 0]}
        event_shape = (16,)
    else:
        layer = snf_ext.SelfNormConv2d(3, 3).double()
        state = {"weight": data["W"], "weight_inv": data["R"]}
        event_shape = (3, 6, 6)
    layer.load_state_dict({**state, "bias": data["bias"]})
    flow = snf_ext.Flow([layer], event_shape)
    np.testing.assert_allclose(flow.log_prob(data["x"]).detach(), data["logp_exact"], atol=1e-10)
