"""The documentation is true: its code runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from cli_runs import environment
from doc_pages import DOCS, README, ROOT, blocks, commands, fences, links, run_python, text_of

import snf_ext
from snf_ext import cli

PAGES = sorted(DOCS.rglob("*.md")) + [
    page
    for page in (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md"))
    if page.exists()
]
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="no docs beside these tests")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# The README's have a test of their own in test_readme.py, the quick start's below.
ELSEWHERE = (README, DOCS / "quickstart.md")


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p not in ELSEWHERE and blocks(p, "python")], ids=name_of
)
def test_python_blocks_run(page, in_own_folder):
    torch.manual_seed(0)
    run_python(page)


def test_python_blocks_of_the_quick_start_do_what_they_say(in_own_folder):
    """Its flow is better than a normal, and brings points back."""
    torch.manual_seed(0)
    names = run_python(DOCS / "quickstart.md")
    x = names["x"].double()
    normal = 0.5 * torch.logdet(2 * torch.pi * torch.e * x.T.cov())
    assert names["nats"].item() < normal.item() - 0.3
    torch.testing.assert_close(normal.item(), 2.7, rtol=0, atol=0.1)
    assert (names["same"] - names["x"]).square().sum(1).mean() < 0.05
    torch.testing.assert_close(names["better"], names["x"], rtol=0, atol=1e-3)
    assert 0 < names["bits_per_dim"] < 4.1  # less than a uniform guess of 17 values costs
    assert names["images"].shape == (16, 1, 8, 8)


@every_page
def test_blocks_say_what_they_are(page):
    """No block of code that is neither run, nor checked, nor marked as text."""
    known = {"python", "sh", "cpp", "text", "{toctree}"}
    assert {language for language, _ in fences(page)} <= known


SOURCES = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh")]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "cpp")], ids=name_of)
def test_quoted_sources_are_those_of_the_repository(page):
    if not SOURCES:
        pytest.skip("no sources beside these tests")
    everything = "\n".join(text_of(source) for source in SOURCES)
    for block in blocks(page, "cpp"):
        assert block in everything


def test_the_operator_that_is_walked_through_is_where_it_is_said_to_be():
    page = DOCS / "adding-an-op.md"
    named = [f for f in links(page) if f.startswith(("../csrc/", "../snf_ext/", "../tests/"))]
    assert len(named) >= 12
    for file in named:
        assert "triangular" in text_of((DOCS / file).resolve()), file
    tests = re.findall(r"`(test_\w+)` \|", text_of(page))
    assert len(tests) == 7
    for test in tests:
        assert f"def {test}(" in text_of(ROOT / "tests" / "test_triangular.py")


@every_page
def test_links_lead_to_files(page):
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


# Words that stand for what a reader fills in, and a value of their kind.
STAND_INS = {"SIGMA": "0.1", "K": "0.1", "N": "2"}
# A command with one of these says how commands look, and a bare option at the end what it takes.
PATTERNS = ("...", "|", "NAME")


class Parsed(Exception):
    """In place of what the command would do."""


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command as the program does. SystemExit, and its message, if that refuses it."""
    words = shlex.split(command, comments=True)
    if words[0] == "torchrun":
        if "-m" not in words:
            return
        assert words[words.index("-m") + 1] == "snf_ext"
        words = ["snf-ext", *words[words.index("-m") + 2 :]]
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) or words[2] in ("build", "sphinx"), words[2]
        if not words[2].startswith(("snf_ext", "bench.")):
            return
        program, arguments = words[2], words[3:]
    else:
        program, arguments = words[0], words[1:]
    arguments = [STAND_INS.get(word, word) for word in arguments]
    if program in ("snf-ext", "snf_ext"):
        parse_snf_ext(arguments)
    elif program.startswith("bench."):
        parse_bench(program, arguments, monkeypatch)
    elif program == "pytest" or "/" in program:
        for path in [program] * ("/" in program) + arguments:
            assert not path.startswith(("tests/", ".ci/", "bench/")) or (ROOT / path).exists(), path


def parse_snf_ext(arguments: list[str]) -> None:
    pattern = any(mark in word for word in arguments[1:] for mark in PATTERNS)
    if not pattern and arguments[-1:] != ["--refine"]:
        cli._parse(arguments)  # SystemExit if it cannot be parsed; nothing is run
        return
    options = {option.__name__.lower(): option for option in cli.COMMANDS}[arguments[0]]
    known = {"--" + name.replace("_", "-") for name in options.__annotations__}
    assert {word for word in arguments if word.startswith("--")} <= known


