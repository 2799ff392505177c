"""Options of ``pytest bench``: --quick for the short cases, --compile for torch.compile, --device.

On a GPU every timed call waits for its end; CUDA graphs are timed by ``bench.compare`` alone.
"""

from __future__ import annotations

import pytest

from bench.steps import native_is_built
from bench.timing import Variant, calibrate, machine_noise, synchronise


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--quick", action="store_true", help="only the short cases, few rounds")
    group.addoption("--compile", action="store_true", help="also torch.compile the reference")
    group.addoption("--device", default="cpu", help="where the steps run (default cpu)")


def pytest_report_header(config: pytest.Config) -> str:
    return str(machine_noise(config.getoption("--device")))


@pytest.fixture(scope="session")
def variants_of():
    """Builds the variants of a case once for all its tests, which follow each other."""
    last = []

    def variants_of(case, build, **options):
        if not last or last[0] is not case:
            last[:] = case, {v.name: v for v in build(case, **options)}
        return last[1]

    return variants_of


@pytest.fixture
def run(benchmark, request, variants_of):
    """Times the named variant of a case; see ``bench.compare`` for ratios, which interleaves."""
    quick = request.config.getoption("--quick")
    compiled = request.config.getoption("--compile")
    device = request.config.getoption("--device")
    synchronised = synchronise(device)

    def run(case, name, build):
        if quick and not case.quick:
            pytest.skip("not one of the --quick cases")
        if name.startswith("native") and not native_is_built(device):
            pytest.skip("the native backend is not built")
        if name.startswith("compiled") and not compiled:
            pytest.skip("torch.compile takes a minute a case; ask for it with --compile")
        variants: dict[str, Variant] = variants_of(case, build, compiled=compiled, device=device)
        if name not in variants:
            pytest.skip(f"{name} is not timed at {case.name}")
        variant = variants[name]
        benchmark.group = case.name
        benchmark.extra_info["flops"] = case.flops

        def step() -> None:
            variant.step()
            synchronised()

        with variant.context():
            inner = calibrate(step, lambda: None, 0.005 if quick else 0.02)
            rounds = 5 if quick else min(15, getattr(case, "rounds", None) or 15)
            benchmark.pedantic(step, rounds=rounds, iterations=inner)

    return run
