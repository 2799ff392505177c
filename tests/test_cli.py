"""The command line, from the main job to every way to get it wrong."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_flows
import torch
from cli_runs import QUICK, environment, one_line, run

from snf_ext import SelfNormConv2d, cli, models
from snf_ext.training import angle, checkpoint, loop
from snf_ext.training.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"
pytestmark = pytest.mark.usefixtures("in_own_folder")


def test_main_job(trained):
    folder, done = trained
    assert re.search(r"^epoch 40/40  loss .* val_nats .* angle", done.stderr, re.MULTILINE)
    result = json.loads((folder / "result.json").read_text())
    test = result["test"]
    assert result["start_test_nll"] - test["nll"] > 30
    assert test["images"] == 300
    assert test["bits_per_dim"] == pytest.approx(test["nll"] / 64 / 0.6931471805599453)
    assert test["bits_per_dim"] < 4.09  # a uniform guess
    assert 0 < result["angle"] < 5
    assert 0 < test["reconstruction"] < 1
    assert result["rollbacks"] == []
    for line in (
        f"untrained test NLL: {result['start_test_nll']:.2f} nats",
        f"test NLL: {test['nll']:.2f} nats, {test['bits_per_dim']:.3f} bits/dim, exact",
        f"reconstruction error: {test['reconstruction']:.4g}",
        f"angle between self-normalizing and exact gradient: {result['angle']:.3f} degrees",
        f"checkpoint: {folder / 'best.pt'}",
    ):
        assert line in done.stdout
    pictures = ["curves.png", "reconstructions.png", "samples.png"]
    files = ["best.pt", "config.json", "history.json", "last.pt", "result.json", "tensorboard"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(files + pictures)
    for name in pictures:
        assert (folder / name).read_bytes().startswith(PNG)


def test_evaluate_repeats_the_training_commands_figures(trained, capsys):
    folder, done = trained
    run("evaluate", "--checkpoint", folder / "best.pt")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert set(printed) <= set(done.stdout.splitlines())
    run("evaluate", "--checkpoint", folder / "best.pt", "--split", "val")
    best = checkpoint.load(folder / "best.pt")
    assert capsys.readouterr().out.startswith(f"val NLL: {best['val_nll']:.2f} nats")


def test_noise_bound_stands_beside_the_exact_likelihood(trained, tmp_path, capsys):
    content = checkpoint.load(trained[0] / "best.pt")
    for name, value in content["state"].items():
        if name.endswith("weight_inv"):
            value.mul_(1.003)  # tracked, it is the inverse, and the bound the exact value
    checkpoint.save(best := tmp_path / "best.pt", content)
    gaps = {}
    for sigma in (1e-3, 0.1):
        run("evaluate", "--checkpoint", best, "--noise", sigma)
        nll, reconstruction, _, line = capsys.readouterr().out.splitlines()
        found = re.match(
            rf"test NLL bound with noise {sigma:g}: (\S+) nats \(.*\), (\S+) to the exact (\S+)$",
            line,
        )
        bound, gaps[sigma], exact = map(float, found.groups())
        assert nll.startswith(f"test NLL: {exact:.2f} nats")
        assert bound - exact == pytest.approx(gaps[sigma], abs=0.011)
    # Little noise costs what the learned inverse lacks.
    missing = float(re.match(r"reconstruction error: (\S+)", reconstruction).group(1))
    assert gaps[1e-3] == pytest.approx(missing / 2e-6, rel=0.05)
    assert gaps[0.1] < 1e-3 * gaps[1e-3]


def test_sample(trained, tmp_path, capsys):
    from matplotlib.image import imread

    best = trained[0] / "best.pt"
    pixels = {}
    for name, more in {
        "learned": [],
        "again": [],
        "exact": ["--exact"],
        "refined": ["--refine", "3"],
        "other": ["--seed", "1"],
        "cold": ["--temperature", "0.1"],
    }.items():
        out = tmp_path / f"{name}.png"
        run("sample", "--checkpoint", best, "--count", "5", "--out", out, *more)
        assert f"samples: {out}" in capsys.readouterr().out
        pixels[name] = imread(out).tobytes()
    assert pixels["learned"] == pixels["again"]
    assert len(set(pixels.values())) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.png" for name in pixels
    )


def test_the_default_folder_and_untouched_globals(capsys, tmp_path):
    threads = torch.get_num_threads()
    run(*QUICK, "--epochs", "1", "--limit-train", "100")
    run(*QUICK, "--epochs", "1", "--limit-train", "100")
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(re.fullmatch(r"fc-digits-\d{8}-\d{6}(-2)?", name) for name in folders)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_the_models_own_arguments(capsys):
    arguments = ["--model-args", "layers=3", "linear=exact"]
    run(*QUICK, "--epochs", "1", "--limit-train", "100", "--run-dir", "a", *arguments)
    model = checkpoint.load(Path("a/best.pt"))["model"]
    assert model["settings"] == {
        "event_shape": (1, 8, 8),
        "pixel_levels": 17,
        "layers": 3,
        "linear": "exact",
    }
    assert "angle" not in capsys.readouterr().out  # there is no learned inverse to compare
    run("evaluate", "--checkpoint", "a/last.pt")


def same_bits(a, b):
    one, two = (checkpoint.load(folder / "last.pt", resume=True) for folder in (a, b))
    assert one["epoch"] == two["epoch"]
    for key in ("state", "optimizer"):
        flat = [flatten(content[key]) for content in (one, two)]
        assert flat[0].keys() == flat[1].keys()
        for name, value in flat[0].items():
            assert value == flat[1][name], name
    assert checkpoint.load(a / "best.pt")["val_nll"] == checkpoint.load(b / "best.pt")["val_nll"]


def flatten(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value.numpy().tobytes()}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, item in items for k, v in flatten(item, f"{name}/{key}").items()}


def test_killed_in_mid_run_and_resumed(tmp_path, capsys):
    """SIGKILL wherever it strikes: the resumed run ends with the bits of one never stopped."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    settings = ["--batch-size", "50", "--seed", "3"]
    endless = [*QUICK, *settings, "--epochs", "100000", "--run-dir", str(killed)]
    process = subprocess.Popen(
        [sys.executable, "-m", "snf_ext", *endless],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 100
        while not epochs_in(killed) >= 3:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "no epoch within 100 seconds"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    (killed / ".last.pt.part").write_bytes(b"what a kill in mid-write leaves")
    done = checkpoint.load(killed / "last.pt", resume=True)["epoch"]
    epochs = str(done + 2)
    run("train", "--resume", "--run-dir", killed, "--epochs", epochs, "--no-progress")
    run(*QUICK, *settings, "--epochs", epochs, "--run-dir", whole)
    same_bits(killed, whole)
    assert not list(killed.glob(".*"))
    capsys.readouterr()


def epochs_in(folder):
    try:
        return json.loads((folder / "history.json").read_text())[-1]["epoch"]
    except FileNotFoundError:
        return 0


def test_ctrl_c(capsys, monkeypatch):
    step, steps = loop.Trainer._step, []

    def interrupted(self, engine, images):
        steps.append(1)
        if len(steps) == 30:
            signal.raise_signal(signal.SIGINT)
        return step(self, engine, images)

    monkeypatch.setattr(loop.Trainer, "_step", interrupted)
    run(*QUICK, "--epochs", "9", "--run-dir", "a", status=130)
    assert one_line(capsys) == (
        "snf-ext: stopped after 2 of 9 epochs; go on with --resume --run-dir a"
    )
    assert checkpoint.load(Path("a/last.pt"), resume=True)["epoch"] == 2


def test_divergence_is_told_in_one_line(capsys):
    run(*QUICK, "--lr", "1e12", "--warmup-epochs", "0", "--run-dir", "a", status=1)
    assert re.match(r"snf-ext: training diverged: .* in epoch 1, step", one_line(capsys))
    assert checkpoint.load(Path("a/last.pt"))["epoch"] == 0


# ---- what is not of one model or one data set alone


def test_the_settings_of_stabilised_training(capsys):
    more = ["--optimizer", "radam", "--objective", "bits", "--log-det-penalty", "1e-3"]
    run(*QUICK, *more, "--epochs", "1", "--limit-train", "100", "--run-dir", "a")
    config = checkpoint.load(Path("a/last.pt"))["config"]
    settings = {"optimizer": "radam", "objective": "bits", "log_det_penalty": 1e-3}
    assert {key: config[key] for key in settings} == settings
    history = json.loads(Path("a/history.json").read_text())
    assert history[1]["train_loss"] < 8  # bits/dim, where nats would be over 100


@pytest.fixture(scope="module")
def class_run(tmp_path_factory):
    """A run of a conditional model on 50 digits."""
    folder = tmp_path_factory.mktemp("classes") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cli.MODELS, "classes", small_flows.conditional)
        options = cli.Train(
            model="classes",
            model_args=("width=2",),
            conditional=True,
            epochs=2,
            limit_train=50,
            run_dir=folder,
            angle_every=0,
            progress=False,
        )
        cli.train(options)
    return folder


