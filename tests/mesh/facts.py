"""What holds on 8 devices: run by `test_mesh.py`, which makes the devices

Prints as JSON what came of each function below, and the errors of bad calls.
"""

import json
import pickle
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import tdjax
from mesh.report import close, error_of

BOTH = P("data", "seq")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6, 3)).astype(np.float32)
W = RNG.normal(size=(3, 5)).astype(np.float32)
LENGTHS = np.array([6, 2, 0, 1, 3, 6, 1, 4])
MASK = np.arange(6) < LENGTHS[:, None]


def over_steps(fun, **options):
    return jax.jit(tdjax.time_distributed(fun, sharding=BOTH, **options))


def time_major():
    x, mask = X.swapaxes(0, 1), MASK.T
    axes = {"in_axes": (None, 0), "out_axes": 0}
    apply = over_steps(lambda w, x: x @ w, **axes)
    expected = np.where(mask[..., None], x @ W, 0)
    return close(apply(W, x), x @ W) and close(apply(W, x, mask=mask), expected)


def pytrees_and_shared_arguments():
    def fun(params, x, scale, *, shift, name):
        assert name == "static"
        return {"y": x["a"] @ params["w"] * scale + shift, "b": x["b"]}

    axes = {"in_axes": (None, {"a": 1, "b": 2}, 0), "out_axes": {"y": 1, "b": 2}}
    apply = tdjax.time_distributed(fun, sharding=P("data"), **axes)
    b, scale = RNG.normal(size=(8, 4, 6)), np.arange(6.0)
    call = jax.jit(lambda *args: apply(*args, shift=jnp.ones(5), name="static"))
    got = call({"w": W}, {"a": X, "b": b}, scale)
    return close(got, {"y": X @ W * scale[:, None] + 1, "b": b})


def results_that_all_steps_share():
    fun = lambda w, x: (x @ w, w * 2, jnp.sum(w) > 0)
    apply = over_steps(fun, in_axes=(None, 1), out_axes=(1, None, None))
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(apply(w, X)[1] ** 2)))(W)
    y, doubled, flag = apply(W, X)
    is_right = close((y, doubled), (X @ W, 2 * W)) and flag == (W.sum() > 0)
    return bool(is_right and close(gradient, 8 * W))


def negative_axes():
    x = X.swapaxes(1, 2)  # (batch, features, time)
    apply = over_steps(lambda x: x * 2, in_axes=-1, out_axes=-1)
    return close(apply(x), 2 * x)


def a_loop_inside_of_fun():
    def fun(w, x):
        step = lambda c, row: (jnp.tanh(c + row @ w), None)
        return lax.scan(step, jnp.zeros((x.shape[0], 5)), x[None])[0]

    apply = over_steps(fun, in_axes=(None, 1), chunk_size=2)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(apply(w, X))))(W)
    plain = lambda w: jnp.sum(jnp.tanh(X @ w))
    return close((apply(W, X), gradient), (np.tanh(X @ W), jax.grad(plain)(W)))


def nested_calls():
    x = RNG.normal(size=(8, 6, 4, 3))
    inner = tdjax.time_distributed(lambda x: x * 2)
    return close(over_steps(inner)(x), 2 * x)


def statistics_over_the_whole_batch():
    def fun(x):
        mean = lax.pmean(x.mean(0), "data")
        return x - mean

    apply = over_steps(fun)
    loss = lambda x: jnp.sum(apply(x) ** 3)
    plain = lambda x: jnp.sum((x - x.mean(0)) ** 3)
    expected = X - X.mean(0), jax.grad(plain)(jnp.asarray(X))
    return close((apply(X), jax.jit(jax.grad(loss))(X)), expected)


def other_mesh_axes_stay_with_the_compiler():
    apply = tdjax.time_distributed(
        lambda w, x: x @ w, in_axes=(None, 1), sharding=P("data")
    )
    if KIND == "Explicit":
        return close(jax.jit(apply)(W, X), X @ W)
    w = np.concatenate([W, W[:, :3]], axis=1)
    placed = jax.device_put(w, jax.NamedSharding(MESH, P(None, "seq")))
    return close(jax.jit(apply)(placed, X), X @ w)


