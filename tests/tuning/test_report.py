"""What the tuner prints."""

import pytest

import tdjax
from helpers import printed
from tdjax._steps.lowering import Lowering
from tdjax._tuning import report
from tdjax._tuning.candidates import Candidate


def texts(table):
    """The cells of each row."""
    return list(zip(*(column.cells for column in table.columns)))


def test_the_table_has_the_chosen_first_then_others_by_time_then_the_refused():
    best = Candidate(
        Lowering("fold"),
        verdict="measured", compile_seconds=0.25, run_seconds=2e-3, ratio=0.5,
        ratio_spread=(0.48, 0.52), temporary_bytes=1500, deviation=3e-7,
    )  # fmt: skip
    slower = Candidate(
        Lowering("vmap", chunk_size=4, unroll=True, remat=True),
        compiler_options={"fast": 1},
        verdict="measured", compile_seconds=2.5, run_seconds=3e-3, ratio=0.75,
        temporary_bytes=2 * 10**6, deviation=0.0,
    )  # fmt: skip
    behind = Candidate(
        Lowering(),
        is_default=True,
        verdict="behind", compile_seconds=1.0, run_seconds=5.0, ratio=1.0,
    )  # fmt: skip
    refused = Candidate(Lowering(unroll=2), verdict="other numbers than the reference")
    failed = Candidate(Lowering("fold", unroll=2), verdict="failed: TypeError: no")
    late = Candidate(Lowering(unroll=3), verdict="no time left")
    everyone = [late, refused, failed, behind, slower, best]
    table = report.rich_table(everyone, best, "title", finished=False)
    assert texts(table) == [
        (
            "fold", "all", "1", "no", "",
            "2 ms", "0.50±0.02", "1.5 kB", "250 ms", "3e-07", "chosen",
        ),
        (
            "vmap", "4", "True", "yes", "1",
            "3 ms", "0.75", "2.0 MB", "2.5 s", "0e+00", "measured once",
        ),
        ("vmap", "all", "1", "no", "", "5 s", "1.00", "", "1 s", "", "default, behind"),
        ("vmap", "all", "2", "no", "", "", "", "", "", "", refused.verdict),
        ("fold", "all", "2", "no", "", "", "", "", "", "", "failed (1)"),
    ]  # fmt: skip
    assert [row.style for row in table.rows] == ["bold", "", "dim", "dim", "dim"]
    assert table.title == "title"
    options, reason, rest = table.caption.split("\n")
    assert options == "options 1: {'fast': 1}"
    assert reason == "(1) failed: TypeError: no"
    assert rest.startswith("Not finished: 1 more were not tried")
    nothing_left = report.rich_table([best], best, "title", finished=False)
    assert nothing_left.caption.startswith("Not finished: more rounds are needed")
    assert report.rich_table([best], best, "title").caption is None
    late.verdict = "not tried"
    stopped = report.rich_table([best, late], best, "title", finished=False)
    assert stopped.caption.startswith("Interrupted: 1 more were not tried")


def test_brackets_are_shown_as_they_are():
    best = Candidate(Lowering(), is_default=True, verdict="measured")
    failed = Candidate(Lowering("fold"), verdict="failed: E: f32[n,8] in [/a/path]")
    text = printed(report.rich_table([best, failed], best, "layers[0]"))
    assert "layers[0]" in text
    assert "f32[n,8] in [/a/path]" in text
    failures = {"layers[1]": "E: [/a/path]"}
    assert "layers[1]: not tuned: E: [/a/path]" in printed(
        tdjax.Tuning(None, [], {}, failures=failures)
    )


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
