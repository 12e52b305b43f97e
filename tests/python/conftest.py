"""For all tests of this folder."""

import re
import signal
import sys
from pathlib import Path

import pytest

GUARANTEES = Path(__file__).parents[2] / "docs" / "guarantees.md"

# Where the runner was started in the background, SIGINT is ignored in it and in all processes that
# it starts; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def grpcio_stays_apart():
    yield
    assert "grpc._cython.cygrpc" not in sys.modules, (
        "a test imported grpcio into the process that runs all tests, which a fault in its C core "
        "would end: import it in a process of its own, as grpc_apart.py does"
    )


def pytest_terminal_summary(terminalreporter):
    """Names the promises whose tests this machine skipped."""
    promised = set(re.findall(r"`(\w+)`", GUARANTEES.read_text()))
    missed = {}
    for report in terminalreporter.stats.get("skipped", []):
        name = report.nodeid.split("::")[-1].split("[")[0].removeprefix("test_")
        if name in promised:
            missed[name] = report.longrepr[2] if report.longrepr else "skipped"
    if missed:
        terminalreporter.section("promises that were NOT TESTED here", red=True, bold=True)
        for name, why in sorted(missed.items()):
            terminalreporter.line(f"{name}: {why.removeprefix('Skipped: ')}", red=True)
