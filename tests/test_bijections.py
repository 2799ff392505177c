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
    back = bijection.inverse(bijection(x).z, exact=True)
    assert (back - x).abs().max() < limit * (1 + x.abs().max())


@every_quiet
def test_log_det_is_that_of_autograds_jacobian(case, device):
    bijection = case.build(device=device).eval()
    x = case.data(3, device=device)
    log_det = bijection(x).log_det
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: bijection(row[None]).z.flatten(), x[i]
        )
        square = jacobian.reshape(jacobian.shape[0], -1)
        assert abs(log_det[i] - torch.linalg.slogdet(square).logabsdet) < 1e-8


@every_quiet
def test_exact_forward_in_training_mode(case):
    """The likelihood is exact in training mode too; only ``forward`` may be a surrogate."""
    bijection, x = case.build(), case.data()
    want = bijection.eval()(x)
    got = bijection.train().exact_forward(x)
    torch.testing.assert_close(tuple(got), tuple(want))
    training = bijection(x)
    if case.learned or case.surrogate:
        assert not training.log_det.any()
    else:
        torch.testing.assert_close(training.log_det, want.log_det)


@every
def test_shapes(case):
    bijection, x = case.build(torch.float32), case.data(4, torch.float32)
    z, log_det, recon = bijection(x)
    assert log_det.shape == recon.shape == (4,)
    assert log_det.dtype == recon.dtype == torch.float32
    assert z.shape == (4, *bijection.output_shape(case.event_shape))
    assert bijection.inverse(z).shape == x.shape
    assert not recon.any() or case.learned


@every
def test_empty_batch(case):
    bijection, x = case.build().eval(), case.data(0)
    z, log_det, recon = bijection(x)
    assert z.shape == (0, *bijection.output_shape(case.event_shape))
    assert log_det.shape == recon.shape == (0,)
    for exact in (False, True):
        assert bijection.inverse(z, exact=exact).shape == x.shape


@every_quiet
def test_non_contiguous(case):
    bijection, x = case.build().eval(), case.data()
    strided = torch.stack([x, x], -1)[..., 0]
    for a, b in zip(bijection(x), bijection(strided), strict=True):
        torch.testing.assert_close(a, b)
    z = bijection(x).z
    strided = torch.stack([z, z], -1)[..., 0]
    torch.testing.assert_close(bijection.inverse(strided), bijection.inverse(z))


@every_quiet
def test_every_parameter_gets_a_gradient(case):
    bijection, x = case.build(), case.data()
    z, log_det, recon = bijection(x)
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
        z, log_det, _ = bijection(x_)
        return z.flatten(1).square().sum(1) + log_det

    assert torch.autograd.gradcheck(density, (x,))


@every_quiet
def test_gradient_through_the_inverse(case):
    bijection = case.build().eval()
    z = bijection(case.data(2)).z.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z_: bijection.inverse(z_), (z,))


@every_quiet
def test_state_dict_and_deepcopy_and_pickle(case):
    bijection, x = case.build(), case.data()
    bijection.eval()
    want = bijection(x)
    other = case.make().double().eval()
    other.load_state_dict(bijection.state_dict())
    buffer = io.BytesIO()
    torch.save(bijection, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    for twin in (other, copy.deepcopy(bijection), pickled):
        for a, b in zip(twin(x), want, strict=True):
            assert torch.equal(a, b)


@every_quiet
def test_compiles(case):
    torch.compiler.reset()
    bijection, x = case.build(), case.data()

    def loss(x_):
        z, log_det, recon = bijection(x_)
        return z.square().sum() - log_det.sum() + recon.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))


@every
def test_half_precision_runs(case):
    bijection, x = case.build(torch.bfloat16).eval(), case.data(3, torch.bfloat16)
    if type(bijection).__name__.startswith("Exact"):
        pytest.skip("torch has no bfloat16 determinant")
    z, log_det, recon = bijection(x)
    assert z.dtype == torch.bfloat16
    assert log_det.dtype == recon.dtype == torch.float32
    assert torch.isfinite(z).all()
    assert torch.isfinite(log_det).all()


@every
def test_repr_names_the_class(case):
    assert repr(case.make()).startswith(type(case.make()).__name__ + "(")
