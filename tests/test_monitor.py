"""The gradient monitor: the right angles, by a step that does not notice it."""

import math

import pytest
import small_flows
import torch

import snf_ext
from snf_ext import GradientMonitor, gradient_angle


def linear(shape, **settings):
    return lambda: [
        snf_ext.SelfNormLinear(shape[-1], **settings),
        snf_ext.SmoothLeakyReLU(0.3),
        snf_ext.SelfNormLinear(shape[-1], **settings),
    ]


def conv(channels, kernel, **settings):
    return lambda: [
        snf_ext.SelfNormConv2d(channels, kernel, **settings),
        snf_ext.SmoothLeakyReLU(0.3),
        snf_ext.SelfNormConv2d(channels, kernel, **settings),
    ]


CASES = {
    "linear": ((6,), linear((6,))),
    "linear-leading": ((3, 4), linear((3, 4), bias=False)),
    "conv": ((2, 4, 5), conv(2, 3)),
    "conv-dilation": ((2, 5, 4), conv(2, 3, dilation=2)),
    "conv-groups": ((4, 3, 4), conv(4, (3, 1), groups=2)),
    "conv-circular": ((2, 4, 5), conv(2, 3, padding_mode="circular")),
    "conv-circular-wraps": ((2, 3, 2), conv(2, 5, padding_mode="circular", dilation=2)),
    "conv-larger-inverse": ((2, 4, 5), conv(2, 3, inverse_kernel_size=5)),
    "conv-66-channels": ((66, 2, 2), conv(66, 3)),
    "conv-larger-than-image": ((2, 3, 1), conv(2, 5)),
    "conv-1x1": ((3, 4, 5), conv(3, 1)),
    "nested": ((2, 4, 4), lambda: [small_flows.Nest([small_flows.Nest(conv(2, 3)())])]),
}


def make(name, dtype=torch.float64, **settings):
    """A flow whose learned inverses are off by some degrees."""
    shape, bijections = CASES[name]
    flow = snf_ext.Flow(bijections(), shape, **settings).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow, torch.randn(7, *shape, dtype=dtype)


def angles_of(flow, *losses):
    """What one measured step says that sends each of ``losses`` back."""
    monitor = GradientMonitor(flow, 1)
    with monitor.step():
        for loss in losses:
            loss().backward()
    return monitor.angles


