"""A convolution over time on 8 devices, the batch split: run by `test_why_not_vmap.py`

Prints as JSON the operations of one device, relative to those of all steps on one
device, and the bytes that it sends: by `jax.vmap` under `jit`, and with `sharding`.
"""

import json

import jax
import numpy as np
from benchmarks.collectives import sent_bytes
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import tdjax
from mesh.programs import LAYERS, TIMESTEPS, random
from mesh.report import place


def main():
    convolution, params, _ = LAYERS["convolution"]
    x = random(0, 8, TIMESTEPS, 16, 16, 2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    options = {"in_axes": (None, 1), "sharding": P("data")}
    calls = {
        "jax.vmap": jax.vmap(convolution, in_axes=(None, 1), out_axes=1),
        "sharding": tdjax.time_distributed(convolution, **options),
    }
    alone = jax.jit(calls["jax.vmap"]).lower(params, x).compile()
    want, found = np.asarray(alone(params, x)), {}
    with jax.set_mesh(mesh):
        placed = place(mesh, params, P()), place(mesh, x, P("data"))
        for name, call in calls.items():
            compiled = jax.jit(call).lower(*placed).compile()
            assert np.allclose(compiled(*placed), want, atol=1e-5)
            work = compiled.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
            found[name] = work, sent_bytes(compiled.as_text())
    print(json.dumps({**found, "input": x.nbytes}))


if __name__ == "__main__":
    main()
