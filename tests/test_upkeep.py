"""How a learned inverse is kept: what each way gives as gradients, and what it leaves alone."""

from __future__ import annotations

import copy

import ground_truth
import numpy as np
import pytest
import torch

import snf_ext
from snf_ext import ExactConv2d, ExactLinear, Penalty, SelfNormConv2d, SelfNormLinear, Tracked
from snf_ext.layers.upkeep import UPKEEP
from snf_ext.tracking import least_squares_kernel
from snf_ext.training.angle import gradient_angle

LAYERS = {
    "linear": (lambda **how: SelfNormLinear(7, **how), (7,)),
    "linear-no-bias": (lambda **how: SelfNormLinear(5, bias=False, **how), (5,)),
    "conv": (lambda **how: SelfNormConv2d(2, 3, **how), (2, 4, 5)),
    "conv-5x5": (lambda **how: SelfNormConv2d(2, 3, inverse_kernel_size=5, **how), (2, 5, 4)),
    "conv-groups": (lambda **how: SelfNormConv2d(4, 3, groups=2, **how), (4, 4, 3)),
    "conv-dilation": (lambda **how: SelfNormConv2d(2, 3, dilation=2, **how), (2, 6, 5)),
    "conv-circular": (
        lambda **how: SelfNormConv2d(2, 3, padding_mode="circular", bias=False, **how),
        (2, 4, 4),
    ),
}


def make(name, batch=3, noise=0.15, **how):
    """A layer in float64 that is away from its start, a batch, and gradients for its outputs."""
    torch.manual_seed(0)
    build, event = LAYERS[name]
    layer = build(**how).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += noise * torch.randn_like(parameter)
    x = torch.randn(batch, *event, dtype=torch.float64)
    return layer, x, (torch.randn_like(x), *torch.randn(2, batch, dtype=torch.float64))


