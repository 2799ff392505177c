"""Training: each step is the right one, and a run can be cut off anywhere."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import small_flows
import torch

import snf_ext
from snf_ext.training import checkpoint, evaluate
from snf_ext.training.batches import Batches
from snf_ext.training.config import DEFAULTS, Config, resolve
from snf_ext.training.context import context_of, rows_of_classes
from snf_ext.training.data import Dataset
from snf_ext.training.errors import Diverged, UserError
from snf_ext.training.loop import Trainer
from snf_ext.training.seeds import derive_seed

SHAPE = (1, 2, 3)


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(17, (count, *SHAPE), generator=generator, dtype=torch.uint8)


DATA = Dataset("noise", images(50, 1), images(20, 2), images(20, 3), SHAPE, 17)
pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = Config("fc", "noise", 5, 8, 1e-2, 1.0, warmup_epochs=2, clip_norm=100.0, seed=7)


def trainer(folder, config=CONFIG, data=DATA):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    flow = snf_ext.models.fc(SHAPE, pixel_levels=17)
    return Trainer(flow, {"name": "fc", "settings": {}}, data, config, folder, progress=False)


def new_run(folder, config=CONFIG):
    run = trainer(folder, config)
    run.begin()
    return run


def resumed(folder, config=CONFIG):
    run = trainer(folder, config)
    torch.manual_seed(123456)  # whatever came before must not matter
    run.flow.load_state_dict({k: v + 1 for k, v in run.flow.state_dict().items()})
    run.resume(checkpoint.load(folder / "last.pt", resume=True), folder / "last.pt")
    return run


def same_run(a, b):
    """Bit for bit the same files, but for the clock."""
    for name in ("last.pt", "best.pt"):
        one, two = checkpoint.load(a / name), checkpoint.load(b / name)
        for content in (one, two):
            del content["config"]["epochs"]  # best.pt has what was asked for when it was written
            for row in content.get("history", []):
                del row["seconds"]
        assert_same(one, two)


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert new_run(folder).fit()
    return folder


# ---- settings, order, learning rate


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("lr", 0.0, "positive and finite"),
        ("lr", float("nan"), "positive and finite"),
        ("recon_weight", -1.0, "finite, not negative"),
        ("warmup_epochs", float("inf"), "finite, not negative"),
        ("clip_norm", 0.0, "positive"),
        ("angle_every", -1, "at least 0"),
        ("monitor_every", -1, "at least 0"),
        ("check_every", -1, "at least 0"),
        ("on_divergence", "hope", "one of stop, rollback"),
        ("optimizer", "sgd", "one of adam, radam"),
        ("objective", "bytes", "one of nats, bits"),
        ("log_det_penalty", -1e-5, "finite, not negative"),
        ("log_det_penalty", float("nan"), "finite, not negative"),
        ("actnorm_batches", 0, "at least 1"),
    ],
)
def test_settings_out_of_range(name, value, rule):
    with pytest.raises(UserError, match=f"{name} must be {rule}; got {value}"):
        Config.from_dict(CONFIG.to_dict() | {name: value})


def test_settings_of_a_resumed_run():
    assert resolve({"model": None, "epochs": None}, CONFIG) == CONFIG
    assert resolve({"epochs": 9, "lr": 1e-2}, CONFIG).epochs == 9
    for name, value in [("lr", 0.5), ("seed", 8), ("batch_size", 9), ("data", "mnist")]:
        with pytest.raises(UserError, match=f"{name} must stay .* when a run is resumed; got"):
            resolve({name: value}, CONFIG)
    with pytest.raises(UserError, match=r"the run's settings must fit this version; .*colour"):
        Config.from_dict(CONFIG.to_dict() | {"colour": "red"})


@pytest.mark.parametrize(
    ("model", "data", "lr", "recon_weight", "clip_norm"),
    [
        ("fc", "mnist", 1e-4, 1.0, None),
        ("conv", "mnist", 1e-3, 1.0, None),
        ("glow", "mnist", 1e-3, 100.0, None),
        ("glow", "images", 1e-3, 1000.0, 10_000.0),
    ],
)
def test_paper_settings(model, data, lr, recon_weight, clip_norm):
    """SNF A.3."""
    config = resolve({"model": model, "data": data})
    assert (config.batch_size, config.warmup_epochs, config.optimizer) == (100, 10.0, "adam")
    assert (config.lr, config.recon_weight, config.clip_norm) == (lr, recon_weight, clip_norm)
    assert (config.objective, config.log_det_penalty) == ("nats", 0.0)


def test_every_model_has_settings_for_every_data_set():
    from snf_ext.training.data import LOADERS

    for data in LOADERS:
        for model in ("fc", "conv", "glow", "one of another package"):
            assert resolve({"model": model, "data": data}).data == data
    assert {data for _, data in DEFAULTS} <= set(LOADERS)


def test_arguments_of_the_model_add_to_its_defaults():
    usual = resolve({"model": "glow", "data": "digits"}).model_args
    assert usual == {"inverse": "tracked", "levels": 2, "steps": 4, "width": 16}
    asked = {"steps": 3, "mixing": "lu"}
    config = resolve({"model": "glow", "data": "digits", "model_args": asked})
    assert config.model_args == {"levels": 2, "steps": 3, "width": 16, "mixing": "lu"}
    assert resolve({"model_args": {"steps": 3}}, config) == config
    with pytest.raises(UserError, match=r"model_args must stay .*'steps': 3.*; got .*'steps': 4"):
        resolve({"model_args": {"steps": 4}}, config)
    assert resolve({"model": "glow", "data": "digits"}).model_args == usual


def test_inverses_are_tracked_unless_the_penalty_is_asked_for():
    def inverse(**asked):
        return resolve({"model": "fc", "data": "digits", **asked}).model_args.get("inverse")

    assert inverse() == "tracked"
    assert inverse(model_args={"layers": 3}) == "tracked"
    assert inverse(model_args={"inverse": "penalty"}) == "penalty"
    assert inverse(recon_weight=1.0) is None
    assert inverse(on_divergence="rollback") is None
    assert inverse(model_args={"linear": "exact"}) is None
    assert inverse(model="autoregressive") is None


def whole_epoch(batches, number):
    return torch.cat([batch.images for batch in batches.epoch(number)])


def test_batches_cover_each_epoch_in_an_order_of_its_own():
    batches = Batches(torch.arange(50), 8, seed=3, shuffle=True)
    assert len(batches) == 7
    stream = batches.stream(1)
    epochs = [torch.cat([next(stream).images for _ in range(7)]) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(50))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(whole_epoch(batches, 3), epochs[2])
    assert [len(batch.images) for batch in batches.epoch(1)] == [8] * 6 + [2]
    other = Batches(torch.arange(50), 8, seed=4, shuffle=True)
    assert not torch.equal(whole_epoch(other, 1), epochs[0])
    straight = Batches(torch.arange(50), 8, seed=3, shuffle=False)
    assert torch.equal(whole_epoch(straight, 2), torch.arange(50))


def test_seeds_are_of_their_parts_alone():
    parts = [(0, "epoch", 1), (0, "epoch", 2), (1, "epoch", 1), (0, "order", 1), (0, "epoch1")]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert derive_seed(0, "epoch", 1) == 65714578822508956


def test_learning_rate_and_clipping_of_each_step(tmp_path):
    config = Config.from_dict(CONFIG.to_dict() | {"epochs": 3, "clip_norm": 0.5})
    run = new_run(tmp_path, config)
    rates, norms = [], []

    def before_step(optimizer, args, kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad.flatten() for p in run.flow.parameters()]
        norms.append(torch.cat(gradients).norm().item())

    run.optimizer.register_step_pre_hook(before_step)
    run.fit()
    warmup = 2 * 7  # epochs times steps
    expected = [1e-2 * min(1.0, step / warmup) for step in range(1, 22)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert norms == pytest.approx([0.5] * 21, rel=1e-4)
    assert [row["lr"] for row in run.history] == pytest.approx([0.0, 5e-3, 1e-2, 1e-2])


RECIPES = {
    "adam": ({}, lambda p: torch.optim.Adam(p, betas=(0.9, 0.999)), 1.0),
    "radam": ({"optimizer": "radam"}, lambda p: torch.optim.RAdam(p, betas=(0.9, 0.999)), 1.0),
    "bits": (
        {"objective": "bits"},
        lambda p: torch.optim.Adam(p, betas=(0.9, 0.999)),
        1 / (6 * math.log(2)),
    ),
    "penalty": ({"log_det_penalty": 0.3}, lambda p: torch.optim.Adam(p, betas=(0.9, 0.999)), 1.0),
}


@pytest.mark.parametrize(("settings", "make", "unit"), RECIPES.values(), ids=RECIPES)
def test_the_loop_is_plain_optimization(tmp_path, settings, make, unit):
    """The loop's weights are those of the same steps written out."""
    config = replace(CONFIG, epochs=2, clip_norm=None, **settings)
    run = new_run(tmp_path, config)
    run.fit()
    torch.manual_seed(0)
    flow = snf_ext.models.fc(SHAPE, pixel_levels=17).train()
    optimizer = make(flow.parameters())
    linear = [layer for layer in flow.bijections if isinstance(layer, snf_ext.SelfNormLinear)]
    step, losses = 0, []
    for epoch in (1, 2):
        torch.manual_seed(derive_seed(7, "epoch", epoch))
        for batch in Batches(DATA.train, 8, 7, True).epoch(epoch):
            step += 1
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, step / 14)
            optimizer.zero_grad()
            loss = unit * flow.loss(batch.images)
            if config.log_det_penalty:
                # Its gradient, 2 log|det| R', is by the learned inverse, as the likelihood's.
                for layer in linear:
                    log_det = torch.linalg.slogdet(layer.weight.detach().double()).logabsdet
                    surrogate = (layer.weight * layer.weight_inv.detach().T).sum()
                    surrogate = surrogate - (layer.weight_inv * layer.weight.detach().T).sum()
                    loss = loss + 0.3 * log_det.float() * (surrogate - surrogate.detach())
                    loss = loss + 0.3 * log_det.float().square()
            loss.backward()
            losses.append(loss.item() * len(batch.images))
            optimizer.step()
    for name, value in run.flow.state_dict().items():
        torch.testing.assert_close(value, flow.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert run.history[2]["train_loss"] == pytest.approx(sum(losses[7:]) / 50, rel=1e-5)


# ---- runs that end, and runs that go on


def test_history_and_best(whole):
    history = json.loads((whole / "history.json").read_text())
    last, best = checkpoint.load(whole / "last.pt", resume=True), checkpoint.load(whole / "best.pt")
    assert last["history"] == history
    assert [row["epoch"] for row in history] == list(range(6))
    assert [row["step"] for row in history] == [7 * epoch for epoch in range(6)]
    lowest = min(history, key=lambda row: row["val_nll"])
    assert (best["epoch"], best["val_nll"]) == (lowest["epoch"], lowest["val_nll"])
    assert last["best"] == {"epoch": lowest["epoch"], "val_nll": lowest["val_nll"]}
    flow = snf_ext.models.fc(SHAPE, pixel_levels=17)
    checkpoint.load_weights(flow, best, whole / "best.pt")
    nll = evaluate.negative_log_likelihood(flow, DATA.val, CONFIG.seed).mean().item()
    assert nll == pytest.approx(lowest["val_nll"], rel=1e-9)
    for row in history:
        assert row["val_bits_per_dim"] == pytest.approx(row["val_nll"] / math.log(2) / 6)
        assert 0 <= row["angle"] < 90
    seconds = [row["seconds"] for row in history]
    assert seconds == sorted(seconds)
    names = {path.name for path in whole.iterdir()}
    assert names == {"best.pt", "last.pt", "history.json", "tensorboard"}


def test_tensorboard_log(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(whole / "tensorboard"))
    log.Reload()
    history = json.loads((whole / "history.json").read_text())
    logged = [(event.step, event.value) for event in log.Scalars("val_nll")]
    assert logged == [(row["epoch"], pytest.approx(row["val_nll"])) for row in history]
    assert {"train_loss", "lr", "recon", "angle"} <= set(log.Tags()["scalars"])


def test_two_runs_have_the_same_bits(whole, tmp_path):
    assert new_run(tmp_path).fit()
    same_run(whole, tmp_path)


@pytest.mark.parametrize("done", [1, 4])
def test_resume_is_bit_for_bit(whole, tmp_path, done):
    short = Config.from_dict(CONFIG.to_dict() | {"epochs": done})
    assert new_run(tmp_path, short).fit()
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == done
    assert resumed(tmp_path).fit()
    same_run(whole, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [3, 14, 20])
def test_a_signal_ends_the_run_and_resuming_is_bit_for_bit(whole, tmp_path, number, step):
    run = new_run(tmp_path)
    steps = []

    def send(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)

    run.optimizer.register_step_post_hook(send)
    handler = signal.getsignal(number)
    assert not run.fit()
    assert run.stopped_by == number
    assert signal.getsignal(number) is handler
    assert len(steps) == step
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == (step - 1) // 7
    assert resumed(tmp_path).fit()
    same_run(whole, tmp_path)


@pytest.mark.parametrize("lost", ["last.pt", "history.json"])
def test_cut_off_between_two_files(whole, tmp_path, monkeypatch, lost):
    """The process dies when best.pt of epoch 3 is written and ``lost`` is not."""
    run, replace = new_run(tmp_path), os.replace

    def die(source, target):
        if run.epoch == 3 and str(target).endswith(lost):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            run.fit()
    assert resumed(tmp_path).fit()
    same_run(whole, tmp_path)
    history = json.loads((tmp_path / "history.json").read_text())
    assert [row["epoch"] for row in history] == list(range(6))


def test_nothing_left_to_do(whole, tmp_path):
    run = trainer(tmp_path)
    run.resume(checkpoint.load(whole / "last.pt", resume=True), whole / "last.pt")
    assert run.fit()
    assert run.epoch == 5


def test_training_leaves_the_callers_random_numbers(tmp_path):
    run = new_run(tmp_path, Config.from_dict(CONFIG.to_dict() | {"epochs": 1}))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run.fit()
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    run = new_run(tmp_path)
    loss, calls = run.flow.loss, []

    def overflow(x, context=None, **options):
        calls.append(1)
        return loss(x, context, **options) * (float("inf") if len(calls) == 10 else 1.0)

    monkeypatch.setattr(run.flow, "loss", overflow)
    message = (
        r"training diverged: the loss is inf in epoch 2, step 10; the last good checkpoint is "
        r".*last.pt \(epoch 1, .* nats\); try a lower --lr, a larger --recon-weight"
    )
    with pytest.raises(Diverged, match=message):
        run.fit()
    content = checkpoint.load(tmp_path / "last.pt")
    assert content["epoch"] == 1
    assert all(value.isfinite().all() for value in content["state"].values())


def test_a_bad_weight_is_never_saved(tmp_path):
    """weight_inv does not enter the likelihood: a finite NLL does not make it a good epoch."""
    run = new_run(tmp_path)
    steps = []

    def poison(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) == 14:
            run.flow.bijections[-1].weight_inv.data[0, 0] = float("nan")

    run.optimizer.register_step_post_hook(poison)
    with pytest.raises(Diverged, match=r"bijections.6.weight_inv is not finite in epoch 2"):
        run.fit()
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 1


def test_a_singular_layer_is_not_a_good_epoch(tmp_path):
    run = trainer(tmp_path)
    run.flow.bijections[-1].weight.data.zero_()
    with pytest.raises(Diverged, match=r"the validation NLL is inf in epoch 0.*no checkpoint"):
        run.begin()
    assert list(tmp_path.iterdir()) == []


def test_progress_without_a_terminal(tmp_path, capfd):
    run = new_run(tmp_path)
    run.progress = True
    run.fit()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("epoch 5/5  loss ")
    assert f"val_nats {run.history[-1]['val_nll']:.4g}" in lines[-1]


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