def each_part_of_the_batch_has_its_own_noise():
    draw = lambda key, x: jax.random.normal(key, x.shape)
    apply = over_steps(draw, in_axes=(0, 1))
    keys = jax.random.split(jax.random.key(0), 6)
    noise = np.asarray(apply(keys, X))
    again = np.asarray(apply(keys, X))
    return len(np.unique(noise)) == noise.size and np.array_equal(noise, again)


def overflow_on_one_device_alone():
    # Of the first device of 8: examples 0 and 1, steps 0 to 2, of which 5 are valid.
    y = np.asarray(over_steps(lambda x: x * 2, capacity=4)(X, mask=MASK))
    valid = [MASK[i : i + 2, j : j + 3].sum() for i in (0, 2, 4, 6) for j in (0, 3)]
    beyond = sum(max(0, int(n) - 4) for n in valid)
    nan = np.isnan(y).any(-1)
    kept = MASK & ~nan
    fits = close(y[kept], 2 * X[kept]) and not y[~MASK].any()
    return bool(beyond > 0 and nan.sum() == beyond and fits)


def nan_in_masked_steps():
    x = np.where(MASK[..., None], X, np.nan).astype(np.float32)
    apply = over_steps(lambda w, x: jnp.sqrt((x @ w) ** 2 + 1), in_axes=(None, 1))
    loss = lambda w: tdjax.masked_mean(apply(w, x, mask=MASK), MASK)
    gradient = jax.jit(jax.grad(loss))(W)
    plain = lambda w: jnp.mean(jnp.sqrt((X[MASK] @ w) ** 2 + 1))
    return close(gradient, jax.grad(plain)(jnp.asarray(W)))


def no_time_axis_of_the_mesh():
    apply = tdjax.time_distributed(jnp.sin, sharding=P("data"), chunk_size=4)
    return close(jax.jit(apply)(X), np.sin(X)) and close(apply(X), np.sin(X))


def eager_calls():
    return close(tdjax.time_distributed(jnp.sin, sharding=BOTH)(X), np.sin(X))


def pickles():
    apply = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1), sharding=BOTH)
    return pickle.loads(pickle.dumps(apply)).sharding == BOTH


def both_layers(make_linen, make_nnx, x=X, **options):
    """Results and gradients, on the mesh and on one device, in Linen and NNX."""
    linen_pair, nnx_pair = [], []
    for sharding in (None, BOTH):
        model = tdjax.linen.TimeDistributed(make_linen(), sharding=sharding, **options)
        variables = model.clone(sharding=None).init(jax.random.key(0), x)
        linen_loss = lambda v, model=model: jnp.sum(model.apply(v, x) ** 2)
        value = jax.jit(jax.value_and_grad(linen_loss))(variables)
        linen_pair.append((jax.jit(model.apply)(variables, x), value))
        layer = tdjax.nnx.TimeDistributed(make_nnx(), sharding=sharding, **options)
        nnx_loss = lambda layer: jnp.sum(layer(x) ** 2)
        nnx_pair.append((layer(x), nnx.jit(nnx.value_and_grad(nnx_loss))(layer)))
    return close(*linen_pair) and close(*nnx_pair)


def layers_have_the_gradients_of_one_device():
    make = lambda: nn.Dense(5), lambda: nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    return both_layers(*make) and both_layers(*make, method="fold", chunk_size=1)


