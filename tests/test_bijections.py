"""The contract of a bijection, for every row of the table."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from bijections_table import BIJECTIONS

import snf_ext

QUIET = [case for case in BIJECTIONS if not case.noisy]
every = pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name)
every_quiet = pytest.mark.parametrize("case", QUIET, ids=lambda case: case.name)


def test_table_covers_every_bijection():
    names = {c.make().__class__.__name__ for c in BIJECTIONS}
    public = {
        name
        for name in snf_ext.__all__
        if isinstance(getattr(snf_ext, name), type)
        and issubclass(getattr(snf_ext, name), snf_ext.Bijection)
    }
    assert public - {"Bijection"} == names


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@every_quiet
def test_exact_inverse(case, dtype, limit, device):
    bijection = case.build(dtype, device).eval()
    x = case.data(7, dtype, device)
    context = case.context(x)
    back = bijection.inverse(bijection(x, context).z, context, exact=True)
    assert (back - x).abs().max() < limit * (1 + x.abs().max())


@every_quiet
def test_log_det_is_that_of_autograds_jacobian(case, device):
    bijection = case.build(device=device).eval()
    x = case.data(3, device=device)
    context = case.context(x)
    z, log_det, _ = bijection(x, context)
    for i in range(len(x)):
        given = None if context is None else context[i : i + 1]
        forward = log_abs_det(lambda row, given=given: bijection(row, given).z, x[i])
        assert abs(log_det[i] - forward) < 1e-8
        back = log_abs_det(lambda row, given=given: bijection.inverse(row, given, exact=True), z[i])
        assert abs(log_det[i] + back) < 1e-7


def log_abs_det(function, row):
    """That of autograd's Jacobian of ``function`` at one event."""
    jacobian = torch.autograd.functional.jacobian(lambda r: function(r[None]).flatten(), row)
    square = jacobian.reshape(jacobian.shape[0], -1)
    return torch.linalg.slogdet(square).logabsdet


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@every_quiet
def test_inverse_of_200_cases(case, dtype, limit, device):
    """Relative to the largest element of each, ±1e4 among them."""
    bijection = case.build(dtype, device).eval()
    x = hard_cases(case, dtype, device)
    assert len(x) == 200
    context = case.context(x)
    z, log_det, _ = bijection(x, context)
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()
    back = bijection.inverse(z, context, exact=True)
    worst = (back - x).flatten(1).abs().amax(1) / x.flatten(1).abs().amax(1).clamp(min=1)
    assert worst.max() <= limit


def hard_cases(case, dtype, device):
    """Near, far and extreme values, and constant events."""
    x = case.data(200, torch.float64, seed=13)
    generator = torch.Generator().manual_seed(17)
    pick = torch.randint(0, 8, x[80:160].shape, generator=generator)
    if case.unit_interval:
        x[80:160] = torch.tensor([0, 1, 1e-7, 1 - 1e-7, 0.5, 1e-3, 0.25, 0.999])[pick].double()
        x[160:] = torch.linspace(0, 1, 40, dtype=torch.float64).view(-1, *(1,) * (x.dim() - 1))
    else:
        x[40:80] *= 5
        x[80:160] = torch.tensor([1e4, -1e4, 10.0, -10.0, 1.5, -1.5, 0.0, 1.0])[pick].double()
        x[160:] = torch.linspace(-1e4, 1e4, 40, dtype=torch.float64).view(-1, *(1,) * (x.dim() - 1))
    return x.to(device, dtype)


@every_quiet
def test_exact_forward_in_training_mode(case):
    """The likelihood is exact in training mode too; only ``forward`` may be a surrogate."""
    bijection, x = case.build(), case.data()
    context = case.context(x)
    want = bijection.eval()(x, context)
    got = bijection.train().exact_forward(x, context)
    torch.testing.assert_close(tuple(got), tuple(want))
    training = bijection(x, context)
    if case.learned or case.surrogate:
        assert not training.log_det.any()
    elif not case.batch_dependent:
        torch.testing.assert_close(training.log_det, want.log_det)


