"""The adapter for zuko's transforms: its families as bijections."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from zuko_cases import C, D, build, every_family, inputs

from snf_ext.adapters import ZukoBijection
from snf_ext.adapters.families import FAMILIES
from snf_ext.training.errors import Diverged

zuko = pytest.importorskip("zuko", reason="zuko is not installed")

contexts = pytest.mark.parametrize("context_features", [0, C])
AUTOREGRESSIVE = sorted(set(FAMILIES) - {"iaf", "nice", "realnvp", "gf", "cnf"})


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
