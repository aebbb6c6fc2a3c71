"""Ragged batches: valid steps packed, beside all steps padded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import tdjax
from benchmarks.layers import LAYERS, attention, dense, layer_norm
from benchmarks.peers import torch_nested
from benchmarks.programs import Row, measure_programs

NESTED = "PyTorch, nested tensors"
SHARES = (0.1, 0.3, 0.6, 1.0)


class Ragged(NamedTuple):
    """A layer, a padded input, and how many steps of each example are valid."""

    layer: str
    step: Callable[..., Any]
    params: Any
    x: jax.Array
    share: float

    @property
    def name(self) -> str:
        shape = f"float32 {list(self.x.shape)}"
        return f"{self.layer}, {shape}, {self.share:.0%} valid"


def cases(quick: bool) -> list[Ragged]:
    keys = jax.random.split(jax.random.key(0), 4)
    video = (2, 10, 8, 8, 3) if quick else (8, 20, 32, 32, 3)
    tokens = (2, 10, 4, 16) if quick else (16, 20, 32, 128)
    video = jax.random.normal(keys[0], video)
    tokens = jax.random.normal(keys[1], tokens)
    conv = LAYERS["conv net"]
    layers: list[tuple[str, Any, Any, jax.Array]] = [
        ("conv net", conv.step, conv.init(keys[2], video[:, 0]), video),
        ("transformer block", block, block_params(keys[3], tokens), tokens),
    ]
    shares = SHARES[1:2] if quick else SHARES
    return [Ragged(*layer, share) for layer in layers for share in shares]


def block_params(key, x):
    keys, width = jax.random.split(key, 3), x.shape[-1]
    norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    return {
        "norms": [norm, norm],
        "attention": LAYERS["attention"].init(keys[0], x[:, 0]),
        "mlp": [
            tdjax.init_dense(keys[1], width, 4 * width),
            tdjax.init_dense(keys[2], 4 * width, width),
        ],
    }


def block(params, x):
    """A transformer block over the tokens of a step, `(batch, tokens, features)`."""
    first, second = params["norms"]
    x = x + attention(params["attention"], layer_norm(first, x))
    widen, narrow = params["mlp"]
    return x + dense(narrow, jax.nn.gelu(dense(widen, layer_norm(second, x))))


def rows(case: Ragged, of: str, effort) -> list[Row]:
    """Padded, packed, and PyTorch; the mask is known at run time only."""
    batch, timesteps = case.x.shape[:2]
    # Lengths differ, and their mean is the share.
    spread = 2 * (jnp.arange(batch) % 2) - 1
    room = min(case.share, 1 - case.share) * timesteps
    lengths = jnp.round(case.share * timesteps + spread * room / 2).astype(int)
    mask = tdjax.lengths_to_mask(lengths, timesteps)
    capacity = int(mask.sum())

    def program(**options):
        apply = tdjax.time_distributed(case.step, in_axes=(None, 1), **options)

        def forward(params, x, mask):
            return apply(params, x, mask=mask)

        def gradient(params, x, mask):
            loss = lambda params, x: jnp.mean(jnp.sin(forward(params, x, mask)))
            return jax.value_and_grad(loss, (0, 1))(params, x)

        return forward if of == "forward" else gradient

    programs: dict[str, Any] = {
        "padded": program(),
        'padded, "fold"': program(method="fold"),
        "packed": program(capacity=capacity),
        'packed, "fold"': program(capacity=capacity, method="fold"),
    }
    about = {"case": case.name, "of": of, "layer": case.layer, "share": case.share}
    about["capacity_share"] = capacity / mask.size
    missing = []
    try:
        programs[NESTED] = torch_nested.program(case, of, lengths)
    except (ImportError, NotImplementedError) as error:
        missing.append({**about, "candidate": NESTED, "missing": str(error)})
    args = case.params, case.x, mask
    return measure_programs(about, programs, args, effort, 2e-3) + missing
