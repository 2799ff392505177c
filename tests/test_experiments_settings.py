"""Full scale is the papers' settings, written out here a second time; smaller scales say so."""

import inspect
import math

import pytest
from cli_runs import one_line, run

import snf_ext
from snf_ext.cli_options import MODELS
from snf_ext.experiments import EXPERIMENTS
from snf_ext.experiments.plan import reductions
from snf_ext.experiments.trained import Trained, config_of
from snf_ext.layers import LUConv1x1

NAMES = list(EXPERIMENTS)
# SNF A.3.
FC = {"epochs": 6000, "batch_size": 100, "lr": 1e-4, "recon_weight": 1.0, "warmup_epochs": 10}
CONV = {"epochs": 1000, "batch_size": 100, "lr": 1e-3, "recon_weight": 1.0, "warmup_epochs": 10}
GLOW = {"epochs": 250, "batch_size": 100, "lr": 1e-3, "recon_weight": 100.0, "warmup_epochs": 10}
LARGE = {"batch_size": 100, "lr": 1e-3, "recon_weight": 1000.0, "warmup_epochs": 10}
TABLE1 = {
    "fc-relative": (FC, 2 * 784 * 785, 1096.5, 0.5),
    "fc-exact": (FC, 2 * 784 * 785, 947.6, 0.2),
    "fc-snf": (FC, 2_460_192, 947.1, 0.2),
    "conv-emerging": (CONV, None, 645.7, 3.6),
    "conv-snf": (CONV, 102_613, 638.6, 0.9),
    "conv-exponential": (CONV, None, 638.1, 1.0),
    "conv-exact": (CONV, 102_613 - 9 * 3 * (1 + 16 + 256), 637.4, 0.2),
    "glow": (GLOW, None, 575.7, 0.8),
    "glow-snf": (GLOW, None, 575.4, 1.4),
}
TABLE2 = {
    "cifar10-glow": ({**LARGE, "epochs": 1000, "clip_norm": None}, 32, 3.36, 0.002),
    "cifar10-snf": ({**LARGE, "epochs": 1000, "clip_norm": 10_000}, 32, 3.37, 0.004),
    "imagenet32-glow": (
        {**LARGE, "epochs": 15, "batch_size": 64, "warmup_epochs": 0, "clip_norm": 10_000},
        *(48, 4.12, 0.002),
    ),
    "imagenet32-snf": (
        {**LARGE, "epochs": 15, "batch_size": 64, "warmup_epochs": 0, "clip_norm": 10_000},
        *(48, 4.14, 0.007),
    ),
}
TABLE3 = {
    "fc-exact": (44.9, 61.5, 100),
    "fc-relative": (7.0, 69.2, 100),
    "fc-snf": (18.7, 38.6, 100),
    "conv-exact": (372.2, 241.6, 100),
    "conv-emerging": (305.0, 71.7, 100),
    "conv-exponential": (304.4, 84.2, 100),
    "conv-snf": (212.5, 29.9, 100),
    "glow": (583.4, 163.1, 100),
    "glow-snf": (476.4, 30.6, 100),
    "cifar10-glow": (1841.3, 126.3, 100),
    "cifar10-snf": (1761.2, 97.8, 100),
    "imagenet32-glow": (2397.2, 174.8, 64),
    "imagenet32-snf": (2047.9, 150.7, 64),
}
TABLE4 = {
    "fc": {0.1: None, 1: 946.3, 10: 954.6, 100: 1007.4, 1000: 1039.8},
    "conv": {0.1: None, 1: 639.6, 10: 642.9, 100: 646.3, 1000: 660.6},
    "glow": {0.1: None, 1: None, 10: None, 100: 574.1, 1000: 574.8},
}
TABLE5 = {"glow-1x1": (678.3, 2.0), "snf-1x1": (678.3, 9.7), "snf-5x5": (669.9, 2.8)}
SFM_TABLE2 = {
    "additive-0": None,
    "additive-1e-05": 3.60,
    "affine-0": None,
    "affine-1e-05": 3.56,
}


def rows(name):
    return {row.name: row for row in EXPERIMENTS[name].rows if not row.ours}


def settings(row):
    return config_of(row, 0).to_dict()


def model(row, shape=(1, 28, 28)):
    return MODELS[row.model](event_shape=shape, **row.model_args)


def test_table1_is_the_papers():
    found = rows("table1")
    assert set(found) == set(TABLE1)
    for name, (wanted, parameters, mean, std) in TABLE1.items():
        row = found[name]
        assert settings(row).items() >= wanted.items()
        assert row.data == "mnist"
        assert (row.paper["nll"].mean, row.paper["nll"].std) == (mean, std)
        if parameters is not None:
            assert sum(p.numel() for p in model(row).parameters()) == parameters
        learned = [m.weight_inv for m in model(row).modules() if hasattr(m, "weight_inv")]
        assert bool(learned) == ("snf" in name)
        assert all(weight.requires_grad for weight in learned)  # by the penalty, as in the paper


