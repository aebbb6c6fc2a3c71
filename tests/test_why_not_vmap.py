"""The README's table "Why not vmap?": what comes of it, and what tdjax does instead."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdjax
from helpers import normal, run_on_devices

B, T, F = 4, 6, 3
X = normal(0, B, T, F)


class Block(nnx.Module):
    """What people put into every step: a layer, statistics and noise."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(F, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def norm_over_time(axis):
    return nn.vmap(
        nn.BatchNorm,
        in_axes=1,
        out_axes=1,
        variable_axes={"params": None, "batch_stats": axis},
        split_rngs={"params": False},
    )(use_running_average=False)


def test_linens_vmap_refuses_statistics_that_steps_share(key):
    model = norm_over_time(None)
    variables = model.init(key, X)
    with pytest.raises(ValueError, match="axis spec None but output was batched"):
        model.apply(variables, X, mutable=["batch_stats"])


def test_linens_vmap_keeps_statistics_for_each_step_and_tdjax_for_the_layer(key):
    stats = norm_over_time(0).init(key, X)["batch_stats"]
    assert stats["mean"].shape == (T, F)
    ours = tdjax.linen.TimeDistributed(nn.BatchNorm(use_running_average=False))
    variables = ours.init(key, X)
    assert variables["batch_stats"]["mean"].shape == (F,)
    _, after = ours.apply(variables, X, mutable=["batch_stats"])
    mean = 0.01 * X.mean((0, 1))  # the layer's momentum is 0.99
    np.testing.assert_allclose(after["batch_stats"]["mean"], mean, 1e-5, 1e-6)


def _shared(model, x):
    return nnx.vmap(lambda model, x: model(x), in_axes=(None, 1), out_axes=1)(model, x)


def _state_axes(model, x):
    axes = nnx.StateAxes({nnx.RngState: 0, ...: None})
    call = nnx.vmap(lambda model, x: model(x), in_axes=(axes, 1), out_axes=1)
    return call(model, x)


def _split_rngs(model, x):
    axes = nnx.StateAxes({nnx.RngState: 0, ...: None})
    call = nnx.vmap(lambda model, x: model(x), in_axes=(axes, 1), out_axes=1)
    return nnx.split_rngs(splits=x.shape[1])(call)(model, x)


@pytest.mark.parametrize("way", [_shared, _state_axes, _split_rngs])
def test_nnx_vmap_fails_in_three_ways_in_training(way):
    with pytest.raises(
        Exception, match=r"got axis spec None but output|its rank should be at least 1"
    ):
        way(Block(), X)


def test_nnx_layers_train_at_every_step():
    model = tdjax.nnx.TimeDistributed(Block())
    y = nnx.jit(lambda model, x: model(x))(model, X)
    assert y.shape == (B, T, 5)
    assert model.layer.norm.mean[...].shape == (5,)
    assert (model.layer.norm.mean[...] != 0).all()
    dropped = np.asarray(y == 0)
    assert (dropped != dropped[:, :1]).any()  # noise of its own for each step


def test_where_over_padding_gives_a_nan_gradient():
    params = tdjax.init_dense(jax.random.key(0), F, 2)
    mask = tdjax.lengths_to_mask(jnp.array([6, 2, 1, 0]), T)
    x = jnp.where(mask[..., None], X, jnp.nan)
    head = tdjax.time_distributed(tdjax.dense, in_axes=(None, 1))
    masked_by_hand = lambda params: jnp.where(
        mask[..., None], tdjax.dense(params, x), 0
    )
    ours = lambda params: head(params, x, mask=mask)
    np.testing.assert_array_equal(ours(params), masked_by_hand(params))
    gradient = lambda fun: jax.grad(lambda params: fun(params).sum())(params)
    assert jnp.isnan(gradient(masked_by_hand)["kernel"]).all()
    valid = X[np.asarray(mask)].sum(0)
    want = jnp.broadcast_to(valid[:, None], (F, 2))
    np.testing.assert_allclose(gradient(ours)["kernel"], want, 1e-5)


def test_a_program_does_not_grow_with_the_sequence():
    def lines(timesteps):
        x = jnp.ones((2, timesteps, F))
        over_time = tdjax.time_distributed(jnp.sin, chunk_size=4)
        return len(jax.jit(over_time).lower(x).as_text().splitlines())

    assert lines(4096) == lines(16)


def test_folding_is_wrong_where_a_layer_mixes_the_batch_and_the_tuner_sees_it():
    centre = lambda x: x - x.mean(0)
    by_hand = centre(X.reshape(B * T, F)).reshape(X.shape)
    ours = tdjax.time_distributed(centre)(X)
    assert jnp.abs(by_hand - ours).max() > 0.1
    fold = [{"method": "fold"}]
    result = tdjax.autotune(centre, jnp.zeros_like(X), candidates=fold, budget=60)
    assert result.options["method"] == "vmap"


def test_the_loss_keeps_no_logits():
    rows, words = 4096, 8192
    hidden, labels = normal(0, rows, 32), jnp.arange(rows)
    head = {"kernel": normal(1, 32, words)}

    def on_all_logits(head):
        logits = hidden @ head["kernel"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def ours(head):
        return tdjax.linear_cross_entropy(head, hidden, labels)

    def temporary_bytes(loss):
        program = jax.jit(jax.value_and_grad(loss)).lower(head).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(on_all_logits) >= rows * words * 4
    assert temporary_bytes(ours) < temporary_bytes(on_all_logits) / 4


def test_on_a_mesh_vmap_computes_a_convolution_everywhere_and_tdjax_once():
    found = run_on_devices("vmapped_convolution.py")
    work, sent = found["jax.vmap"]
    assert work == pytest.approx(1, rel=0.01)  # of all steps, on each of 8 devices
    assert sent == found["input"]
    work, sent = found["sharding"]
    assert work == pytest.approx(1 / 8, rel=0.01)
    assert sent == 0