class Noted(nn.Module):
    """BatchNorm that may see all devices, a counter, and sown values."""

    axis_name: object = None
    norm: bool = True

    @nn.compact
    def __call__(self, x, mask=None):
        count = self.variable("counts", "steps", jnp.zeros, (), jnp.int32)
        last = self.variable("counts", "last", jnp.zeros, (), jnp.int32)
        count.value += 1
        last.value = x[0, 0].astype(jnp.int32)
        self.sow("intermediates", "x", x)
        if not self.norm:
            return x
        norm = nn.BatchNorm(False, axis_name=self.axis_name, momentum=0.5)
        return norm(x, mask=None if mask is None else mask[:, None])


def state_of(x, sharding, layer, mask=None, **options):
    model = tdjax.linen.TimeDistributed(layer, sharding=sharding, **options)
    args = (x,) if mask is None else (x, mask)
    plain = tdjax.linen.TimeDistributed(layer.clone(axis_name=None), **options)
    variables = dict(plain.init(jax.random.key(0), *args, mask=mask))
    variables.pop("intermediates", None)
    mutable = ["batch_stats", "counts", "intermediates"]
    apply = lambda v: model.apply(v, *args, mask=mask, mutable=mutable)
    return jax.jit(apply)(variables)


def steps_of_all_devices_make_one_state():
    x = jnp.asarray(X) + jnp.arange(6.0)[:, None]
    by_time = P(None, "seq")
    same = close(state_of(x, by_time, Noted()), state_of(x, None, Noted()))
    masked = MASK.copy()
    masked[:, 4:] = False
    pair = [state_of(x, s, Noted(norm=False), masked) for s in (by_time, None)]
    return same and close(*pair)


def statistics_over_all_devices_on_request():
    everywhere = Noted(axis_name=("data", "seq"))
    on_mesh = state_of(X, BOTH, everywhere, method="fold")
    alone = state_of(X, None, Noted(), method="fold")
    for _, state in (on_mesh, alone):
        state.pop("counts")  # Under "fold" a device counts its first step.
    return close(on_mesh, alone)


def nnx_state_is_that_of_one_device():
    states = []
    for sharding in (None, P(None, "seq")):
        norm = nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
        model = tdjax.nnx.TimeDistributed(norm, sharding=sharding)
        y = nnx.jit(lambda model, x: model(x))(model, X)
        states.append((y, norm.mean[...], norm.var[...]))
    return close(*states)


def dropout_differs_from_step_to_step_and_example_to_example():
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model = tdjax.nnx.TimeDistributed(layer, sharding=BOTH)
    y = np.asarray(model(np.ones((8, 6, 64), np.float32)))
    rows = {row.tobytes() for row in y.reshape(48, 64)}
    again = np.asarray(model(np.ones((8, 6, 64), np.float32)))
    packed = tdjax.nnx.TimeDistributed(layer, method="fold", capacity=6, sharding=BOTH)
    z = np.asarray(packed(np.ones((8, 6, 64), np.float32), mask=MASK))[MASK]
    differ = len(rows) == 48 and len({row.tobytes() for row in z}) == MASK.sum()
    return bool(differ and {*np.unique(y)} == {0, 2} and not (y == again).all())


def carried_state_with_the_batch_split():
    options = {"variable_carry": nnx.BatchStat, "sharding": P("data")}
    everywhere = nnx.BatchNorm(3, momentum=0.5, axis_name="data", rngs=nnx.Rngs(0))
    nnx.jit(lambda model: model(X))(tdjax.nnx.TimeDistributed(everywhere, **options))
    alone = nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    for t in range(6):
        alone(X[:, t])
    return close(everywhere.mean[...], alone.mean[...])


