"""Every model, bijection and operator as a program of ``torch.export``, for batches of any size."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from bijections_table import BIJECTIONS
from conftest import needs_native
from elementwise_table import ELEMENTWISE
from models_table import VARIANTS, images
from ops_table import OPS
from torch.export import Dim
from traced_flows import ROWS, SOME, USES, flow_of, function_of, marked

import snf_ext

BATCH = Dim("batch", min=1)


class Program(torch.nn.Module):
    """A function of a module, as a module."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *arguments):
        return self.function(*arguments)


def exported(program, arguments, strict=False):
    """Exported, saved and loaded."""
    shapes = {"arguments": tuple({0: BATCH} for _ in arguments)}
    made = torch.export.export(program, arguments, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(made, file)
    file.seek(0)
    return torch.export.load(file).module()


def check(name, use, strict=False, sizes=(3, 5)):
    flow = flow_of(name, torch.float32)
    function, draw = function_of(flow, use)
    program = exported(Program(flow, function).train(flow.training), (draw(sizes[0]),), strict)
    for size in sizes:
        torch.testing.assert_close(program(draw(size)), function(draw(size)))


MODELS = marked(ROWS, lambda name: name == "fc-self_norm", lambda name: name in SOME)


@pytest.mark.parametrize("use", ["loss", "log_prob", "sample"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name, use):
    check(name, use)


# Reading code instead of running it ends where zuko makes a transform.
EITHER = [(name, False) for name in ROWS] + [(name, True) for name in VARIANTS]


@pytest.mark.nightly
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("name", "strict"), EITHER, ids=[f"{n}-by-{('running', 'reading')[s]}" for n, s in EITHER]
)
def test_model_in_either_way(name, strict, use):
    check(name, use, strict)


# Exact values of SelfNormBijection differentiate its networks by transforms of torch.func, which
# torch.export does not take with a batch of unknown size.
EXPORTED = marked(
    [c for c in BIJECTIONS if not c.name.startswith("SelfNormBijection")],
    lambda name: name in ("SelfNormLinear", "SelfNormConv2d", "Spline", "ActNorm", "Squeeze"),
    lambda name: not name.startswith(("ExponentialConv2d", "SmoothTanh")),
)


@pytest.mark.parametrize("case", EXPORTED)
def test_bijection(case):
    """Forward and learned inverse, in evaluation mode."""
    bijection = case.build().eval()

    def there_and_back(x, *context):
        step = bijection(x, *context)
        return *step, bijection.inverse(step.z, *context)

    x = case.data(3)
    given = () if case.context_shape is None else (case.context(x),)
    program = exported(Program(bijection, there_and_back).eval(), (x, *given))
    x = case.data(5)
    given = () if case.context_shape is None else (case.context(x),)
    torch.manual_seed(1)
    got = program(x, *given)
    torch.manual_seed(1)
    for a, b in zip(got, there_and_back(x, *given), strict=True):
        torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.parametrize(
    "case",
    marked(
        [c for c in OPS if c.x[0] > 1],
        lambda name: name in ("linear", "conv-3x3"),
        lambda name: True,
    ),
)
def test_operator(case):
    x, *weights = case.tensors()
    function = functools.partial(getattr(snf_ext.ops, case.op), **case.rest)
    check_operator(lambda x_: function(x_, *weights), x)


FEW = [c for c in ELEMENTWISE if c.name.endswith(("3x4x3x5", "-5x7"))]


@needs_native
@pytest.mark.parametrize("case", marked(FEW, lambda name: name.endswith("-5x7"), lambda name: True))
def test_elementwise_operator(case):
    tensors = case.tensors()
    # The parameters of a coupling have a batch too.
    batched = [t for t in tensors if t.dim() > 1]
    others = tensors[len(batched) :]
    check_operator(lambda *given: case.function(*given, *others), *batched)


def check_operator(function, *arguments):
    program = exported(Program(None, function), arguments)
    larger = [torch.cat([t, t.flip(0) / 2]) for t in arguments]
    for a, b in zip(program(*larger), function(*larger), strict=True):
        torch.testing.assert_close(a, b)


def test_samples_are_drawn():
    """As many as a tensor has rows: what an exported program takes are tensors."""
    flow = flow_of("fc-self_norm").eval()
    program = exported(
        Program(flow, lambda like: flow.sample(like.shape[0])).eval(), (torch.empty(3),)
    )
    torch.manual_seed(1)
    got = program(torch.empty(6))
    torch.manual_seed(1)
    torch.testing.assert_close(got, flow.sample(6))


def test_with_dequantization():
    flow = flow_of("fc-self_norm", noisy=True).eval()
    program = exported(Program(flow, flow.log_prob).eval(), (images(3),))
    torch.manual_seed(1)
    got = program(images(3))
    torch.manual_seed(1)
    torch.testing.assert_close(got, flow.log_prob(images(3)))


def test_a_loaded_program_follows_its_own_weights():
    """Its determinants are no constants of the program."""
    flow = flow_of("fc-self_norm").eval()
    function, draw = function_of(flow, "log_prob")
    program = exported(Program(flow, function).eval(), (draw(3),))
    with torch.no_grad():
        for tensors in (flow.parameters(), program.parameters()):
            for p in tensors:
                p.mul_(1.25)
    torch.testing.assert_close(program(draw(4)), flow.log_prob(draw(4)))


@pytest.mark.slow
def test_a_program_runs_in_another_process(tmp_path):
    """Which has only to import the package."""
    import subprocess
    import sys

    flow = flow_of("fc-self_norm", torch.float32).eval()
    function, draw = function_of(flow, "log_prob")
    made = torch.export.export(
        Program(flow, function).eval(), (draw(3),), dynamic_shapes={"arguments": ({0: BATCH},)}
    )
    torch.export.save(made, tmp_path / "flow.pt2")
    torch.save((draw(5), flow.log_prob(draw(5)).detach()), tmp_path / "want.pt")
    code = (
        "import torch, snf_ext\n"
        f"x, want = torch.load({str(tmp_path / 'want.pt')!r})\n"
        f"program = torch.export.load({str(tmp_path / 'flow.pt2')!r}).module()\n"
        "torch.testing.assert_close(program(x).detach(), want)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SOME[:1])
def test_strict(name):
    check(name, "log_prob", strict=True)