def parse_bench(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(program)
    assert "__main__" in inspect.getsource(module), f"{program} is no program"
    main = getattr(module, "main", None)
    if not arguments or main is None or "parse_args" not in inspect.getsource(module):
        return  # named in passing, or it takes paths alone
    parse_args = argparse.ArgumentParser.parse_args

    def only(parser, given=None, namespace=None):
        parse_args(parser, given, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", only)
        patch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(Parsed):
            main(*[arguments] * bool(inspect.signature(main).parameters))


@pytest.mark.parametrize(
    ("page", "command"),
    [(page, command) for page in PAGES for command in dict.fromkeys(commands(page))],
    ids=lambda value: name_of(value) if isinstance(value, Path) else value,
)
def test_commands_parse(page, command, monkeypatch, in_own_folder):
    pytest.importorskip("tyro")
    status = 0
    try:
        parse(command, monkeypatch)
    except SystemExit as end:
        status = end.code  # --help ends with 0
    assert not status


def test_a_wrong_command_is_found(monkeypatch, capsys):
    for command in (
        "snf-ext train --model nothing",
        "snf-ext train --no-such-option",
        "torchrun --standalone -m snf_ext train --modle glow",
        "python -m bench.compare linear --no-such-option",
    ):
        with pytest.raises(SystemExit):
            parse(command, monkeypatch)
    for command in (
        "python -m bench.nothing",
        "pytest tests/test_nothing.py",
        "snf-ext evaluate --noize N|M",
    ):
        with pytest.raises(AssertionError):
            parse(command, monkeypatch)


def test_the_api_has_every_public_name():
    listed, module = set(), ""
    for page in (DOCS / "api").glob("*.rst"):
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", text_of(page), re.MULTILINE):
            module = name if directive == "currentmodule" else module
            listed |= {f"{module}.{name}"} if directive.startswith("auto") else set()
    modules = [snf_ext, snf_ext.models, snf_ext.ops, snf_ext.reference, snf_ext.exact]
    modules += [snf_ext.layers, importlib.import_module("snf_ext.adapters")]
    for module in modules:
        for name in set(module.__all__) - {"__version__", "models", "ops", "reference"}:
            home = "snf_ext" if module is snf_ext.layers else module.__name__
            assert f"{home}.{name}" in listed


DOCSTRING = """What it is, log |det W|, ``|x|``.

    y = |x|

Args:
    features: D.
    bias: whether there is a |c|.

        Not an equation.

Shapes: (B, D).
Cost: none::

    as it stands |

>>> 1 | 2
3
"""
RESTRUCTURED = r"""What it is, log \|det W\|, ``|x|``.

::

    y = |x|

Args:
    features: \D.
    bias: whether there is a \|c\|.

        Not an equation.

Shapes: (B, D).

Cost: none::

    as it stands |

>>> 1 | 2
3
"""


def test_docstrings_become_restructured_text(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "site")
    docstrings = importlib.import_module("docstrings")
    assert docstrings.as_restructured_text(DOCSTRING.split("\n")) == RESTRUCTURED.split("\n")


class Fetched(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "link" and "stylesheet" not in (values.get("rel") or ""):
            return
        name = {"link": "href", "script": "src", "img": "src", "iframe": "src"}.get(tag)
        if name and values.get(name):
            self.addresses.append(values[name])


@pytest.mark.nightly
def test_pictures_of_the_concepts_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    shutil.copy(DOCS / "images" / "concepts.py", tmp_path)
    command = [sys.executable, str(tmp_path / "concepts.py")]
    subprocess.run(command, check=True, env=environment())
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in (DOCS / "images").glob("concepts-*.png")}


@pytest.mark.slow
def test_site_builds_without_a_warning_and_asks_no_other_host(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_nb")
    pytest.importorskip("furo")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), "-c", "docs", ".", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert (done.returncode, done.stderr) == (0, "")
    html = sorted(site.rglob("*.html"))
    assert len(html) > 25
    for page in html:
        fetched = Fetched()
        fetched.feed(page.read_text(encoding="utf-8"))
        outside = [a for a in fetched.addresses if re.match(r"(https?:)?//", a)]
        assert not outside, page
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\W{0,3}(https?:)?//", style.read_text("utf-8")), style