def carried_state_keeps_dtypes_and_skips_devices_without_examples():
    lengths = np.array([6, 6, 6, 6, 6, 6, 0, 0])
    mask = np.arange(6) < lengths[:, None]

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            n = self.variable("state", "n", jnp.zeros, (), jnp.int32)
            m = self.variable("state", "mean", jnp.zeros, (3,))
            n.value += 1
            m.value = 0.5 * m.value + 0.5 * x.mean(0, where=mask[:, None])
            return x

    states = []
    for sharding, x in ((P("data"), X), (None, X[:6])):
        model = tdjax.linen.TimeDistributed(
            Counted(), variable_carry="state", sharding=sharding
        )
        m = mask[: len(x)]
        constant = np.full_like(x, 3.0)
        variables = tdjax.linen.TimeDistributed(Counted(), variable_carry="state").init(
            jax.random.key(0), constant, m, mask=m
        )
        apply = lambda v, model=model, x=constant, m=m: model.apply(
            v, x, m, mask=m, mutable=["state"]
        )
        states.append(jax.jit(apply)(variables)[1]["state"])
    is_int = states[0]["n"].dtype == jnp.int32
    return bool(is_int and close(*states))


def sown_values_count_valid_examples_alone():
    class Sown(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "three", jnp.float32(3))
            return x

    mask = np.arange(6) < np.array([6, 2, 6, 1, 3, 6, 0, 0])[:, None]
    model = tdjax.linen.TimeDistributed(Sown(), sharding=P("data"))
    apply = lambda x: model.apply({}, x, mask=mask, mutable=["intermediates"])
    (three,) = jax.jit(apply)(X)[1]["intermediates"]["three"]
    return close(three, np.full(6, 3.0))


def packed_batch_norm_that_gets_the_mask():
    stats = []
    for sharding in (None, P("data")):
        names = None if sharding is None else "data"
        capacity = int(MASK.sum())
        model = tdjax.linen.TimeDistributed(
            Noted(axis_name=names), method="fold", capacity=capacity, sharding=sharding
        )
        plain = tdjax.linen.TimeDistributed(Noted(), method="fold")
        variables = dict(plain.init(jax.random.key(0), X, MASK, mask=MASK))
        apply = lambda v, model=model: model.apply(
            v, X, MASK, mask=MASK, mutable=["batch_stats", "counts"]
        )
        y, _ = jax.jit(apply)(
            {k: variables[k] for k in ("params", "batch_stats", "counts")}
        )
        stats.append(np.isfinite(y).all() and not np.asarray(y)[~MASK].any())
    return all(map(bool, stats))


def untyped_keys_and_shared_keys_have_their_own_noise():
    layer = tdjax.linen.TimeDistributed(
        nn.Dropout(0.5, deterministic=False), sharding=BOTH
    )
    ones = np.ones((8, 6, 64), np.float32)
    y = layer.apply({}, ones, rngs={"dropout": jax.random.PRNGKey(0)})
    rows = {row.tobytes() for row in np.asarray(y).reshape(48, 64)}
    draw = lambda key, x: jax.random.normal(key, x.shape)
    options = {"in_axes": (None, 1), "sharding": BOTH}
    folded = tdjax.time_distributed(draw, method="fold", **options)
    noise = np.asarray(jax.jit(folded)(jax.random.key(0), X))
    shared = tdjax.time_distributed(draw, **options)
    same = np.asarray(jax.jit(shared)(jax.random.key(0), X))
    every_step = (same == same[:, :1]).all() and len(np.unique(same[:, 0])) == 24
    return bool(len(rows) == 48 and len(np.unique(noise)) == noise.size and every_step)


def meshes_of_both_kinds():
    kinds = AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=kinds)
    with jax.set_mesh(mesh):
        return close(
            jax.jit(tdjax.time_distributed(jnp.sin, sharding=BOTH))(X), np.sin(X)
        )


def masked_mean_over_devices():
    values, names = jnp.asarray(X[..., 0]), ("data", "seq")
    mean = lambda values, mask: tdjax.masked_mean(values, mask, axis_name=names)
    over = jax.shard_map(mean, in_specs=(BOTH, BOTH), out_specs=P())
    place = lambda x: jax.device_put(x, jax.NamedSharding(MESH, BOTH))
    mask = place(MASK)
    call = jax.jit(jax.value_and_grad(lambda v: over(v, mask)))
    plain = jax.value_and_grad(lambda v: tdjax.masked_mean(v, jnp.asarray(MASK)))
    return close(call(place(values)), plain(values))


