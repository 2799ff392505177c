"""Autocast and GradScaler, for every bijection and model; operators have their own files.

Residuals, log-determinants and likelihoods are float32, and near what they are without autocast.
"""

from __future__ import annotations

import models_table
import pytest
import torch
from bijections_table import BIJECTIONS
from models_table import VARIANTS, images

import snf_ext

pytestmark = pytest.mark.usefixtures("one_thread", "backend")
every = pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name)
every_model = pytest.mark.parametrize("name", VARIANTS)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# Those that leave z to torch's products in half precision; all others compute in float32.
NARROW = (
    *("ExactLinear", "ExactConv2d", "PlainConv1x1", "LUConv1x1", "HouseholderConv1x1"),
    *("EmergingConv2d", "ExponentialConv2d"),
)
# Those whose log_det comes from a network, which is torch's, too.
NETWORKS = (
    *("VariationalDequantize", "ComponentwiseAffine-context"),
    *("AffineCoupling", "AdditiveCoupling", "SplitPrior"),
)


def seeded(function, *arguments):
    torch.manual_seed(5)
    return function(*arguments)


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


@halves
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@every
def test_bijections(case, mode, dtype):
    bijection, x = case.build(torch.float32).train(mode), case.data(4, torch.float32)
    context, rounding = case.context(x), torch.finfo(dtype).eps
    want = seeded(bijection, x, context)
    learned = bijection.inverse(want.z, context)
    with torch.autocast("cpu", dtype):
        z, log_det, recon = seeded(bijection, x, context)
        again = bijection.inverse(want.z, context)
        back = bijection.inverse(want.z, context, exact=True)
    assert log_det.dtype == recon.dtype == torch.float32
    assert relative(recon, want.recon) < 1e-5
    assert relative(log_det, want.log_det) < (
        2 * rounding if case.name.startswith(NETWORKS) else 1e-5
    )
    loose = case.name.startswith((*NARROW, *NETWORKS))
    assert relative(z, want.z) < (4 * rounding if loose else 1e-5)
    assert back.shape == x.shape
    if not (case.noisy or (case.batch_dependent and mode)):
        for got, right in ((back, x), (again, learned)):
            assert relative(got, right) < (8 * rounding if loose else 1e-4)


@halves
@every
def test_bijections_after_one_that_narrows(case, dtype):
    """Under autocast x may come in half precision while parameters are float32."""
    bijection, x = case.build(torch.float32), case.data(4, torch.float32).to(dtype)
    context = case.context(x)
    with torch.autocast("cpu", dtype):
        z, log_det, recon = bijection(x, context)
        assert log_det.dtype == recon.dtype == torch.float32
        for exact in (False, True):
            assert bijection.inverse(z.to(dtype), context, exact=exact).isfinite().all()
    loss = z.float().square().sum() - log_det.sum() + recon.sum()
    if loss.requires_grad:
        loss.backward()
    for p in bijection.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@halves
@every_model
def test_models(name, dtype):
    flow, x = models_table.build(name, torch.float32), images(3, torch.float32)
    rounding = torch.finfo(dtype).eps

    def both():
        loss = seeded(flow.train().loss, x)
        return loss, seeded(flow.eval().log_prob, x)

    want = both()
    with torch.autocast("cpu", dtype):
        got = both()
        for exact in (False, True):
            assert flow.sample(2, exact=exact).isfinite().all()
    assert {t.dtype for t in got} == {torch.float32}
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 4 * rounding
    got[0].backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


# ---- GradScaler


def gradients(flow, optimizer, x, scaler=None):
    """Of one step, unscaled."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = seeded(flow.loss, x)
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    return [p.grad.clone() for p in flow.parameters()]


@every_model
def test_scaled_gradients_are_the_unscaled_ones(name, backend):
    """The layers' gradients follow the scale of the loss, their inverse term too."""
    flow, x = models_table.build(name, torch.float32), images(3, torch.float32)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
    want = gradients(flow, optimizer, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    # In half precision small gradients are rounded without a scale; elsewhere 16 changes no bit.
    exactly = name.endswith(("self_norm", "relative", "smooth", "5x5", "5x5-inverse"))
    exactly = exactly and not (backend == "reference" and name.startswith("glow"))
    limit = 0 if exactly else 8 * torch.finfo(torch.float16).eps
    got = gradients(flow, optimizer, x, scaler)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=limit * b.abs().max().item())
    before = [p.detach().clone() for p in flow.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for p, old, grad in zip(flow.parameters(), before, got, strict=True):
        torch.testing.assert_close(p.detach(), old - 1e-3 * grad)


@every_model
def test_overflow_skips_the_step(name):
    flow, x = models_table.build(name, torch.float32), images(3, torch.float32)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    before = [p.detach().clone() for p in flow.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = flow.loss(x)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == pytest.approx(1.5e38)
    assert all(torch.equal(p, old) for p, old in zip(flow.parameters(), before, strict=True))


@pytest.mark.parametrize("inverse", ["penalty", "inverse-only", "symmetric", "tracked"])
@pytest.mark.parametrize("debias", [0, 1])
def test_ways_to_keep_an_inverse(inverse, debias):
    """None of them rounds under autocast: steps are the same to the bit."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        flow = snf_ext.Flow(
            [
                snf_ext.SelfNormConv2d(2, 3, inverse=inverse, debias=debias),
                snf_ext.Flatten((2, 3, 3)),
                snf_ext.SelfNormLinear(18, inverse=inverse, debias=debias),
            ],
            (2, 3, 3),
        )
        x = torch.randn(5, 2, 3, 3)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = flow.loss(x)
            loss.backward()
        found.append([loss, *(p.grad for p in flow.parameters()), *flow.state_dict().values()])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
