"""Training: each step is the right one, and a run can be cut off anywhere."""

import json
import math
import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from training_runs import CONFIG, DATA, SHAPE, new_run, resumed, same_run, trainer

import snf_ext
from snf_ext.training import checkpoint, evaluate
from snf_ext.training.batches import Batches
from snf_ext.training.config import DEFAULTS, Config, resolve
from snf_ext.training.errors import Diverged, UserError
from snf_ext.training.seeds import derive_seed

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ("evaluate_every", 0, "at least 1"),
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


def test_measuring_less_often_changes_nothing_else(whole, tmp_path):
    config = replace(CONFIG, evaluate_every=3, epochs=8, monitor_every=4)
    every = replace(config, evaluate_every=1)
    assert new_run(tmp_path / "every", every).fit()
    assert new_run(tmp_path / "some", config).fit()
    rows = {name: read_history(tmp_path / name) for name in ("every", "some")}
    assert [row["epoch"] for row in rows["some"]] == [0, 3, 6, 8]
    for row in rows["some"]:
        other = rows["every"][row["epoch"]]
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(rows["some"]))
    assert (tmp_path / "some/angles.csv").read_text() == (tmp_path / "every/angles.csv").read_text()
    # Cut off between two checkpoints: what is done again is the same.
    assert new_run(tmp_path / "cut", replace(config, epochs=6)).fit()
    assert resumed(tmp_path / "cut", config).fit()
    same_run(tmp_path / "some", tmp_path / "cut")


def read_history(folder):
    return json.loads((folder / "history.json").read_text())


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