@pytest.fixture
def classes(class_run, monkeypatch):
    """Its checkpoint, with the model in the table."""
    monkeypatch.setitem(cli.MODELS, "classes", small_flows.conditional)
    return class_run / "best.pt"


def test_conditional_runs(classes, capsys):
    model = checkpoint.load(classes)["model"]
    assert model["settings"] == {
        "event_shape": (1, 8, 8),
        "pixel_levels": 17,
        "context_features": 10,
        "width": 2.0,
    }
    test = json.loads((classes.parent / "result.json").read_text())["test"]
    capsys.readouterr()
    run("evaluate", "--checkpoint", classes)
    assert capsys.readouterr().out.startswith(f"test NLL: {test['nll']:.2f} nats")
    shutil.copytree(classes.parent, "a")
    run("train", "--resume", "--run-dir", "a", "--epochs", "3", "--no-progress")
    assert checkpoint.load(Path("a/last.pt"))["epoch"] == 3


def test_a_model_without_context(tmp_path, monkeypatch):
    monkeypatch.setitem(cli.MODELS, "plain", lambda event_shape, *, pixel_levels: None)
    message = r"model plain takes no context; leave out --conditional; models that do: fc, conv, gl"
    with pytest.raises(UserError, match=message):
        cli.train(cli.Train(model="plain", conditional=True))
    assert not list(tmp_path.iterdir())


