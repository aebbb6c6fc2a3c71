"""The lowerings beside what people write by hand: forward and gradient, in one run.

    python benchmarks/lowerings.py --out benchmarks/results

Every candidate is compiled and warmed up before the first measurement, gets the same
numbers, is checked against the others, and is timed in turn with them. Reported are
ratios of medians to the first candidate of the case, and the spread (the quartiles)
of each. Writes `lowerings-<device>.json` and a Markdown table of the same name.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tdjax


class Case(NamedTuple):
    name: str
    params: Any
    x: jax.Array
    candidates: dict[str, Callable[[Any, jax.Array], jax.Array]]


class Frame(nn.Module):
    """A small conv net over one frame."""

    @nn.compact
    def __call__(self, x):
        for features in (16, 16, 16):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
        return x


class Mapped(nn.Module):
    """The same through Flax's own vmap."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            Frame,
            in_axes=1,
            out_axes=1,
            variable_axes={"params": None},
            split_rngs={"params": False},
        )
        return mapped(name="frame")(x)


def dense_case(batch: int, timesteps: int, features: int) -> Case:
    key = jax.random.key(0)
    params = tdjax.init_dense(key, features, features)
    x = jax.random.normal(key, (batch, timesteps, features))
    wrap = partial(tdjax.time_distributed, tdjax.dense, in_axes=(None, 1))
    candidates = {
        "x @ kernel + bias": lambda p, x: x @ p["kernel"] + p["bias"],
        "jax.vmap over time": jax.vmap(tdjax.dense, (None, 1), 1),
        "jax.lax.map over time": lambda p, x: _mapped_steps(tdjax.dense, p, x),
        "tdjax.dense": tdjax.dense,
        "time_distributed": wrap(),
        'time_distributed, "fold"': wrap(method="fold"),
        "time_distributed, 8 chunks": wrap(chunk_size=timesteps // 8),
    }
    return Case(f"Dense, float32 {list(x.shape)}", params, x, candidates)


def conv_case(*shape: int) -> Case:
    x = jax.random.normal(jax.random.key(1), shape)
    params = Frame().init(jax.random.key(0), x[:, 0])
    apply = Frame().apply
    wrap = partial(tdjax.time_distributed, apply, in_axes=(None, 1))
    candidates = {
        "jax.vmap over time": jax.vmap(apply, (None, 1), 1),
        "flax nn.vmap": lambda p, x: Mapped().apply(
            {"params": {"frame": p["params"]}}, x
        ),
        "reshape by hand": lambda p, x: _folded(apply, p, x),
        "jax.lax.map over time": lambda p, x: _mapped_steps(apply, p, x),
        "time_distributed": wrap(),
        'time_distributed, "fold"': wrap(method="fold"),
        "time_distributed, steps, unrolled": wrap(chunk_size=1, unroll=True),
        "time_distributed, steps, in a loop": wrap(chunk_size=1),
    }
    return Case(f"3 convolutions, float32 {list(shape)}", params, x, candidates)


def _folded(apply, params, x):
    y = apply(params, x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _mapped_steps(apply, params, x):
    y = jax.lax.map(lambda step: apply(params, step), jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1)


def gradient(apply):
    return jax.grad(lambda params, x: jnp.sum(apply(params, x) ** 2), argnums=(0, 1))


def compile_all(case: Case, of_gradient: bool) -> dict[str, Any]:
    compiled = {}
    for name, apply in case.candidates.items():
        fun = gradient(apply) if of_gradient else apply
        compiled[name] = jax.jit(fun).lower(case.params, case.x).compile()
    return compiled


def check_agreement(case: Case, compiled) -> None:
    results = [jax.tree.leaves(run(case.params, case.x)) for run in compiled.values()]
    for name, result in zip(compiled, results):
        for got, want in zip(result, results[0]):
            # Sums of thousands of float32 products, in another order.
            scale = float(jnp.abs(want).max())
            np.testing.assert_allclose(
                got, want, rtol=0, atol=2e-4 * scale, err_msg=name
            )


def measure(case: Case, compiled, rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate, in turn, `rounds` times."""
    seconds = {name: [] for name in compiled}
    for _ in track(range(rounds), description=case.name, transient=True):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(case.params, case.x))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(case: Case, what: str, compiled, seconds) -> list[dict[str, Any]]:
    base = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        memory = compiled[name].memory_analysis()
        rows.append(
            {
                "case": case.name,
                "of": what,
                "candidate": name,
                "ratio": round(median / base, 3),
                "quartiles": [round(low / base, 3), round(high / base, 3)],
                "temporary MB": round(memory.temp_size_in_bytes / 1e6, 1),
            }
        )
    return rows


def run(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        for what in ("forward", "gradient"):
            compiled = compile_all(case, what == "gradient")
            check_agreement(case, compiled)
            rows += summarise(case, what, compiled, measure(case, compiled, rounds))
    return rows


def write(out: Path, rows) -> None:
    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "cores": os.cpu_count() if device.platform == "cpu" else None,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    out.mkdir(parents=True, exist_ok=True)
    name = f"lowerings-{device.platform}"
    write_atomically(
        out / f"{name}.json", json.dumps({**about, "rows": rows}, indent=1)
    )
    header = "| case | of | candidate | time, ratio | quartiles | temporary MB |"
    lines = [", ".join(f"{k} {v}" for k, v in about.items() if v), "", header]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        low, high = row["quartiles"]
        cells = [row["case"], row["of"], row["candidate"], f"{row['ratio']:.2f}"]
        cells += [f"{low:.2f} to {high:.2f}", f"{row['temporary MB']}"]
        lines.append("| " + " | ".join(cells) + " |")
    write_atomically(out / f"{name}.md", "\n".join(lines) + "\n")


def write_atomically(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    draft.replace(path)


def show(rows) -> None:
    table = Table("case", "of", "candidate", "ratio", "quartiles", "temporary MB")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the lowerings.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    cases = [
        dense_case(32, 512, 256),
        dense_case(64, 128, 64),
        conv_case(8, 16, 64, 64, 3),
    ]
    rows = run(cases, options.rounds)
    show(rows)
    write(options.out, rows)


if __name__ == "__main__":
    main()
