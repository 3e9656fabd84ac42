"""Fixtures shared by the tests: the backends that can run here."""

from __future__ import annotations

import signal

import pytest

from narrows.backends import BACKENDS, probe


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that cannot run here is skipped with its reason."""
    name: str = request.param
    found = probe(name)
    if not found.ok:
        pytest.skip(f"backend {name}: {found.reason}")
    return name


@pytest.fixture
def cpp() -> str:
    """For promises that the C++ backend alone makes."""
    found = probe("cpp")
    if not found.ok:
        pytest.skip(f"backend cpp: {found.reason}")
    return "cpp"


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A shell starts its background jobs with SIGINT ignored, and children inherit that; the tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