def test_samples_of_a_class(classes, tmp_path, capsys, monkeypatch):
    contexts, sample = [], cli.Flow.sample

    def look(self, count, context=None, **options):
        contexts.append(context.argmax(1).tolist())
        return sample(self, count, context, **options)

    monkeypatch.setattr(cli.Flow, "sample", look)
    run("sample", "--checkpoint", classes, "--count", "6", "--label", "3", "--exact")
    run("sample", "--checkpoint", classes, "--count", "20")
    assert contexts == [[3] * 6, [label for label in range(10) for _ in range(2)]]
    before = sorted(tmp_path.rglob("*"))
    for label in (10, -1):
        run("sample", "--checkpoint", classes, "--label", label, "--out", "b.png", status=2)
        assert f"label must lie in 0..9; got {label}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_refined_samples(trained, monkeypatch):
    asked, sample = [], cli.Flow.sample

    def look(self, *args, **options):
        asked.append((options.get("refine", 0), options["exact"]))
        return sample(self, *args, **options)

    monkeypatch.setattr(cli.Flow, "sample", look)
    for more in ([], ["--refine", "4"], ["--exact"]):
        run("sample", "--checkpoint", trained[0] / "best.pt", "--count", "2", *more)
    assert asked == [(0, False), (4, False), (0, True)]


def test_a_label_without_classes(trained, capsys):
    run("sample", "--checkpoint", trained[0] / "best.pt", "--label", "3", status=2)
    assert one_line(capsys) == (
        "snf-ext: label must be left out: the checkpoint's flow is not conditional; got 3"
    )


def test_more_classes_than_the_checkpoint_knows(classes, capsys, monkeypatch):
    from snf_ext.training import data

    digits = data.load("digits", labels=True)
    more = digits.with_labels([digits.labels(split) for split in data.SPLITS], 11)
    monkeypatch.setitem(data.LOADERS, "digits", lambda folder, labels: more)
    capsys.readouterr()
    run("evaluate", "--checkpoint", classes, status=2)
    assert "data must have at most 10 classes, as the checkpoint's model; digits has 11" in (
        one_line(capsys)
    )


def test_angles_that_are_not_measured_are_told(capsys, monkeypatch):
    def pixels(event_shape, *, pixel_levels=256):
        layers = [*models.preprocessing(pixel_levels), SelfNormConv2d(1, 3)]
        return cli.Flow(layers, event_shape)

    monkeypatch.setattr(angle, "MAX_OPERATIONS", 1e3)
    monkeypatch.setitem(cli.MODELS, "pixels", pixels)
    options = {"limit_train": 50, "run_dir": Path("a"), "progress": False}
    cli.train(cli.Train(model="pixels", epochs=1, **options))
    note = (
        "no gradient angle for 1 convolutions: their exact log-determinants take up to "
        "0.00017 Gflop each, more than 1e-06"
    )
    assert one_line(capsys) == note
    assert json.loads(Path("a/result.json").read_text())["angle"] is None
    run("evaluate", "--checkpoint", "a/best.pt")
    assert one_line(capsys) == note


def test_images_of_ones_own(tmp_path, capsys):
    draw = np.random.default_rng(0)
    train = draw.integers(0, 256, (1040, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", train_x=train, test_x=train[:9])
    run(*QUICK, "--data", "images", "--data-dir", tmp_path, "--epochs", "1", "--run-dir", "a")
    assert "(standard error" in capsys.readouterr().out
    settings = checkpoint.load(Path("a/best.pt"))["model"]["settings"]
    assert settings == {"event_shape": (3, 4, 4), "pixel_levels": 256, "inverse": "tracked"}
    run("evaluate", "--checkpoint", "a/best.pt", "--data-dir", "mine.npz")
