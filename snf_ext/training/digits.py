"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import Dataset
from .errors import require


def load_digits(data_dir: Path | None = None, labels: bool = False) -> Dataset:
    """The 1,797 handwritten digits of scikit-learn, 1x8x8, values 0..16.

    The values stay as they are: ``pixel_levels`` is 17, so bits/dim is an honest count for a pixel
    of 17 values (a uniform guess costs log2 17 = 4.09 bits/dim, not 8).

    The split is the same for every run and every seed: 1,197 training, 300 validation and 300
    test images.
    """
    require("sklearn")
    import numpy as np
    from sklearn.datasets import load_digits as bundled

    content = bundled()
    images = torch.from_numpy(content.images.astype(np.uint8))[:, None]
    # RandomState's stream is frozen for good; torch and numpy's Generator do not promise that.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    sizes = [len(images) - 600, 300, 300]
    train, val, test = images[order].split(sizes)
    digits = Dataset("digits", train, val, test, (1, 8, 8), 17)
    if not labels:
        return digits
    numbers = torch.from_numpy(content.target.astype(np.int64))[order]
    return digits.with_labels(numbers.split(sizes), 10)
