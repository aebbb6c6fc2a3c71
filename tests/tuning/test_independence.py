"""Which functions are shown to keep the examples of a batch apart."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import tdjax
import zoo
from helpers import integers, normal
from tdjax._steps.fold import watch_fold
from tdjax._tuning.independence import find_mixing

B, T, F = 4, 3, 5
X = normal(0, B, T, F)
KERNEL = normal(1, F, F)
CUBE = normal(5, 2, 3, F)
IMAGES = normal(2, B, T, 6, 6, 2)
IDS = (jnp.abs(integers(3, B, T, 2)) % F).astype(int)


def mixing(over_time, *args):
    """What `fold` may mix; None if nothing."""
    found = []
    with watch_fold(lambda *fold: found.append(find_mixing(*fold))):
        jax.eval_shape(over_time, *args)
    (reason,) = found
    return reason


def mixing_of(fun, *args, **options):
    return mixing(tdjax.time_distributed(fun, method="fold", **options), *args)


APART = {
    "elementwise": lambda x: jnp.sin(x) * 2 + jnp.where(x > 0, x, -x) ** 3,
    "a shared bias": lambda x: x + jnp.arange(1.0, 1 + F),
    "zeros of the batch": lambda x: x + jnp.zeros(x.shape) + jnp.ones((x.shape[0], 1)),
    "matmul": lambda x: x @ KERNEL,
    "matmul from the left": lambda x: (KERNEL @ x.T).T,
    "a cube from the left": lambda x: lax.dot_general(
        CUBE, x, (((2,), (1,)), ((), ()))
    ).transpose(2, 0, 1),
    "outer product": lambda x: jnp.einsum("bi,bj->bij", x, x),
    "sum of features": lambda x: x - x.mean(-1, keepdims=True),
    "softmax": jax.nn.softmax,
    "argmax": lambda x: jnp.argmax(x, -1),
    "reshape": lambda x: x.reshape(-1, 1, F).reshape(x.shape[0], -1),
    "merged with features": lambda x: (x.reshape(-1, 1) @ KERNEL[:1]).reshape(x.shape[0], -1),
    "one row each": lambda x: jnp.sin(x.ravel()).reshape(x.shape),
    "transposed": lambda x: jnp.sin(x.T).T,
    "sorted": lambda x: jnp.sort(x, -1),
    "top k": lambda x: lax.top_k(x, 2)[0],
    "running sum": lambda x: jnp.cumsum(x, 1),
    "reversed features": lambda x: x[:, ::-1],
    "sliced": lambda x: x[:, 1:3],
    "one feature": lambda x: x[:, 0],
    "a row for each feature": lambda x: KERNEL[jnp.argmax(x, -1)],
    "words of two axes": lambda x: KERNEL[(x > 0).astype(int)],
    "chosen features": lambda x: x[:, jnp.array([2, 0])],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2))),
    "concatenated": lambda x: jnp.concatenate([x, jnp.zeros((x.shape[0], 1)), -x], 1),
    "rolled features": lambda x: jnp.roll(x, 2, -1),
    "a class token": lambda x: jnp.concatenate([jnp.tile(KERNEL[:1], (x.shape[0], 1)), x], 1),
    "unstacked": lambda x: jnp.unstack(x, axis=1)[2],
    "set where it says": jax.vmap(lambda row: row.at[jnp.argmax(row)].set(0)),
    "updated where it says": jax.vmap(
        lambda row: lax.dynamic_update_slice(row, row[:2], (jnp.argmax(row),))
    ),
    "complex": lambda x: jnp.abs(lax.complex(x, 2 * x)),
    "bessel": jax.scipy.special.i0e,
    "tiled": lambda x: jnp.tile(x, (1, 2)),
    "repeated": lambda x: jnp.repeat(x, 2, 1),
    "kept together": lambda x: sum(lax.optimization_barrier((x, x + 1))),
    "a shared carry times a matrix": lambda x: x + jnp.zeros(x.shape) @ KERNEL + jnp.ones((x.shape[0], 3)).T.sum(0)[:, None],
    "stacked": lambda x: jnp.stack([x, x + 1], 1),
    "split": lambda x: jnp.split(x, F, 1)[1],
    "its largest": lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1)[:, None], 1),
    "set by a function": lambda x: x.at[:, 1].apply(jnp.zeros_like),
    "a number out of a loop": lambda x: x + lax.fori_loop(0, 2, lambda i, s: (1.0, s[1] + 1), (0.0, 1.0))[1],
    "one-hot": lambda x: jax.nn.one_hot(jnp.argmax(x, -1), F),
    "set": lambda x: x.at[:, 1].set(0).at[:, jnp.array([0, 2])].add(1),
    "updated": lambda x: lax.dynamic_update_slice(x, x[:, :1], (0, 2)),
    "dynamic slice": lambda x: lax.dynamic_slice_in_dim(x, 1, 2, 1),
    "scan over features": lambda x: lax.scan(
        lambda c, f: (c + f, c), jnp.zeros(x.shape[0]), x.T
    )[1].T,
    "while": lambda x: lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * x), (0, jnp.ones_like(x))
    )[1],
    "cond": lambda x: lax.cond(jnp.sum(KERNEL) > 0, jnp.sin, lambda v: 0 * v, x),
    "checkpoint and jit": jax.checkpoint(jax.jit(lambda x: x @ KERNEL)),
    "relu": jax.nn.relu,
    "cholesky": lambda x: jnp.linalg.cholesky(
        jnp.einsum("bi,bj->bij", x, x) + jnp.eye(F)
    ),
    "solve": lambda x: jax.scipy.linalg.solve_triangular(
        jnp.broadcast_to(jnp.eye(F), (x.shape[0], F, F)), x[..., None], lower=True
    ),
    "fft": lambda x: jnp.abs(jnp.fft.fft(x)),
    "attention": lambda x: jax.nn.dot_product_attention(
        *[x.reshape(x.shape[0], F, 1, 1)] * 3
    ),
    "vmap": lambda x: jax.vmap(lambda row: row @ KERNEL - row.mean())(x),
    "a gradient of each": lambda x: jax.vmap(jax.grad(lambda v: jnp.sin(v).sum()))(x),
    "a constant": lambda x: jnp.ones((x.shape[0], 2)),
    "its own derivative": lambda x: jax.jvp(jnp.tanh, (x,), (jnp.ones_like(x),))[1],
}  # fmt: skip


def write_the_mean(x):
    reference = jax.new_ref(jnp.zeros(F))
    reference[...] = x.mean(0)
    return x + reference[...]


MIXED = {
    "centred": (lambda x: x - x.mean(0), "reduce_sum"),
    "a gate of 0": (lambda x: x + 0.0 * x.mean(0), "reduce_sum"),
    "the first": (lambda x: x + x[:1], None),
    "the first, as a row": (lambda x: x * x[0], None),
    "batch reversed": (lambda x: x[::-1], None),
    "rolled": (lambda x: jnp.roll(x, 1, 0), "slice"),
    "sorted batch": (lambda x: jnp.sort(x, 0), "sort"),
    "running sum over the batch": (lambda x: jnp.cumsum(x, 0), "cumsum"),
    "gram": (lambda x: x @ (x.T @ x), "dot_general"),
    "all pairs": (lambda x: (x @ x.T).sum(-1), "dot_general"),
    "softmax over the batch": (lambda x: jax.nn.softmax(x, 0), "reduce_max"),
    "the place in the batch": (lambda x: x + jnp.arange(x.shape[0])[:, None], "iota"),
    "noise": (lambda x: x + jax.random.normal(jax.random.key(0), x.shape), "random_bits"),
    "one of the batch": (lambda x: x.at[0].set(0), None),
    "places from the batch": (lambda x: KERNEL[jnp.arange(x.shape[0])] + x, None),
    "other rows": (lambda x: x.reshape(-1, x.shape[0]).T, None),
    "a constant of places": (lambda x: lax.iota(int, x.shape[0]), "iota"),
    "scan over the batch": (
        lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros(F), x)[1], "scan",
    ),
    "as often as its sum says": (
        lambda x: lax.while_loop(lambda v: jnp.sum(v) > 0, lambda v: v - 1, x),
        "reduce_sum",
    ),
    "one branch for all": (
        lambda x: lax.cond(jnp.max(x) > 0, jnp.sin, jnp.cos, x), "reduce_max",
    ),
    "transposed by a reshape": (
        lambda x: lax.reshape(x, x.shape, dimensions=(1, 0)), "reshape",
    ),
    "written to a reference": (write_the_mean, "a reference"),
    "joined": (lambda x: jnp.concatenate([x[1:], x[:1]]), None),
    "shifted": (lambda x: jnp.pad(x, ((1, 0), (0, 0)))[:-1], "pad"),
    "pooled": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1), (1, 1), "SAME"),
        "reduce_window_sum",
    ),
    "a callback": (
        lambda x: jax.pure_callback(lambda v: v, jax.typeof(x), x), "pure_callback",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_treats_each_example_alone_is_shown_to(name):
    assert mixing_of(APART[name], X) is None


def test_time_may_come_first():
    x = X.swapaxes(0, 1)
    assert mixing_of(jnp.sin, x, in_axes=0, out_axes=0) is None
    assert mixing_of(lambda x: x - x.mean(0), x, in_axes=0, out_axes=0) == "reduce_sum"


@pytest.mark.parametrize("name", APART)
def test_it_does_so(name):
    """The table above is true."""
    y = jax.jit(APART[name])
    x, order = X[:, 0], jnp.array([2, 0, 3, 1, 2])
    for got, want in zip(jax.tree.leaves(y(x[order])), jax.tree.leaves(y(x))):
        np.testing.assert_allclose(got, want[order], 1e-5, 1e-5)


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_is_found(name):
    fun, primitive = MIXED[name]
    for x in (X, X[:, :1]):
        found = []
        with watch_fold(lambda *fold, to=found: to.append(find_mixing(*fold))):
            try:
                jax.eval_shape(tdjax.time_distributed(fun, method="fold"), x)
            except ValueError:  # Some give another number of rows.
                assert found
        assert found[0]
        assert found[0].startswith(primitive or "")


def test_a_batch_of_one_example_and_one_step_shows_as_much():
    x = X[:1, :1]
    assert mixing_of(lambda x: x @ KERNEL + jnp.ones(F), x) is None
    assert mixing_of(lambda x: x - x.mean(0), x) == "reduce_sum"
    assert mixing_of(lambda x: x + jnp.arange(x.shape[0])[:, None], x) == "iota"
    token = lambda x: jnp.concatenate(
        [jnp.broadcast_to(KERNEL[:1], (x.shape[0], F)), x], 1
    )
    assert mixing_of(token, x) is None
    best = lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1)[:, None], 1)
    assert mixing_of(best, x) is None


WIDE = jnp.arange(20.0)


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: x * x.shape[0],
        lambda x: x * len(x),
        lambda x: x + jnp.asarray(1 / x.shape[0]),
        lambda x: x ** x.shape[0],
        lambda x: jnp.where(x.shape[0] > 5, x, -x),
        lambda x: jnp.sin(x) if x.shape[0] > 5 else x,
        lambda x: jax.jit(lambda x: x * x.shape[0])(x),
        lambda x: lax.fori_loop(0, x.shape[0], lambda i, v: v * 0.5, x),
        lambda x: x.reshape(2, -1, F).reshape(-1, F),
        lambda x: x / jnp.ones_like(x).sum(),
        lambda x: x + jnp.arange(x.shape[0]).sum(),
        lambda x: x * jnp.arange(x.shape[0])[-1],
        lambda x: x * (jnp.ones(x.shape[0]) @ jnp.ones(x.shape[0])),
        lambda x: x * jnp.eye(x.shape[0]).sum(),
        lambda x: x + WIDE[x.shape[0]],
        lambda x: x + WIDE[: x.shape[0]].sum(),
        lambda x: x + jnp.pad(KERNEL, ((0, 0), (x.shape[0], 9)))[0, :F],
        lambda x: x * np.full(F, 1 / x.shape[0], np.float32),
        lambda x: jnp.cumsum(x.reshape(4, -1, 1), 1).reshape(x.shape),
        lambda x: x - x.mean(0) if x.shape[0] == B * T else x,
        lambda x: 2 * x if x.shape == (B, F) else x,
        lambda x: x * (2.0 if x.shape[0] == B * T else 3.0),
        lambda x: x - x.max(0) if x.shape[0] % 2 == 0 else x,
        lambda x: jnp.sort(x, 0) if x.shape[0] % B == 0 else x,
        lambda x: x[:, :1] if x.shape[0] == B else x[:, 1:2],
        lambda x: lax.integer_pow(x, 2 if x.shape[0] == B else 3),
        lambda x: x * np.full(F, 2.0 if x.shape[0] == B else 3.0, np.float32),
        lambda x: x - jnp.sin(x) if x.shape[0] == B else jnp.sin(x) - x,
        lambda x: 2 * x if x.shape[0] in (1, B) else x,
        lambda x: x.at[:, 1].apply(lambda v: v * x.shape[0]),
        lambda x: x + lax.reduce(
            x, 0.0, lambda a, b: jnp.minimum(a + b, 1 / x.shape[0]), (1,)
        )[:, None],
        lambda x: jnp.pad(x, ((0, 0), (x.shape[0] % 5, 5 - x.shape[0] % 5)))[:, :F],
        lambda x: x + lax.pad(KERNEL[0], 0.0, [(x.shape[0], -x.shape[0], 0)]),
        lambda x: x + lax.slice_in_dim(WIDE, x.shape[0] % 5, x.shape[0] % 5 + F),
        lambda x: lax.integer_pow(x, x.shape[0]),
    ],
)  # fmt: skip
def test_the_size_of_the_batch_may_not_matter(fun):
    assert mixing_of(lambda x: 0.0 * fun(x), X) is not None


def norm_of_all(g):
    return g / jnp.maximum(1.0, jnp.linalg.norm(g) / 1e3)


def with_vjp(pull_back):
    fun = jax.custom_vjp(lambda x: x * 1.0)
    fun.defvjp(lambda x: (x, None), lambda _, g: (pull_back(g),))
    return fun


def with_jvp(push_forward):
    fun = jax.custom_jvp(lambda x: x * 1.0)
    fun.defjvp(lambda primals, tangents: (primals[0], push_forward(tangents[0])))
    return fun


def test_a_derivative_that_is_given_may_mix_where_the_function_does_not():
    for wrap in (with_vjp, with_jvp):
        assert mixing_of(wrap(lambda g: 2 * g), X) is None
        assert mixing_of(wrap(lambda g: g * KERNEL[0, 0]), X) is None
        assert mixing_of(wrap(lambda g: g - g.mean(0)), X) == "a derivative"
    assert mixing_of(with_vjp(norm_of_all), X) == "a derivative"
    assert mixing_of(lambda x: with_vjp(norm_of_all)(KERNEL)[0] + x, X) is None


def test_a_given_gradient_by_what_examples_share_may_be_a_mean():
    linear = jax.custom_vjp(lambda w, x: x @ w)
    linear.defvjp(
        lambda w, x: (x @ w, (w, x)),
        lambda res, g: (res[1].T @ g / g.shape[0], g @ res[0].T),
    )
    assert mixing_of(linear, KERNEL, X, in_axes=(None, 1)) == "a derivative"
    scale = jax.custom_jvp(lambda w, x: x * w)
    scale.defjvp(lambda p, t: (p[0] * p[1], t[0] * p[1] + p[0] * t[1]))
    assert mixing_of(scale, KERNEL[0], X, in_axes=(None, 1)) is None
    other = jax.custom_vjp(lambda x: x * 1.0)
    other.defvjp(lambda x: (x - x.mean(0), None), lambda _, g: (g,))
    assert mixing_of(other, X) == "a derivative"


def test_noise_of_a_step_is_no_shared_number(key):
    class Noisy(nn.Module):
        shape: tuple[int, ...]

        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.zeros, ())
            return x + scale * jax.random.normal(self.make_rng("noise"), self.shape)

    rngs = {"params": key, "noise": key}
    for shape in ((F,), (1, F), ()):
        layer = tdjax.linen.TimeDistributed(Noisy(shape), method="fold")
        apply = functools.partial(layer.apply, layer.init(rngs, X), rngs=rngs)
        assert mixing(apply, X) == "random keys"


class Noise:
    """Linen layers whose noise of a step goes through control flow."""

    cond = lambda key, on: lax.cond(
        on, lambda: jax.random.normal(key, (F,)), lambda: jnp.zeros(F)
    )
    fori_loop = lambda key, on: lax.fori_loop(
        0,
        2,
        lambda i, s: s + jax.random.normal(jax.random.fold_in(key, i), (F,)),
        jnp.zeros(F),
    )
    scan = lambda key, on: lax.scan(
        lambda s, k: (s + jax.random.normal(k, (F,)), None),
        jnp.zeros(F),
        jax.random.split(key, 2),
    )[0]


@pytest.mark.parametrize("through", ["cond", "fori_loop", "scan"])
def test_noise_of_a_step_is_none_behind_control_flow_either(key, through):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            scale = self.param("scale", nn.initializers.zeros, ())
            noise = getattr(Noise, through)(self.make_rng("noise"), scale >= 0)
            return x + scale * noise

    model = tdjax.linen.TimeDistributed(Layer(), method="fold")
    rngs = {"params": key, "noise": key}
    variables = model.init(rngs, X)
    apply = functools.partial(model.apply, variables, rngs=rngs)
    assert mixing(apply, X) == "random keys"


def _unless_large(x):
    try:
        if x.shape[0] > 1000:
            return x
    except Exception:
        return x
    return x - x.max(0)


KEYS = {B * T: jax.random.key(1)}
OTHER_KEY = jax.random.key(2)
BY_NUMBER = {
    "isinstance": lambda x: x - x.max(0) if isinstance(x.shape[0], int) else x,
    "range": lambda x: x - x.max(0) if x.shape[0] in range(2, 1000) else x,
    "type": lambda x: x[::-1] if type(x.shape[0]) is int else x,
    "an error of a comparison": _unless_large,
    "features": lambda x: (
        x + (x[:, :2] if x.shape[0] == B * T else x[:, :3]).sum(-1, keepdims=True)
    ),
    "a range": lambda x: x * jnp.arange(3 if x.shape[0] == B * T else 4).sum(),
    "a shape": lambda x: x + jnp.ones(3 if x.shape[0] == B * T else 4).sum(),
    "a dtype": lambda x: x.astype("int8" if x.shape[0] == B * T else "int16").astype(
        "float32"
    ),
    "a key": lambda x: x + jax.random.normal(KEYS.get(x.shape[0], OTHER_KEY), (F,)),
    "a gradient": with_vjp(lambda g: g - g.mean(0) if g.shape[0] == B * T else g),
    "a gradient by type": with_vjp(
        lambda g: g - g.max(0) if isinstance(g.shape[0], int) else g
    ),
    "a tangent": with_jvp(lambda t: t - t.mean(0) if t.shape[0] == B * T else t),
    "a callback": lambda x: (
        x
        / jax.pure_callback(
            lambda n=x.shape[0]: np.float32(n), jax.ShapeDtypeStruct((), jnp.float32)
        )
    ),
}


@pytest.mark.parametrize("fun", BY_NUMBER)
def test_a_function_that_does_another_thing_for_some_number_is_refused(fun):
    assert mixing_of(BY_NUMBER[fun], X)


def test_traced_weights_are_told_apart():
    choose = lambda w, v, x: x @ (w if x.shape[0] == B * T else v)
    assert (
        mixing_of(choose, KERNEL, 2 * KERNEL, X, in_axes=(None, None, 1)) == "its size"
    )
    keep = lambda w, v, x: x @ w + x @ v
    assert mixing_of(keep, KERNEL, 2 * KERNEL, X, in_axes=(None, None, 1)) is None


def test_promised_places_of_one_step_are_not_those_of_all():
    places = lambda x: jnp.argmax(x, -1)
    assert mixing_of(lambda x: KERNEL.at[places(x)].get(), X) is None
    assert (
        mixing_of(lambda x: KERNEL.at[places(x)].get(unique_indices=True), X)
        == "gather"
    )


def test_an_empty_array_of_features_is_no_error():
    assert mixing_of(lambda x: x + x[:, :0].reshape(-1).sum(), X) is not None


def test_literals_of_a_given_gradient_are_not_shared_parameters():
    clip = jax.custom_vjp(lambda low, high, x: x)
    clip.defvjp(
        lambda low, high, x: (x, (low, high)),
        lambda limits, g: (None, None, jnp.clip(g, *limits)),
    )
    assert mixing_of(lambda x: clip(-1.0, 1.0, x), X) is None


@pytest.mark.parametrize("kind", ["threshold", "noise"])
def test_noise_that_is_only_written_to_the_state_is_found(key, kind):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            rate = self.variable("schedule", "rate", jnp.zeros, ())
            seen = self.variable("schedule", "seen", jnp.zeros, ())
            draw = jax.random.uniform(self.make_rng("noise"))
            is_threshold = kind == "threshold"
            seen.value = (
                1.0 * (draw < rate.value) if is_threshold else rate.value * draw
            )
            return nn.Dense(3)(x)

    model = tdjax.linen.TimeDistributed(Layer(), method="fold")
    rngs = {"params": key, "noise": key}
    variables = model.init(rngs, X)
    apply = functools.partial(model.apply, variables, rngs=rngs, mutable=["schedule"])
    assert mixing(apply, X) == "random keys"


def test_a_given_gradient_of_what_is_repeated_for_each_example_is_looked_at():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def expand(w, n):
        return jnp.broadcast_to(w, (n, *w.shape))

    expand.defvjp(
        lambda w, n: (expand(w, n), None),
        lambda n, _, g: (g.sum(0) / jnp.maximum(1, jnp.linalg.norm(g) / 1e3),),
    )
    repeat = lambda w, x: x + expand(w, x.shape[0])
    assert mixing_of(repeat, KERNEL[0], X, in_axes=(None, 1)) == "a derivative"


def test_a_given_gradient_may_close_over_arrays():
    levels = np.arange(1.0, 1 + F, dtype=np.float32)
    rounded = jax.custom_vjp(lambda x: jnp.round(x * levels) / levels)
    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))
    assert mixing_of(rounded, X) is None


@pytest.mark.parametrize("batch", [2, 6, 10])
def test_results_whose_number_depends_on_the_batch_are_refused(batch):
    fun = lambda x: (x, x) if x.shape[0] == batch else (x,)
    assert mixing_of(fun, normal(0, batch, T, F)) == "its size"


def test_weak_types_stay_weak():
    weak = jnp.full(X.shape, 1.0)
    assert weak.weak_type
    assert mixing_of(lambda x: jnp.sin(x) * np.float16(2) + KERNEL[0], weak) is None


def test_what_steps_share_is_not_taken_for_examples():
    add = lambda bias, x: x + bias
    assert mixing_of(add, jnp.ones(F), X, in_axes=(None, 1)) is None
    # As long as the folded batch, by chance.
    square = normal(0, B * T, T, B * T)[:B]
    assert (
        mixing_of(lambda w, x: x @ w, jnp.ones((B * T, 2)), square, in_axes=(None, 1))
        is None
    )
    lookup = lambda table, ids: table[ids].mean(1)
    assert mixing_of(lookup, KERNEL, IDS, in_axes=(None, 1)) is None
    assert mixing_of(lambda ids: KERNEL[ids] - KERNEL[ids].mean(0), IDS) == "reduce_sum"


@pytest.mark.parametrize("api", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_layers(api, name):
    kind = zoo.ZOO[name]
    functional = getattr(zoo, f"{api}_functional")(kind)
    over_time = functional.over_time(method="fold")
    assert mixing(over_time, functional.params, *kind.inputs) is None


def test_layers_that_mix_or_draw_noise(key):
    norm = tdjax.linen.TimeDistributed(nn.BatchNorm(False), method="fold")
    variables = norm.init(key, X)
    train = lambda x: norm.apply(variables, x, mutable=["batch_stats"])
    assert mixing(train, X) == "reduce_sum"
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    noisy = tdjax.nnx.TimeDistributed(dropout, method="fold")
    assert mixing(lambda x: nnx.clone(noisy)(x), X)


def test_pools_and_strides():
    pool = lambda x: nn.max_pool(x, (2, 2), strides=(2, 2))
    assert mixing_of(pool, IMAGES) is None
    assert mixing_of(lambda x: nn.avg_pool(x, (3, 3), padding="SAME"), IMAGES) is None
    assert mixing_of(lambda x: x[::2].repeat(2, 0), IMAGES)


def test_masks_chunks_and_packing_are_followed():
    mask = tdjax.lengths_to_mask(jnp.array([3, 1, 0, 2]), T)
    for options in (
        {},
        {"chunk_size": 2},
        {"chunk_size": 2, "unroll": True},
        {"capacity": 8},
    ):
        for fun, expected in ((jnp.sin, None), (lambda x: x - x.mean(0), "reduce_sum")):
            over_time = tdjax.time_distributed(fun, method="fold", **options)
            assert mixing(lambda x, call=over_time: call(x, mask=mask), X) == expected


def test_a_function_with_a_fold_inside_is_tuned():
    for inside in (lambda x: x - x.mean(0), jnp.sin):
        inner = tdjax.time_distributed(inside, method="fold")
        x = normal(0, 2, 2, 3, 4)
        sizes = [{"method": "fold"}, {"method": "fold", "chunk_size": 1}]
        over_time = tdjax.time_distributed(inner)
        result = tdjax.autotune(over_time, x, candidates=sizes, budget=60)
        assert result.candidates[0].verdict in ("measured", "behind")
        fold = result.candidates[1].verdict
        assert (fold in ("measured", "behind")) == (inside is jnp.sin)


def test_a_fold_inside_is_the_users_own():
    inner = tdjax.time_distributed(lambda x: x - x.mean(0), method="fold")
    x = normal(0, 2, 3, 4, F)
    assert mixing_of(inner, x) is not None
    clean = tdjax.time_distributed(jnp.sin, method="fold")
    assert mixing_of(clean, x) is None