@every
def test_shapes(case):
    bijection, x = case.build(torch.float32), case.data(4, torch.float32)
    context = case.context(x)
    z, log_det, recon = bijection(x, context)
    assert log_det.shape == recon.shape == (4,)
    assert log_det.dtype == recon.dtype == torch.float32
    assert z.shape == (4, *bijection.output_shape(case.event_shape))
    assert bijection.inverse(z, context).shape == x.shape
    assert not recon.any() or case.learned


@every
def test_empty_batch(case):
    bijection, x = case.build().eval(), case.data(0)
    context = case.context(x)
    z, log_det, recon = bijection(x, context)
    assert z.shape == (0, *bijection.output_shape(case.event_shape))
    assert log_det.shape == recon.shape == (0,)
    for exact in (False, True):
        assert bijection.inverse(z, context, exact=exact).shape == x.shape


@every_quiet
def test_non_contiguous(case):
    bijection, x = case.build().eval(), case.data()
    strided = torch.stack([x, x], -1)[..., 0]
    context = case.context(x)
    for a, b in zip(bijection(x, context), bijection(strided, context), strict=True):
        torch.testing.assert_close(a, b)
    z = bijection(x, context).z
    strided = torch.stack([z, z], -1)[..., 0]
    torch.testing.assert_close(bijection.inverse(strided, context), bijection.inverse(z, context))


@every_quiet
def test_every_parameter_gets_a_gradient(case):
    bijection, x = case.build(), case.data()
    z, log_det, recon = bijection(x, case.context(x))
    loss = z.square().sum() - log_det.sum() + recon.sum()
    if not loss.requires_grad:
        assert not list(bijection.parameters())
        return
    loss.backward()
    for name, p in bijection.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


@every_quiet
def test_gradients_of_the_log_density_are_numerical(case):
    """In x; what a learned inverse does to the weights has tests of its own."""
    bijection = case.build().eval()
    x = case.data(2).requires_grad_()

    def density(x_):
        z, log_det, _ = bijection(x_, case.context(x_))
        return z.flatten(1).square().sum(1) + log_det

    assert torch.autograd.gradcheck(density, (x,))


@every_quiet
def test_gradient_through_the_inverse(case):
    bijection = case.build().eval()
    x = case.data(2)
    context = case.context(x)
    z = bijection(x, context).z.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z_: bijection.inverse(z_, context), (z,))


@every_quiet
def test_state_dict_and_deepcopy_and_pickle(case):
    bijection, x = case.build(), case.data()
    bijection.eval()
    context = case.context(x)
    want = bijection(x, context)
    other = case.make().double().eval()
    other.load_state_dict(bijection.state_dict())
    buffer = io.BytesIO()
    torch.save(bijection, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    for twin in (other, copy.deepcopy(bijection), pickled):
        for a, b in zip(twin(x, context), want, strict=True):
            assert torch.equal(a, b)


@every_quiet
def test_compiles(case):
    torch.compiler.reset()
    bijection, x = case.build(), case.data()

    context = case.context(x)

    def loss(x_):
        z, log_det, recon = bijection(x_, context)
        return z.square().sum() - log_det.sum() + recon.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))


@every
def test_half_precision_runs(case):
    bijection, x = case.build(torch.bfloat16).eval(), case.data(3, torch.bfloat16)
    if type(bijection).__name__.startswith("Exact"):
        pytest.skip("torch has no bfloat16 determinant")
    z, log_det, recon = bijection(x, case.context(x))
    assert z.dtype == torch.bfloat16
    assert log_det.dtype == recon.dtype == torch.float32
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()


@every
def test_repr_names_the_class(case):
    assert repr(case.make()).startswith(type(case.make()).__name__ + "(")
