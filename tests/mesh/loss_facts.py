"""The fused loss on 8 devices, beyond the numbers of `losses`: run by `test_mesh.py`

Prints as JSON what came of each function below, and the errors of bad calls.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.collectives import collectives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import tdjax
from mesh.losses import FEATURES, HEAD, HIDDEN, LABELS, MASK, WORDS
from mesh.report import close, place, print_facts
from softmax_by_the_book import cross_entropy

STEPS, EVERYWHERE = P("data", "seq"), P()


def on_one_device(function, *args):
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        return jax.device_get(jax.jit(function)(*args))


def expected(head, hidden):
    return cross_entropy(head, hidden, LABELS, mask=MASK)[0]


def with_gradients(function):
    return jax.value_and_grad(function, argnums=(0, 1))


def inside(mesh, body, out_specs=EVERYWHERE, **options):
    """A user's own `shard_map` of `body(head, hidden, labels, mask)`."""
    steps = place(mesh, (LABELS, MASK), STEPS)
    specs = P(), STEPS, STEPS, STEPS
    over = jax.shard_map(body, in_specs=specs, out_specs=out_specs, **options)
    return lambda head, hidden: over(head, hidden, *steps)


def placed(mesh):
    return place(mesh, HEAD, P()), place(mesh, HIDDEN, STEPS)


def loss_of_all(head, hidden, labels, mask, **options):
    names = ("data", "seq")
    return tdjax.linear_cross_entropy(
        head, hidden, labels, mask=mask, axis_name=names, **options
    )


def axis_name_is_the_mean_of_all_devices(mesh):
    want = on_one_device(with_gradients(expected), HEAD, HIDDEN)
    for options in ({}, {"chunk_size": 1, "vocab_chunk_size": 5}):
        body = lambda *args, options=options: loss_of_all(*args, **options)
        for check_vma in (True, False):
            loss = inside(mesh, body, check_vma=check_vma)
            got = jax.jit(with_gradients(loss))(*placed(mesh))
            if not close(got, want, 1e-12):
                return False
    return True


def the_gradient_may_be_taken_inside(mesh):
    def body(head, hidden, labels, mask):
        loss = lambda head, hidden: loss_of_all(head, hidden, labels, mask)
        return jax.grad(loss, argnums=(0, 1))(head, hidden)

    got = jax.jit(inside(mesh, body, (P(), STEPS)))(*placed(mesh))
    return close(got, on_one_device(with_gradients(expected), HEAD, HIDDEN)[1], 1e-12)


def class_weights_inside(mesh):
    weights = np.arange(WORDS) % 4 / 2
    body = lambda *args: loss_of_all(*args, class_weights=weights, label_smoothing=0.1)
    want = lambda head, hidden: cross_entropy(
        head, hidden, LABELS, mask=MASK, class_weights=weights, label_smoothing=0.1
    )[0]
    want = on_one_device(with_gradients(want), HEAD, HIDDEN)
    got = jax.jit(with_gradients(inside(mesh, body, check_vma=True)))(*placed(mesh))
    return close(got, want, 1e-12)


def losses_and_masked_mean_inside(mesh):
    def body(head, hidden, labels, mask):
        losses = tdjax.linear_cross_entropy(
            head, hidden, labels, mask=mask, reduction="none"
        )
        return tdjax.masked_mean(losses, mask, axis_name=("data", "seq"))

    got = jax.jit(with_gradients(inside(mesh, body)))(*placed(mesh))
    return close(got, on_one_device(with_gradients(expected), HEAD, HIDDEN), 1e-12)


def a_mean_of_means_would_be_another_number(mesh):
    def body(*args):
        head, hidden, labels, mask = args
        own = tdjax.linear_cross_entropy(head, hidden, labels, mask=mask)
        return jax.lax.pmean(own, ("data", "seq"))

    got = jax.jit(inside(mesh, body))(*placed(mesh))
    return not close(got, on_one_device(expected, HEAD, HIDDEN), 1e-3)


