"""Training on a mesh of several processes: run by `test_processes.py`, which starts them

    processes.py OUT DEVICES [PORT PROCESSES PROCESS]

Trains for three steps of Adam under automatic and under explicit axes, with a last shard
that is ragged and one device that has more valid steps than the others' capacity, tunes
a layer, and writes a checkpoint. Each process writes what came of it to OUT.PROCESS.
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tdjax

BATCH, TIMESTEPS, FEATURES, HIDDEN, WORDS = 10, 6, 5, 8, 12
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, TIMESTEPS, FEATURES)).astype(np.float32)
LABELS = RNG.integers(0, WORDS, (BATCH, TIMESTEPS)).astype(np.int32)
LENGTHS = np.array([6, 5, 6, 0, 3, 2, 6, 5, 4, 1])
# Ragged: 10 examples on 4 devices, the last two of 12 are padding.
PADDED = 12


def padded(x, fill):
    tail = np.full((PADDED - BATCH, *x.shape[1:]), fill, x.dtype)
    return np.concatenate([x, tail])


LENGTHS = padded(LENGTHS, 0)
MASK = np.arange(TIMESTEPS) < LENGTHS[:, None]
X = np.where(MASK[..., None], padded(X, np.nan), np.nan).astype(np.float32)
LABELS = np.where(MASK, padded(LABELS, 0), -1)
PACKED = {"capacity": 40, "method": "fold"}
CHUNKS = {"method": "fold", "chunk_size": 4, "remat": True}
# Kind of axes, whether words are split too, options of the layer and of the loss.
RUNS = {
    "plain": ("Auto", False, {}, {}),
    "words, packed": ("Auto", True, PACKED, {}),
    "explicit, chunks": ("Explicit", False, CHUNKS, {"chunk_size": 2}),
    "explicit, words": ("Explicit", True, {}, {"vocab_chunk_size": 4}),
}


def make_model(**options):
    layers = [nn.Dense(HIDDEN), nn.tanh, nn.Dense(HIDDEN)]
    return tdjax.linen.TimeDistributed(nn.Sequential(layers), **options)


def place(mesh, x, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def start():
    """Parameters, the same in every process."""
    with jax.default_device(jax.local_devices()[0]):
        variables = make_model().init(jax.random.key(0), jnp.ones((1, 1, FEATURES)))
        head = tdjax.init_dense(jax.random.key(1), HIDDEN, WORDS)
        return jax.device_get({"body": variables["params"], "head": head})


def train(mesh, by_words, layer_options, loss_options):
    """Losses of three steps, and the parameters after them."""
    words = "model" if by_words else None
    head = {"kernel": P(None, words), "bias": P(words)}
    specs = {"body": P(), "head": head}
    spec_of = lambda path: P() if path[0].key == "body" else specs["head"][path[1].key]
    params = jax.tree.map_with_path(lambda p, x: place(mesh, x, spec_of(p)), start())
    batch = [place(mesh, x, P("data")) for x in (X, MASK, LABELS)]
    model = make_model(sharding=P("data"), **layer_options)
    adam = optax.adam(1e-2)

    def loss(params, x, mask, labels):
        hidden = model.apply({"params": params["body"]}, x, mask=mask)
        return tdjax.linear_cross_entropy(
            params["head"], hidden, labels, mask=mask, sharding=P("data"),
            kernel_sharding=P(None, words), **loss_options,
        )  # fmt: skip

    @jax.jit
    def step(params, state, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = jax.jit(adam.init)(params), []
    for _ in range(3):
        params, state, value = step(params, state, *batch)
        losses.append(float(value))
    return losses, params


def values(mesh, tree):
    """All values of arrays that several processes hold."""
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    return [
        np.asarray(whole(x).addressable_data(0)).tolist() for x in jax.tree.leaves(tree)
    ]


def overflow(mesh):
    """One device has more valid steps than the capacity: NaN there alone."""
    double = tdjax.time_distributed(lambda x: 2 * x, sharding=P("data"), capacity=16)
    x, mask = place(mesh, X, P("data")), place(mesh, MASK, P("data"))
    got = jax.jit(lambda x, mask: jnp.isnan(double(x, mask=mask)).any(-1))(x, mask)
    return values(mesh, got)[0]


def tuned(mesh, out):
    """The options that this process takes, and the entries of its cache."""
    params = jax.tree.map(lambda x: place(mesh, x, P()), start()["head"])
    hidden = RNG.normal(size=(PADDED, TIMESTEPS, HIDDEN)).astype(np.float32)
    hidden = place(mesh, hidden, P("data"))
    head = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), sharding=P("data"))
    # Each process has a budget of its own, and only one has a cache.
    folder = out.parent / "cache"
    cache = folder if jax.process_index() == 0 else None
    budget, mask = 5 + jax.process_index(), place(mesh, MASK, P("data"))
    folds = {"method": "fold"}, {"method": "fold", "chunk_size": 3}
    results = [
        tdjax.autotune(
            head, params, hidden, mask=mask, argnums=0, budget=budget, cache=cache,
            candidates=[*folds, {"chunk_size": 2}],
        )
        for _ in range(2)
    ]  # fmt: skip
    return {
        "options": [result.options for result in results],
        "from cache": [result.from_cache for result in results],
        "entries": len(list(folder.glob("*"))),
        "failed": failed(hidden),
    }


def failed(hidden):
    """The verdicts, where one process can't trace one of the lowerings."""

    def fun(x):
        if jax.process_index() == 1 and x.shape[0] != PADDED // 4:
            raise OSError("not here")
        return 2 * x

    folds = {"method": "fold"}, {"method": "fold", "chunk_size": 3}
    result = tdjax.autotune(
        tdjax.time_distributed(fun, sharding=P("data")), hidden,
        budget=5, candidates=[*folds, {"chunk_size": 2}],
    )  # fmt: skip
    return [candidate.verdict.split(":")[0] for candidate in result.candidates]


def main(out):
    found = {"processes": jax.process_count(), "devices": jax.device_count()}
    for name, (kind, by_words, *options) in RUNS.items():
        words = min(2, jax.device_count()) if by_words else 1
        shape = jax.device_count() // words, words
        kinds = (AxisType[kind],) * 2
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=kinds)
        with jax.set_mesh(mesh):
            losses, params = train(mesh, by_words, *options)
            found[name] = losses, values(mesh, params)
    with jax.set_mesh(mesh), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(out.with_suffix(".checkpoint").absolute(), params)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    with jax.set_mesh(mesh):
        found["overflow"] = overflow(mesh)
        found["tuned"] = tuned(mesh, out)
    out.with_suffix(f".{jax.process_index()}").write_text(json.dumps(found))


if __name__ == "__main__":
    out, devices, *others = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if others:
        port, processes, process = map(int, others)
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    main(Path(out))
