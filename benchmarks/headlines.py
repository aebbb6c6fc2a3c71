"""The six lines of speed in the README: what, beside what, and the ratio of times."""

import re
from typing import Any

from benchmarks.measure import is_control
from benchmarks.targets import geometric_mean

Row = dict[str, Any]
TUNED, KERAS = "time_distributed, tuned", "Keras TimeDistributed"
# What, beside what: the suite, ours, the peer, and a pattern of the cases.
LINES = {
    ("Dense at every step", "`x @ w + b`"): ("dense", TUNED, "raw jnp", ""),
    ("a conv net for every frame", "`jax.vmap`"): ("video", TUNED, "jax.vmap", ""),
    ("Dense at 128 steps and more", "Keras 3 on JAX"): ("dense", TUNED, KERAS, ""),
    ("a batch of frames, 30 % valid, packed", "the same, padded"): (
        "packing", "packed", "padded", "conv net.*30% valid",
    ),
    ("loss at 32,000 words", "Optax on all logits"): (
        "loss", "linear_cross_entropy", "Optax, all logits",
        "4096 steps, 256 features, 32000 words, float32",
    ),
}  # fmt: skip


def headlines(rows: list[Row]) -> list[tuple[str, str, str]]:
    """`(what, beside, figure)`; a figure below 1 means that tdjax is faster."""
    rows = [row for row in rows if "missing" not in row and not is_control(row)]
    lines = []
    for (what, peer), line in LINES.items():
        least = 128 if peer == "Keras 3 on JAX" else 0
        chosen = [row for row in rows if (row.get("timesteps") or 0) >= least]
        figure = _times(chosen, "seconds", *line)
        if what.startswith("loss"):
            memory = _times(chosen, "temporary_bytes", *line)
            figure += f" ({memory} of the memory)"
        lines.append((what, peer, figure))
        if peer == "Keras 3 on JAX":
            compiling = _times(chosen, "compile_seconds", *line)
            lines.append(("compiling that", peer, compiling))
    return lines


def _times(
    rows: list[Row], column: str, suite: str, ours: str, peer: str, case: str
) -> str:
    """The geometric mean over the cases of ours beside the peer's, with gradients."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        is_asked = (row["suite"], row["of"]) == (suite, "gradient")
        if is_asked and re.search(case, row["case"]):
            cases.setdefault(row["case"], {})[row["candidate"]] = row
    pairs = [c for c in cases.values() if ours in c and peer in c]
    ratio = geometric_mean(c[ours][column] / c[peer][column] for c in pairs)
    return f"{ratio:.2f}"