def second_derivatives(mesh):
    kernel = HEAD["kernel"][:4]
    hidden = HIDDEN[..., :4]
    head = lambda kernel: {"kernel": kernel, "bias": HEAD["bias"]}
    want = on_one_device(jax.hessian(lambda k: expected(head(k), hidden)), kernel)
    for kernel_sharding in (P(), P(None, "seq"), P("data", "seq")):
        loss = lambda k, kernel_sharding=kernel_sharding: tdjax.linear_cross_entropy(
            head(k), hidden, LABELS, mask=MASK, sharding=P("data"),
            kernel_sharding=kernel_sharding, chunk_size=2,
        )  # fmt: skip
        if not close(jax.jit(jax.hessian(loss))(kernel), want, 1e-12):
            return False
    return True


def second_derivatives_in_reverse(mesh):
    """With the loss itself in use, and the soft cap, which has a derivative."""
    options = {"logits_soft_cap": 2.0, "z_loss": 0.1, "mask": MASK}

    def twice(loss):
        def value(head, hidden):
            loss_value, gradient = with_gradients(loss)(head, hidden)
            return loss_value + sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient))

        return jax.grad(value, argnums=(0, 1))

    capped = lambda head, hidden: cross_entropy(head, hidden, LABELS, **options)[0]
    want = on_one_device(twice(capped), HEAD, HIDDEN)
    for words in ({"kernel_sharding": P(None, "seq")}, {"vocab_chunk_size": 7}):
        loss = lambda head, hidden, words=words: tdjax.linear_cross_entropy(
            head, hidden, LABELS, sharding=P("data"), **words, **options
        )
        if not close(jax.jit(twice(loss))(HEAD, HIDDEN), want, 1e-10):
            return False
    return True


def words_split_inside_of_a_shard_map_over_steps(mesh):
    def body(head, hidden, labels, mask):
        return tdjax.linear_cross_entropy(
            head, hidden, labels, mask=mask, axis_name="data",
            kernel_sharding=P(None, "seq"),
        )  # fmt: skip

    specs = P(), P("data"), P("data"), P("data")
    over = jax.shard_map(
        body, in_specs=specs, out_specs=P(), axis_names={"data"}, check_vma=False
    )
    head = (
        place(mesh, HEAD["kernel"], P(None, "seq")),
        place(mesh, HEAD["bias"], P("seq")),
    )
    steps = place(mesh, (HIDDEN, LABELS, MASK), P("data"))
    loss = lambda kernel, bias, hidden: over(
        {"kernel": kernel, "bias": bias}, hidden, *steps[1:]
    )
    got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*head, steps[0])
    value, (of_head, of_hidden) = on_one_device(with_gradients(expected), HEAD, HIDDEN)
    return close(got, (value, (of_head["kernel"], of_head["bias"], of_hidden)), 1e-12)


def half_precision(mesh):
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    head, hidden = narrow(HEAD), narrow(HIDDEN)
    options = {"mask": MASK, "chunk_size": 3}
    alone = lambda head, hidden: tdjax.linear_cross_entropy(
        head, hidden, LABELS, **options
    )
    over = lambda head, hidden: tdjax.linear_cross_entropy(
        head, hidden, LABELS, **options,
        sharding=P("data"), kernel_sharding=P(None, "seq"),
    )  # fmt: skip
    want = on_one_device(with_gradients(alone), head, hidden)
    got = jax.jit(with_gradients(over))(head, hidden)
    dtypes = [x.dtype for x in jax.tree.leaves(got)]
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    same = dtypes == [x.dtype for x in jax.tree.leaves(want)]
    return same and close(wide(got), wide(want), 1e-2)


def a_mesh_of_both_kinds_in_the_types_alone(mesh):
    kinds = AxisType.Explicit, AxisType.Auto
    mixed = jax.make_mesh((4, 2), ("data", "seq"), axis_types=kinds)
    args = place(mixed, HEAD, P()), place(mixed, HIDDEN, P("data"))
    labels, mask = place(mixed, (LABELS, MASK), P("data"))
    loss = lambda head, hidden: tdjax.linear_cross_entropy(
        head, hidden, labels, mask=mask, kernel_sharding=P("seq")
    )
    empty = jax.sharding.AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(empty):
        got = jax.jit(loss)(*args)
    return close(got, on_one_device(expected, HEAD, HIDDEN), 1e-12)


