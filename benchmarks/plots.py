"""The pictures of a run: one for each suite that has something to show."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw_all(out: Path, results: dict[str, Any]) -> None:
    """Writes `<suite>.png` for each suite of the results."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in results["rows"] if "missing" not in row]
    draw = {
        "compile": _compile,
        "memory": _memory,
        "packing": _packing,
        "keras": _keras,
    }
    for suite in dict.fromkeys(row["suite"] for row in rows):
        chosen = [row for row in rows if row["suite"] == suite]
        figure = draw.get(suite, _ratios)(chosen, suite, results["about"])
        draft = out / f".{suite}.png"
        figure.savefig(draft, dpi=110, bbox_inches="tight")
        draft.replace(out / f"{suite}.png")


def _figure(title: str, about: dict[str, Any], size: tuple[float, float]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.set_title(f"{title} ({about['device']}, JAX {about['versions']['jax']})")
    return figure, axes


def _ratios(rows: list[Row], suite: str, about: dict[str, Any]):
    """The geometric mean over cases, forward and gradient, with all cases as dots."""
    ratios: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        ratios[row["candidate"]][row["of"]].append(row["ratio"])
    if suite == "tuner":
        ratios = {n: r for n, r in ratios.items() if len(r) > 1}
    figure, axes = _figure(f"{suite}: time, ratio", about, (9, 1 + 0.4 * len(ratios)))
    names = list(ratios)[::-1]
    for shift, of in enumerate(dict.fromkeys(row["of"] for row in rows)):
        color = f"C{shift}"
        for place, name in enumerate(names):
            values = ratios[name].get(of, [])
            height = place + 0.2 * (1 - 2 * shift)
            axes.plot(values, [height] * len(values), ".", color=color, alpha=0.4)
            if values:
                mean = math.exp(sum(map(math.log, values)) / len(values))
                label = of if place == 0 else None
                axes.barh(height, mean, 0.35, color=color, alpha=0.6, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="k", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time, relative to the first candidate of each case")
    axes.legend()
    return figure


def _compile(rows: list[Row], suite: str, about: dict[str, Any]):
    figure, axes = _figure("compile time of Dense", about, (8, 5))
    lines: dict[tuple, list] = defaultdict(list)
    for row in rows:
        point = row["timesteps"], row["compile_seconds"]
        lines[row["candidate"], row["of"]].append(point)
    for (name, of), points in lines.items():
        style = "-o" if of == "forward" else "--s"
        axes.plot(*zip(*sorted(points)), style, label=f"{name}, {of}", alpha=0.7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("seconds")
    axes.legend()
    return figure


def _memory(rows: list[Row], suite: str, about: dict[str, Any]):
    figure, axes = _figure("conv net gradient: memory and time", about, (8, 5))
    for color, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        points = [row for row in rows if row["case"] == case]
        x = [row["temporary_bytes"] / 1e6 for row in points]
        y = [row["ratio"] for row in points]
        axes.plot(x, y, "o", color=f"C{color}", label=case)
        for row, place in zip(points, zip(x, y)):
            axes.annotate(row["candidate"], place, fontsize=7)
    axes.set_xlabel("temporary memory, MB")
    axes.set_ylabel("time, relative to all steps at once")
    axes.legend()
    return figure


def _packing(rows: list[Row], suite: str, about: dict[str, Any]):
    figure, axes = _figure("packed steps: time", about, (8, 5))
    lines: dict[tuple, list] = defaultdict(list)
    for row in rows:
        if row["candidate"].startswith("packed"):
            place = row["layer"], row["candidate"], row["of"]
            lines[place].append((row["capacity_share"], row["ratio"]))
    for (layer, name, of), points in lines.items():
        style = "-o" if of == "forward" else "--s"
        label = f"{layer}, {name}, {of}"
        axes.plot(*zip(*sorted(points)), style, label=label, alpha=0.7)
    axes.plot([0, 1], [0, 1], color="k", linewidth=0.8, label="share of valid steps")
    axes.set_xlabel("share of valid steps")
    axes.set_ylabel("time, relative to all steps padded")
    axes.legend(fontsize=7)
    return figure


def _keras(rows: list[Row], suite: str, about: dict[str, Any]):
    """The first call and a later step, a line for each model and what it does."""
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((row["case"], row["of"]) for row in rows))[::-1]
    figure = Figure(figsize=(12, 1.5 + 0.3 * len(places)))
    titles = {"first_seconds": "first call", "seconds": "a step after that"}
    for axes, (what, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for name, mark in zip(dict.fromkeys(row["candidate"] for row in rows), "sod^"):
            points = [
                (row[what], places.index((row["case"], row["of"])))
                for row in rows
                if row["candidate"] == name
            ]
            axes.plot(*zip(*points), mark, label=name, alpha=0.7)
        axes.set_xscale("log")
        axes.set_xlabel(f"{title}, seconds")
        axes.set_yticks(range(len(places)), [", ".join(place) for place in places])
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    device, version = about["device"], about["versions"]["keras"]
    figure.suptitle(f"Keras models ({device}, Keras {version})", y=0.95)
    return figure
