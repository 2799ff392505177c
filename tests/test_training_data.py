"""Training on labelled images, and layers that initialise by the data."""

import math
from dataclasses import replace

import pytest
import small_flows
import torch
from training_runs import CONFIG, DATA, SHAPE, assert_same, images, new_run, resumed, same_run

import snf_ext
from snf_ext.training import checkpoint, evaluate
from snf_ext.training.batches import Batches
from snf_ext.training.context import context_of, rows_of_classes
from snf_ext.training.data import Dataset
from snf_ext.training.errors import UserError
from snf_ext.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- labels


def labelled(count, seed):
    """Images whose first pixel is their class."""
    x = images(count, seed)
    labels = x[:, 0, 0, 0].long() % 3
    x[:, 0, 0, 0] = labels.byte()
    return x, labels


SPLITS = [labelled(50, 1), labelled(20, 2), labelled(20, 3)]
LABELLED = Dataset(
    "classes", *(x for x, _ in SPLITS), SHAPE, 17, *(labels for _, labels in SPLITS), 3
)


def conditional_run(folder, config=CONFIG, data=LABELLED):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    run = Trainer(small_flows.conditional(), {"name": "c", "settings": {}}, data, config, folder)
    run.progress = False
    return run


@pytest.mark.parametrize("shuffle", [True, False])
def test_labels_travel_with_their_images(tmp_path, shuffle):
    run = conditional_run(tmp_path, replace(CONFIG, epochs=2, shuffle=shuffle))
    run.begin()
    seen, loss = [], run.flow.loss

    def look(x, context=None, **options):
        assert context.shape == (len(x), 3)
        assert context.dtype == torch.float32
        assert torch.equal(context.argmax(1), x[:, 0, 0, 0].long())
        assert torch.equal(context.sum(1), torch.ones(len(x)))
        seen.append(x)
        return loss(x, context, **options)

    run.flow.loss = look
    run.fit()
    assert len(torch.cat(seen)) == 100
    assert torch.equal(torch.cat(seen[:7]), LABELLED.train) is not shuffle


def test_a_conditional_run_learns_from_the_classes(tmp_path):
    """The first pixel is the class: knowing it is worth bits."""
    run = conditional_run(tmp_path / "right", replace(CONFIG, epochs=30, angle_every=0, lr=5e-2))
    run.begin()
    run.fit()
    turned = replace(LABELLED, val_labels=(LABELLED.val_labels + 1) % 3)
    wrong = conditional_run(tmp_path / "wrong", data=turned)
    wrong.flow.load_state_dict(run.flow.state_dict())
    context = context_of(run.flow, LABELLED.val_labels)
    nll = evaluate.negative_log_likelihood(run.flow, LABELLED.val, 7, context).mean().item()
    assert run.history[-1]["val_nll"] == pytest.approx(nll, rel=1e-9)
    row = {"epoch": 0, "step": 0}
    wrong._measure(row)
    assert row["val_nll"] > nll + 1


def test_a_conditional_run_resumes_bit_for_bit(tmp_path):
    settings = {"optimizer": "radam", "objective": "bits", "log_det_penalty": 1e-3}
    config = replace(CONFIG, conditional=True, **settings)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = conditional_run(whole, config)
    run.begin()
    assert run.fit()
    run = conditional_run(cut, replace(config, epochs=2))
    run.begin()
    assert run.fit()
    run = conditional_run(cut, config)
    torch.manual_seed(123456)
    run.resume(checkpoint.load(cut / "last.pt", resume=True), cut / "last.pt")
    assert run.fit()
    same_run(whole, cut)
    assert checkpoint.load(cut / "last.pt")["config"]["optimizer"] == "radam"


def test_context_of_labels():
    flow = small_flows.conditional().double()
    context = context_of(flow, torch.tensor([2, 0]))
    assert context.dtype == torch.float64
    assert context.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert context_of(snf_ext.models.fc(SHAPE), torch.tensor([2, 0])) is None
    with pytest.raises(UserError, match="labels must be given: the flow takes 3 classes"):
        context_of(flow, None)
    for bad in ([0, 3], [-1, 1]):
        with pytest.raises(
            UserError, match=rf"labels must lie in 0\.\.2; got {bad[0]}\.\.{bad[1]}"
        ):
            context_of(flow, torch.tensor(bad))


