"""What the fuzzers found worth keeping, without the fuzzer: see docs/robustness.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parent / "fuzz"
sys.path.append(str(FUZZ))

import fuzz_checkpoint  # noqa: E402
import fuzz_data  # noqa: E402
from harness import peak  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FUZZERS = {"data": fuzz_data, "checkpoint": fuzz_checkpoint}
MOST, BYTES = 300_000, 512 * 2**20


def corpus(name):
    return sorted((FUZZ / "corpus" / name).iterdir())


@pytest.mark.parametrize("name", ["data", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_every_input_is_read_or_refused_in_words(name):
    """In little memory, whatever a header announces."""
    fuzzer, inputs = FUZZERS[name], corpus(name)
    fuzzer.one_input(inputs[0].read_bytes())
    before = peak()
    for path in inputs:
        fuzzer.one_input(path.read_bytes())
    assert peak() < before + BYTES


@pytest.mark.parametrize("name", FUZZERS)
def test_the_corpus_reaches_every_reader(name):
    targets, inputs = FUZZERS[name].TARGETS, corpus(name)
    assert {path.read_bytes()[0] % len(targets) for path in inputs if path.stat().st_size} == set(
        range(len(targets))
    )


@pytest.mark.parametrize("name", FUZZERS)
def test_whole_files_are_read(name):
    """The harness itself is in order: what is whole passes."""
    fuzzer = FUZZERS[name]
    whole = fuzzer.seeds()
    for target, read in fuzzer.TARGETS.items():
        content = whole[f"{target}-0"]
        if target != "raw":  # there it has no weights, to be small
            read(content[1:])


def test_the_corpus_is_small():
    files = [path for path in (FUZZ / "corpus").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST
