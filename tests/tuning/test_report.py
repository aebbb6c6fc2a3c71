"""What the tuner prints."""

import pytest

from tdjax._steps.lowering import Lowering
from tdjax._tuning import report
from tdjax._tuning.candidates import Candidate


def texts(table):
    """The cells of each row."""
    return list(zip(*(column.cells for column in table.columns)))


def test_the_table_has_the_chosen_first_then_others_by_time_then_the_refused():
    best = Candidate(
        Lowering("fold"), 1, "measured", 0.25, 2e-3, None, 1500, deviation=3e-7
    )
    slower = Candidate(
        Lowering("vmap", chunk_size=4, unroll=True, remat=True),
        3, "measured", 2.5, 3e-3, None, 2 * 10**6, deviation=0.0,
    )  # fmt: skip
    behind = Candidate(Lowering(), 1, "behind", 1.0, 5.0)
    refused = Candidate(Lowering(unroll=2), 1, "other numbers than the reference")
    late = Candidate(Lowering(unroll=3), verdict="no time left")
    table = report.rich_table([late, refused, behind, slower, best], best, "title")
    assert texts(table) == [
        ("fold", "all", "1", "no", "2 ms", "1.00", "1.5 kB", "250 ms", "3e-07", "chosen"),
        ("vmap", "4", "True", "yes", "3 ms", "1.50", "2.0 MB", "2.5 s", "0e+00", "measured"),
        ("vmap", "all", "1", "no", "5 s", "2500.00", "", "1 s", "", "behind"),
        ("vmap", "all", "2", "no", "", "", "", "", "", refused.verdict),
    ]  # fmt: skip
    assert [row.style for row in table.rows] == ["bold", "", "dim", "dim"]
    assert table.title == "title"
    assert table.caption.startswith("1 more were not tried")
    assert report.rich_table([best], best, "title").caption is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (1.0, "1 s"), (0.5, "500 ms"), (1e-3, "1 ms"), (2e-5, "20 µs")],
)
def test_seconds_have_a_unit_that_suits_them(seconds, text):
    assert report.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(123456, "0.1 MB"), (10**5, "0.1 MB"), (99900, "99.9 kB"), (1000, "1.0 kB"), (7, "7 B")],
)  # fmt: skip
def test_bytes_have_a_unit_that_suits_them(size, text):
    assert report.format_bytes(size) == text
