"""The cases of the paper's Figure 4: one layer by its size, and what it grows with.

- One fully connected layer, batch 128, D = 32 in steps of 96 up to 4064, with and without Adam.
- The same at one D by batch.
- One 3x3 convolution by image size, of one channel, and by channels, of one size. The public code
  times the former too, but the paper does not show it.

Long steps are timed in fewer rounds. What is fitted to the times is in ``growth``.
"""

from __future__ import annotations

from .cases import STOCK, ConvCase, LinearCase

__all__ = ["BATCHES", "FEATURES", "FIGURE4"]

FEATURES = range(32, 4065, 96)
BATCHES = (32, 64, 128, 256, 512, 1024)  # at D = 800
SIZES = (8, 16, 24, 32, 48, 64)
CHANNELS = (1, 2, 4, 8, 16, 32)  # of 16x16 images
QUICK = {"features": (32, 224, 800), "sizes": (8, 16), "channels": (1, 4)}

# Ratios to be reached from a D on.
EXACT = {32: 1.0, 800: 2.0, 1568: 3.0, 3104: 5.5}
COMPOSED = {800: 5.0, 3104: 6.0}
PRODUCTS = {1568: 0.9}
RELATIVE = 1 / 1.7  # native takes at most 1.7 times as long


def _from(steps: dict[int, float], features: int) -> float | None:
    """The target of the last step that D has reached."""
    reached = [d for d in steps if d <= features]
    return steps[max(reached)] if reached else None


def _targets(features: int, adam: bool) -> dict[str, float]:
    found = {
        "exact": _from(EXACT, features),
        "composed": _from(COMPOSED, features),
        "relative": RELATIVE,
    }
    if not adam:
        found |= dict.fromkeys(("products (out=)", "products (fresh)"), _from(PRODUCTS, features))
        found |= STOCK
    return {name: target for name, target in found.items() if target is not None}


def _rounds(features: int) -> int | None:
    """A round of all variants takes 1 s at D = 1568 and 5 s at D = 4064."""
    return None if features < 1500 else 11 if features < 2500 else 7


def _linear(features: int, adam: bool) -> LinearCase:
    over = {"native, given gradients": 60.0} if features == 32 and not adam else {}
    return LinearCase(
        features,
        targets=_targets(features, adam),
        quick=features in QUICK["features"],
        over_us=over,
        adam=adam,
        rounds=_rounds(features),
    )


def _conv(channels: int, size: int, quick: bool) -> ConvCase:
    # The dense matrix of a 48x48 image takes a second to factorise, that of 64x64 four.
    return ConvCase(
        channels, size, size, 3, targets=STOCK, quick=quick, dense_features=2304, rounds=11
    )


FIGURE4: tuple[LinearCase | ConvCase, ...] = (
    *(_linear(d, adam) for d in FEATURES for adam in (False, True)),
    *(LinearCase(800, batch, targets=STOCK, rounds=11) for batch in BATCHES if batch != 128),
    *(_conv(1, size, size in QUICK["sizes"]) for size in SIZES),
    *(_conv(c, 16, c in QUICK["channels"]) for c in CHANNELS if c > 1),
)