def one_axis_of_steps_and_no_bias(mesh):
    head, hidden = {"kernel": HEAD["kernel"]}, HIDDEN.reshape(-1, FEATURES)
    labels = LABELS.reshape(-1)
    want = on_one_device(lambda: cross_entropy(head, hidden, labels)[0])
    got = jax.jit(
        lambda: tdjax.linear_cross_entropy(
            head, hidden, labels, sharding=P(("data", "seq"))
        )
    )()
    return close(got, want, 1e-12)


def without_jit(mesh):
    got = tdjax.linear_cross_entropy(
        HEAD, HIDDEN, LABELS, mask=MASK, sharding=STEPS, reduction="none"
    )
    return close(got.sum() / MASK.sum(), on_one_device(expected, HEAD, HIDDEN), 1e-12)


def bytes_do_not_grow_with_the_devices(mesh):
    """Steps split over 2, 4 and 8 devices: the head's gradient, once."""
    cast = lambda x: np.asarray(x, np.float32)
    head = jax.tree.map(cast, HEAD)
    size = sum(x.nbytes for x in head.values())
    loss = lambda head, hidden: tdjax.linear_cross_entropy(
        head, hidden, LABELS, chunk_size=4, sharding=P("data")
    )
    for devices in (2, 4, 8):
        small = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        with jax.set_mesh(small):
            args = place(small, head, P()), place(small, cast(HIDDEN), P("data"))
            compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
        found = collectives(compiled.as_text())
        sent = sum(each.bytes for each in found)
        if any(each.times != 1 for each in found) or not size <= sent <= 1.1 * size:
            return False
    return True


def bad_calls(mesh):
    loss = tdjax.linear_cross_entropy
    some = {"labels": LABELS, "mask": MASK}
    odd = {name: x[..., :-1] for name, x in HEAD.items()}
    labels = LABELS % (WORDS - 1)
    return {
        "unknown axis": lambda: loss(HEAD, HIDDEN, **some, sharding=P("model")),
        "kind": lambda: loss(HEAD, HIDDEN, **some, kernel_sharding="data"),
        "three axes": lambda: loss(HEAD, HIDDEN, **some, sharding=P(None, None, "seq")),
        "twice": lambda: loss(
            HEAD, HIDDEN, **some, kernel_sharding=P("data", ("data", "seq"))
        ),
        "size": lambda: loss(odd, HIDDEN, labels, kernel_sharding=P(None, "seq")),
        "words and steps": lambda: loss(
            HEAD, HIDDEN, **some,
            sharding=P("data"), kernel_sharding=P(None, ("data", "seq")),
        ),
        "kind of axis_name": lambda: loss(HEAD, HIDDEN, **some, axis_name=3),
        "axis_name and none": lambda: loss(
            HEAD, HIDDEN, **some, axis_name="data", reduction="none"
        ),
        "forward mode": lambda: jax.jvp(
            lambda h: loss(HEAD, h, **some, sharding=P("data")), (HIDDEN,), (HIDDEN,)
        ),
    }  # fmt: skip


FACTS = (
    axis_name_is_the_mean_of_all_devices,
    the_gradient_may_be_taken_inside,
    class_weights_inside,
    losses_and_masked_mean_inside,
    a_mean_of_means_would_be_another_number,
    second_derivatives,
    second_derivatives_in_reverse,
    words_split_inside_of_a_shard_map_over_steps,
    half_precision,
    a_mesh_of_both_kinds_in_the_types_alone,
    one_axis_of_steps_and_no_bias,
    without_jit,
    bytes_do_not_grow_with_the_devices,
)

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print_facts(sys.argv[1], FACTS, bad_calls)
