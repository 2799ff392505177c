"""scikit-learn's digits."""

import numpy as np
import torch

from snf_ext.training import data


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    assert (digits.event_shape, digits.pixel_levels) == ((1, 8, 8), 17)
    assert digits.train.dtype == torch.uint8
    together = torch.cat([digits.train, digits.val, digits.test]).flatten(1).numpy()
    expected = load_digits().data
    # Each image once, whatever the order.
    assert np.array_equal(
        together[np.lexsort(together.T)], expected[np.lexsort(expected.T)].astype(np.uint8)
    )


def test_digits_split_is_fixed():
    torch.manual_seed(1)
    first = data.load("digits")
    torch.manual_seed(2)
    second = data.load("digits")
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.test, second.test)
    # Figures of one version can be compared with those of the next.
    assert first.test[:2, 0, 3].tolist() == [[0, 8, 14, 1, 14, 7, 0, 0], [0, 0, 9, 16, 15, 8, 0, 0]]


def test_labels_stay_beside_their_images():
    from sklearn.datasets import load_digits

    plain, digits = data.load("digits"), data.load("digits", labels=True)
    assert plain.classes == 0
    assert plain.train_labels is None
    assert digits.classes == 10
    bundled = load_digits()
    number_of = {
        image.astype(np.uint8).tobytes(): label
        for image, label in zip(bundled.data, bundled.target, strict=True)
    }
    for split in ("train", "val", "test"):
        images, labels = getattr(digits, split), digits.labels(split)
        assert torch.equal(images, getattr(plain, split))
        assert labels.dtype == torch.int64
        assert labels.tolist() == [number_of[image.numpy().tobytes()] for image in images]
    few = digits.limit_train(7)
    assert torch.equal(few.train_labels, digits.train_labels[:7])
