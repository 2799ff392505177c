"""Augmentation: each image on its own, all shifts and turns as often as they should be."""

from itertools import product

import pytest
import torch

from snf_ext.shard import Shard, sharded
from snf_ext.training.augment import AUGMENTATIONS, flip, flip_jitter, require_images
from snf_ext.training.config import Config, resolve
from snf_ext.training.errors import UserError


def moved(image, turned, down, right):
    """By copying one pixel after another; what moves in at an edge repeats the edge."""
    channels, height, width = image.shape
    out = torch.empty_like(image)
    for c, h, w in product(range(channels), range(height), range(width)):
        row = min(max(h - down, 0), height - 1)
        column = min(max(w - right, 0), width - 1)
        out[c, h, w] = image[c, row, width - 1 - column if turned else column]
    return out


def test_each_image_is_turned_and_shifted_on_its_own():
    torch.manual_seed(0)
    image = torch.randint(256, (3, 4, 5), dtype=torch.uint8)
    possible = {
        (turned, down, right): moved(image, turned, down, right)
        for turned, down, right in product((False, True), (-1, 0, 1), (-1, 0, 1))
    }
    count = 9000
    out = flip_jitter(image.expand(count, 3, 4, 5))
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    seen = {key: int((out == want).flatten(1).all(1).sum()) for key, want in possible.items()}
    assert sum(seen.values()) == count
    # Each of 18 cases with probability 1/18: five standard deviations.
    assert all(abs(n - count / 18) < 5 * (count / 18) ** 0.5 for n in seen.values()), seen
    out = flip(image.expand(count, 3, 4, 5))
    whole, turned = (int((out == possible[t, 0, 0]).flatten(1).all(1).sum()) for t in (0, 1))
    assert whole + turned == count
    assert abs(turned - count / 2) < 5 * (count / 4) ** 0.5


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_keep_their_places_and_stay_as_they_were(name):
    torch.manual_seed(0)
    levels = torch.arange(50, dtype=torch.uint8)[:, None, None, None]
    images = levels.expand(50, 3, 4, 4).clone()
    images[:, :, :, 0] += 100
    before = images.clone()
    out = AUGMENTATIONS[name](images)
    assert torch.equal(images, before)
    assert not torch.equal(out, before)
    assert torch.equal(out % 100, levels.expand_as(out))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_shard_draws_what_the_whole_batch_does(name):
    images = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8)
    torch.manual_seed(3)
    whole = AUGMENTATIONS[name](images)
    state = torch.get_rng_state()
    for start, stop in ((0, 4), (4, 10)):
        torch.manual_seed(3)
        with sharded(Shard(start, 10)):
            part = AUGMENTATIONS[name](images[start:stop])
        assert torch.equal(part, whole[start:stop])
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_number_is_looked_at(name):
    """On fake tensors whatever asks for a value raises: so it would in a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = AUGMENTATIONS[name](torch.empty(5, 3, 8, 6, dtype=torch.uint8))
    assert (out.shape, out.dtype) == ((5, 3, 8, 6), torch.uint8)


@pytest.mark.cuda
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_in_a_graph(name):
    images = torch.randint(256, (1000, 3, 8, 8), dtype=torch.uint8, device="cuda")
    AUGMENTATIONS[name](images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = AUGMENTATIONS[name](images)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(out.clone())
    assert not torch.equal(*seen)
    same = (seen[0] == images).flatten(1).all(1) | (seen[0] == images.flip(3)).flatten(1).all(1)
    assert same.all() if name == "flip" else same.any()


# ---- settings


def test_which_data_are_augmented():
    def augment(data, **asked):
        return resolve({"model": "glow", "data": data, **asked}).augment

    assert augment("cifar10") == "flip-jitter"
    assert [augment(data) for data in ("digits", "mnist", "images", "imagenet32")] == [None] * 4
    assert augment("cifar10", augment="none") is None
    assert augment("cifar10", augment="flip") == "flip"
    assert augment("images", augment="flip-jitter") == "flip-jitter"
    config = resolve({"model": "glow", "data": "cifar10"})
    assert Config.from_dict(config.to_dict()) == config
    assert resolve({"augment": "flip-jitter"}, config) == config
    with pytest.raises(UserError, match="augment must stay 'flip-jitter' when a run is resumed"):
        resolve({"augment": "none"}, config)
    with pytest.raises(UserError, match="augment must be one of none, flip, flip-jitter; got spin"):
        resolve({"model": "glow", "data": "cifar10", "augment": "spin"})


def test_settings_of_earlier_versions_have_none():
    values = resolve({"model": "fc", "data": "digits"}).to_dict()
    del values["augment"]
    assert Config.from_dict(values).augment is None


def test_vectors_are_not_augmented():
    require_images(None, (2,))
    require_images("flip", (1, 28, 28))
    with pytest.raises(UserError, match=r"augment must be none for events .*; got flip for \(2,\)"):
        require_images("flip", (2,))
