"""Draws the pictures of the README and the site, from the library and its benchmarks.

    python docs/pictures.py
    python docs/pictures.py examples

writes them to docs/pictures. The curves are those of benchmarks/results/cpu. With
`examples`, it runs every example in full, six minutes on two cores, and keeps the
picture that each leaves in docs/pictures/examples.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

import tdjax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.drawing import OURS, PEER, is_ours, name_figure, new_figure, times
from benchmarks.plots import ratios_to

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
OUT = HERE / "pictures"
RESULTS = HERE.parent / "benchmarks" / "results" / "cpu" / "results.json"
LIGHT, EMPTY = "#cfe2ff", "#f3f4f6"
LOSSES = {
    "linear_cross_entropy": "tdjax",
    "Optax, all logits": "Optax on all logits",
    "PyTorch": "PyTorch",
}


def main():
    matplotlib.use("Agg")
    plt.style.use("tdjax.plots")
    OUT.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text())
    about = results["about"]
    rows = [row for row in results["rows"] if "missing" not in row]
    pictures = {
        "families": draw_families(),
        "packing": draw_packing(),
        "loss": draw_loss(rows, about),
    }
    for name, figure in pictures.items():
        figure.savefig(OUT / f"{name}.png")
        print(OUT / f"{name}.png")


def keep_pictures_of_examples():
    for program in sorted(EXAMPLES.glob("[!_]*.py")):
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([sys.executable, program, "--out", out], check=True)
            (picture,) = Path(out).glob("*.png")
            shutil.copy(picture, OUT / "examples" / f"{program.stem}.png")


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


def draw_loss(rows, about):
    """Time and temporary memory of the loss and its gradient at 32,000 words."""
    chosen = [
        row
        for row in rows
        if row["suite"] == "loss" and row["of"] == "gradient"
        and "4096 steps, 256 features, 32000 words, float32" in row["case"]
    ]  # fmt: skip
    figure, (time, memory) = new_figure(["seconds", "temporary memory, MB"], 3.2)
    draw_bars(time, {row["candidate"]: row["seconds"] for row in chosen}, "{:.2f}")
    known = [row for row in chosen if row["temporary_bytes"]]
    sizes = {row["candidate"]: row["temporary_bytes"] / 1e6 for row in known}
    draw_bars(memory, sizes, "{:,.0f}")
    ratio = lambda column: times(
        ratios_to("Optax, all logits", chosen, LOSSES, column)["tdjax"]
    )
    title = "The fused loss at 4096 steps and 32,000 words takes"
    title += (
        f" {ratio('seconds')} Optax' time and {ratio('temporary_bytes')} its memory"
    )
    return name_figure(figure, title, about)


def draw_bars(ax, sizes: dict[str, float], form: str):
    """A bar for each of LOSSES, the smallest on top, with its size at the end."""
    order = sorted(sizes.keys() & LOSSES.keys(), key=sizes.get, reverse=True)
    names, values = [LOSSES[name] for name in order], [sizes[name] for name in order]
    colors = [OURS if is_ours(name) else PEER for name in names]
    ax.bar_label(ax.barh(names, values, color=colors), fmt=form, padding=4)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.set_xlim(0, 1.25 * max(values))


if __name__ == "__main__":
    keep_pictures_of_examples() if sys.argv[1:] == ["examples"] else main()
