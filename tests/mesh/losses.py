"""The fused loss on 8 devices: run by `test_mesh.py`, which makes the devices

Prints a JSON list: for each layout and each set of options the largest deviation from
plain JAX on all logits, in float64 on one device, relative to the largest value; and for
each layout what the gradient sends in float32.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import softmax_by_the_book
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
        "ignore_class": 7, "vocab_chunk_size": 4, "reduction": "sum", "weights": True,
        "class_weights": True, "has_aux": True,
    },
    "weights": {"weights": True, "class_weights": True, "has_aux": True},
    "tied": {"tied": True, "mask": True, "label_smoothing": 0.2},
    "packed": {"mask": True, "capacity": 64, "reduction": "none", "has_aux": True},
    "log_probs": {"log_probs": True, "mask": True, "temperature": 0.5},
    "log_probs, tied": {
        "log_probs": True, "tied": True, "logits_soft_cap": 2.0, "temperature": 2.0,
        "chunk_size": 3, "vocab_chunk_size": 4,
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


WEIGHTS = RNG.uniform(0.5, 2, (BATCH, TIMESTEPS)) * (LABELS % 3 > 0)
CLASS_WEIGHTS = np.arange(WORDS) % 4 / 2


def inputs(options):
    """`(head, hidden, labels, mask, weights, class weights)` and what options are left.

    Masked steps have hidden NaN and labels outside the vocabulary.
    """
    options = dict(options)
    mask = MASK if options.pop("mask", False) else None
    hidden = HIDDEN if mask is None else np.where(mask[..., None], HIDDEN, np.nan)
    labels = np.where(MASK, LABELS, -100) if "ignore_class" in options else LABELS
    labels = np.where(LABELS == 7, 7, labels)
    if mask is not None:
        labels = np.where(mask, labels, 999)
    weights = WEIGHTS if options.pop("weights", False) else None
    class_weights = CLASS_WEIGHTS if options.pop("class_weights", False) else None
    head = HEAD
    if options.pop("tied", False):
        head = {"embedding": HEAD["kernel"].T, "bias": HEAD["bias"]}
    labels = labels.astype(np.int32)
    return (head, hidden, labels, mask, weights, class_weights), options


def function_of(module, options):
    """`(function of arrays, whether it has weights)`, of tdjax or by the book."""
    options = {**options}
    if options.pop("log_probs", False):
        return lambda head, hidden, labels, mask, *_: module.log_probs(
            head, hidden, labels, mask=mask, **options
        )
    return lambda head, hidden, labels, mask, weights, class_weights: module.loss(
        head, hidden, labels, mask=mask, weights=weights, class_weights=class_weights,
        **options,
    )  # fmt: skip


class Ours:
    loss = staticmethod(tdjax.linear_cross_entropy)
    log_probs = staticmethod(tdjax.linear_log_probs)


class ByTheBook:
    log_probs = staticmethod(softmax_by_the_book.log_probs_and_entropies)

    @staticmethod
    def loss(*args, has_aux=False, **options):
        loss, aux = softmax_by_the_book.cross_entropy(*args, **options)
        return (loss, aux) if has_aux else loss


def without(options, *names):
    return {name: x for name, x in options.items() if name not in names}


def total(results):
    """A different weight for each result, so that no two gradients are mistaken."""
    floats = [x for x in jax.tree.leaves(results) if x.dtype == np.float64]
    return sum(map(scalar, floats))


def scalar(losses):
    return jnp.sum(losses * (1 + jnp.arange(losses.size).reshape(losses.shape)))


def place(mesh, layout, head, hidden, labels, mask, weights=None, class_weights=None):
    steps, kernel = LAYOUTS[layout]
    kernel = [*kernel, None, None][:2]
    put = lambda x, *spec: (
        None if x is None else jax.device_put(x, NamedSharding(mesh, P(*spec)))
    )
    specs = {"kernel": kernel, "embedding": kernel[::-1], "bias": kernel[1:]}
    head = {name: put(x, *specs[name]) for name, x in head.items()}
    of_steps = [put(x, *steps) for x in (hidden, labels, mask, weights)]
    return head, *of_steps, put(class_weights, *kernel[1:])


def deviation(got, expected):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    largest = lambda x: np.abs(x).max() or 1.0
    return max(float(np.abs(a * 1.0 - b).max() / largest(b)) for a, b in pairs)


def given_layout(layout, head, from_types):
    if from_types:
        return {}
    steps, kernel = LAYOUTS[layout]
    if "embedding" in head:
        kernel = P(*[*kernel, None, None][1::-1])
    return {"sharding": steps, "kernel_sharding": kernel}


def run(mesh, layout, name, from_types):
    arrays, options = inputs(OPTIONS[name])
    placed = place(mesh, layout, *arrays)
    given = given_layout(layout, arrays[0], from_types)
    ours = function_of(Ours, {**options, **given})
    blocks = "chunk_size", "vocab_chunk_size", "capacity"
    book = function_of(ByTheBook, without(options, *blocks))
    # By the head, hidden and the weights of steps.
    by = (0, 1) if arrays[4] is None else (0, 1, 4)

    def gradients(function):
        # Aux has no gradient.
        first = lambda *args: (
            function(*args)[0] if "has_aux" in options else function(*args)
        )
        return jax.jit(jax.grad(lambda *args: total(first(*args)), argnums=by))

    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        expected = jax.device_get((book(*arrays), gradients(book)(*arrays)))
    got = jax.device_get((jax.jit(ours)(*placed), gradients(ours)(*placed)))
    return deviation(got, expected)


def sent(mesh, layout, from_types):
    """`(collectives of the gradient, bytes of the head)`, in float32."""
    cast = lambda x: x.astype(np.float32)
    placed = place(mesh, layout, jax.tree.map(cast, HEAD), cast(HIDDEN), LABELS, MASK)
    given = given_layout(layout, HEAD, from_types)
    loss = lambda head, hidden, labels, mask, *_: tdjax.linear_cross_entropy(
        head, hidden, labels, mask=mask, chunk_size=2, **given
    )
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(*placed).compile()
    shardings = [x.sharding.spec for x in jax.tree.leaves(compiled(*placed))]
    return collectives(compiled.as_text()), list(map(str, shardings))


FEW = {
    "batch and time": "packed",
    "words": "weights",
    "batch, features (FSDP)": "log_probs, tied",
    "batch, features and words": "everything",
}


def main(kind, which="few"):
    """`which`: one set of options for a "few" layouts, or for those of "few types"; all
    layouts with "some" sets of options, or "all", or with those of "types"."""
    mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType[kind],) * 2)
    names, rows = [*OPTIONS], []
    with jax.set_mesh(mesh):
        for i, layout in enumerate(FEW if which.startswith("few") else LAYOUTS):
            chosen = names if which == "all" else [names[i % len(names)], "everything"]
            chosen = [FEW[layout]] if which.startswith("few") else chosen
            from_types = which.endswith("types")
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
