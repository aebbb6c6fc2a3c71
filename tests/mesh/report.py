"""How the programs of this folder say what came of them: as JSON."""

import json

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding


def close(got, expected, tolerance=1e-5):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return all(np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


def error_of(call):
    """`(kind, message with notes)`, or None if nothing is raised."""
    try:
        call()
    except (TypeError, ValueError) as error:
        text = [str(error), *getattr(error, "__notes__", ())]
        return type(error).__name__, "\n".join(text)
    return None


def print_facts(kind, facts, bad_calls):
    """`facts` and `bad_calls` are functions of the mesh."""
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType[kind],) * 2)
    with jax.set_mesh(mesh):
        found = {fact.__name__: bool(fact(mesh)) for fact in facts}
        errors = {name: error_of(call) for name, call in bad_calls(mesh).items()}
    print(json.dumps({**found, "errors": errors}))


def place(mesh, tree, spec):
    put = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(put, tree)
