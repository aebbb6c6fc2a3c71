import matplotlib
import pytest


@pytest.fixture(autouse=True, scope="module")
def own_style():
    """The programs set the style of all plots; other tests have the default."""
    with matplotlib.rc_context():
        yield
