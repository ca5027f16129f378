"""Models of all shapes: almost all the time of these tests is compiling."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def every_model(fast_compiles):
  """None of them runs often enough to be worth optimising."""
