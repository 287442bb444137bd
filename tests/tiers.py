"""The two tiers of tests: `make test` leaves out what is marked slow, `make test-all` runs everything."""

import pytest


def slow(*values):
    """A case of `pytest.mark.parametrize` for `make test-all` alone."""
    return pytest.param(*values, marks=pytest.mark.slow)
