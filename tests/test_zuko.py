"""The adapter for zuko, in both directions, and its families as models of the commands."""

import copy
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import snf_ext
from snf_ext import cli
from snf_ext.adapters import ZukoBijection, as_lazy_transform, pop_recon
from snf_ext.adapters.families import FAMILIES
from snf_ext.models_zuko import autoregressive
from snf_ext.training import data
from snf_ext.training.errors import Diverged

zuko = pytest.importorskip("zuko", reason="zuko is not installed")

D, C = 5, 3
every_family = pytest.mark.parametrize("family", FAMILIES)
contexts = pytest.mark.parametrize("context_features", [0, C])
AUTOREGRESSIVE = sorted(set(FAMILIES) - {"iaf", "nice", "realnvp", "gf", "cnf"})


def build(family, context_features=0, dtype=torch.float64, **sizes):
    sizes = {"features": D, "layers": 2, "width": 16} | sizes
    features = sizes["features"]
    lazy = FAMILIES[family].build(features, context_features, sizes["layers"], sizes["width"])
    bijection = ZukoBijection(lazy, features, context_features).to(dtype)
    with torch.no_grad():  # off the start, where some rows are the identity
        for p in bijection.parameters():
            p += 0.1 * torch.randn_like(p)
    return bijection.eval()


def inputs(context_features=0, batch=6, dtype=torch.float64):
    x = torch.randn(batch, D, dtype=dtype)
    return x, torch.randn(batch, C, dtype=dtype) if context_features else None


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", None)


# As bijections


@contexts
@every_family
def test_inverse(family, context_features):
    bijection, (x, context) = build(family, context_features), inputs(context_features)
    limit = FAMILIES[family].inverse_error
    with torch.no_grad():
        z = bijection(x, context).z
        assert (z - x).abs().max() > 0.01
        for exact in (False, True):
            assert (bijection.inverse(z, context, exact=exact) - x).abs().max() < limit


@every_family
def test_inverse_in_float32(family):
    """Over the range of the scaled logits. Distribution functions of gf saturate in its tails."""
    bijection = build(family, dtype=torch.float32)
    x = torch.linspace(-3.5, 3.5, 20 * D).reshape(D, 20).T.contiguous()
    with torch.no_grad():
        back = bijection.inverse(bijection(x).z)
    assert (back - x).abs().max() < (1e-3 if family in ("gf", "cnf") else 2e-5)


@contexts
@every_family
def test_log_det_is_that_of_autograds_jacobian(family, context_features):
    bijection, (x, context) = build(family, context_features), inputs(context_features, 2)
    log_det = bijection(x, context).log_det
    assert log_det.shape == (2,)
    for i in range(len(x)):
        c = None if context is None else context[i, None]
        jacobian = torch.autograd.functional.jacobian(
            lambda row, c=c: bijection(row[None], c).z.flatten(), x[i]
        )
        error = abs(log_det[i] - torch.linalg.slogdet(jacobian).logabsdet)
        assert error < (1e-3 if family == "cnf" else 1e-8)


@pytest.mark.parametrize("family", AUTOREGRESSIVE)
def test_the_jacobian_is_triangular(family):
    bijection, (x, _) = build(family, layers=1), inputs(batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda row: bijection(row).z[0], x)[:, 0]
    assert not jacobian.triu(1).any()
    assert jacobian.tril(-1).any()
    assert (jacobian.diagonal() > 0).all()


@contexts
@pytest.mark.parametrize("family", [*AUTOREGRESSIVE, "NAF"])
def test_one_group_a_pass_inverts_as_zuko_does(family, context_features):
    """The NAF of zuko itself has stacked networks, which are left to its own inverse."""
    if family == "NAF":
        bijection = ZukoBijection(zuko.flows.NAF(D, context_features), D, context_features)
        bijection.double()
    else:
        bijection = build(family, context_features)
    z, context = inputs(context_features)
    with torch.no_grad():
        want = bijection.lazy(context).inv(z)
        torch.testing.assert_close(bijection.inverse(z, context), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["maf", "nsf", "dsf", "realnvp"])
def test_gradient_through_the_inverse(family):
    """dx/dz is the inverse of dz/dx."""
    bijection, (x, _) = build(family), inputs(batch=1)
    z = bijection(x).z.detach()
    forward = torch.autograd.functional.jacobian(lambda row: bijection(row).z[0], x)[:, 0]
    back = torch.autograd.functional.jacobian(lambda row: bijection.inverse(row)[0], z)[:, 0]
    torch.testing.assert_close(back @ forward, torch.eye(D).double(), rtol=0, atol=1e-5)


