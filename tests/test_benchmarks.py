"""The committed results are what a run wrote, and the README quotes them."""

import json
from pathlib import Path

import pytest
from benchmarks import report
from benchmarks.headlines import headlines

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/results.json"))


def read(path):
    return json.loads(path.read_text())


def test_there_are_results_of_a_cpu():
    assert any(read(path)["about"]["platform"] == "cpu" for path in RESULTS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_tables_and_plots_belong_to_the_json(path):
    results = read(path)
    assert (path.parent / "README.md").read_text() == report.markdown(results)
    assert results["about"]["quick"] is False
    for suite in {row["suite"] for row in results["rows"]}:
        assert (path.parent / f"{suite}.png").stat().st_size > 1000


def test_the_figures_in_the_readme_come_from_the_results():
    text = (ROOT / "README.md").read_text()
    rows = read(ROOT / "benchmarks" / "results" / "cpu" / "results.json")["rows"]
    for line in headlines(rows):
        assert f"| {' | '.join(line)} |" in text


def test_a_run_that_cannot_be_read_is_not_resumed(tmp_path):
    with pytest.raises(SystemExit, match=r"--resume: .*results.json can't be read"):
        report.read(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match="can't be read"):
        report.read(tmp_path)


def test_the_roofline_is_a_fraction_of_the_measured_ceilings():
    row = {"flops": 2e9, "bytes": 4e9, "dtype": "float32", "seconds": 4.0}
    rates = {"matmul float32": 1e9, "copy": 1e9}
    assert report.roofline(row, rates) == 1.0  # four seconds for the bytes alone
    assert report.roofline({**row, "bytes": 0.0}, rates) == 0.5