# ---- the angle


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_copy_in_float64(name):
    flow, x = make(name)
    angles = angles_of(flow, lambda: flow.loss(x))
    assert len(angles) == 2
    assert min(angles.values()) > 0.1
    assert angles == pytest.approx(gradient_angle(flow, x), rel=0, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_near_as_its_precision(backend, name):
    flow, x = make(name, torch.float32)
    angles = angles_of(flow, lambda: flow.loss(x))
    assert angles == pytest.approx(gradient_angle(flow, x), rel=0, abs=1e-3)


def test_agrees_on_models_with_noise():
    for flow in (
        snf_ext.models.conv((1, 8, 8), pixel_levels=17, layers=3, blocks=3),
        snf_ext.models.glow((1, 8, 8), pixel_levels=17, levels=2, steps=2, width=4),
    ):
        flow.double()
        x = torch.randint(17, (9, 1, 8, 8)).double()
        flow(x)  # actnorm sets itself up
        torch.manual_seed(1)
        angles = angles_of(flow, lambda flow=flow, x=x: flow.loss(x))
        torch.manual_seed(1)
        assert len(angles) >= 3
        assert angles == pytest.approx(gradient_angle(flow, x), rel=0, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_against_the_gradients_of_both_kinds_of_layers(name):
    """The self-normalizing one as training gets it, the exact one of the compared layers."""
    flow, x = make(name, recon_weight=0.0)
    true = snf_ext.Flow(exact_layers(flow), flow.event_shape).double()
    true.loss(x).backward()
    angles = angles_of(flow, lambda: flow.loss(x))
    learned, exact = ([p.grad for p in f.parameters() if p.dim() > 1] for f in (flow, true))
    learned = learned[::2]  # weight, weight_inv
    assert len(learned) == len(exact) == 2
    for angle, u, v in zip(angles.values(), learned, exact, strict=True):
        cosine = (u * v).sum() / (u.norm() * v.norm())
        assert angle == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-6)


def exact_layers(flow):
    layers = []
    for layer in flow.modules():
        if isinstance(layer, snf_ext.SelfNormLinear):
            layers.append(snf_ext.ExactLinear(layer.features, layer.bias is not None))
        elif isinstance(layer, snf_ext.SelfNormConv2d):
            channels, kernel, dilation, groups, padding = layer.shape
            layers.append(
                snf_ext.ExactConv2d(
                    channels, kernel, dilation=dilation, groups=groups, padding_mode=padding
                )
            )
        elif isinstance(layer, snf_ext.SmoothLeakyReLU):
            layers.append(layer)
            continue
        else:
            continue
        state = layer.state_dict()
        del state["weight_inv"]
        layers[-1].load_state_dict(state)
    return layers


@pytest.mark.parametrize("name", ["linear-leading", "conv", "nested"])
def test_scale_pieces_and_penalty_change_nothing(name):
    flow, x = make(name)
    whole = angles_of(flow, lambda: flow.loss(x))
    same = {
        "bits": [lambda: flow.loss(x, bits_per_dim=True)],
        "scaled": [lambda: 65536 * flow.loss(x)],
        "pieces": [lambda: 3 / 7 * flow.loss(x[:3]), lambda: 4 / 7 * flow.loss(x[3:])],
        "penalty": [lambda: flow.loss(x, log_det_penalty=10.0)],
    }
    for what, losses in same.items():
        assert angles_of(flow, *losses) == pytest.approx(whole, rel=1e-9), what


def test_a_layer_that_sees_two_image_sizes():
    _, bijections = CASES["conv"]
    layer = bijections()[0].double()
    layer.weight.data += 0.1 * torch.randn_like(layer.weight)
    flow = snf_ext.Flow([layer], (2, 4, 5))
    true = exact_layers(flow)[0].double()
    inputs = torch.randn(3, 2, 4, 5).double(), torch.randn(5, 2, 2, 3).double()

    def loss(module, weight):
        steps = [module(x) for x in inputs]
        return sum(weight * s.z.square().sum() - i * s.log_det.sum() for i, s in enumerate(steps))

    angles = angles_of(flow, lambda: loss(layer, 0.3))
    loss(true, 0.3).backward()
    cosine = torch.nn.functional.cosine_similarity(
        layer.weight.grad.flatten(), true.weight.grad.flatten(), dim=0
    )
    assert angles["bijections.0"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-6)


def test_no_angle_is_nan():
    flow, x = make("linear")
    first, second = flow.bijections[0], flow.bijections[2]
    everything_nan = {"bijections.0": math.nan, "bijections.2": math.nan}
    for factor in (math.nan, math.inf, 0.0):
        angles = angles_of(flow, lambda factor=factor: factor * flow.loss(x))
        assert angles == pytest.approx(everything_nan, nan_ok=True), factor
    angles = angles_of(flow, lambda: (flow.loss(x), second.bias.sum())[1])
    assert angles == pytest.approx(everything_nan, nan_ok=True)
    first.weight.data.zero_()
    angles = angles_of(flow, lambda: flow.loss(x))
    assert math.isnan(angles["bijections.0"])
    assert 0 < angles["bijections.2"] < 180
    first.weight.data.fill_(math.nan)
    angles = angles_of(flow, lambda: first(x).log_det.sum())
    assert angles == pytest.approx({"bijections.0": math.nan}, nan_ok=True)


def test_half_of_the_gradient_alone():
    """Without log_det both gradients point the same way; without z they are the inverses'."""
    flow, x = make("linear")
    layer = flow.bijections[2]
    assert angles_of(flow, lambda: layer(x).z.sum())["bijections.2"] < 1e-9
    u, v = layer.weight_inv.detach().T, torch.linalg.inv(layer.weight.detach()).T
    cosine = (u * v).sum() / (u.norm() * v.norm())
    angle = angles_of(flow, lambda: -layer(x).log_det.sum())["bijections.2"]
    assert angle == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-6)