def test_sigmoidal_is_its_equation():
    from snf_ext.adapters.families import sigmoidal

    weight, scale, shift = torch.randn(3, 7, 4, dtype=torch.float64)
    x = torch.randn(7, dtype=torch.float64)
    a = torch.log1p((scale + torch.tensor(torch.e - 1).double().log()).exp())
    mixed = (weight.softmax(-1) * torch.sigmoid(a * x[:, None] + shift)).sum(-1)
    got = sigmoidal(weight, scale, shift)(x)
    torch.testing.assert_close(got, torch.logit(mixed), rtol=0, atol=1e-6)
    far = torch.tensor([-1e4, 1e4] * 3 + [0.0], dtype=torch.float64)
    z, log_det = sigmoidal(weight, scale, shift).call_and_ladj(far)
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()


@every_family
def test_empty_batch_and_strides_and_copies(family):
    bijection, (x, _) = build(family), inputs()
    with torch.no_grad():
        want = bijection(x)
        strided = torch.stack([x, x], -1)[..., 0]
        for a, b in zip(bijection(strided), want, strict=True):
            torch.testing.assert_close(a, b)
        z, log_det, recon = bijection(x[:0])
        assert z.shape == bijection.inverse(z).shape == (0, D)
        assert log_det.shape == recon.shape == (0,)
        buffer = io.BytesIO()
        torch.save(bijection, buffer)
        buffer.seek(0)
        loaded = build(family)
        loaded.load_state_dict(bijection.state_dict())
        for twin in (loaded, copy.deepcopy(bijection), torch.load(buffer, weights_only=False)):
            for a, b in zip(twin(x), want, strict=True):
                assert torch.equal(a, b)


def test_wide_sums():
    bijection, (x, _) = build("maf", dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    z, log_det, recon = bijection(x)
    assert z.dtype == torch.bfloat16
    assert log_det.dtype == recon.dtype == torch.float32


def test_what_cannot_be_used():
    bijection = build("maf", C)
    x, context = inputs(C)
    with pytest.raises(ValueError, match=r"x must have shape \[B, D\] with D = 5; got \[6, 4\]"):
        bijection(x[:, :4], context)
    with pytest.raises(ValueError, match=r"z must have shape \[B, D\] with D = 5; got \[5\]"):
        bijection.inverse(x[0], context)
    with pytest.raises(ValueError, match=r"context must have shape \[B, C\] = \[6, 3\]; got None"):
        bijection(x)
    with pytest.raises(ValueError, match=r"= \[6, 3\]; got \[1, 3\]"):
        bijection(x, context[:1])
    with pytest.raises(TypeError, match=r"lazy must be a zuko.lazy.LazyTransform .* got Linear"):
        ZukoBijection(torch.nn.Linear(2, 2), 2)
    without = build("maf")
    assert torch.equal(without(x, context).z, without(x).z)
    assert repr(without).startswith("ZukoBijection(")


def test_nan_does_not_hang_the_solver():
    bijection = build("cnf")
    with pytest.raises(Diverged, match="velocity"):
        bijection(torch.full((2, D), torch.nan, dtype=torch.float64))


# As models


def test_settings_of_another_type_are_one_line():
    """The command line refuses them by itself; a checkpoint's settings may be anything."""
    settings = {"event_shape": [1, 2, 2], "width": 1.5}
    with pytest.raises(cli.UserError, match="the settings of model autoregressive must fit it"):
        cli.build_flow({"name": "autoregressive", "settings": settings})


@every_family
def test_a_training_step_and_samples(family, digits):
    """On digits, at the default width, built as the commands build it."""
    settings = {"event_shape": [1, 8, 8], "pixel_levels": 17, "family": family, "layers": 2}
    flow = cli.build_flow({"name": "autoregressive", "settings": settings})
    images = digits.train[:20]
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    losses = []
    for step in range(3):
        torch.manual_seed(1)  # the same noise: the same objective
        loss = flow.loss(images)
        optimizer.zero_grad()
        loss.backward()
        for name, p in flow.named_parameters():
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
            assert step or p.grad.any(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 400
    assert losses[2] < losses[0]
    flow.eval()
    samples = flow.sample(3)
    assert samples.shape == (3, 1, 8, 8)
    assert ((samples >= 0) & (samples <= 16) & (samples == samples.floor())).all()
    with torch.no_grad():
        assert flow.log_prob(images).shape == (20,)


@every_family
def test_conditional_model(family):
    flow = autoregressive(
        (1, 2, 2), family, layers=2, width=16, context_features=C, pixel_levels=17
    )
    images, context = torch.randint(17, (8, 1, 2, 2)), torch.randn(8, C)
    context.requires_grad_()
    flow.loss(images, context).backward()
    assert context.grad.any()
    for name, p in flow.named_parameters():
        assert p.grad is not None, name
    flow.eval()
    assert flow.sample(8, context).shape == images.shape


def test_extreme_images_have_finite_losses():
    images = torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 255.0)])
    for family in FAMILIES:
        flow = autoregressive((1, 8, 8), family)
        assert torch.isfinite(flow.loss(images)), family


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "mafia"}, "family must be one of made, .*; got 'mafia'"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"context_features": -1}, "context_features must be at least 0; got -1"),
        ({"event_shape": (1, 1, 1)}, r"event_shape must hold at least 2 .* got \[1, 1, 1\]"),
    ],
)
def test_models_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        autoregressive(**arguments)


