"""The committed results are what a run wrote, and the README quotes them."""

import gzip
import itertools
import json
from pathlib import Path

import pytest
from benchmarks import (
    cases,
    compare,
    drawing,
    measure,
    ours,
    own,
    plots,
    report,
    targets,
)
from benchmarks.headlines import headlines

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/results.json"))


def read(path):
    return json.loads(path.read_text())


def test_there_are_results_of_a_cpu():
    assert any(read(path)["about"]["platform"] == "cpu" for path in RESULTS)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_tables_and_plots_belong_to_the_json(path, tmp_path):
    results = read(path)
    assert (path.parent / "README.md").read_text() == report.markdown(results)
    assert results["about"]["quick"] is False
    plots.draw_all(tmp_path, results)
    drawn = {picture.name: picture.stat().st_size for picture in tmp_path.iterdir()}
    assert {f"{row['suite']}.png" for row in results["rows"]} == set(drawn)
    for name, size in drawn.items():
        assert abs(size / (path.parent / name).stat().st_size - 1) < 0.2


def test_the_figures_in_the_readme_come_from_the_results():
    text = (ROOT / "README.md").read_text()
    rows = read(ROOT / "benchmarks" / "results" / "cpu" / "results.json")["rows"]
    for line in headlines(rows):
        assert f"| {' | '.join(line)} |" in text


def rows_of(suite):
    rows = read(ROOT / "benchmarks" / "results" / "cpu" / "results.json")["rows"]
    return [row for row in rows if row["suite"] == suite and "missing" not in row]


def title(rows):
    about = {"device": "a GPU", "cores": None, "versions": {"jax": "1"}, "quick": True}
    figure = plots.PICTURES[rows[0]["suite"]](rows, about)
    note = figure.get_supxlabel()
    assert note.startswith("A quick run")
    assert note.endswith("a GPU, jax 1")
    return figure.get_suptitle().replace("\n", " ")


def rows(suite, column, values, **about):
    """A row of `column` for each candidate, forward and gradient, predict and fit."""
    kinds = ("fit", "predict") if suite == "keras" else ("gradient", "forward")
    about = {"suite": suite, "case": "one", "layer": "a layer", **about}
    return [
        {**about, "of": of, "candidate": name, "seconds": 1.0, column: value}
        for of in kinds
        for name, value in values.items()
    ]


def compiled(times, keras=()):
    return [
        row
        for name, line in (("vmap", times), ("Keras TimeDistributed", keras))
        for steps, seconds in zip((16, 64, 256), line)
        for row in rows("compile", "compile_seconds", {name: seconds}, timesteps=steps)
    ]


def beside(tuned, torch, **about):
    values = {"raw jnp": 1.0, "time_distributed, tuned": tuned, "PyTorch": torch}
    return rows("dense", "seconds", values, **about)


def packed(share, *ratios):
    sizes = {"share": share, "capacity_share": share}
    return [
        row
        for place, ratio in enumerate(ratios)
        for row in rows(
            "packing", "ratio", {"packed": ratio}, layer=str(place), **sizes
        )
    ]


def traded(time, memory):
    whole = rows("memory", "ratio", {"all steps": 1.0}, temporary_bytes=4e6)
    options = {"temporary_bytes": memory, "seconds": time}
    return whole + [
        {**row, **options} for row in rows("memory", "ratio", {"chunks": time})
    ]


def fused(time, memory):
    names = "Optax, all logits", "linear_cross_entropy"
    found = rows("loss", "seconds", dict(zip(names, (1.0, time))))
    return [
        {**row, "temporary_bytes": memory if "linear" in row["candidate"] else 1.0}
        for row in found
    ]


def tuned(*picks):
    return [
        {**row, "chosen": ["first"] * (row["candidate"] == "pick")}
        for place, pick in enumerate(picks)
        for row in rows("tuner", "ratio", {"vmap": 1.0, "pick": pick}, case=str(place))
    ]


