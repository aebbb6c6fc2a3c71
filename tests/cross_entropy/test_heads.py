"""Heads as modules, and modules as heads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import tdjax
import tdjax.linen
import tdjax.nnx
from helpers import assert_trees_close, assert_trees_equal, normal, slow_but

F, V = 4, 11
HIDDEN = normal(0, 2, 5, F)
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, 5)))


def by_optax(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


class TiedLinen(nn.Module):
    """A language model of one embedding; `use_bias` is the head's."""

    use_bias: bool | None = None
    logits_soft_cap: float | None = None

    def setup(self):
        self.embed = nn.Embed(V, F)
        self.head = tdjax.linen.CrossEntropyHead(
            self.embed, logits_soft_cap=self.logits_soft_cap, use_bias=self.use_bias
        )

    def __call__(self, tokens, labels=None, **options):
        return self.head(self.embed(tokens), labels, **options)

    def plain(self, tokens):
        return self.embed.attend(self.embed(tokens))


class TiedNNX(nnx.Module):
    def __init__(self, rngs, **options):
        self.embed = nnx.Embed(V, F, rngs=rngs)
        self.head = tdjax.nnx.CrossEntropyHead(F, self.embed, rngs=rngs, **options)

    def __call__(self, tokens, labels=None, **options):
        return self.head(self.embed(tokens), labels, **options)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", slow_but((0,), [None, False]))
def test_a_linen_head_is_a_dense_layer(use_bias, dtype, key):
    head = tdjax.linen.CrossEntropyHead(V, use_bias=use_bias, dtype=dtype)
    layer = nn.Dense(V, use_bias=use_bias is None, dtype=dtype)
    variables = head.init(key, HIDDEN)
    assert_trees_equal(variables, layer.init(key, HIDDEN))
    assert_trees_equal(head.init(key, HIDDEN, LABELS), variables)
    logits = layer.apply(variables, HIDDEN)
    assert_trees_equal(head.apply(variables, HIDDEN), logits)
    loss = head.apply(variables, HIDDEN, LABELS)
    tolerance = 1e-5 if dtype is None else 2e-2
    np.testing.assert_allclose(loss, by_optax(logits.astype(float)), tolerance)
    got = head.apply(variables, HIDDEN, LABELS, temperature=2.0, method="log_probs")
    params = variables["params"]
    want = tdjax.linear_log_probs(params, HIDDEN, LABELS, temperature=2.0)
    assert_trees_close(got, want, tolerance, tolerance)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", slow_but((0,), [None, False]))
def test_an_nnx_head_is_a_linear_layer(use_bias, dtype):
    head = tdjax.nnx.CrossEntropyHead(
        F, V, use_bias=use_bias, dtype=dtype, rngs=nnx.Rngs(0)
    )
    options = {"use_bias": use_bias is None, "dtype": dtype}
    layer = nnx.Linear(F, V, **options, rngs=nnx.Rngs(0))
    pure = lambda module: nnx.to_pure_dict(nnx.state(module))
    assert_trees_equal(pure(head), pure(layer))
    assert_trees_equal(head(HIDDEN), layer(HIDDEN))
    tolerance = 1e-5 if dtype is None else 2e-2
    want = by_optax(layer(HIDDEN).astype(float))
    np.testing.assert_allclose(head(HIDDEN, LABELS), want, tolerance)
    # The layer itself is a head, in its own dtype.
    loss = tdjax.linear_cross_entropy(layer, HIDDEN, LABELS)
    np.testing.assert_array_equal(loss, head(HIDDEN, LABELS))
    got, want = (
        head.log_probs(HIDDEN, LABELS),
        tdjax.linear_log_probs(layer, HIDDEN, LABELS),
    )
    assert_trees_equal(got, want)


@pytest.mark.parametrize("use_bias", [None, True])
def test_a_tied_linen_head_shares_the_embedding(use_bias, key):
    model = TiedLinen(use_bias)
    variables = model.init(key, LABELS)
    names = {"embed", "head"} if use_bias else {"embed"}
    assert set(variables["params"]) == names
    logits = model.apply(variables, LABELS)
    np.testing.assert_allclose(
        logits, model.apply(variables, LABELS, method="plain"), 1e-6
    )
    np.testing.assert_allclose(
        model.apply(variables, LABELS, LABELS), by_optax(logits), 1e-5
    )
    fused = jax.grad(lambda v: model.apply(v, LABELS, LABELS))(variables)
    plain = jax.grad(lambda v: by_optax(model.apply(v, LABELS)))(variables)
    assert_trees_close(fused, plain)


