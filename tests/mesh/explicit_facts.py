"""Without `sharding` on 8 devices, beyond `programs.py`: run by `test_mesh.py`

Functions and layers whose arguments are split over a mesh; they mix examples, close over
arrays, or write state. Results are those of one device.
"""

import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import tdjax
from mesh.report import close, place, print_facts

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6, 4, 4, 3)).astype(np.float32)
LENGTHS = np.array([6, 2, 0, 1, 3, 6, 1, 4])
MASK = np.arange(6) < LENGTHS[:, None]
BOTH = P("data", "seq")
QUICK = {"budget": 4, "candidates": [{"method": "fold"}, {"chunk_size": 3}]}


def on_one_device(function, *args):
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        return jax.device_get(jax.jit(function)(*jax.device_get(args)))


class Net(nn.Module):
    """A convolution, BatchNorm over the batch, and a sown value."""

    train: bool = True

    @nn.compact
    def __call__(self, x, mask=None):
        x = nn.Conv(4, (3, 3))(x)
        valid = None if mask is None else mask[:, None, None, None]
        x = nn.BatchNorm(not self.train, momentum=0.5)(x, mask=valid)
        self.sow("intermediates", "x", x.mean((1, 2)))
        return nn.Dense(5)(x.reshape(len(x), -1))


def linen_run(model, masked=False):
    """The variables, and a function of them and the input: results and gradients."""
    args = (X, MASK) if masked else (X,)
    kwargs = {"mask": MASK} if masked else {}
    variables = dict(model.init(jax.random.key(0), *args, **kwargs))
    variables.pop("intermediates", None)

    def loss(variables, x, mask):
        args = (x, mask) if masked else (x,)
        kwargs = {"mask": mask} if masked else {}
        mutable = ["batch_stats", "intermediates"]
        y, state = model.apply(variables, *args, **kwargs, mutable=mutable)
        return jnp.sum(y**2), (y, state)

    return variables, jax.value_and_grad(loss, has_aux=True)


def linen_layers_that_mix_examples(mesh):
    for masked in (False, True):
        for options in ({}, {"method": "fold"}, {"chunk_size": 2}):
            model = tdjax.linen.TimeDistributed(Net(), **options)
            variables, run = linen_run(model, masked)
            want = on_one_device(run, variables, X, MASK)
            x, mask = place(mesh, (X, MASK), BOTH)
            got = jax.jit(run)(place(mesh, variables, P()), x, mask)
            if not close(got, want, 1e-4):
                return False
    return True


def packed_layers(mesh):
    options = {"capacity": int(MASK.sum()), "method": "fold"}
    model = tdjax.linen.TimeDistributed(Net(train=False), **options)
    plain = tdjax.linen.TimeDistributed(Net(train=False))
    variables = plain.init(jax.random.key(0), X)
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    run = lambda variables, x, mask: model.apply(variables, x, mask=mask)
    want = on_one_device(run, variables, X, MASK)
    x, mask = place(mesh, (X, MASK), BOTH)
    got = jax.jit(run)(place(mesh, variables, P()), x, mask)
    return close(got, want, 1e-4)


def nnx_layers(mesh):
    def make():
        return nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)),
            nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
            nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
        )

    def run(layer, x):
        return nnx.jit(lambda layer, x: layer(x).sum())(layer, x), nnx.state(layer)

    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        want = jax.device_get(run(tdjax.nnx.TimeDistributed(make(), chunk_size=2), X))
    layer = tdjax.nnx.TimeDistributed(make(), chunk_size=2)
    got = run(layer, place(mesh, X, BOTH))
    drop = lambda tree: [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]
    return close(drop(got), drop(want), 1e-4)


def layers_with_keys_and_carried_state(mesh):
    x = X[..., 0, 0, :]
    dropout = nn.Sequential([nn.Dense(5), nn.Dropout(0.5, deterministic=False)])
    rngs = lambda: {"dropout": jax.random.key(1)}
    for layer, options in (
        (dropout, {}),
        (nn.BatchNorm(False, momentum=0.5), {"variable_carry": "batch_stats"}),
    ):
        model = tdjax.linen.TimeDistributed(layer, **options)
        keys = {"params": jax.random.key(0), **rngs()}
        variables = jax.device_get(model.init(keys, x))
        run = lambda v, x, m=model: m.apply(v, x, rngs=rngs(), mutable=["batch_stats"])
        want = on_one_device(run, variables, x)
        got = jax.jit(run)(place(mesh, variables, P()), place(mesh, x, BOTH))
        if not close(got, want, 1e-4):
            return False
    return True


def layers_that_jax_cannot_map_there(mesh):
    ids = RNG.integers(0, 7, (8, 6))
    model = tdjax.linen.TimeDistributed(nn.Embed(7, 4))
    variables = model.init(jax.random.key(0), place(mesh, ids, BOTH))
    want = np.asarray(variables["params"]["embedding"])[ids]
    on_mesh = place(mesh, jax.device_get(variables), P())
    return close(jax.jit(model.apply)(on_mesh, place(mesh, ids, BOTH)), want)


def tables_that_are_on_no_mesh(mesh):
    table, ids = np.arange(21.0).reshape(7, 3), RNG.integers(0, 7, (8, 6))
    read = tdjax.time_distributed(lambda table, ids: table[ids], in_axes=(None, 1))
    return close(jax.jit(read)(jnp.asarray(table), place(mesh, ids, BOTH)), table[ids])


