"""What is measured: a layer, a shape, a dtype, and the same random numbers for all."""

import math
from typing import Any, NamedTuple

import jax

from benchmarks.layers import LAYERS, whole


class Case(NamedTuple):
    """One layer over one input; `y` is the reference output in the common layout."""

    layer: str
    params: Any
    x: jax.Array
    cotangent: jax.Array

    @property
    def name(self) -> str:
        return f"{self.layer}, {self.x.dtype} {list(self.x.shape)}"

    @property
    def timesteps(self) -> int:
        return self.x.shape[1]


def make_case(layer: str, shape: tuple[int, ...], dtype: str = "float32") -> Case:
    keys = jax.random.split(jax.random.key(0), 3)
    cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)
    x = cast(jax.random.normal(keys[0], shape))
    params = cast(LAYERS[layer].init(keys[1], x[:, 0]))
    model = whole(layer, lambda step: jax.vmap(step, (None, 1), 1))
    y = jax.eval_shape(model, params, x)
    return Case(layer, params, x, cast(jax.random.normal(keys[2], y.shape)))


def dense_grid(quick: bool) -> list[Case]:
    batches, times, features = ((8,), (128,), (64,)) if quick else (
        (8, 64), (16, 128, 1024), (64, 256)
    )  # fmt: skip
    return [
        make_case("Dense", (b, t, f), dtype)
        for dtype in (("bfloat16",) if quick else ("float32", "bfloat16"))
        for f in features
        for b in batches
        for t in times
    ]


def blocks(quick: bool) -> list[Case]:
    shapes = {
        "MLP": (16, 128, 128),
        "LayerNorm block": (64, 128, 256),
        "attention": (8, 32, 64, 128),
        "GRU and head": (32, 128, 128),
    }
    if quick:
        some = "MLP", "GRU and head"
        shapes = {name: (2, 16, *shapes[name][2:]) for name in some}
    return [make_case(layer, shape) for layer, shape in shapes.items()]


def videos(quick: bool) -> list[Case]:
    shapes = [(8, 16, 64, 64, 3), (16, 8, 112, 112, 3)]
    if quick:
        shapes = [(2, 8, 16, 16, 3)]
    return [make_case("conv net", shape) for shape in shapes]


def dense_floor_work(case: Case, of: str) -> tuple[float, float]:
    """Of a Dense: `(floating-point operations, bytes)` that no program can avoid.

    The forward pass reads x and the kernel and writes y. The gradient has three
    matrix products; it reads x, the cotangent and the kernel, and writes y and the
    gradients of x and of the kernel.
    """
    width, size = case.x.shape[-1], case.x.dtype.itemsize
    steps, kernel = math.prod(case.x.shape[:-1]), case.x.shape[-1] ** 2
    product, array = 2.0 * steps * kernel, steps * width
    if of == "forward":
        return product, size * (2.0 * array + kernel)
    return 3 * product, size * (4.0 * array + 2 * kernel)