def on_devices(ours, left=None):
    """The loss' megabytes on 2 and on 8 devices."""
    lines = {"tdjax": ours, "tdjax, sharding left to the compiler": left}
    about = {"suite": "mesh", "case": "loss, examples split", "of": "gradient"}
    return [
        {**about, "candidate": name, "devices": n, "sent_bytes": 1e6 * sent}
        for name, line in lines.items()
        for n, sent in zip((2, 8), line or ())
    ]


def called(ours, split):
    names = (
        "nnx.jit, the layer alone",
        "nnx.jit, tdjax.nnx",
        "jax.jit after nnx.split, tdjax.nnx",
    )
    return rows("overhead", "seconds", dict(zip(names, (100e-6, ours, split))))


def kerases(first, later):
    about = {"model": "a model", "timesteps": 16}
    found = rows("keras", "seconds", {"Keras": 1.0, "drop-in": later}, **about)
    return [
        {**row, "first_seconds": first if row["candidate"] == "drop-in" else 1.0}
        for row in found
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (compiled((1.0, 2.0, 1.2)), "Compile time stays flat"),
        (compiled((1.0, 2.0, 3.0)), "Compile time grows 3.0 times with the sequence"),
        (compiled((1.0, 1.0), (2.0, 9.0)), "Compile time stays flat; Keras' grows with the sequence"),
        (compiled((1.0, 1.0), (2.0, 2.1)), "Compile time stays flat"),
        (beside(0.8, 0.5), "Dense with gradients: tuned tdjax takes 0.80 of raw jnp's time; PyTorch takes 0.50 of it"),
        (beside(1.2, 1.3), "Dense with gradients: tuned tdjax takes 1.20 times raw jnp's time; no peer takes less"),
        (beside(0.9, 0.5) + beside(0.4, 0.8, case="two"), "Dense with gradients: tuned tdjax takes 0.60 of raw jnp's time; no peer takes less"),
        # PyTorch ran one case of two: its mean is of other numbers.
        (beside(0.8, 0.5) + beside(0.8, 0.5, case="two")[:2], "Dense with gradients: tuned tdjax takes 0.80 of raw jnp's time"),
        (packed(0.3, 0.27), "Packed, a batch that is 30 % valid takes 0.27 of the padded time"),
        (packed(0.3, 0.27, 0.35) + packed(1.0, 2.0), "Packed, a batch that is 30 % valid takes 0.27 to 0.35 of the padded time"),
        (packed(0.5, 0.9, 1.25), "Packed, a batch that is 50 % valid takes 0.90 to 1.25 times the padded time"),
        (traded(0.5, 1e6), "The conv net's gradient with chunks takes 0.25 of the memory and 0.50 of the time"),
        (traded(1.5, 1e6), "The conv net's gradient with chunks takes 0.25 of the memory and 1.50 times the time"),
        (fused(0.6, 0.1), "The fused loss takes 0.60 of Optax' time and 0.10 of its memory"),
        (fused(1.6, None), "The fused loss takes 1.60 times Optax' time"),
        (tuned(0.5, 1.05), "4 of 4 picks of the tuner are within 1.1 times the fastest choice, at worst 1.05 times"),
        (tuned(0.5, 2.0), "2 of 4 picks of the tuner are within 1.1 times the fastest choice, at worst 2.00 times"),
        (rows("operations", "ratio", {"XLA": 1.0, "PyTorch": 0.4}), "PyTorch's operations take 0.40 of XLA's time"),
        (rows("operations", "ratio", {"XLA": 1.0, "PyTorch": 1.4}), "PyTorch's operations take 1.40 times XLA's time"),
        (called(150e-6, 30e-6), "tdjax adds 50 µs to the call of an NNX layer, which takes 100 alone; after nnx.split it all takes 30 µs"),
        (called(90e-6, 20e-6), "tdjax adds no time to the call of an NNX layer, which takes 100 alone; after nnx.split it all takes 20 µs"),
        (on_devices((2, 2), (4, 16)), "With sharding=, the loss sends the same on 8 devices as on 2; without, 8.0 times as much"),
        (on_devices((2, 3)), "With sharding=, the loss sends 1.5 times as much on 8 devices as on 2"),
        (kerases(0.1, 0.5), "With tdjax.keras, the first call takes 0.10 of Keras' time, later steps 0.50 of it"),
        (kerases(2.0, 0.5), "With tdjax.keras, the first call takes 2.00 times Keras' time, later steps 0.50 of it"),
        (kerases(0.1, 0.5)[1::2], "Keras models with tdjax.keras; Keras' own layer was not run"),
    ],
)  # fmt: skip
def test_the_title_of_a_plot_follows_its_rows(rows, expected):
    assert title(rows) == expected


