"""Whole models: as given, tuned by `tdjax.linen.autotune`, and with `method="auto"`."""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import tdjax
from benchmarks.layers import CHANNELS, CONVOLUTIONS
from benchmarks.programs import Row, measure_programs

TimeDistributed = tdjax.linen.TimeDistributed
OF = ("training step", "inference")


class Encoder(nn.Module):
    """Three convolutions over a frame, and the mean over its pixels."""

    @nn.compact
    def __call__(self, x):
        for name in CONVOLUTIONS:
            x = nn.relu(nn.Conv(CHANNELS, (3, 3), name=name)(x))
        return x.mean((1, 2))


class VideoModel(nn.Module):
    """A conv net over every frame, a GRU, and a head at every step."""

    classes: int = 10
    method: Literal["vmap", "auto"] = "vmap"

    @nn.compact
    def __call__(self, frames):
        x = TimeDistributed(Encoder(), method=self.method, name="encoder")(frames)
        x = nn.RNN(nn.GRUCell(64), name="memory")(x)
        head = TimeDistributed(nn.Dense(self.classes), method=self.method, name="head")
        return head(x)


class Whole(NamedTuple):
    """A model and its input."""

    title: str
    model: nn.Module
    x: jax.Array

    @property
    def name(self) -> str:
        return f"{self.title}, float32 {list(self.x.shape)}"


def cases(quick: bool) -> list[Whole]:
    shapes = [(2, 6, 8, 8, 3)] if quick else [(8, 16, 64, 64, 3), (4, 32, 64, 64, 3)]
    draw = lambda shape: jax.random.normal(jax.random.key(0), shape)
    return [Whole("video model", VideoModel(), draw(shape)) for shape in shapes]


def rows(case: Whole, of: str, effort, budget: float) -> list[Row]:
    """A row for each way; all must agree with the model as it was given."""
    is_training, x = of == "training step", case.x
    variables = case.model.init(jax.random.key(1), x)
    labels = jnp.zeros(x.shape[:2], jnp.int32)
    argnums = 0 if is_training else None
    found = tdjax.linen.autotune(
        case.model, variables, x, argnums=argnums, budget=budget
    )
    models = {
        "as given": case.model,
        "tuned as a whole": found.tuned,
        '"auto", no table': case.model.clone(method="auto"),
    }
    args = variables, x, labels
    run = lambda model: _step(model) if is_training else _inference(model)
    programs = {name: run(model) for name, model in models.items()}
    about = {"case": case.name, "of": of, "options": found.options}
    return measure_programs(about, programs, args, effort, 2e-3)


def _inference(model: nn.Module):
    return lambda variables, x, labels: model.apply(variables, x)


def _step(model: nn.Module):
    """The loss, and the parameters after a step of gradient descent."""

    def loss(variables: Any, x, labels):
        logits: Any = model.apply(variables, x)
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, labels[..., None], -1)
        return -jnp.mean(chosen)

    def step(variables, x, labels):
        value, gradients = jax.value_and_grad(loss)(variables, x, labels)
        move = lambda p, g: p - 0.01 * g
        return value, gradients, jax.tree.map(move, variables, gradients)

    return step