def sown_values_may_be_as_long_as_the_batch_of_a_device():
    class Sown(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "mean", x.mean(0)[:2])
            self.sow("intermediates", "rows", x[:, :2].T)
            return x

    outs = []
    for sharding in (None, P("data")):  # Two examples for each device.
        model = tdjax.linen.TimeDistributed(Sown(), sharding=sharding)
        apply = lambda x, m=model: m.apply({}, x, mutable=["intermediates"])
        outs.append(jax.jit(apply)(X)[1])
    return close(*outs)


def boxes_that_name_an_axis_of_sharding():
    if KIND == "Explicit":
        return True  # Flax constrains automatic axes alone.
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("seq", "data"))
    model = tdjax.linen.TimeDistributed(nn.Dense(8, kernel_init=init))
    x = np.concatenate([X, X[..., :1]], axis=-1)  # Features that devices divide.
    kinds = (AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "seq"), axis_types=kinds)):
        variables = jax.device_get(model.init(jax.random.key(0), x))
        want = jax.device_get(jax.jit(lambda: model.clone().apply(variables, x))())
    apply = model.clone(sharding=P("data")).apply
    return close(jax.jit(apply)(variables, x), want)


def a_layer_for_one_size_of_batch_may_sow():
    class ForTwo(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "x", x)
            return x + jnp.zeros((2, 3))

    model = tdjax.linen.TimeDistributed(ForTwo(), sharding=P("data"))
    apply = lambda x: model.apply({}, x, mutable=["intermediates"])
    y, state = jax.jit(apply)(X)
    return close((y, state["intermediates"]["x"]), (X, (X.swapaxes(0, 1),)))


def written_boxes_keep_their_names():
    if KIND == "Explicit":
        return True  # Flax constrains automatic axes alone.

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(lambda: jnp.zeros(8), ("data",))
            count = self.variable("counts", "n", init)
            count.value += 1
            return x

    model = tdjax.linen.TimeDistributed(Counted(), sharding=P("data"))
    variables = model.init(jax.random.key(0), X)

    def step(variables, _):
        return model.apply(variables, X, mutable=["counts"])[1], None

    after, _ = jax.jit(lambda v: jax.lax.scan(step, v, None, length=2))(variables)
    return close(after["counts"]["n"].value, variables["counts"]["n"].value + 2)


class Logical(nn.Module):
    """Weights and activations that Flax splits by names of its own."""

    @nn.compact
    def __call__(self, x):
        split = nn.with_logical_partitioning
        init = split(nn.initializers.lecun_normal(), (None, "wide"))
        x = nn.tanh(nn.Dense(8, kernel_init=init)(x))
        return nn.with_logical_constraint(x, ("batch", "wide"))


def linens_logical_names_keep_their_rules():
    if KIND == "Explicit":
        return True  # Flax constrains automatic axes alone.
    rules = (("batch", "data"), ("wide", "seq"))
    model = tdjax.linen.TimeDistributed(Logical())
    variables = model.init(jax.random.key(0), X)
    loss = lambda model, v: jnp.sum(model.apply(v, X) ** 2)
    plain = jax.device_get(variables)
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        alone = jax.device_get(jax.value_and_grad(lambda v: loss(model, v))(plain))
    over = model.clone(sharding=P("data"))
    with nn.logical_axis_rules(rules):
        split = jax.jit(jax.value_and_grad(lambda v: loss(over, v)))(variables)
    kernel = split[1]["params"]["Dense_0"]["kernel"].value
    return close(split, alone) and kernel.sharding.spec == P(None, "seq")


class Mean(nnx.Module):
    def __call__(self, x):
        return x.mean()


