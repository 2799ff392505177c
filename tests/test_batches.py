"""Batches: the order of each epoch, augmented on the way, and sets that the device cannot hold."""

import threading

import pytest
import torch

from snf_ext.training.augment import AUGMENTATIONS
from snf_ext.training.batches import Batches
from snf_ext.training.seeds import derive_seed

IMAGES = torch.randint(
    256, (50, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
CONTEXT = torch.arange(50.0)[:, None]
CPU = torch.device("cpu")


def nothing_free(device):
    assert device == CPU
    return 0


def epoch(batches, number, seed=0):
    torch.manual_seed(seed)
    return list(batches.epoch(number))


def test_the_order_is_that_of_the_epochs():
    batches = Batches(torch.arange(50), 8, 3, True)
    generator = torch.Generator().manual_seed(derive_seed(3, "order", 4))
    order = batches.order(4)
    assert torch.equal(order, torch.randperm(50, generator=generator))
    assert order.dtype == torch.int64
    assert torch.equal(torch.cat([b.images for b in batches.epoch(4)]), order)
    straight = Batches(torch.arange(50), 8, 3, False).order(4)
    assert torch.equal(straight, torch.arange(50))


def test_any_part_can_be_taken():
    batches = Batches(IMAGES, 8, 3, True, CONTEXT)
    index = torch.tensor([7, 0, 7])
    images, context = batches.take(index)
    assert torch.equal(images, IMAGES[index])
    assert context[:, 0].tolist() == [7.0, 0.0, 7.0]
    assert Batches(IMAGES, 8, 3, True).take(index).context is None


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("augment", [None, *AUGMENTATIONS])
def test_what_does_not_fit_comes_batch_by_batch_and_the_same(shuffle, augment):
    here = Batches(IMAGES, 8, 3, shuffle, CONTEXT, augment=augment)
    there = Batches(IMAGES, 8, 3, shuffle, CONTEXT, device=CPU, augment=augment, free=nothing_free)
    assert here.resident
    assert not there.resident
    assert len(here) == len(there) == 7
    for number in (1, 2):
        wanted, got = epoch(here, number), epoch(there, number)
        assert [len(batch.images) for batch in got] == [8] * 6 + [2]
        for one, two in zip(wanted, got, strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.context, two.context)
    torch.manual_seed(5)
    first = there.take(torch.tensor([3, 1]))
    torch.manual_seed(5)
    assert torch.equal(first.images, here.take(torch.tensor([3, 1])).images)


def test_half_of_what_is_free_is_for_the_set():
    size = IMAGES.numel() + 4 * CONTEXT.numel()

    def resident(free, **options):
        return Batches(IMAGES, 8, 3, True, CONTEXT, free=lambda device: free, **options).resident

    assert resident(2 * size, device=CPU)
    assert not resident(2 * size - 1, device=CPU)
    assert resident(None, device=CPU)  # a CPU: the set is there already
    assert resident(0)  # no device named: where the set is


def test_one_batch_is_gathered_ahead_and_the_thread_ends():
    batches = Batches(IMAGES, 8, 3, True, device=CPU, free=nothing_free)
    gathered, plain = [], batches._gathered
    batches._gathered = lambda index: gathered.append(index) or plain(index)
    before = threading.active_count()
    stream = batches.stream(1)
    for taken in range(1, 10):  # into the next epoch, whose order is not drawn ahead
        next(stream)
        while len(gathered) < (ahead := taken + (taken % 7 != 0)):
            threading.Event().wait(0.001)
        assert len(gathered) == ahead
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_a_failure_in_the_thread_is_the_callers():
    batches = Batches(IMAGES, 8, 3, True, device=CPU, free=nothing_free)
    batches.order = lambda number: torch.tensor([0, 50])
    with pytest.raises(IndexError):
        list(batches.epoch(1))


def test_augmented_images_are_of_those_batches():
    plain = Batches(IMAGES, 8, 3, True, CONTEXT)
    turned = Batches(IMAGES, 8, 3, True, CONTEXT, augment="flip")
    torch.manual_seed(0)
    for one, two in zip(plain.epoch(1), turned.epoch(1), strict=True):
        same = (one.images == two.images).flatten(1).all(1)
        mirrored = (one.images == two.images.flip(3)).flatten(1).all(1)
        assert bool((same | mirrored).all())
        assert torch.equal(one.context, two.context)
    assert not torch.equal(epoch(turned, 1, 0)[0].images, epoch(turned, 1, 1)[0].images)
    assert torch.equal(epoch(turned, 1, 1)[0].images, epoch(turned, 1, 1)[0].images)


@pytest.mark.cuda
@pytest.mark.parametrize("fits", [True, False])
def test_on_a_gpu(fits):
    free = None if fits else (lambda device: 0)
    options = {} if free is None else {"free": free}
    batches = Batches(IMAGES, 8, 3, True, CONTEXT, device=torch.device("cuda"), **options)
    assert batches.resident is fits
    assert batches.images.is_cuda is fits
    for one, two in zip(
        Batches(IMAGES, 8, 3, True, CONTEXT).epoch(1), batches.epoch(1), strict=True
    ):
        assert two.images.is_cuda
        assert torch.equal(one.images, two.images.cpu())
        assert torch.equal(one.context, two.context.cpu())
    assert batches.order(1).device == batches.images.device