def test_operations_without_a_peer_have_no_plot():
    assert (
        plots.PICTURES["operations"](rows("operations", "ratio", {"XLA": 1.0}), {})
        is None
    )


def test_the_title_of_packing_is_the_headline_of_the_readme():
    chosen = [row for row in rows_of("packing") if row["layer"] == "conv net"]
    everything = read(ROOT / "benchmarks" / "results" / "cpu" / "results.json")["rows"]
    (figure,) = (line[2] for line in headlines(everything) if "packed" in line[0])
    assert f"takes {figure} of the padded time" in title(chosen)


def test_names_at_the_ends_of_lines_keep_apart():
    heights = [10.0, 12.0, 90.0, 11.0]
    shifts = drawing.moves(heights, 15)
    moved = sorted(height + move for height, move in zip(heights, shifts))
    assert min(high - low for low, high in itertools.pairwise(moved)) >= 15


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


def test_the_first_of_each_case_is_timed_twice():
    calls = {"one": lambda: None, "other": lambda: None}
    seconds = measure.take_turns(calls, measure.Effort(0.01, 3))
    assert list(seconds) == ["one", "other", "one, again"]
    named = {"one": lambda: None, "one, again": lambda: None}
    assert list(measure.take_turns(named, measure.Effort(0.01, 3))) == list(named)


def test_copies_of_a_program_are_one_sample_and_the_control_has_its_own():
    case = cases.blocks(quick=True)[0]
    made = [ours.transform(case, name) for name in ("one", "other")]
    prepared = measure.prepare(case, "forward", made, copies=2)
    assert len(prepared.calls) == len({*prepared.calls.values()}) == 6
    taken = {name: [i + 1.0] * 3 for i, name in enumerate(prepared.calls)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "take_turns", lambda calls, effort: taken)
        found = prepared.rows(measure.Effort(0.01, 3))
    assert [row["candidate"] for row in found] == ["one", "other", "one, again"]
    # The copies come after the first of each: 1 and 3, 2 and 4, 5 and 6.
    assert [row["seconds"] for row in found] == [2.0, 3.0, 5.5]


def test_picks_are_compared_in_the_rounds_and_the_place_of_their_search():
    busy = "forward, beside two busy processes"
    spent = {"spent": {"first": 1.0}, "budget": 2.0}
    of = lambda ratios, of, **more: [
        {**row, "of": of, "chosen": [], "seconds": row["ratio"], **spent, **more}
        for row in rows("tuner", "ratio", ratios)[: len(ratios)]
    ]
    alone = of({"vmap": 1.0, "fold": 0.8, "loop": 0.84}, "forward")
    alone[2]["chosen"] = ["first", "second"]
    rest = of({"slow": 0.7}, "forward", behind=1.4)
    beside = of({"vmap": 1.0, "fold": 0.8, "loop": 0.6}, busy)
    beside[1]["chosen"] = ["beside two busy processes"]
    noise = of({"vmap, again": 1.2}, "forward") + of({"vmap, again": 1.5}, busy)
    lines = targets.answers([*alone, *rest, *beside, *noise])
    found = {what: line for what, *line in lines}
    _, figure, spread = found[
        "the tuner's pick against the best fixed choice, two searches"
    ]
    assert figure == "geometric mean 1.05, largest 1.05; 2 of 2 within 1.05"
    assert spread == "1.20 to 1.20"
    _, figure, spread = found["the same, searched and run beside two busy processes"]
    assert "largest 1.33" in figure
    assert spread == "1.50 to 1.50"
    _, figure, _ = found["the tuner's pick against the default, all searches"]
    assert "3 of 3 within 1.03" in figure


