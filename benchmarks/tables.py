"""Makes the table that ships for this device: `python -m benchmarks.tables`.

Flax's own layers and `tdjax.dense` are tuned, each by itself, with its gradient, at the
shapes of the benchmarks. What was measured is in `benchmark-tables/`, one file for each
kind of device; a run that was stopped goes on from it.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.progress import track

import tdjax
from benchmarks.cases import blocks, dense_grid, videos
from benchmarks.layers import CHANNELS, HEADS
from tdjax._tuning.cache import write_atomically
from tdjax._tuning.shipped import file_name

TABLES = Path(__file__).parents[1] / "src" / "tdjax" / "_tuning" / "tables"
Run = Callable[[], Any]


def main() -> None:
    options = _parse()
    kind = jax.devices()[0].device_kind
    measured = options.measured / file_name(kind)
    tasks = list(_tasks(options.quick))
    console = Console(stderr=True)
    with tdjax.tuning(measured, budget=options.budget):
        for name, run in track(tasks, description="tables", console=console):
            console.log(name)
            run()
    found = tdjax.Tuning.from_json(measured.read_text("utf-8")).options_by_key()
    options.out.mkdir(parents=True, exist_ok=True)
    table = json.dumps(dict(sorted(found.items())), indent=0)
    write_atomically(options.out / file_name(kind), table + "\n")
    print(f"{len(found)} places for {kind!r}, written to {options.out}/")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.tables", description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the table")
    parser.add_argument(
        "--measured", type=Path, default=Path("benchmark-tables"),
        help="folder of what was measured",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=10.0, help="seconds for each place"
    )
    parser.add_argument("--quick", action="store_true", help="one small shape of each")
    return parser.parse_args()


def _tasks(quick: bool) -> Iterator[tuple[str, Run]]:
    for case in dense_grid(quick):
        yield from _dense(case.x.shape[-1], case.x)
    width = blocks(quick)[0].x.shape[-1]
    rngs = nnx.Rngs(0)
    for case in blocks(quick):
        x, features = case.x, case.x.shape[-1]
        if case.layer == "GRU and head":
            yield from _dense(features, x)
        elif case.layer == "LayerNorm block":
            yield from _layer(nn.LayerNorm(), nnx.LayerNorm(features, rngs=rngs), x)
        elif case.layer == "attention":
            own = nnx.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
            yield from _layer(nn.MultiHeadDotProductAttention(HEADS), own, x)
    for case in videos(quick):
        for channels in (case.x.shape[-1], CHANNELS):
            x = jnp.zeros((*case.x.shape[:-1], channels))
            own = nnx.Conv(channels, CHANNELS, (3, 3), rngs=rngs)
            yield from _layer(nn.Conv(CHANNELS, (3, 3)), own, x)


def _dense(features: int, x: jax.Array) -> Iterator[tuple[str, Run]]:
    params = tdjax.init_dense(jax.random.key(0), x.shape[-1], features, dtype=x.dtype)
    run = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), method="auto")
    yield f"dense, {jax.typeof(x)}", lambda: jax.eval_shape(run, params, x)
    own = nnx.Linear(x.shape[-1], features, rngs=nnx.Rngs(0), param_dtype=x.dtype)
    yield from _layer(nn.Dense(features), own, x)


def _layer(layer: nn.Module, own: nnx.Module, x: jax.Array):
    """A layer of Linen and one of NNX, each over the steps of `x`."""
    name = f"{type(layer).__name__}, {jax.typeof(x)}"
    linen = tdjax.linen.TimeDistributed(layer, method="auto")
    of_x = lambda tree: jax.tree.map(lambda leaf: leaf.astype(x.dtype), tree)
    variables = of_x(linen.init(jax.random.key(0), x))
    yield f"Linen {name}", lambda: jax.eval_shape(linen.apply, variables, x)
    graph, state = nnx.split(tdjax.nnx.TimeDistributed(own, method="auto"))
    run = lambda state, x: nnx.merge(graph, state)(x)
    yield f"NNX {name}", lambda: jax.eval_shape(run, state, x)


if __name__ == "__main__":
    main()