def test_a_tied_nnx_head_shares_the_embedding():
    model = TiedNNX(nnx.Rngs(0))
    assert set(nnx.state(model)) == {"embed"}
    logits = model.embed.attend(model.embed(LABELS))
    np.testing.assert_allclose(model(LABELS), logits, 1e-6)
    fused = nnx.grad(lambda model: model(LABELS, LABELS))(model)
    plain = nnx.grad(lambda model: by_optax(model(LABELS)))(model)
    assert_trees_close(nnx.to_pure_dict(fused), nnx.to_pure_dict(plain))


def test_the_soft_cap_of_a_head_is_in_logits_and_loss(key):
    for cap in (None, 0.5):
        linen = TiedLinen(logits_soft_cap=cap)
        variables = linen.init(key, LABELS)
        logits = linen.apply(variables, LABELS)
        loss = linen.apply(variables, LABELS, LABELS)
        np.testing.assert_allclose(loss, by_optax(logits), 1e-5)
        assert cap is None or np.abs(logits).max() < cap
        module = TiedNNX(nnx.Rngs(0), logits_soft_cap=cap)
        loss = module(LABELS, LABELS)
        np.testing.assert_allclose(loss, by_optax(module(LABELS)), 1e-5)


def test_a_tied_head_computes_in_the_dtype_of_its_embedding(key):
    """Options that are None are as good as not given."""
    embed = nnx.Embed(V, F, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits = tdjax.nnx.CrossEntropyHead(F, embed)(HIDDEN, mask=None)
    assert_trees_equal(logits, embed.attend(HIDDEN))
    wide = tdjax.nnx.CrossEntropyHead(F, embed, dtype=jnp.float32)(HIDDEN)
    assert (logits.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
    head = tdjax.nnx.CrossEntropyHead(F, embed)
    given = head(HIDDEN, LABELS, z_loss=None, reduction=None, logits_soft_cap=None)
    assert_trees_equal(given, head(HIDDEN, LABELS))
    shared = nn.Embed(V, F, dtype=jnp.bfloat16)
    head = tdjax.linen.CrossEntropyHead(shared)
    logits = head.apply(head.init(key, HIDDEN), HIDDEN, None, mask=None)
    assert logits.dtype == jnp.bfloat16


def test_the_bias_of_a_head_in_half_precision_is_not_rounded():
    layer = nnx.Linear(F, V, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.bias[...] = 100 + normal(5, V)
    head = tdjax.nnx.CrossEntropyHead(F, V, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    head.kernel[...], head.bias[...] = layer.kernel[...], layer.bias[...]
    assert_trees_equal(head(HIDDEN), layer(HIDDEN))
    want = tdjax.linear_cross_entropy(layer, HIDDEN, LABELS)
    np.testing.assert_array_equal(head(HIDDEN, LABELS), want)


class ScaledLinen(nn.Embed):
    def attend(self, query):
        return super().attend(query) / 10


class ScaledNNX(nnx.Embed):
    def attend(self, query):
        return super().attend(query) / 10


@pytest.mark.parametrize("kind", ["Linear", "Embed"])
def test_nnx_modules_and_their_states_are_heads(kind):
    made = {
        "Linear": lambda: nnx.Linear(F, V, rngs=nnx.Rngs(0)),
        "Embed": lambda: nnx.Embed(V, F, rngs=nnx.Rngs(0)),
    }
    head = made[kind]()
    logits = head(HIDDEN) if kind == "Linear" else head.attend(HIDDEN)
    for params in (head, nnx.state(head), nnx.to_pure_dict(nnx.state(head))):
        loss = lambda params: tdjax.linear_cross_entropy(params, HIDDEN, LABELS)
        np.testing.assert_allclose(jax.jit(loss)(params), by_optax(logits), 1e-5)
    gradient = nnx.grad(loss)(head)
    by_state = jax.grad(loss)(nnx.state(head))
    apply = lambda m: by_optax(m(HIDDEN) if kind == "Linear" else m.attend(HIDDEN))
    want = nnx.to_pure_dict(nnx.grad(apply)(head))
    assert_trees_close(nnx.to_pure_dict(gradient), want)
    assert_trees_close(nnx.to_pure_dict(by_state), want)


def test_boxed_linen_params_are_a_head(key):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "words"))
    layer = nn.Dense(V, kernel_init=init)
    params = layer.init(key, HIDDEN)["params"]
    loss = lambda params: tdjax.linear_cross_entropy(params, HIDDEN, LABELS)
    want = jax.value_and_grad(loss)(nn.unbox(params))
    got = jax.value_and_grad(loss)(params)
    assert_trees_equal(nn.unbox(got), want)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tdjax.linen.CrossEntropyHead(0), ValueError, "vocabulary must be a pos"),
        (lambda: tdjax.linen.CrossEntropyHead(nn.Dense(3)), TypeError, "vocabulary must be the number of words or an Embed, got a Dense"),
        (lambda: tdjax.nnx.CrossEntropyHead(4, 1.0), TypeError, "vocabulary must be a positive int"),
        (lambda: tdjax.nnx.CrossEntropyHead(4, V), TypeError, "rngs must be an nnx.Rngs"),
        (lambda: tdjax.nnx.CrossEntropyHead(5, nnx.Embed(V, F, rngs=nnx.Rngs(0))), ValueError,
         "in_features must be 4, .* got 5"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, V, rngs=nnx.Rngs(0))(HIDDEN, z_loss=0.1), TypeError,
         "labels must be given with z_loss"),
        (lambda: tdjax.linen.CrossEntropyHead(8, 50), TypeError, "positional"),
        (lambda: tdjax.linen.CrossEntropyHead(8, logits_soft_cap=0.0), ValueError, "logits_soft_cap must be positive"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, V, logits_soft_cap="30", rngs=nnx.Rngs(0)), TypeError, "logits_soft_cap"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, V, rngs=0), TypeError, "rngs must be an nnx.Rngs, got int"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, nnx.Embed(V, F, promote_dtype=lambda x, **_: x, rngs=nnx.Rngs(0))),
         TypeError, "own attend and promote_dtype"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, V, rngs=nnx.Rngs(0))(HIDDEN, lables=LABELS), TypeError,
         "lables is not an option; those of linear_cross_entropy are mask"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, V, rngs=nnx.Rngs(0)).log_probs(HIDDEN, LABELS, z_loss=0.1), TypeError,
         "z_loss is not an option; those of linear_log_probs"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, V, rngs=nnx.Rngs(0))(HIDDEN[..., :3]), ValueError,
         "hidden must have the features of params"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, V, rngs=nnx.Rngs(0))(LABELS[..., None] + jnp.zeros(F, int)),
         TypeError, "hidden must be of floats"),
        (lambda: tdjax.linen.CrossEntropyHead(ScaledLinen(V, F)), TypeError, "own attend and promote_dtype, got a ScaledLinen"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, ScaledNNX(V, F, rngs=nnx.Rngs(0))), TypeError, "own attend and promote_dtype, got a ScaledNNX"),
        (lambda: tdjax.linear_cross_entropy(
            tdjax.nnx.CrossEntropyHead(F, V, rngs=nnx.Rngs(0)), HIDDEN, LABELS),
         TypeError, r"Call it instead: head\(hidden, labels\)"),
        (lambda: tdjax.nnx.CrossEntropyHead(F, V, rngs=nnx.Rngs(0))(HIDDEN, LABELS, logits_soft_cap=2.0),
         TypeError, "logits_soft_cap is a field"),
        (lambda: tdjax.linear_cross_entropy(nnx.LoRALinear(F, V, lora_rank=2, rngs=nnx.Rngs(0)), HIDDEN, LABELS),
         TypeError, "got a LoRALinear, whose logits may be others"),
        (lambda: tdjax.linear_cross_entropy(
            nnx.Linear(F, V, dot_general=lambda *a, **k: 0, rngs=nnx.Rngs(0)), HIDDEN, LABELS),
         TypeError, "without dot_general of its own"),
        (lambda: tdjax.linear_cross_entropy(
            nnx.Embed(V, F, promote_dtype=lambda args, **_: args, rngs=nnx.Rngs(0)), HIDDEN, LABELS),
         TypeError, "without promote_dtype of its own"),
    ],
)  # fmt: skip
def test_errors(user_errors, make, error, message):
    with pytest.raises(error, match=message):
        make()