# Through the commands


@pytest.mark.parametrize("family", ["made", "realnvp", "nsf_coupling"])
def test_commands(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = "train --model autoregressive --limit-train 100 --epochs 1 --no-progress --run-dir run"
    arguments = ["--model-args", f"family={family}", "layers=2", "width=16"]
    assert cli.main([*train.split(), *arguments]) == 0
    trained = capsys.readouterr().out
    assert cli.main(["evaluate", "--checkpoint", "run/best.pt"]) == 0
    evaluated = capsys.readouterr().out
    line = re.search(r"^test NLL: .*$", trained, re.MULTILINE)[0]
    assert line in evaluated
    assert "angle" not in evaluated
    command = ["sample", "--checkpoint", "run/best.pt", "--count", "4", "--out", "out.png"]
    assert cli.main(command) == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_without_zuko_one_line_says_so(tmp_path, monkeypatch, capsys):
    for name in [m for m in sys.modules if m.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zuko", None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--model", "autoregressive", "--run-dir", "run"]) == 2
    assert capsys.readouterr().err == (
        'snf-ext: zuko is needed here and not installed: pip install "snf_ext[zuko]"\n'
    )
    assert not Path("run").exists()


def test_importing_does_not_import_zuko():
    """Its import changes torch.distributions for everybody in the process."""
    code = (
        "import sys, snf_ext.cli, snf_ext.adapters\nassert not {'zuko', 'pyro'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Our bijections inside zuko's flows


def mixed(exact=False):
    """Self-normalizing, autoregressive, self-normalizing: as zuko's flow, and its parts."""
    torch.manual_seed(2)
    first, last = snf_ext.SelfNormLinear(D), snf_ext.SelfNormLinear(D)
    with torch.no_grad():
        for layer in (first, last):
            for p in layer.parameters():
                p += 0.1 * torch.randn_like(p)
    maf = zuko.flows.MAF(D, transforms=1)
    parts = [
        as_lazy_transform(first, (D,), exact),
        maf.transform,
        as_lazy_transform(last, (D,), exact),
    ]
    flow = zuko.lazy.Flow(parts, maf.base).double()
    ours = snf_ext.Flow([first, ZukoBijection(maf, D), last], (D,), recon_weight=10.0)
    return flow, ours, (first, maf, last)


def test_log_prob_in_a_zuko_flow_is_the_dense_one():
    flow, _, (first, maf, last) = mixed()
    x = torch.randn(7, D, dtype=torch.float64)
    y = x @ first.weight.T + first.bias
    h, between = maf.transform().call_and_ladj(y)
    z = h @ last.weight.T + last.bias
    dense = sum(torch.linalg.slogdet(layer.weight).logabsdet for layer in (first, last))
    want = snf_ext.ops.normal_log_prob(z) + between + dense
    torch.testing.assert_close(flow.eval()().log_prob(x), want)
    # In training mode the value leaves the determinants out, and is exact where that is asked for.
    torch.testing.assert_close(flow.train()().log_prob(x), want - dense)
    torch.testing.assert_close(mixed(exact=True)[0].train()().log_prob(x), want)


def test_training_gradients_in_a_zuko_flow_are_those_of_ours():
    flow, ours, _ = mixed()
    x = torch.randn(7, D, dtype=torch.float64)
    parameters = list(ours.parameters())
    want = torch.autograd.grad(ours.loss(x), parameters)
    loss = -flow().log_prob(x).mean() + 10.0 * pop_recon(flow).mean()
    for a, b in zip(torch.autograd.grad(loss, parameters), want, strict=True):
        torch.testing.assert_close(a, b)
        assert b.any()
    with pytest.raises(ValueError, match=r"flow must hold a layer .* got no reconstruction error"):
        pop_recon(flow)


@pytest.mark.parametrize("exact", [False, True])
def test_samples_of_a_zuko_flow(exact):
    flow, ours, _ = mixed(exact)
    flow.eval()
    noise = torch.randn(4, D, dtype=torch.float64)
    with torch.no_grad():
        got = flow().transform.inv(noise)
        torch.testing.assert_close(got, ours.inverse(noise, exact=exact))
        assert flow().sample((4, 2)).shape == (4, 2, D)
        if exact:
            x, log_prob = flow().rsample_and_log_prob((4,))
            torch.testing.assert_close(flow().log_prob(x), log_prob)


def test_any_leading_shape():
    flow, _, _ = mixed()
    flow.eval()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    want = flow().log_prob(x.reshape(6, D)).reshape(2, 3)
    torch.testing.assert_close(flow().log_prob(x), want)
    torch.testing.assert_close(flow().log_prob(x[1, 2]), want[1, 2])
    with pytest.raises(ValueError, match=r"x must have shape \[..., 5\]; got \[2, 3, 4\]"):
        flow().log_prob(x[..., :4])


def test_images_in_a_zuko_flow():
    """A convolution, then a bijection that changes the shape, then zuko's own."""
    conv = snf_ext.SelfNormConv2d(2, 3)
    base = zuko.flows.MAF(12, transforms=1)
    shape = (2, 2, 3)
    parts = [as_lazy_transform(conv, shape), as_lazy_transform(snf_ext.Flatten(shape), shape)]
    flow = zuko.lazy.Flow([*parts, base.transform], base.base).eval()
    ours = snf_ext.Flow([conv, snf_ext.Flatten(shape), ZukoBijection(base, 12)], shape).eval()
    x = torch.randn(4, *shape)
    torch.testing.assert_close(flow().log_prob(x), ours.log_prob(x))
    assert flow().event_shape == shape
    assert flow().sample((3,)).shape == (3, *shape)


def test_context_reaches_a_bijection():
    """One context for each sample, and one for several."""
    inner = build("realnvp", C)
    flow = zuko.lazy.Flow(as_lazy_transform(inner, (D,)), zuko.flows.MAF(D).base.double())
    x, context = inputs(C)
    step = inner(x, context)
    want = snf_ext.ops.normal_log_prob(step.z) + step.log_det
    torch.testing.assert_close(flow(context).log_prob(x), want)
    same = inner(x, context[:1].expand(6, C))
    want = snf_ext.ops.normal_log_prob(same.z) + same.log_det
    torch.testing.assert_close(flow(context[0]).log_prob(x), want)
    assert flow(context).sample((2,)).shape == (2, 6, D)


def test_transforms_in_zukos_distributions():
    """Without a lazy transform, and with gradients of samples in the weight."""
    layer = snf_ext.SelfNormLinear(D, inverse="tracked").double()
    transform = snf_ext.BijectionTransform(layer, (D,))
    base = zuko.distributions.DiagNormal(torch.zeros(D).double(), torch.ones(D).double())
    flow = zuko.distributions.NormalizingFlow(transform, base)
    ours = snf_ext.Flow([layer], (D,))
    x, log_prob = flow.rsample_and_log_prob((6,))
    torch.testing.assert_close(log_prob, ours.log_prob(x))
    (x.sum() + log_prob.sum()).backward()
    assert layer.weight.grad.abs().min() > 0
    q = ours.as_distribution()
    mixture = zuko.distributions.Mixture(q.expand((2,)), torch.zeros(2).double())
    torch.testing.assert_close(mixture.log_prob(x), q.log_prob(x))


def test_samples_of_lazy_transforms_send_gradients_to_weights():
    flow, _, (first, maf, last) = mixed(exact=True)
    x = flow.eval()().rsample((6,))
    x.square().sum().backward()
    for module in (first, maf, last):
        assert all(p.grad.any() for n, p in module.named_parameters() if n != "weight_inv")


def test_the_inverse_as_a_lazy_transform():
    layer = snf_ext.SelfNormLinear(D).double().eval()
    lazy = as_lazy_transform(layer, (D,), exact=True)
    x, _ = inputs()
    z, log_det = lazy().call_and_ladj(x)
    back, inverse_log_det = lazy.inv().call_and_ladj(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_copies_and_files_between_evaluation_and_backward():
    flow, _, _ = mixed()
    x = torch.randn(7, D, dtype=torch.float64)
    flow().log_prob(x)
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(flow), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(twin().log_prob(x), flow().log_prob(x))
    assert pop_recon(flow).shape == (7,)
