"""What the operators refuse, in the same words wherever they run, and where there is no CUDA."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_native

import snf_ext


def bad_arguments():
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    yield (
        "snf_linear",
        (x.long(), w, w),
        TypeError,
        r"x must be a floating-point tensor; got torch.int64",
    )
    yield (
        "snf_linear",
        (x, w[:3], w),
        ValueError,
        r"weight must be a square matrix \[D, D\]; got \[3, 4\]",
    )
    yield (
        "snf_linear",
        (x[:, :3], w, w),
        ValueError,
        r"x must have shape \[\.\.\., D\] with D = 4; got \[2, 3\]",
    )
    yield (
        "snf_linear",
        (x, w, w[:2]),
        ValueError,
        r"weight_inv must have shape \[D, D\] = \[4, 4\]; got \[2, 4\]",
    )
    yield (
        "snf_linear",
        (x, w, w, w),
        ValueError,
        r"bias must have shape \[D\] = \[4\]; got \[4, 4\]",
    )
    yield (
        "snf_linear",
        (x, w.double(), w),
        TypeError,
        r"weight must have the dtype of x, torch.float32; got torch.float64",
    )
    yield (
        "snf_linear",
        (x, w, w.to("meta")),
        ValueError,
        r"weight_inv must be on the device of x, cpu; got meta",
    )
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 2, 3, 3)
    yield (
        "snf_conv2d",
        (x.int(), w, w),
        TypeError,
        r"x must be a floating-point tensor; got torch.int32",
    )
    yield (
        "snf_conv2d",
        (x[0], w, w),
        ValueError,
        r"x must have shape \[B, C, H, W\]; got \[4, 5, 5\]",
    )
    yield (
        "snf_conv2d",
        (x[..., :0], w, w, None, 1, 2),
        ValueError,
        r"x must have at least one pixel; got \[2, 4, 5, 0\]",
    )
    yield (
        "snf_conv2d",
        (x, w, w),
        ValueError,
        r"weight must have shape \[C, C/groups, k, k\] = \[4, 4, k, k\]; got \[4, 2, 3, 3\]",
    )
    yield (
        "snf_conv2d",
        (x, w, w, None, 1, 3),
        ValueError,
        r"groups must divide the channels C = 4; got 3",
    )
    yield (
        "snf_conv2d",
        (x, w, w, None, 0, 2),
        ValueError,
        r"dilation must be in \[1, 2\^31\); got 0",
    )
    yield "snf_conv2d", (x, w, w, None, 2**31, 2), ValueError, r"\[1, 2\^31\); got 2147483648"
    yield (
        "snf_conv2d",
        (x, w[..., :2], w, None, 1, 2),
        ValueError,
        r"weight must have an odd kernel size.*Squeeze.*got \[4, 2, 3, 2\]",
    )
    yield (
        "snf_conv2d",
        (x, w, w[:, :1], None, 1, 2),
        ValueError,
        r"weight_inv must have shape \[C, C/groups, k, k\] = \[4, 2, k, k\]; got \[4, 1, 3, 3\]",
    )
    yield (
        "snf_conv2d",
        (x, w, w, x[0, 0, 0], 1, 2),
        ValueError,
        r"bias must have shape \[C\] = \[4\]; got \[5\]",
    )
    message = r"penalty_share must be in \[0, 1\]; got "
    square, conv = (torch.randn(2, 4), *[torch.eye(4)] * 2), (x, w, w)
    for share, text in ((1.5, "1.5"), (-1, "-1.0"), (float("nan"), "nan")):
        for reconstruct in (True, False):
            rule = (None, reconstruct, share)
            yield "snf_linear", (*square, *rule), ValueError, message + text
        yield "snf_conv2d", (*conv, None, 1, 2, False, False, share), ValueError, message + text


@pytest.mark.parametrize(("name", "arguments", "error", "message"), list(bad_arguments()))
def test_bad_arguments_in_the_same_words(name, arguments, error, message, backend):
    with pytest.raises(error, match=message):
        getattr(snf_ext.ops, name)(*arguments)


@needs_native
def test_cpu_only_build_explains_cuda_tensors():
    if snf_ext.build_info()["cuda"]:
        pytest.skip("built with CUDA")
    x, w = torch.randn(2, 3), torch.eye(3)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.snf_ext.snf_linear_forward.default
    with pytest.raises(NotImplementedError, match=r"built for the CPU only.*FORCE_CUDA=1"):
        op.redispatch(keys, x, w, w, None, True)


@needs_native
def test_cuda_build_without_a_device_explains_itself():
    if not snf_ext.build_info()["cuda"] or torch.cuda.is_available():
        pytest.skip("for a build with CUDA on a machine without a GPU")
    x, w, ops = torch.randn(2, 3), torch.eye(3), torch.ops.snf_ext
    image, kernel, shape = torch.randn(2, 3, 4, 4), torch.randn(3, 3, 3, 3), (1, 1, False)
    calls = {
        ops.snf_linear_forward.default: (x, w, w, None, True),
        ops.snf_linear_backward.default: (x, None, None, x, x, x, w, w, None, 1.0, [True] * 4),
        ops.snf_conv2d_forward.default: (image, kernel, kernel, None, *shape, True),
        ops.snf_conv2d_backward.default: (
            *(image, None, None, image, image, image, kernel, kernel, None),
            *(*shape, 1.0, [True] * 4),
        ),
    }
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op, arguments in calls.items():
        with pytest.raises(NotImplementedError, match="no CUDA device can be used here"):
            op.redispatch(keys, *arguments)