def test_a_trace_has_every_candidate(tmp_path):
    effort = measure.Effort(0.01, 3, tmp_path)
    measure.take_turns({"one of them": lambda: None}, effort)
    (trace,) = tmp_path.rglob("*.trace.json.gz")
    assert "one of them" in gzip.decompress(trace.read_bytes()).decode()


def test_the_noise_stands_beside_the_targets():
    found = beside(1.2, 2.0) + rows("dense", "seconds", {"raw jnp, again": 1.1})
    found += beside(1.2, 2.0, case="two")
    found += rows("dense", "seconds", {"raw jnp, again": 3.0}, case="two")
    found = [{**row, "suite": "blocks"} for row in found]
    answers = {
        what: (figure, noise) for what, _, figure, noise in targets.answers(found)
    }
    figure, noise = answers["tuned against the best JAX peer, above 100 µs"]
    # The control is no peer.
    assert "largest 1.20" in figure
    assert noise == "1.10 to 3.00"


def run_of(path, ratios, memory=100, once=()):
    """A file with a candidate of each name, and these ratios; some measured once."""
    about = {"suite": "dense", "case": "one", "of": "forward"}
    found = [
        {**about, "candidate": name, "ratio": ratio, "temporary_bytes": memory}
        | ({"quartiles": []} if name in once else {})
        for name, ratio in ratios.items()
    ]
    path.write_text(json.dumps({"rows": found}))
    return path


def test_two_runs_are_compared_beyond_their_noise(tmp_path):
    first = run_of(tmp_path / "a.json", {"x": 1.0, "y": 2.0, "z": 1.0, "x, again": 1.1})
    after = {"x": 1.0, "y": 2.1, "z": 0.5, "new": 1.0, "x, again": 1.0}
    second = run_of(tmp_path / "b.json", after)
    text = "\n".join(compare.compare(first, second))
    assert "4 candidates are in both" in text
    assert "| z | time, as a ratio to the first | 1 | 0.5 | 0.50 |" in text
    # Within the noise of 1.1.
    assert "| y | time" not in text
    assert "| dense | y | 1 | 1.05 |" in text
    smaller = run_of(tmp_path / "c.json", after, memory=50)
    assert "memory | 100 | 50 | 0.50" in "\n".join(compare.compare(second, smaller))
    assert "Nothing has changed." in compare.compare(second, second)
    single = run_of(tmp_path / "d.json", after, once=["z"])
    assert "| z | time" not in "\n".join(compare.compare(first, single))


def test_runs_that_cannot_be_compared_say_why(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    good = run_of(tmp_path / "a.json", {"x": 1.0})
    with pytest.raises(SystemExit, match=r"must be the results.json of a run"):
        compare.compare(good, tmp_path / "other.json")
    with pytest.raises(SystemExit, match="no case in common"):
        compare.compare(good, run_of(tmp_path / "b.json", {"y": 1.0}))


OWN = """
import jax.numpy as jnp

def case():
    keywords = {"argnums": 0, "candidates": [{"chunk_size": 2}]}
    return jnp.sin, (jnp.ones((2, 4, 3)),), keywords

def wrong():
    return 1

def with_arguments(x):
    return x
"""


def test_a_users_own_function_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own_case.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    found = own.rows("my_own_case:case", budget=20)
    assert {row["candidate"] for row in found} >= {"method='vmap'"}
    assert {row["of"] for row in found} == {"gradient"}
    assert sum(row["chosen"] for row in found) == 1
    assert "default" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"must return \(fun, args"):
        own.rows("my_own_case:wrong", budget=1)
    with pytest.raises(SystemExit, match="must take no arguments"):
        own.rows("my_own_case:with_arguments", budget=1)
    for spec in ("my_own_case", "my_own_case:none", "no_such_module:case"):
        with pytest.raises(SystemExit, match=r"module:function|can't be found"):
            own.rows(spec, budget=1)
