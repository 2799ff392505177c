"""NAME=VALUE on the command line: every type that a model's arguments have."""

import pytest

from snf_ext.training.arguments import keyword_arguments
from snf_ext.training.errors import UserError


def model(
    event_shape: tuple[int, ...] = (1, 8, 8),
    layers: int = 2,
    mixing: str = "self_norm",
    alpha: float = 0.3,
    inverse_kernel_size: int | None = None,
    additive: bool = False,
    kernel_size: "int | str" = 1,
    plain=7,
    *,
    recon_weight: float = 1.0,
):
    """Stands for a model."""


def convert(*pairs):
    return keyword_arguments("model", model, pairs, ("event_shape", "recon_weight"))


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("layers=3", 3),
        ("mixing=lu", "lu"),
        ("mixing=a=b", "a=b"),
        ("alpha=1", 1.0),
        ("alpha=1e-3", 1e-3),
        ("inverse_kernel_size=5", 5),
        ("inverse_kernel_size=None", None),
        ("additive=true", True),
        ("additive=False", False),
        ("additive=1", True),
        ("additive=no", False),
        ("kernel_size=3", 3),
        ("kernel_size=wide", "wide"),
        ("plain=8", 8),
    ],
)
def test_values(pair, value):
    (got,) = convert(pair).values()
    assert got == value
    assert type(got) is type(value)


def test_several_and_none():
    assert convert("layers=3", "alpha=2", "layers=4") == {"layers": 4, "alpha": 2.0}
    assert convert() == {}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("layers=3.5", "layers must be of type int; got '3.5'"),
        ("layers=none", "layers must be of type int; got 'none'"),
        ("alpha=much", "alpha must be of type float; got 'much'"),
        ("additive=2", "additive must be of type bool; got '2'"),
        ("inverse_kernel_size=big", "inverse_kernel_size must be of type int; got 'big'"),
        ("depth=3", "model_args of model must be NAME=VALUE, NAME one of layers, mixing, .*depth"),
        ("recon_weight=3", "must be NAME=VALUE, .*; got 'recon_weight=3'"),
        ("layers", "must be NAME=VALUE, .*; got 'layers'"),
    ],
)
def test_what_cannot_be_read(pair, message):
    with pytest.raises(UserError, match=message):
        convert(pair)