def bad_calls():
    def inside(x):
        return tdjax.time_distributed(jnp.sin, sharding=P("data"))(x)

    everywhere = jax.shard_map(inside, in_specs=P("data"), out_specs=P("data"))
    placed = jax.device_put(X, jax.NamedSharding(MESH, P("data")))
    no_batch = lambda x: x.sum(0)[0]
    make = tdjax.time_distributed
    yield "unknown axis", lambda: make(jnp.sin, sharding=P("model"))(X)
    yield "size", lambda: make(jnp.sin, sharding=P("data"))(jnp.ones((6, 8, 3)))
    yield "no batch", lambda: make(no_batch, out_axes=0, sharding=P("data"))(X)
    yield "inside shard_map", lambda: everywhere(placed)
    yield "kind", lambda: make(jnp.sin, sharding="data")
    yield "three axes", lambda: make(jnp.sin, sharding=P("data", None, "seq"))
    yield "twice", lambda: make(jnp.sin, sharding=P("data", "data"))
    yield "nothing", lambda: make(jnp.sin, sharding=P())
    both = {"sharding": P(None, "seq"), "spmd_axis_name": "seq"}
    yield "spmd_axis_name", lambda: make(jnp.sin, **both)
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    carry = {"variable_carry": nnx.BatchStat, "sharding": BOTH}
    add = make(lambda x, e: x + e, in_axes=(1, 0), sharding=P("data"))
    yield "no batch in an argument", lambda: add(X, np.ones((6, 3), np.float32))
    yield (
        "another batch in a result",
        lambda: make(lambda x: x.mean(0), sharding=BOTH)(X),
    )
    layer = tdjax.nnx.TimeDistributed(Mean(), out_axes=0, sharding=P("data"))
    yield "no batch in a layer's result", lambda: layer(X)
    by_name = {"axis_name": "t", "sharding": P(None, "seq")}
    yield "axis_name", lambda: make(jnp.sin, **by_name)
    yield (
        "a mask of another layout",
        lambda: make(jnp.sin, sharding=BOTH)(X, mask=MASK.T),
    )
    inner = make(jnp.sin, sharding=P(None, "seq"))
    within = jax.shard_map(
        inner, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    yield "varying", lambda: jax.jit(within)(placed)
    yield "carried over time", lambda: tdjax.nnx.TimeDistributed(norm, **carry)(X)


FACTS = (
    time_major,
    pytrees_and_shared_arguments,
    results_that_all_steps_share,
    negative_axes,
    a_loop_inside_of_fun,
    nested_calls,
    statistics_over_the_whole_batch,
    other_mesh_axes_stay_with_the_compiler,
    each_part_of_the_batch_has_its_own_noise,
    overflow_on_one_device_alone,
    nan_in_masked_steps,
    no_time_axis_of_the_mesh,
    eager_calls,
    pickles,
    layers_have_the_gradients_of_one_device,
    steps_of_all_devices_make_one_state,
    statistics_over_all_devices_on_request,
    nnx_state_is_that_of_one_device,
    dropout_differs_from_step_to_step_and_example_to_example,
    carried_state_with_the_batch_split,
    masked_mean_over_devices,
    carried_state_keeps_dtypes_and_skips_devices_without_examples,
    sown_values_count_valid_examples_alone,
    packed_batch_norm_that_gets_the_mask,
    untyped_keys_and_shared_keys_have_their_own_noise,
    meshes_of_both_kinds,
    linens_logical_names_keep_their_rules,
    sown_values_may_be_as_long_as_the_batch_of_a_device,
    boxes_that_name_an_axis_of_sharding,
    a_layer_for_one_size_of_batch_may_sow,
    written_boxes_keep_their_names,
)

if __name__ == "__main__":
    KIND = sys.argv[1]
    MESH = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType[KIND],) * 2)
    no_mesh = tdjax.time_distributed(jnp.sin, sharding=P("data"))
    errors = {"no mesh": error_of(lambda: no_mesh(X))}
    with jax.set_mesh(MESH):
        found = {fact.__name__: fact() for fact in FACTS}
        errors |= {name: error_of(call) for name, call in bad_calls()}
    print(json.dumps({**found, "errors": errors}))