def test_one_row_a_class():
    labels, columns = rows_of_classes(64, 10)
    assert columns == 7
    assert len(labels) == 64
    assert all(len(set(row.tolist())) == 1 for row in labels.split(columns))
    assert labels.unique().tolist() == list(range(10))
    labels, columns = rows_of_classes(3, 10)
    assert (labels.tolist(), columns) == ([0, 1, 2], 1)


# ---- layers that initialise by the data


def actnorm_run(folder, count):
    """Raw pixels / 17, a conditional layer that does nothing yet, then actnorm in a nest."""
    folder.mkdir(exist_ok=True)
    layers = [
        snf_ext.Normalize(0.0, 17.0),
        snf_ext.Flatten(SHAPE),
        small_flows.ContextAffine(6, 3),
        small_flows.Nest([snf_ext.ActNorm(6)]),
    ]
    flow = snf_ext.Flow(layers, SHAPE, context_features=3)
    config = replace(CONFIG, epochs=2, actnorm_batches=count, angle_every=0)
    return Trainer(flow, {"name": "c", "settings": {}}, LABELLED, config, folder, False)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_first_batches_initialise_before_anything_is_measured(tmp_path, count):
    run = actnorm_run(tmp_path, count)
    with torch.no_grad():  # each class has its own shift, so that contexts matter
        run.flow.bijections[2].shift += torch.arange(3.0)[:, None]
    run.begin()
    stream = Batches(LABELLED.train, 8, 7, True, LABELLED.train_labels).stream(1)
    shown = [next(stream) for _ in range(count)]
    seen = torch.cat([x.flatten(1).double() / 17 - c[:, None] for x, c in shown])
    std = seen.std(0, correction=0)
    assert len(seen) == {1: 8, 3: 24, 9: 50 + 16}[count]
    state = checkpoint.load(tmp_path / "last.pt")["state"]
    for content in (state, run.flow.state_dict()):
        shift, log_scale = (content[f"bijections.3.rest.0.{n}"] for n in ("shift", "log_scale"))
        torch.testing.assert_close(shift.double(), seen.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(log_scale.double().exp(), std, rtol=1e-4, atol=1e-5)
    x = LABELLED.val.flatten(1).double() / 17 - LABELLED.val_labels[:, None]
    z = (x - seen.mean(0)) / std
    log_prob = -0.5 * z.square().sum(1) - std.log().sum() - 6 * math.log(17)
    nll = 3 * math.log(2 * math.pi) - log_prob.mean().item()
    assert run.history[0]["val_nll"] == pytest.approx(nll, rel=1e-4)


def test_initialisation_draws_numbers_of_its_own_and_happens_once(tmp_path):
    states = []
    for seed in (1, 2):  # whatever came before must not matter
        torch.manual_seed(0)
        flow = snf_ext.Flow(
            [snf_ext.Dequantize(17), snf_ext.Flatten(SHAPE), snf_ext.ActNorm(6)], SHAPE
        )
        folder = tmp_path / str(seed)
        folder.mkdir()
        run = Trainer(flow, {"name": "c", "settings": {}}, DATA, CONFIG, folder, False)
        torch.manual_seed(seed)
        run.begin()
        states.append({name: value.clone() for name, value in flow.state_dict().items()})
    assert_same(*states)
    flow.bijections[2].shift.data += 1
    run.begin()  # what is initialised stays
    torch.testing.assert_close(flow.bijections[2].shift, states[1]["bijections.2.shift"] + 1)


@pytest.mark.parametrize("augment", ["flip", "flip-jitter"])
def test_an_augmented_run_goes_on_with_the_same_bits(tmp_path, augment):
    config = replace(CONFIG, augment=augment, epochs=4)
    assert new_run(tmp_path / "whole", config).fit()
    assert new_run(tmp_path / "cut", replace(config, epochs=2)).fit()
    assert resumed(tmp_path / "cut", config).fit()
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert new_run(tmp_path / "plain", replace(config, augment=None)).fit()
    with pytest.raises(AssertionError):
        same_run(tmp_path / "whole", tmp_path / "plain")