def test_table1_has_rows_of_our_own_marked_as_ours():
    own = {row.name: row for row in EXPERIMENTS["table1"].rows if row.ours}
    assert not any(row.paper for row in own.values())
    for name in ("fc-tracked", "conv-tracked", "glow-tracked"):
        layers = model(own.pop(name)).modules()
        inverses = [layer.weight_inv for layer in layers if hasattr(layer, "weight_inv")]
        assert inverses
        assert not any(weight.requires_grad for weight in inverses)
    wide = model(own.pop("conv-snf-5x5"))
    kernels = [m.weight_inv.shape[2:] for m in wide.modules() if hasattr(m, "weight_inv")]
    assert kernels == [(5, 5)] * 9
    mixing = [m for m in model(own.pop("glow-lu")).modules() if isinstance(m, LUConv1x1)]
    assert len(mixing) == 32
    assert not own


def test_glow_of_mnist_is_2_levels_of_16_steps_of_width_512():
    for name in ("glow", "glow-snf"):
        flow = model(rows("table1")[name])
        steps = [m for m in flow.modules() if isinstance(m, snf_ext.AffineCoupling)]
        assert len([m for m in flow.modules() if isinstance(m, snf_ext.ActNorm)]) == 32
        assert {tuple(p.shape[:1]) for m in steps for p in m.parameters()} >= {(512,)}


def test_table2_is_the_papers():
    found = rows("table2")
    assert set(found) == set(TABLE2)
    for name, (wanted, steps, mean, std) in TABLE2.items():
        row = found[name]
        assert settings(row).items() >= wanted.items()
        assert row.data == name.partition("-")[0]
        assert settings(row)["augment"] == ("flip-jitter" if row.data == "cifar10" else None)
        size = {"levels": 3, "steps": steps, "width": 512}
        assert dict(row.model_args).items() >= size.items()
        assert row.model_args["mixing"] == ("self_norm" if "snf" in name else "plain")
        assert (row.paper["bits_per_dim"].mean, row.paper["bits_per_dim"].std) == (mean, std)


def test_table3_has_the_papers_times_and_batches():
    found = rows("table3")
    assert set(found) == set(TABLE3)
    for name, (batch, sample, size) in TABLE3.items():
        row = found[name]
        assert row.paper["batch_ms"].mean == batch
        assert row.paper["sample_ms"].mean == sample
        assert row.settings["batch_size"] == size
        source = {**rows("table1"), **rows("table2")}[name]
        assert (row.model, row.data) == (source.model, source.data)
        assert row.model_args == source.model_args


def test_table4_sweeps_lambda_and_knows_what_diverged():
    found = rows("table4")
    assert len(found) == 15
    for model_name, by_weight in TABLE4.items():
        for weight, nll in by_weight.items():
            row = found[f"{model_name}-{weight:g}"]
            assert row.paper["nll"].mean == nll
            assert settings(row)["recon_weight"] == weight
            like = rows("table1")["glow-snf" if model_name == "glow" else f"{model_name}-snf"]
            assert settings(row) == {**settings(like), "recon_weight": weight}
    own = [row for row in EXPERIMENTS["table4"].rows if row.ours]
    assert [settings(row)["controller"] for row in own] == ["relative"] * 3


def test_table5_is_the_papers():
    found = rows("table5")
    assert {n: (r.paper["nll"].mean, r.paper["nll"].std) for n, r in found.items()} == TABLE5
    for name, row in found.items():
        assert settings(row).items() >= {**GLOW, "epochs": 1000}.items()
        assert dict(row.model_args).items() >= {"levels": 2, "steps": 4, "width": 16}.items()
        assert settings(row)["controller"] == (None if name == "glow-1x1" else "geco")
    assert found["snf-5x5"].model_args["kernel_size"] == 5
    geco = inspect.signature(snf_ext.GECO).parameters
    assert (geco["rate"].default, geco["ema"].default) == (1e-3, 0.9)  # SNF A.5


def test_figures_have_the_rows_and_settings_of_table1():
    first = rows("table1")
    for name, wanted, angle in (
        ("figure2", ["fc-snf", "conv-snf", "glow-snf"], 0),
        ("figure3", ["fc-snf", "conv-snf"], 1),
        ("figure5", ["fc-exact", "fc-snf", "conv-exact", "conv-snf"], 0),
    ):
        found = rows(name)
        assert list(found) == wanted
        for row in found.values():
            assert settings(row) == {**settings(first[row.name]), "angle_every": angle}