def backward(layer, x, grads):
    """Gradients of x and of the parameters, by name, None where there is none; and the step."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    step = layer(leaf)
    pairs = [(out, grad) for out, grad in zip(step, grads, strict=True) if out.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"x": leaf.grad, **found}, step


def dense(layer, x):
    """W and R as matrices, how a matrix's gradient becomes W's or R's, and x in rows."""
    rows = x.flatten(1).numpy()
    w, r = layer.weight.detach().numpy(), layer.weight_inv.detach().numpy()
    if isinstance(layer, SelfNormLinear):
        return w, r, lambda m, _: m, rows
    geometry = (tuple(x.shape[2:]), *layer.shape.geometry)
    return (
        ground_truth.conv_matrix(w, *geometry),
        ground_truth.conv_matrix(r, *geometry),
        lambda m, shape: ground_truth.onto_kernel(m, tuple(shape), *geometry),
        rows,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_tracked_inverse_gives_the_whole_gradient(name, backend):
    layer, x, grads = make(name, inverse="tracked")
    got, step = backward(layer, x, grads)
    w, r, onto, rows = dense(layer, x)  # R is what the step fitted
    dz = grads[0].flatten(1).numpy()
    want = onto(dz.T @ rows + grads[1].sum().item() * r.T, layer.weight.shape)
    np.testing.assert_allclose(got["weight"].numpy(), want, atol=1e-10)
    np.testing.assert_allclose(got["x"].flatten(1).numpy(), dz @ w, atol=1e-10)
    if layer.bias is not None:
        c = grads[0].sum((0, 2, 3)) if x.dim() == 4 else grads[0].sum(0)
        torch.testing.assert_close(got["bias"], c)
    assert got["weight_inv"] is None
    assert not step.recon.requires_grad
    assert step.recon.tolist() == step.log_det.tolist() == [0.0] * len(x)


@pytest.mark.parametrize("name", LAYERS)
def test_what_tracking_fits(name):
    layer, x, grads = make(name, inverse=Tracked(every=3, samples=0))
    for step in range(7):
        before = layer.weight_inv.detach().clone()
        with torch.no_grad():
            layer.weight += 0.01 * torch.randn_like(layer.weight)
        backward(layer, x, grads)
        assert torch.equal(layer.weight_inv, before) == (step % 3 > 0)
    if isinstance(layer, SelfNormConv2d):
        size = tuple(layer.weight_inv.shape[2:])
        fitted = least_squares_kernel(layer.weight, size, x.shape[2:], *layer.shape.geometry)
    else:
        fitted = torch.from_numpy(np.linalg.inv(layer.weight.detach().numpy()))
    torch.testing.assert_close(layer.weight_inv.detach(), fitted)


@pytest.mark.parametrize("samples", [1, 2, 32])
def test_samples_between_fits(samples):
    """R is right on the first samples, and changes as little as that takes."""
    layer, x, _ = make("linear", inverse=Tracked(every=1000, samples=samples))
    layer(x)
    with torch.no_grad():
        layer.weight += 0.1 * torch.randn_like(layer.weight)
    before = layer.weight_inv.detach().numpy().copy()
    layer(x)
    used = x[:samples].numpy().T
    y = layer.weight.detach().numpy() @ used
    want = before + (used - before @ y) @ np.linalg.pinv(y)
    np.testing.assert_allclose(layer.weight_inv.detach(), want, atol=1e-10)
    layer(torch.randn(2, 3, 7, dtype=torch.float64))  # of leading dimensions, the first rows
    layer(torch.empty(0, 7, dtype=torch.float64))
    assert layer.weight_inv.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_samples_that_are_not_finite_change_nothing(bad):
    layer, x, _ = make("linear", inverse=Tracked(every=1000))
    layer(x)
    before = layer.weight_inv.detach().clone()
    x[1, 2] = bad
    layer(x)
    assert torch.equal(layer.weight_inv, before)


def test_a_singular_value_near_zero_pushes_back():
    """Between fits samples hold W where the exact gradient does; without them it goes past 0."""
    layers = {
        "exact": lambda: ExactLinear(40),
        "samples": lambda: SelfNormLinear(40, inverse=Tracked(every=60)),
        "fits alone": lambda: SelfNormLinear(40, inverse=Tracked(every=60, samples=0)),
    }
    nats, least = {}, {}
    for name, build in layers.items():
        torch.manual_seed(0)
        layer = build()
        flow = snf_ext.Flow([layer], (40,))
        optimizer = torch.optim.Adam(flow.parameters(), lr=5e-4)
        least[name] = 1.0
        for _ in range(700):
            # One direction 60 times as wide as the others: its singular value becomes 1/60.
            x = torch.randn(100, 40) + 60 * torch.randn(100, 1) / 40**0.5
            optimizer.zero_grad()
            flow.loss(x).backward()
            optimizer.step()
            least[name] = min(least[name], torch.linalg.det(layer.weight.detach()).item())
        nats[name] = flow.log_prob(x).mean().item()
    assert least["fits alone"] < 0 < least["samples"]
    assert abs(nats["samples"] - nats["exact"]) < 0.02


def test_when_a_fit_is_due_is_saved():
    layer, x, _ = make("linear", inverse=Tracked(every=4))
    for _ in range(3):
        layer(x)
    again, *_ = make("linear", inverse=Tracked(every=4))
    again.load_state_dict(layer.state_dict())
    for one in (layer, again):
        torch.manual_seed(1)
        for _ in range(3):
            with torch.no_grad():
                one.weight += 0.1 * torch.randn_like(one.weight)
            one(x)
    assert torch.equal(layer.weight_inv, again.weight_inv)
    plain, *_ = make("linear")
    plain.load_state_dict(layer.state_dict())
    assert "due" not in plain.state_dict()
    layer.load_state_dict(plain.state_dict())


@pytest.mark.cuda
@pytest.mark.parametrize("inverse", UPKEEP)
@pytest.mark.parametrize("name", LAYERS)
def test_a_gpu_does_the_same(name, inverse):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    layer, x, grads = make(name, inverse=inverse)
    other = copy.deepcopy(layer).to("cuda")
    for _ in range(3):  # a fit, and steps between
        want, _ = backward(layer, x, grads)
        got, _ = backward(other, x.to("cuda"), [grad.to("cuda") for grad in grads])
        for key, value in want.items():
            assert (value is None) == (got[key] is None)
            if value is not None:
                torch.testing.assert_close(got[key].cpu(), value)
        torch.testing.assert_close(other.weight_inv.cpu(), layer.weight_inv)


def test_tracking_leaves_alone_what_is_not_trained():
    layer, x, _ = make("linear", inverse="tracked")
    before, state = layer.weight_inv.detach().clone(), torch.get_rng_state()
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.train().weight.requires_grad_(False)
    layer(x)
    assert torch.equal(layer.weight_inv, before)
    assert torch.equal(torch.get_rng_state(), state)
    layer.eval()
    error = x @ layer.weight.T @ layer.weight_inv.T - x
    torch.testing.assert_close(layer(x).recon, error.square().sum(1))


def test_optimizers_leave_a_tracked_inverse_to_the_layer():
    layer, x, _ = make("conv", inverse="tracked")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    (layer(x).z.square().sum() - layer(x).log_det.sum()).backward()
    fitted = layer.weight_inv.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight_inv, fitted)
    assert not layer.weight_inv.requires_grad


