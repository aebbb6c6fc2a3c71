"""What the tests of the programs share."""

import matplotlib
import pytest

# Fixtures that run a program or its model. Their tests are slow, and CI runs them in a
# step of their own.
RUNS = {
    "at_step", "checkpoints", "episodes", "films", "finished", "inputs", "models",
    "params", "program", "reader", "small", "trained", "whole",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/examples" in item.nodeid and RUNS & {*item.fixturenames}:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.examples)


@pytest.fixture(autouse=True, scope="module")
def own_style():
    """The programs set the style of all plots; other tests have the default."""
    with matplotlib.rc_context():
        yield