def test_figure4_is_the_papers():
    found = rows("figure4")
    sizes = [32 + 96 * k for k in range(43)]
    assert sizes[-1] == 4064
    assert list(found) == [f"{kind}-{size}" for size in sizes for kind in ("snf", "exact")]
    for row in found.values():
        assert (row.settings["batch_size"], row.settings["batches"]) == (128, 4000)


def test_sfm_is_the_papers():
    found = rows("sfm-table2")
    assert {name: row.paper["bits_per_dim"].mean for name, row in found.items()} == SFM_TABLE2
    wanted = {
        "batch_size": 32,
        "lr": 1e-4,
        "optimizer": "radam",
        "objective": "bits",
        "actnorm_batches": 256,
        "epochs": 200,
    }
    for name, row in found.items():
        assert settings(row).items() >= wanted.items()
        assert settings(row)["log_det_penalty"] == float(name.partition("-")[2])
        size = {"levels": 4, "steps": 32, "mixing": "lu", "coupling": name.partition("-")[0]}
        assert dict(row.model_args).items() >= size.items()
    for name in ("sfm-figure4", "sfm-figure5"):
        one, many = EXPERIMENTS[name].rows
        assert (one.settings["init_images"], many.settings["init_images"]) == (1, 256)
        for row in (one, many):
            step = {"batch_size": 1, "lr": 1e-5, "penalty": 1e-3}
            assert dict(row.settings).items() >= step.items()
            assert row.model_args["coupling"] == "additive"


@pytest.mark.parametrize("name", NAMES)
def test_full_scale_reduces_nothing_and_the_others_say_what(name):
    experiment = EXPERIMENTS[name]
    assert experiment.rows_of("full") == list(experiment.rows)
    assert reductions(experiment.rows, "full") == []
    for scale in ("cpu", "smoke"):
        here = experiment.rows_of(scale)
        said = " ".join(reductions(here, scale))
        for row in here:
            full, small = row.flat(), row.at(scale).flat()
            assert full.keys() == small.keys()  # a misspelt setting would be a new one
            for key in full:
                if full[key] != small[key]:
                    assert f"{key}: {small[key]} in place of {full[key]}" in said
        assert said


@pytest.mark.parametrize("name", NAMES)
def test_smoke_needs_no_files_and_every_model_can_be_built(name):
    experiment = EXPERIMENTS[name]
    small = [row.at("smoke") for row in experiment.rows_of("smoke")]
    assert experiment.kind.data(small) <= {"digits"}
    for row in small:
        if isinstance(experiment.kind, Trained):
            assert config_of(row, 0).epochs <= 2
            assert model(row, (1, 8, 8)).event_shape == (1, 8, 8)


def test_the_models_of_a_small_cpu_can_be_built_for_its_data():
    shapes = {"mnist": (1, 28, 28), "images": (3, 32, 32)}
    for experiment in EXPERIMENTS.values():
        here = [row.at("cpu") for row in experiment.rows_of("cpu")]
        assert experiment.kind.data(here) <= shapes.keys()
        for row in here:
            if isinstance(experiment.kind, Trained):
                assert config_of(row, 0).epochs <= 10
                assert model(row, shapes[row.data]).event_shape == shapes[row.data]


@pytest.mark.parametrize("scale", ["full", "cpu"])
def test_names_are_folders_and_differ(scale):
    for experiment in EXPERIMENTS.values():
        names = [row.name for row in experiment.rows_of(scale)]
        assert len(set(names)) == len(names)
        assert all(math.prod((c.isalnum() or c in "-.") for c in name) for name in names)


def test_what_cannot_be_asked_for(capsys, tmp_path, monkeypatch):
    asked = ["reproduce", "table1", "--out", tmp_path / "out"]
    run(*asked, "--scale", "smoke", "--only", "fc", status=2)
    assert "only must name rows, fc-relative, fc-exact, " in one_line(capsys)
    run(*asked, "--scale", "smoke", "--seeds", "0", status=2)
    assert "seeds must be at least 1; got 0" in one_line(capsys)
    run(*asked, "--scale", "smoke", "--threads", "0", status=2)
    assert "threads must be at least 1; got 0" in one_line(capsys)
    run(*asked, status=2)
    assert "--data mnist needs --data-dir" in one_line(capsys)
    run(*asked, "--data-dir", tmp_path / "none", status=2)
    assert "none does not exist" in one_line(capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(*asked, "--scale", "smoke", status=2)
    assert "reproduce must run in one process; torchrun started 2" in one_line(capsys)
    assert not list(tmp_path.iterdir())  # nothing was begun
