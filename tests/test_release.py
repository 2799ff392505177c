"""What a release says of itself: version and tag, the wheel's contents, citation and forms."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import snf_ext
import snf_ext.info
from snf_ext import build_record

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))
wheel_check = pytest.importorskip("wheel_check", reason="needs a clone")


# --- beside another torch -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, None),  # never built: importing the library says so
        ({"reason": "no compiler", "torch": "1.0"}, None),
        ({"reason": None, "torch": "2.13.0"}, None),
        ({"reason": None, "torch": "2.13.1+cu130"}, None),  # patches keep the binary interface
        (
            {"reason": None, "torch": "2.11.0+cu130"},
            "it was built against torch 2.11.0+cu130 and torch 2.13.0+cpu is running",
        ),
    ],
)
def test_only_the_same_release_of_torch_gets_the_library(tmp_path, monkeypatch, record, message):
    path = tmp_path / "_build.json"
    if record is not None:
        path.write_text(json.dumps(record))
    monkeypatch.setattr(build_record, "RECORD", path)
    assert build_record.other_torch("2.13.0+cpu") == message


def test_a_library_for_another_torch_is_not_even_loaded(tmp_path):
    """It could load and misread torch's structures. One warning names both versions."""
    package = tmp_path / "snf_ext"
    shutil.copytree(
        ROOT / "snf_ext", package, ignore=shutil.ignore_patterns("_C*", "_build*", "__pycache__")
    )
    (package / "_C.py").write_text("raise SystemExit('the library was loaded')\n")
    (package / "_build.json").write_text(json.dumps({"reason": None, "torch": "2.4.1"}))

    def python(code, **environment):
        kept = {name: text for name, text in os.environ.items() if not name.startswith("SNF_EXT")}
        kept |= {"PYTHONPATH": str(tmp_path), **environment}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)

    result = python("import snf_ext; print(snf_ext.backend())")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["reference"]
    assert result.stderr.count("RuntimeWarning") == 1
    both = f"built against torch 2.4.1 and torch {torch.__version__} is running"
    assert both in result.stderr
    asked = python("import snf_ext", SNF_EXT_BACKEND="native")
    assert asked.returncode == 1
    assert both in asked.stderr.splitlines()[-1]


# --- the release script ---------------------------------------------------------------------------

git = shutil.which("git")


@pytest.fixture
def clone(tmp_path):
    """A repository with what the script looks at before it builds, and a release of it."""
    if not git:
        pytest.skip("needs git")
    folder = tmp_path / "clone"
    for name in (".ci/release", "snf_ext/version.py"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, folder / name)
    log = f"# Changelog\n\n## [Unreleased]\n\n## [{snf_ext.__version__}] - 2026-12-01\n"
    (folder / "CHANGELOG.md").write_text(log)
    run(folder, "init", "-q")
    commit(folder)
    return folder