def test_a_singular_convolution_is_nan():
    flow, x = make("conv")
    flow.bijections[2].weight.data.zero_()
    angles = angles_of(flow, lambda: flow.loss(x))
    assert list(map(math.isnan, angles.values())) == [False, True]


def test_only_what_is_trained_counts():
    flow, x = make("linear")
    whole = angles_of(flow, lambda: flow.loss(x))
    monitor = GradientMonitor(flow, 1)
    with monitor.step():
        with torch.no_grad():
            flow.loss(2 * x)
        flow.inverse(x)
        flow.loss(x).backward()
    assert monitor.angles == whole
    assert angles_of(flow, lambda: -flow.log_prob(x).mean()) == {}
    exact = snf_ext.Flow([snf_ext.ExactLinear(6)], (6,)).double()
    assert angles_of(exact, lambda: exact.loss(x)) == {}


def test_the_optimizer_may_step_inside():
    flow, x = make("linear")
    whole = angles_of(flow, lambda: flow.loss(x))
    optimizer = torch.optim.SGD(flow.parameters(), 0.1)
    monitor = GradientMonitor(flow, 1)
    optimizer.zero_grad()
    with monitor.step():
        flow.loss(x).backward()
        optimizer.step()
    assert monitor.angles == whole


def test_bfloat16():
    """Deltas and inputs are rounded, and from there on it is the same angle."""
    flow, x = make("conv", torch.bfloat16)
    angles = angles_of(flow, lambda: flow.loss(x))
    assert angles == pytest.approx(gradient_angle(flow, x), rel=0, abs=0.5)


# ---- the step


def test_the_interval():
    flow, x = make("linear")
    monitor = GradientMonitor(flow, 3)
    assert (monitor.last_step, monitor.angles) == (None, {})
    due = []
    for _ in range(7):
        with monitor.step() as measured:
            assert any(layer._forward_hooks for layer in flow.modules()) is measured
            flow.loss(x).backward()
        due.append((measured, monitor.last_step))
    assert due == [
        *[(False, None)] * 2,
        *[(True, 3), (False, 3), (False, 3), (True, 6), (False, 6)],
    ]
    monitor.steps = 11
    with monitor.step():
        flow.loss(x).backward()
    assert monitor.last_step == 12


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "3", None])
def test_an_interval_that_is_none(every):
    with pytest.raises(ValueError, match=f"every must be a positive int; got {every!r}"):
        GradientMonitor(make("linear")[0], every)


@pytest.mark.parametrize("name", ["linear", "conv-circular", "nested"])
def test_gradients_keep_their_bits_and_nothing_stays(backend, name):
    flow, x = make(name, torch.float32)
    flow.loss(x, log_det_penalty=1e-3).backward()
    plain = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    before = set(vars(flow))
    assert angles_of(flow, lambda: flow.loss(x, log_det_penalty=1e-3))
    for parameter, gradient in zip(flow.parameters(), plain, strict=True):
        assert parameter.grad.numpy().tobytes() == gradient.numpy().tobytes()
    assert set(vars(flow)) == before
    assert not any(layer._forward_hooks for layer in flow.modules())


def test_an_error_in_the_step_goes_through_and_nothing_stays():
    flow, x = make("linear")
    monitor = GradientMonitor(flow, 1)
    with pytest.raises(ValueError, match="x must have shape"), monitor.step():
        flow.loss(x[:, :3])
    losses = []
    with pytest.raises(IndexError), monitor.step():
        losses[losses.append(flow.loss(x)) or 1].backward()
    assert not any(layer._forward_hooks for layer in flow.modules())
    assert (monitor.last_step, monitor.angles) == (None, {})
    with monitor.step():
        pass
    losses[0].backward()  # a graph that outlives its step
    assert monitor.angles == {}
