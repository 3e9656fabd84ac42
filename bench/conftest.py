"""What the benchmarks share: each backend that can run here."""

from __future__ import annotations

import pytest

from narrows.backends import AUTO, probe


@pytest.fixture(params=AUTO)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that narrows chooses for its speed; the reference is not one of them."""
    name: str = request.param
    found = probe(name)
    if not found.ok:
        pytest.skip(f"{name}: {found.reason}")
    return name
