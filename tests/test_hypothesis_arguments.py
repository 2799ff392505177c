"""Operators whose arguments do not fit: both backends refuse, in the same words, or neither does.

``SNF_EXAMPLES=20000`` draws so many for each operator.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from conftest import needs_native
from drawn_calls import run
from hypothesis import given
from strategies import CALLS, Call, drawn, seeds

import snf_ext

pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]

OTHER_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int64, torch.uint8, torch.bool, torch.complex64),
)
TENSORS = {
    "a dimension less": lambda t, k: t.select(k % t.dim(), 0) if t.dim() and t.numel() else t,
    "a dimension more": lambda t, k: t.unsqueeze(k % (t.dim() + 1)),
    "shorter": lambda t, k: _axis(t, k, lambda axis: t.narrow(axis, 0, t.shape[axis] // 2)),
    "longer": lambda t, k: _axis(t, k, lambda axis: torch.cat((t, t), axis)),
    "turned": lambda t, k: _axis(t, k, lambda axis: t.transpose(axis, -1)),
    "of another dtype": lambda t, k: t.to(OTHER_DTYPES[k % len(OTHER_DTYPES)]),
    "sparse": lambda t, k: t.to_sparse(),  # which the reference may take
    "without storage": lambda t, k: t.to("meta"),
}
NUMBERS = {
    bool: (True, False),
    int: (-(2**62), -1, 0, 1, 2, 3, 7, 40, 2**31 - 1, 2**31, 2**62),
    float: (-torch.inf, -1.0, -1e-300, 0.0, 1e-300, 0.5, 1.0, 3.0, 1e300, torch.inf, torch.nan),
    list: ([], [0.0], [1.0] * 5, [-1.0], [torch.nan], [1e300, torch.inf]),
}


def _axis(t, k, change):
    return change(k % t.dim()) if t.dim() else t


def spoilt(call: Call, choice: int) -> Call:
    """One argument changed: a tensor, or now and then one of the rest."""
    kind, at, k = choice % 4, choice // 4 % 64, choice // 256
    if kind == 0 and call.rest:
        name = sorted(call.rest)[at % len(call.rest)]
        numbers = NUMBERS[type(call.rest[name])]
        return dataclasses.replace(call, rest=call.rest | {name: numbers[k % len(numbers)]})
    tensors = list(call.tensors)
    at %= len(tensors)
    if tensors[at] is not None:
        change = list(TENSORS.values())[k % len(TENSORS)]
        tensors[at] = change(tensors[at].detach(), k // len(TENSORS))
    return dataclasses.replace(call, tensors=tuple(tensors), grads=(), wanted=())


def outcome(call: Call, function):
    try:
        outputs, _ = run(call, function)
    except Exception as error:
        return type(error), re.sub(r"(\d)\.0\b", r"\1", str(error))  # C++ writes 1.0 as 1
    return None, [(o.shape, o.dtype, o.device) for o in outputs]


@pytest.mark.parametrize("op", CALLS)
def test_bad_arguments(op):
    @drawn
    @given(CALLS[op], seeds)
    def check(call, choice):
        call = spoilt(call, choice)
        before = [None if t is None or t.is_meta else t.clone() for t in call.tensors]
        theirs, words = outcome(call, getattr(snf_ext.reference, op))
        ours, own_words = outcome(call, getattr(torch.ops.snf_ext, op))
        if any(t is not None and t.is_sparse for t in call.tensors):
            assert ours is not None
        else:
            assert ours == theirs, f"{own_words} where the reference says: {words}"
            assert own_words == words
        for t, was in zip(call.tensors, before, strict=True):
            if was is not None:
                t, was = (a.to_dense() for a in (t, was))
                same = (t == was) | (t.isnan() & was.isnan())
                assert same.all(), "an argument was changed"

    check()
