"""Draws the pictures of the README and the site, from the library and its benchmarks.

    python docs/pictures.py

writes them to docs/pictures. The curves are those of benchmarks/results/cpu.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

import tdjax

HERE = Path(__file__).resolve().parent
OUT = HERE / "pictures"
RESULTS = HERE.parent / "benchmarks" / "results" / "cpu" / "results.json"
STRONG, GREY, LIGHT, EMPTY = "#1f6feb", "#8c959f", "#cfe2ff", "#f3f4f6"
# Which peers a curve is drawn for; more lines than four can't be told apart.
COMPILED = {"vmap": "tdjax", "Keras TimeDistributed": "Keras"}
LOSSES = {
    "linear_cross_entropy": "tdjax",
    "Optax, all logits": "Optax on all logits",
    "PyTorch": "PyTorch",
}


def main():
    matplotlib.use("Agg")
    plt.style.use("tdjax.plots")
    OUT.mkdir(exist_ok=True)
    rows = [r for r in json.loads(RESULTS.read_text())["rows"] if "missing" not in r]
    pictures = {
        "families": draw_families(),
        "packing": draw_packing(),
        "compile": draw_compile_time(rows),
        "loss": draw_loss(rows),
    }
    for name, figure in pictures.items():
        figure.savefig(OUT / f"{name}.png")
        print(OUT / f"{name}.png")


def draw_families():
    """What each of the three Dense families lets a step see."""
    timesteps, features = 6, 2
    x = jnp.ones((1, timesteps, features))
    key = jax.random.key(0)
    flatten = tdjax.init_flatten_dense(key, timesteps, features, features)
    per_step = tdjax.init_per_step_dense(key, timesteps, features, features)
    shared = tdjax.init_dense(key, features, features)
    families = {
        "dense\none kernel for all steps": (tdjax.dense, shared),
        "per_step_dense\none kernel per step": (tdjax.per_step_dense, per_step),
        "flatten_dense\none kernel for everything": (tdjax.flatten_dense, flatten),
    }
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.9), sharey=True)
    for ax, (title, (fun, params)) in zip(panels, families.items()):
        influence = tdjax.step_influence(fun, params, x, argnums=1)
        tdjax.plot_step_influence(influence, ax=ax)
        ax.set_title(title, fontsize=10)
        ax.set_ylabel("output step" if ax is panels[0] else "")
    return figure


def draw_packing():
    """A ragged batch, and the same steps packed."""
    lengths, timesteps, capacity = [8, 3, 5, 1], 8, 18
    mask = np.asarray(tdjax.lengths_to_mask(jnp.array(lengths), timesteps))
    figure, (padded, packed) = plt.subplots(
        2, 1, figsize=(9, 3.6), gridspec_kw={"height_ratios": [4, 1.2]}
    )
    places = np.argwhere(mask)
    for row, step in np.ndindex(mask.shape):
        draw_cell(padded, step, row, LIGHT if mask[row, step] else EMPTY)
        if mask[row, step]:
            padded.text(step, row, f"{row}.{step}", ha="center", va="center", size=8)
    for slot in range(capacity):
        used = slot < len(places)
        draw_cell(packed, slot, 0, LIGHT if used else EMPTY)
        if used:
            row, step = places[slot]
            packed.text(slot, 0, f"{row}.{step}", ha="center", va="center", size=8)
    padded.set_title(f"4 sequences, padded: {mask.size} steps are computed")
    packed.set_title(
        f"the same with capacity={capacity}: {capacity} steps are computed"
    )
    for ax, rows in ((padded, 4), (packed, 1)):
        ax.set(xlim=(-0.6, capacity - 0.4), ylim=(rows - 0.4, -0.6), aspect="equal")
        ax.axis("off")
    return figure


def draw_cell(ax, x: int, y: int, colour: str):
    ax.add_patch(plt.Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, color=colour))


def draw_compile_time(rows):
    """Seconds to compile Dense, by the number of steps."""
    lines = {name: [] for name in COMPILED.values()}
    for row in rows:
        is_asked = (row["suite"], row["of"]) == ("compile", "gradient")
        if is_asked and row["candidate"] in COMPILED:
            point = row["timesteps"], row["compile_seconds"]
            lines[COMPILED[row["candidate"]]].append(point)
    figure, ax = plt.subplots()
    draw_lines(ax, lines)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="steps", ylabel="seconds to compile the gradient of Dense")
    ax.set_title("Compile time stays flat; Keras' grows with the sequence")
    return figure


def draw_lines(ax, lines):
    """A line for each name, tdjax in colour and in front, named at its end."""
    for place, name in enumerate(lines):
        x, y = zip(*sorted(lines[name]))
        ax.plot(
            x,
            y,
            color=f"C{place}",
            marker=["o", "s", "^", "D"][place],
            zorder=5 - place,
        )
        ax.annotate(
            name, (x[-1], y[-1]), xytext=(8, 0), textcoords="offset points",
            color=f"C{place}", va="center", weight="bold" if place == 0 else "normal",
        )  # fmt: skip


def draw_loss(rows):
    """Time and temporary memory of the loss and its gradient at 32,000 words."""
    chosen = [
        row
        for row in rows
        if row["suite"] == "loss" and row["of"] == "gradient"
        and "4096 steps, 256 features, 32000 words, float32" in row["case"]
    ]  # fmt: skip
    figure, panels = plt.subplots(1, 2, figsize=(9, 3))
    values = {"seconds": 1.0, "temporary_bytes": 1e-6}
    titles = {"seconds": "seconds", "temporary_bytes": "temporary memory, MB"}
    for ax, (key, scale) in zip(panels, values.items()):
        bars = [
            (LOSSES[row["candidate"]], row[key] * scale)
            for row in chosen
            if row["candidate"] in LOSSES and row.get(key)
        ]
        bars.sort(key=lambda bar: bar[1], reverse=True)
        names, sizes = zip(*bars)
        colours = [STRONG if name == "tdjax" else GREY for name in names]
        drawn = ax.barh(names, sizes, color=colours)
        ax.bar_label(drawn, fmt="{:.2f}" if key == "seconds" else "{:,.0f}", padding=4)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
        ax.set_xlim(0, 1.2 * max(sizes))
        ax.set_title(titles[key], fontsize=10)
    figure.suptitle(
        "The fused loss at 4096 steps and 32,000 words keeps no logits",
        x=0.01, ha="left", weight="bold",
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    main()
