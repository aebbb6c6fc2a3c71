"""The fused loss on 8 devices: run by `test_mesh.py`, which makes the devices

Prints a JSON list: for each layout and each set of options the largest deviation from
Optax on all logits, in float64 on one device, relative to the largest value; and for
each layout what the gradient sends in float32.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tdjax

BATCH, TIMESTEPS, FEATURES, WORDS = 8, 8, 16, 48
LAYOUTS = {
    # Of the steps, then of the kernel's features and words.
    "batch": (P("data"), P()),
    "time": (P(None, "data"), P()),
    "batch and time": (P("data", "seq"), P()),
    "batch on all": (P(("data", "seq")), P()),
    "words": (P(), P(None, "seq")),
    "words on all": (P(), P(None, ("data", "seq"))),
    "features": (P(), P("data")),
    "batch, words": (P("data"), P(None, "seq")),
    "batch, features": (P("data"), P("seq")),
    "batch, features (FSDP)": (P("data"), P("data")),
    "batch, words (FSDP)": (P("data"), P(None, "data")),
    "features, words": (P(), P("data", "seq")),
    "batch, features and words": (P("data"), P("data", "seq")),
    "all features": (P("data", "seq"), P(("seq", "data"))),
}
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "mask": {"mask": True},
    "smoothed": {"label_smoothing": 0.2, "mask": True},
    "z_loss": {"z_loss": 0.1},
    "capped": {"logits_soft_cap": 2.0, "reduction": "none"},
    "ignored": {"ignore_class": -100},
    "chunks": {"chunk_size": 2, "mask": True},
    "chunks of words": {"vocab_chunk_size": 5, "chunk_size": 3, "mask": True},
    "everything": {
        "label_smoothing": 0.1, "z_loss": 0.01, "logits_soft_cap": 3.0, "mask": True,
        "ignore_class": 7, "vocab_chunk_size": 4, "reduction": "sum",
    },
}  # fmt: skip
RNG = np.random.default_rng(0)
HEAD = {
    "kernel": RNG.normal(size=(FEATURES, WORDS)),
    "bias": RNG.normal(size=WORDS),
}
HIDDEN = RNG.normal(size=(BATCH, TIMESTEPS, FEATURES))
LABELS = RNG.integers(0, WORDS, (BATCH, TIMESTEPS))
MASK = np.arange(TIMESTEPS) < np.array([8, 2, 0, 1, 3, 6, 1, 4])[:, None]


def inputs(options):
    options = dict(options)
    mask = MASK if options.pop("mask", False) else None
    hidden = HIDDEN if mask is None else np.where(mask[..., None], HIDDEN, np.nan)
    labels = np.where(MASK, LABELS, -100) if "ignore_class" in options else LABELS
    labels = np.where(LABELS == 7, 7, labels)
    if mask is not None:
        labels = np.where(mask, labels, 999)
    return hidden, labels.astype(np.int32), mask, options


def plain(head, hidden, labels, mask, options):
    """Optax, on all logits."""
    valid = np.ones(labels.shape, bool) if mask is None else mask
    valid = valid & (labels != options.get("ignore_class"))
    hidden = jnp.where(valid[..., None], hidden, 0)
    logits = hidden @ head["kernel"] + head["bias"]
    if cap := options.get("logits_soft_cap"):
        logits = cap * jnp.tanh(logits / cap)
    one_hot = jax.nn.one_hot(np.where(valid, labels, 0), WORDS, dtype=logits.dtype)
    smoothed = optax.smooth_labels(one_hot, options.get("label_smoothing", 0.0))
    losses = optax.softmax_cross_entropy(logits, smoothed)
    normalizer = jax.scipy.special.logsumexp(logits, axis=-1)
    losses += options.get("z_loss", 0.0) * normalizer**2
    losses = jnp.where(valid, losses, 0)
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return losses
    return losses.sum() / (valid.sum() if reduction == "mean" else 1)


def scalar(losses):
    """A different weight for each loss, so that no two gradients are mistaken."""
    return jnp.sum(losses * (1 + jnp.arange(losses.size).reshape(losses.shape)))


def place(mesh, layout, head, hidden, labels, mask):
    steps, kernel = LAYOUTS[layout]
    kernel = [*kernel, None, None][:2]
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    specs = {"kernel": kernel, "bias": kernel[1:]}
    head = {name: put(x, *specs[name]) for name, x in head.items()}
    return head, *(
        None if x is None else put(x, *steps) for x in (hidden, labels, mask)
    )


def deviation(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def run(mesh, layout, name, from_types):
    hidden, labels, mask, options = inputs(OPTIONS[name])
    placed = place(mesh, layout, HEAD, hidden, labels, mask)
    given = (
        {}
        if from_types
        else dict(zip(("sharding", "kernel_sharding"), LAYOUTS[layout]))
    )

    def loss(head, hidden, labels, mask):
        return tdjax.linear_cross_entropy(
            head, hidden, labels, mask=mask, **options, **given
        )

    grads = lambda f: jax.value_and_grad(lambda *a: scalar(f(*a)), argnums=(0, 1))
    expected_loss = lambda head, hidden: plain(head, hidden, labels, mask, options)
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        expected = jax.device_get(
            (expected_loss(HEAD, hidden), jax.jit(grads(expected_loss))(HEAD, hidden))
        )
    got = jax.device_get((jax.jit(loss)(*placed), jax.jit(grads(loss))(*placed)))
    return deviation(got, expected)


def sent(mesh, layout, from_types):
    """`(collectives of the gradient, bytes of the head)`, in float32."""
    cast = lambda x: x.astype(np.float32)
    placed = place(mesh, layout, jax.tree.map(cast, HEAD), cast(HIDDEN), LABELS, MASK)
    given = (
        {}
        if from_types
        else dict(zip(("sharding", "kernel_sharding"), LAYOUTS[layout]))
    )
    loss = lambda head, hidden, labels, mask: tdjax.linear_cross_entropy(
        head, hidden, labels, mask=mask, chunk_size=2, **given
    )
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(*placed).compile()
    shardings = [x.sharding.spec for x in jax.tree.leaves(compiled(*placed))]
    return collectives(compiled.as_text()), list(map(str, shardings))


def main(kind, which="some", *layouts):
    """`which`: "some" sets of options for each layout, "all", or those of "types"."""
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType[kind],) * 2)
    names, rows = [*OPTIONS], []
    with jax.set_mesh(mesh):
        for i, layout in enumerate(layouts or LAYOUTS):
            chosen = names if which == "all" else [names[i % len(names)], "everything"]
            from_types = which == "types"
            deviations = {name: run(mesh, layout, name, from_types) for name in chosen}
            operations, shardings = sent(mesh, layout, from_types)
            rows.append(
                {
                    "layout": layout,
                    "deviations": deviations,
                    "collectives": operations,
                    "shardings": shardings,
                }
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(*sys.argv[1:])