def run(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = [git, *identity, *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def commit(folder):
    run(folder, "add", "-A")
    run(folder, "commit", "-q", "-m", "A release", "--no-gpg-sign")


def release(folder, *options):
    """The script's refusals. Its folder is not empty, so that it never goes on to build."""
    command = [folder / ".ci" / "release", *options, folder / "snf_ext"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert result.returncode == 1
    return [line.removeprefix("release: ") for line in result.stderr.splitlines()]


OUT = "OUT must be a new or empty folder"
NO_RELEASE = "not a release; --dry-run builds all the same"


def test_a_tagged_clean_clone_is_a_release(clone):
    run(clone, "tag", f"v{snf_ext.__version__}")
    (line,) = release(clone)
    assert line.startswith(OUT)


@pytest.mark.parametrize("tag", [None, "v9.9.9"])
def test_version_and_tag_must_agree(clone, tag):
    if tag:
        run(clone, "tag", tag)
    wanted = f"this commit must have the tag v{snf_ext.__version__}, as snf_ext/version.py says; "
    assert release(clone) == [wanted + f"it has {tag or 'none'}", NO_RELEASE]
    told, stopped = release(clone, "--dry-run")
    assert told.startswith(wanted)
    assert stopped.startswith(OUT)


def test_a_tag_of_another_commit_does_not_count(clone):
    run(clone, "tag", f"v{snf_ext.__version__}")
    (clone / "later").write_text("x")
    commit(clone)
    assert f"the tag v{snf_ext.__version__}" in release(clone)[0]


def test_changes_and_a_changelog_without_the_version_are_no_release(clone):
    (clone / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    run(clone, "tag", f"v{snf_ext.__version__}")
    changed, log, refused = release(clone)
    assert changed == "the tree has changes that are not committed"
    assert log == f"CHANGELOG.md has no section '## [{snf_ext.__version__}] - DATE'"
    assert refused == NO_RELEASE


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a clone")
def test_tags_of_this_commit_agree():
    command = ["git", "tag", "--points-at", "HEAD", "--list", "v*"]
    tags = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    if not tags:
        pytest.skip("this commit has no tag")
    assert tags.split() == [f"v{snf_ext.__version__}"]


@pytest.mark.parametrize("options", [[], ["--upload", "out"], ["out", "more"], [""]])
def test_usage(options):
    result = subprocess.run([ROOT / ".ci" / "release", *options], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "usage: .ci/release [--dry-run] OUT\n"


# --- what the script holds a wheel against --------------------------------------------------------

MODULES = {"snf_ext/__init__.py", "snf_ext/py.typed"}
WHEEL = MODULES | {"snf_ext/_build.json", "snf_ext/_C.cpython-311-x86_64-linux-gnu.so"}


@pytest.mark.parametrize(
    ("names", "problems"),
    [
        (WHEEL | {"snf_ext-0.1.0.dist-info/RECORD", "snf_ext/"}, []),
        (WHEEL - {"snf_ext/py.typed"}, ["missing: snf_ext/py.typed"]),
        (WHEEL | {"tests/test_ops.py"}, ["not wanted: tests/test_ops.py"]),
        (WHEEL | {"snf_ext.libs/libgomp.so.1"}, ["not wanted: snf_ext.libs/libgomp.so.1"]),
        (MODULES | {"snf_ext/_build.json"}, ["one snf_ext/_C.*.so is wanted; got []"]),
    ],
)
def test_files_of_a_wheel(names, problems):
    assert wheel_check.file_problems(names, MODULES) == problems


@pytest.mark.parametrize(
    ("version", "requirement", "problem"),
    [
        ("0.1.0+torch2.13.cpu", "torch>=2.11", None),
        ("0.1.0", "torch>=2.11", "Version must be 0.1.0+torch...; got 0.1.0"),
        ("0.1.0+torch2.13.cpu", "torch==2.13", "must have torch>=...; got ['torch==2.13']"),
    ],
)
def test_metadata_of_a_wheel(version, requirement, problem):
    metadata = f"Name: snf_ext\nVersion: {version}\nRequires-Dist: {requirement}\n"
    problems = wheel_check.metadata_problems(metadata, "0.1.0")
    assert len(problems) == (problem is not None)
    assert all(problem in line for line in problems)


# --- for those who report and cite ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("snf_ext", re.escape(snf_ext.__version__)),
        ("backend", "native|reference"),
        ("C\\+\\+ kernels", "built with .* running (baseline|avx2|avx512) code|not loaded: ."),
        ("CUDA kernels", "."),
        ("torch", re.escape(torch.__version__)),
        ("packages", r"numpy \d.*, scipy \d"),
        ("python", r"3\.\d+\.\d+ on ."),
        ("processor", r"\w.*, \d+ cores"),
        ("variables", "OMP_NUM_THREADS=3.*SNF_EXT_TEST=here"),
    ],
)
def test_info_has_what_a_report_needs(monkeypatch, name, pattern):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SNF_EXT_TEST", "here")
    assert re.search(rf"^{name} +.*?({pattern})", snf_ext.info.report(), re.MULTILINE)


def test_forms_ask_for_it():
    yaml = pytest.importorskip("yaml")
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yml")}
    assert forms.pop("config")["blank_issues_enabled"] is False
    assert set(forms) == {"bug", "feature"}
    for form in forms.values():
        assert {"name", "description", "body"} <= form.keys()
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert all(field["type"] in ("input", "textarea", "checkboxes") for field in fields)
        assert len({field["id"] for field in fields}) == len(fields)
    (info,) = (field for field in forms["bug"]["body"] if field.get("id") == "info")
    assert "python -m snf_ext.info" in info["attributes"]["description"]
    assert info["validations"]["required"] is True


def test_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", text, re.MULTILINE) == [snf_ext.__version__]
    assert "title: Self Normalizing Flows\n" in text
