"""What the tests of the tuner tune."""

import pytest

import tdjax


@pytest.fixture
def params(key):
    return tdjax.init_dense(key, 4, 5)