def numbers_as_results(mesh):
    both = tdjax.time_distributed(lambda x: (x, 3.0), out_axes=(1, None), method="fold")
    return close(both(place(mesh, X, BOTH)), (X, 3.0))


def no_warning_of_what_is_not_so(mesh):
    """Statistics under a mask whose steps are valid for all examples or for none."""
    mask = np.broadcast_to(np.arange(6) < 4, (8, 6))
    model = tdjax.linen.TimeDistributed(nn.BatchNorm(False))
    variables = jax.device_get(model.init(jax.random.key(0), X))
    x, mask = place(mesh, (X, np.array(mask)), P("data"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return not [w for w in caught if "statistics" in str(w.message)]


def without_a_mesh_in_context(mesh):
    """Arrays say where they are."""
    double = tdjax.time_distributed(lambda x: 2 * x, method="fold")
    head = jax.device_get(tdjax.init_dense(jax.random.key(0), 3, 16))
    hidden, labels = X[..., 0, 0, :], RNG.integers(0, 16, (8, 6))
    want = on_one_device(tdjax.linear_cross_entropy, head, hidden, labels)
    args = place(mesh, head, P()), *place(mesh, (hidden, labels), BOTH)
    x, empty = place(mesh, X, BOTH), jax.sharding.AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(empty):
        got = jax.jit(double)(x), jax.jit(tdjax.linear_cross_entropy)(*args)
    return close(got, (2 * X, want))


def time_major_and_other_axes(mesh):
    x = X[..., 0, 0, :]  # (batch, time, features)
    weights = RNG.normal(size=(3, 5)).astype(np.float32)
    major = tdjax.time_distributed(
        lambda w, x: x @ w, in_axes=(None, 0), out_axes=0, method="fold", chunk_size=2
    )
    placed = place(mesh, x.swapaxes(0, 1), P("seq", "data"))
    mask = place(mesh, MASK.T, P("seq", "data"))
    got = jax.jit(lambda w, x, m: major(w, x, mask=m))(weights, placed, mask)
    want = np.where(MASK.T[..., None], x.swapaxes(0, 1) @ weights, 0)
    last = tdjax.time_distributed(jnp.cumsum, in_axes=-1, out_axes=-1, chunk_size=3)
    placed = place(mesh, x.swapaxes(1, 2), P("data", None, "seq"))
    cumsum = np.stack([np.cumsum(x[:, t]) for t in range(6)], axis=-1)
    return close(got, want, 1e-4) and close(jax.jit(last)(placed), cumsum, 1e-4)


def without_jit(mesh):
    double = tdjax.time_distributed(lambda x: 2 * x, method="fold")
    return close(double(place(mesh, X, BOTH)), 2 * X)


def the_loss_in_a_batch(mesh):
    """As Optax on logits, nothing said but how the arguments are split."""
    head = tdjax.init_dense(jax.random.key(0), 3, 16)
    hidden, labels = X[..., 0, 0, :], RNG.integers(0, 16, (8, 6))
    loss = lambda head, hidden, labels: tdjax.linear_cross_entropy(head, hidden, labels)
    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    want = on_one_device(gradient, jax.device_get(head), hidden, labels)
    args = place(mesh, head, P()), *place(mesh, (hidden, labels), BOTH)
    return close(jax.jit(gradient)(*args), want)


def the_tuner(mesh):
    x = place(mesh, X, BOTH)
    kernel = place(mesh, RNG.normal(size=(3, 5)).astype(np.float32), P())
    fun = lambda w, x: jnp.tanh(x @ w)
    results = [
        tdjax.autotune(
            tdjax.time_distributed(fun, in_axes=(None, 1), sharding=sharding),
            kernel, x, argnums=(0, 1), **QUICK,
        )
        for sharding in (BOTH, None)
    ]  # fmt: skip
    measured = [[c.measured for c in r.candidates] for r in results]
    known = all(
        f"{name}={size}" in result.about["mesh"]
        for result in results
        for name, size in mesh.shape.items()
    )
    said = {result.about["sharding"] for result in results}
    return known and len(said) == 2 and all(map(any, measured))


def arrays_that_fun_closes_over(mesh):
    """Where JAX can do it, without help."""
    weights = place(mesh, RNG.normal(size=(3, 5)).astype(np.float32), P())
    apply = tdjax.time_distributed(lambda x: x @ weights)
    return close(jax.jit(apply)(place(mesh, X, BOTH)), X @ np.asarray(weights))


def bad_calls(mesh):
    weights = place(mesh, np.ones((3, 5), np.float32), P())
    apply = tdjax.time_distributed(lambda x: x @ weights, method="fold")
    return {"closed over": lambda: jax.jit(apply)(place(mesh, X, BOTH))}


FACTS = (
    linen_layers_that_mix_examples,
    packed_layers,
    nnx_layers,
    layers_with_keys_and_carried_state,
    layers_that_jax_cannot_map_there,
    tables_that_are_on_no_mesh,
    numbers_as_results,
    no_warning_of_what_is_not_so,
    without_a_mesh_in_context,
    time_major_and_other_axes,
    without_jit,
    the_loss_in_a_batch,
    the_tuner,
    arrays_that_fun_closes_over,
)

if __name__ == "__main__":
    print_facts(sys.argv[1], FACTS, bad_calls)
