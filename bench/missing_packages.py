"""pytest plugin: test modules that need a package which is not installed are skipped, not errors.

``pytest -p bench.missing_packages`` is for machines where nothing can be installed.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    call = getattr(report, "call", None)
    error = call.excinfo.value if report.failed and call is not None and call.excinfo else None
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and not _is_ours(error.name):
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f"Skipped: {error.name} is not installed")
            break
        error = error.__cause__ or error.__context__
    return report


def _is_ours(name: str | None) -> bool:
    return name is None or name.split(".")[0] in ("bench", "snf_ext")
