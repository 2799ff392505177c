"""The benchmark's stand-in for the public code computes what the public code computes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# Last in the path, so that an installed package is not shadowed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import snf_ext
from bench import baselines, cases, models, steps
from bench.composed_conv import ComposedConv, ComposedSpline
from bench.composition import (
    ComposedConv2d,
    ComposedFC,
    ComposedLinear,
    base_distribution,
    composed_backward,
)

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
needs_parity = pytest.mark.skipif(
    not PARITY.is_dir(), reason="the public code's gradients (shared/parity) are not beside us"
)


def _close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def _parity(name):
    np = pytest.importorskip("numpy")
    with np.load(PARITY / f"{name}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data}


def _gaussian_loss(z):
    return (0.5 * z.flatten(1).square().sum(1)).mean()


@needs_parity
@pytest.mark.parametrize("name", ["fc", "conv"])
@pytest.mark.parametrize("recon", [True, False])
def test_reproduces_the_public_code(name, recon):
    data = _parity(name)
    channels, _, k, _ = data["W"].shape
    layer = ComposedLinear(channels) if name == "fc" else ComposedConv2d(channels, k)
    layer.double()
    with torch.no_grad():
        layer.weight.copy_(data["W"])
        layer.weight_inv.copy_(data["R"])
        layer.bias.copy_(data["bias"])
    x = data["x"].requires_grad_()

    z = layer(x)
    _close(z.detach(), data["z"])
    log_prob = base_distribution(z[0].numel(), "normal").log_prob(z.flatten(1))
    _close(log_prob.detach(), data["logp_cheap"])
    loss = -log_prob.mean()
    if recon:
        composed_backward(loss, [layer], recon_weight=1.0)
    else:
        loss.backward()

    kind = "snf_recon" if recon else "snf"
    for key, leaf in {"x": x, "W": layer.weight, "R": layer.weight_inv, "b": layer.bias}.items():
        _close(leaf.grad, data[f"grad_{key}_{kind}"])


@needs_parity
@pytest.mark.parametrize("name", ["fc", "conv"])
def test_reproduces_the_public_penalty(name):
    data = _parity(name)
    channels, _, k, _ = data["W"].shape
    layer = ComposedConv2d(channels, k).double()
    with torch.no_grad():
        layer.weight.copy_(data["W"])
        layer.weight_inv.copy_(data["R"])
    layer(data["x"].view(len(data["x"]), channels, *data["x"].shape[2:] or (1, 1)))
    _close(layer.reconstruction_backward(1.0), data["recon_loss"])
    _close(layer.weight.grad, data["grad_W_recon_only"])
    _close(layer.weight_inv.grad, data["grad_R_recon_only"])


@pytest.mark.parametrize(("channels", "k", "h", "w"), [(1, 3, 5, 4), (3, 1, 4, 4), (2, 5, 6, 7)])
def test_convolution_follows_the_merged_equations(channels, k, h, w):
    """dw = (delta/2 + 2q r^T e) x - flip(r) m / 2 and its twin, with dense matrices."""
    torch.manual_seed(0)
    layer = ComposedConv2d(channels, k).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(3, channels, h, w, dtype=torch.double)
    composed_backward(_gaussian_loss(layer(x)), [layer], recon_weight=2.0)

    batch, features = len(x), x[0].numel()
    eye = torch.eye(features, dtype=torch.double).view(features, channels, h, w)

    def matrix(kernel):  # T(k), so that T(k) x is the convolution
        return torch.nn.functional.conv2d(eye, kernel, padding=k // 2).flatten(1).T

    rows = x.flatten(1)
    weight, weight_inv = layer.weight.detach(), layer.weight_inv.detach()
    big_w, big_r = matrix(weight), matrix(weight_inv)
    y = rows @ big_w.T
    delta_z = (y + layer.bias.detach().repeat_interleave(h * w)) / batch
    delta_x, error, q = delta_z @ big_w, y @ big_r.T - rows, 2.0 / batch
    big_dw = (delta_z / 2 + 2 * q * error @ big_r).T @ rows - big_r.T / 2
    big_dr = (-delta_x / 2 + 2 * q * error).T @ y + big_w.T / 2

    def gather(big, kernel):  # sum the dense gradient over the places of each kernel element
        kernel = kernel.clone().requires_grad_()
        (grad,) = torch.autograd.grad((matrix(kernel) * big).sum(), kernel)
        return grad

    _close(layer.weight.grad, gather(big_dw, weight))
    _close(layer.weight_inv.grad, gather(big_dr, weight_inv))


def test_base_distributions_are_the_same_density():
    z = torch.randn(5, 7)
    _close(
        base_distribution(7, "multivariate").log_prob(z),
        base_distribution(7, "normal").log_prob(z),
        tol=1e-5,
    )
    with pytest.raises(ValueError, match="base must be 'multivariate' or 'normal'; got 'cauchy'"):
        base_distribution(7, "cauchy")


def test_model_gradients_and_exact_likelihood():
    torch.manual_seed(0)
    flow = ComposedFC((1, 4, 4), layers=2)
    x = torch.randint(256, (6, 1, 4, 4)).float()
    flow.training_backward(x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())

    # With W = I the logit's and the activation's terms are all that is left of the change of
    # variables, so log p follows from the base density and autograd's Jacobian alone.
    torch.manual_seed(1)
    actual = flow.log_prob(x)
    torch.manual_seed(1)
    noisy = x + torch.rand_like(x)

    def latent(v):
        u = (v / 256 + 1e-6) * (1 - 2e-6)
        h = torch.logit(u)
        h = flow.linears[0](h[None])
        h, _ = flow.activation(h)
        return flow.linears[1](h)[0]

    for i in range(2):
        v = noisy[i].flatten()
        jacobian = torch.autograd.functional.jacobian(latent, v)
        z = latent(v)
        expected = -0.5 * (z.square() + torch.log(torch.tensor(2 * torch.pi))).sum()
        expected = expected + torch.linalg.slogdet(jacobian.double())[1].float()
        torch.testing.assert_close(actual[i], expected.detach(), rtol=1e-4, atol=1e-2)


# ---- The spline and the convolutional model ------------------------------------------------------

SMALL = {
    "fc": cases.ModelCase("fc", (1, 4, 4), 2),
    "conv": cases.ModelCase("conv", (1, 8, 8), 6, model="conv", blocks=3),
    "glow": cases.ModelCase("glow", (1, 8, 8), 4, batch=4, model="glow", blocks=2, hidden=5),
}


@needs_parity
def test_spline_reproduces_the_public_code():
    data = _parity("spline")
    spline = ComposedSpline((6,)).double()
    raw = {"w": spline.widths, "h": spline.heights, "d": spline.derivatives}
    with torch.no_grad():
        for key, p in raw.items():
            p.copy_(data[key].view(p.shape))
    x = data["x"].requires_grad_()
    y, log_det = spline(x)
    _close(y.detach(), data["y"])
    (0.5 * y.square().sum() - log_det.sum()).backward()
    _close(x.grad, data["gx"])
    for key, p in raw.items():
        _close(p.grad.view(data[f"g{key}"].shape), data[f"g{key}"])


def test_spline_log_det_is_that_of_its_jacobian():
    torch.manual_seed(0)
    spline = ComposedSpline((5,)).double()
    with torch.no_grad():
        for p in spline.parameters():
            p.normal_()
    x = torch.tensor([[-30.0, -10.0, 0.3, 10.0, 11.0], [-9.9, -1.0, 1.0, 4.0, 9.9]]).double()
    y, log_det = spline(x)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: spline(v[None])[0][0], x[i])
        # On the bounds autograd sees the side of the interval, as does log_det.
        _close(log_det[i].detach(), jacobian.diagonal().log().sum())
    _close(y[0, [0, 1, 3, 4]], x[0, [0, 1, 3, 4]])
    with pytest.raises((RuntimeError, IndexError)):  # as in the public code
        spline(torch.full((2, 5), 11.0).double())


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize("backend", steps.backends())
def test_models_agree_with_the_composition(case, backend):
    """Exact log p and every gradient of the batch-mean loss, in float64 and under one noise."""
    assert models.check_agreement(case, backend) < 1e-8


@pytest.mark.parametrize("part", ["convolution", "spline", "penalty", "likelihood"])
def test_disagreement_is_seen(part, monkeypatch):
    def wrong(name, value):
        original = models.composed_like

        def composed_like(*args):
            composed = original(*args)
            layer = composed.layers[1 if name == "widths" else 0]
            if name == "recon_weight":
                composed.recon_weight *= value
            elif name == "base":
                log_prob = composed.log_prob
                composed.log_prob = lambda x: log_prob(x) * value
            else:
                with torch.no_grad():
                    getattr(layer, name).view(-1)[0].add_(value)
            return composed

        monkeypatch.setattr(models, "composed_like", composed_like)

    wrong(
        *{
            "convolution": ("weight_inv", 1e-5),
            "spline": ("widths", 1e-5),
            "penalty": ("recon_weight", 1.001),
            "likelihood": ("base", 1 + 1e-6),
        }[part]
    )
    with pytest.raises(RuntimeError, match="reference and composed differ by"):
        models.check_agreement(SMALL["conv"], "reference")


def test_convolutional_model_is_that_of_the_paper():
    composed = ComposedConv(base="normal")
    assert sum(p.numel() for p in composed.parameters()) == 102_613
    case = next(c for c in cases.MODELS if c.model == "conv")
    assert case.parameters == 102_613
    flow = models.make_flow(case)
    assert sum(p.numel() for p in flow.parameters()) == 102_613
    x = torch.randint(256, (3, 1, 28, 28)).float()
    torch.manual_seed(0)
    composed.training_backward(x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in composed.parameters())


def test_glow_is_that_of_the_paper():
    """What is counted leaves out actnorm's shift and scale."""
    case = next(c for c in cases.MODELS if c.model == "glow")
    flow = models.make_flow(case)
    actnorm = [m for m in flow.modules() if isinstance(m, snf_ext.ActNorm)]
    assert len(actnorm) == case.layers == 8
    assert all(m.initialized for m in actnorm)
    counted = sum(p.numel() for p in flow.parameters()) - 4 * 2 * (4 + 8)
    assert case.parameters == counted
    # Six products of each mixing layer, three of each convolution in a coupling.
    mixing = 4 * (4**2 * 14**2 + 8**2 * 7**2)
    first, second = (2 * 9 * 16 + 16**2 + 16 * 9 * 4), (4 * 9 * 16 + 16**2 + 16 * 9 * 8)
    couplings = 5 * first * 14**2 + 4 * second * 7**2
    assert case.flops == 2 * 100 * (6 * mixing + 3 * couplings)


def test_all_models_of_a_case_start_from_the_same_numbers():
    flow = models.make_flow(SMALL["conv"])
    for base in ("multivariate", "normal"):
        composed = models.composed_like(flow, SMALL["conv"], base)
        for a, b in zip(flow.parameters(), composed.parameters(), strict=True):
            assert torch.equal(a.flatten(), b.flatten())


def test_bare_products_are_the_six_of_the_layer():
    torch.manual_seed(0)
    x, g, e = torch.randn(3, 4, 6).unbind()
    weight, weight_inv = torch.randn(2, 6, 6).unbind()
    fresh = baselines.linear_products(x, g, e, weight, weight_inv)
    out = [torch.full_like(t, torch.nan) for t in fresh]
    reused = baselines.linear_products(x, g, e, weight, weight_inv, out=out)
    for a, b, buffer in zip(fresh, reused, out, strict=True):
        torch.testing.assert_close(a, b)
        assert b is buffer
    y = x @ weight.T
    for actual, expected in zip(
        fresh, (y, y @ weight_inv.T, g @ weight, e @ weight_inv, g.T @ x, e.T @ y), strict=True
    ):
        torch.testing.assert_close(actual, expected)
