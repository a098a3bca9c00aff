"""The published reference, for the tests that compare with it."""

from __future__ import annotations

import pytest

from tests.reference import basicsr


@pytest.fixture(scope="session")
def reference() -> basicsr.BasicSR:
    """BasicSR's operators; skips where pip cannot fetch them."""
    try:
        return basicsr.load()
    except basicsr.UnavailableError as error:
        pytest.skip(f"BasicSR is not at hand: {error}")