def test_two_forward_passes_before_backward():
    """Tracking moves R between them, and autograd does not mind."""
    layer, x, _ = make("linear", inverse="tracked")
    (layer(layer(x).z).z.sum() + layer(x).log_det.sum()).backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("ours", "exact", "event"),
    [
        (lambda: SelfNormLinear(6, inverse="tracked"), lambda: ExactLinear(6), (6,)),
        (lambda: SelfNormConv2d(3, 1, inverse="tracked"), lambda: ExactConv2d(3, 1), (3, 4, 4)),
    ],
    ids=["linear", "1x1"],
)
def test_training_by_an_inverse_that_is_exact(ours, exact, event):
    """Where the fit is the inverse, 30 steps of a flow are those of the exact gradient."""
    torch.manual_seed(0)
    flows = []
    for build in (ours, exact):
        layers = [build(), snf_ext.SmoothLeakyReLU(0.3), build()]
        flows.append(snf_ext.Flow(layers, event).double())
    ours, theirs = (flow.state_dict() for flow in flows)
    flows[1].load_state_dict({name: ours[name] for name in theirs})
    start = flows[0].bijections[0].weight.detach().clone()
    data = torch.randn(30, 20, *event, dtype=torch.float64) + 1
    for flow in flows:
        optimizer = torch.optim.SGD(flow.parameters(), lr=1e-2 / data[0, 0, 0].numel())
        for batch in data:
            optimizer.zero_grad()
            flow.loss(batch).backward()
            optimizer.step()
    for index in (0, 2):
        weights = [flow.bijections[index].weight for flow in flows]
        torch.testing.assert_close(*weights, atol=1e-7, rtol=0)
    assert (flows[0].bijections[0].weight - start).norm() > 0.05


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_the_share_of_the_penalty(name, share, backend):
    layer, x, grads = make(name, inverse=Penalty(share))
    got, _ = backward(layer, x, grads)
    w, r, onto, rows = dense(layer, x)
    dz, total = grads[0].flatten(1).numpy(), grads[1].sum().item()
    y = rows @ w.T
    pull = 2 * grads[2].numpy()[:, None] * (y @ r.T - rows)
    dw = (dz / 2 + share * pull @ r).T @ rows + total / 2 * r.T
    dr = (pull - dz @ w / 2).T @ y - total / 2 * w.T
    for key, want in (("weight", dw), ("weight_inv", dr)):
        shape = getattr(layer, key).shape
        np.testing.assert_allclose(got[key].numpy(), onto(want, shape), atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_symmetric_penalty(name):
    layer, x, grads = make(name, inverse="symmetric")
    got, step = backward(layer, x, grads)
    plain, *_ = make(name)
    plain.load_state_dict(layer.state_dict())
    want, other = backward(plain, x, (*grads[:2], grads[2] / 2))
    # The second half by autograd through dense matrices.
    w, r, onto, rows = dense(layer, x)
    w, r = (torch.tensor(m, requires_grad=True) for m in (w, r))
    y = torch.from_numpy(rows) @ w.T
    error = (y @ r.T @ w.T - y.detach()).square().sum(1)
    (error @ grads[2] / 2).backward()
    torch.testing.assert_close(step.recon, (other.recon + error) / 2)
    for key, m in (("weight", w), ("weight_inv", r)):
        more = torch.from_numpy(onto(m.grad.numpy(), getattr(layer, key).shape))
        torch.testing.assert_close(got[key], want[key] + more)
    torch.testing.assert_close(got["x"], want["x"])


@pytest.mark.parametrize("name", LAYERS)
def test_fit_inverse(name):
    layer, x, _ = make(name, noise=0.05)
    w, r, _, _ = dense(layer, x)
    before = np.linalg.norm(r @ w - np.eye(len(w)))
    layer.fit_inverse(*([] if x.dim() == 2 else [x.shape[2:]]))
    w, r, _, _ = dense(layer, x)
    after = np.linalg.norm(r @ w - np.eye(len(w)))
    assert after < (1e-12 if x.dim() == 2 else before / 2)


def test_gradient_angle_of_a_tracked_inverse():
    torch.manual_seed(0)
    layers = [SelfNormLinear(6, inverse="tracked"), SelfNormLinear(6)]
    flow = snf_ext.Flow(layers, (6,))
    layers[1].fit_inverse()
    angles = gradient_angle(flow, torch.randn(50, 6))
    assert max(angles.values()) < 1e-3
    with torch.no_grad():
        layers[1].weight_inv.mul_(1.5)
    assert gradient_angle(flow, torch.randn(50, 6))["bijections.1"] > 1


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_compiled_and_copied(name):
    layer, x, _ = make(name, inverse="tracked")
    again = copy.deepcopy(layer)
    assert not again.weight_inv.requires_grad
    assert again.upkeep == layer.upkeep
    gradients = []
    for step in (layer, torch.compile(again, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        out = step(x)
        (out.z.square().sum() - out.log_det.sum()).backward()
        gradients.append(step.weight.grad)
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(layer.weight_inv, again.weight_inv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_precisions(name, dtype):
    layer, x, _ = make(name, inverse="tracked", noise=0.02)
    layer.to(dtype)
    out = layer(x.to(dtype))
    (out.z.float().square().sum() - out.log_det.sum()).backward()
    assert layer.weight.grad.dtype == dtype
    back = layer.inverse(out.z)
    assert (back - x).abs().max() < 0.5


@pytest.mark.parametrize(
    ("inverse", "text"),
    [
        ("learned", r"inverse must be one of penalty, .*, tracked; got 'learned'"),
        (None, r"inverse must be one of .*; got None"),
        (Tracked(0), r"inverse\.every must be a positive int or None; got 0"),
        (Tracked(samples=2.0), r"inverse\.samples must be an int of at least 0; got 2\.0"),
        (Penalty(1.5), r"inverse\.share must be in \[0, 1\]; got 1\.5"),
        (Penalty(0.5, symmetric=True), r"inverse\.share must be 1 where it is symmetric; got 0\.5"),
    ],
)
def test_errors(inverse, text):
    for build in (
        lambda: SelfNormLinear(3, inverse=inverse),
        lambda: SelfNormConv2d(1, 3, inverse=inverse),
    ):
        with pytest.raises(ValueError, match=text):
            build()


def test_models_pass_the_choice_on():
    for flow in (
        snf_ext.models.fc((1, 2, 2), inverse="tracked", debias=2),
        snf_ext.models.conv((1, 4, 4), layers=3, inverse="tracked", debias=2),
        snf_ext.models.glow((1, 4, 4), 1, 2, 8, inverse="tracked", debias=2),
    ):
        layers = [m for m in flow.modules() if hasattr(m, "upkeep")]
        assert layers
        assert all(m.upkeep == Tracked() and m.debias.terms == 2 for m in layers)
        loss = flow.loss(torch.randint(256, (3, *flow.event_shape)).float())
        loss.backward()
        assert all(m.weight.grad.isfinite().all() for m in layers)
    with pytest.raises(ValueError, match="inverse must be None for 'exact', which learns no"):
        snf_ext.models.fc((1, 2, 2), linear="exact", inverse="tracked")
    with pytest.raises(ValueError, match="debias must be None for 'lu', which learns no inverse"):
        snf_ext.models.glow((1, 4, 4), 1, 2, 8, mixing="lu", debias=1)
