"""Programs on 8 devices: run by `test_mesh.py`, which makes the devices

Prints a JSON list of what came of each: its name, whether it is a gradient, the largest
deviation from plain `jax.vmap` on one device, relative to the largest value, what it
sends, and the bytes of the parameters.
"""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tdjax

BATCH, TIMESTEPS, CAPACITY = 16, 8, 128
SPECS = {
    "batch": P("data"),
    "time": P(None, "data"),
    "both": P("data", "seq"),
    "both on the batch": P(("data", "seq")),
}
LOWERINGS = {
    "vmap": {},
    "fold": {"method": "fold"},
    "chunks": {"chunk_size": 2},
    "folded chunks, remat": {"method": "fold", "chunk_size": 2, "remat": True},
    "line": {"chunk_size": 1, "unroll": True},
    "mask": {},
    "mask, chunks": {"chunk_size": 1},
    "packed": {"capacity": CAPACITY, "method": "fold"},
}
LENGTHS = np.array([8, 3, 1, 0, 2, 5, 8, 7] * 2)
MASK = np.arange(TIMESTEPS) < LENGTHS[:, None]


def attention(params, x):
    """Within a step: `(batch, objects, features)`."""
    q, k = x @ params["q"], x @ params["k"]
    weights = jax.nn.softmax(jnp.einsum("bid,bjd->bij", q, k))
    return jnp.einsum("bij,bjd->bid", weights, x)


def convolution(params, x):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    return jax.nn.relu(y)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LAYERS = {
    "dense": (
        tdjax.dense,
        {"kernel": random(0, 12, 20) / 4, "bias": random(1, 20)},
        random(2, BATCH, TIMESTEPS, 12),
    ),
    "attention": (
        attention,
        {"q": random(3, 6, 6) / 3, "k": random(4, 6, 6) / 3},
        random(5, BATCH, TIMESTEPS, 4, 6),
    ),
    "convolution": (
        convolution,
        {"kernel": random(6, 3, 3, 2, 4) / 4},
        random(7, BATCH, TIMESTEPS, 6, 6, 2),
    ),
}


def chosen(everything):
    """All programs, or some of each kind."""
    for layer, spec, lowering in itertools.product(LAYERS, SPECS, LOWERINGS):
        is_main = layer == "dense" and lowering in ("vmap", "packed")
        if everything or is_main or spec == "both":
            yield layer, spec, lowering


def loss(apply, params, *args):
    y = apply(params, *args)
    return jnp.sum(y**2), y


def run(mesh, layer, spec, lowering, given=True):
    """`[forward, gradient]`, with `sharding` given or only in the types."""
    fun, params, x = LAYERS[layer]
    masked = lowering.startswith(("mask", "packed"))
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    args = (place(x, SPECS[spec]), place(MASK, SPECS[spec]))[: 1 + masked]
    on_mesh = jax.tree.map(lambda leaf: place(leaf, P()), params)
    over_time = tdjax.time_distributed(
        fun,
        in_axes=(None, 1),
        sharding=SPECS[spec] if given else None,
        **LOWERINGS[lowering],
    )
    apply = lambda p, x, mask=None: over_time(p, x, mask=mask)
    gradient = jax.grad(lambda p, *args: loss(apply, p, *args)[0])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for is_gradient, call in ((False, apply), (True, gradient)):
        compiled = jax.jit(call).lower(on_mesh, *args).compile()
        expected = reference(layer, masked, is_gradient)
        results = compiled(on_mesh, *args)
        got = jax.device_get(results)
        yield {
            "name": f"{layer}, {spec}, {lowering}",
            "is_gradient": is_gradient,
            "specs": [str(y.sharding.spec) for y in jax.tree.leaves(results)],
            "deviation": deviation(got, expected),
            "collectives": collectives(compiled.as_text()),
            "parameter_bytes": size,
        }


def reference(layer, masked, is_gradient):
    """Plain JAX, on one device."""
    fun, params, x = LAYERS[layer]

    def apply(params):
        y = jax.vmap(fun, in_axes=(None, 1), out_axes=1)(params, x)
        mask = MASK.reshape(*MASK.shape, *[1] * (y.ndim - 2))
        return jnp.where(mask, y, 0) if masked else y

    gradient = jax.grad(lambda params: loss(apply, params)[0])
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        return jax.device_get(jax.jit(gradient if is_gradient else apply)(params))


def deviation(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def main(kind, which="some"):
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType[kind],) * 2)
    with jax.set_mesh(mesh):
        cases = chosen(which == "all")
        given = which != "without sharding"
        rows = [row for case in cases for row in run(mesh, *case, given=given)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
