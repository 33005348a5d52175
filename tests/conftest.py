"""What is left out for want of something is said once, in the last line, and not for each test."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Examples are not timed: the machine may have anything else to do meanwhile.
settings.register_profile("fray", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fray")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Generator[None]:
    skipped = terminalreporter.stats.get("skipped", [])
    wants = {report: want for report in skipped if (want := _want(report))}
    skipped[:] = [report for report in skipped if report not in wants]
    yield
    skipped += wants  # for the count that comes below
    for (what, remedy), count in Counter(wants.values()).items():
        tests = "1 test was" if count == 1 else f"{count} tests were"
        terminalreporter.write_line(f"{tests} left out for want of {what}; to include them: {remedy}", yellow=True)


def _want(report: Any) -> tuple[str, str] | None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    found = re.search(r"not tested here, for want of ([^:]+): (.*)", reason)
    return (found[1], found[2]) if found else None
