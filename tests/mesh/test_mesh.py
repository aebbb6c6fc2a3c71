"""Steps and losses on 8 devices: equal numbers, and nothing sent that need not be."""

import re

import pytest

from helpers import run_on_devices


def check_programs(rows):
    assert len(rows) >= 60
    for row in rows:
        assert row["deviation"] < 1e-5, row
        if row["is_gradient"]:
            # Its own sum, of the parameters' size and outside of loops, and no more.
            only = [["all-reduce", row["parameter_bytes"], 1]]
            assert row["collectives"] == only, row
        else:
            assert row["collectives"] == [], row


def kinds(Explicit=(), Auto=()):
    """Both kinds of axes, with marks."""
    return [
        pytest.param(kind, marks=marks, id=kind)
        for kind, marks in {"Explicit": Explicit, "Auto": Auto}.items()
    ]


# Slow, and run in CI's step `mesh`.
IN_MESH_STEP = (pytest.mark.mesh, pytest.mark.slow)


@pytest.mark.parametrize("kind", kinds(IN_MESH_STEP, pytest.mark.slow))
def test_every_lowering_is_equal_and_sends_one_sum(kind):
    check_programs(run_on_devices("programs.py", kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_every_lowering_of_every_layer_in_every_layout(kind):
    check_programs(run_on_devices("programs.py", kind, "all"))


@pytest.mark.parametrize("kind", kinds(IN_MESH_STEP, pytest.mark.slow))
def test_without_sharding_the_results_are_those_of_one_device(kind):
    rows = run_on_devices("programs.py", kind, "without sharding")
    assert len(rows) >= 60
    for row in rows:
        assert row["deviation"] < 1e-5, row
        if kind == "Explicit" and not row["is_gradient"]:
            # Split as the input is.
            assert row["specs"][0].startswith(LAYOUTS[row["name"].split(", ")[1]]), row


LAYOUTS = {
    "batch": "P('data', None,",
    "time": "P(None, 'data',",
    "both": "P('data', 'seq',",
    "both on the batch": "P(('data', 'seq'), None,",
}
# Of the loss: bytes of a device that are gathered, summed, summed and scattered, and
# sent in each iteration of the loop. Kernel and bias are 3,072 and 192 bytes, the
# gradient by all hidden states is 4,096; loss, count and cotangent are 4 each.
SENT_BY_THE_LOSS = {
    "batch": (0, 3264 + 8, 0, 0),
    "time": (0, 3264 + 8, 0, 0),
    "batch and time": (0, 3264 + 8, 0, 0),
    "batch on all": (0, 3264 + 8, 0, 0),
    "words": (0, 4096 + 4, 0, 16),
    "words on all": (0, 4096 + 4, 0, 16),
    "features": (3072, 0, 0, 0),
    "batch, words": (0, 4096 // 4 + 3264 // 2 + 12, 0, 16),
    "batch, features": (3072, 3264 + 8, 0, 0),
    "batch, features (FSDP)": (3072, 192 + 8, 3072 // 4, 0),
    "batch, words (FSDP)": (3264, 8, 3264 // 4, 0),
    "features, words": (3072 // 2, 4096 + 4, 0, 16),
    "batch, features and words": (3072 // 2, 4096 // 4 + 192 // 2 + 12, 384, 16),
    "all features": (3072, 192 + 8, 3072 // 8, 0),
}


def check_losses(rows, layouts=14):
    assert len({row["layout"] for row in rows} & SENT_BY_THE_LOSS.keys()) == layouts
    for row in rows:
        assert max(row["deviations"].values()) < 1e-12, row
        kinds = dict.fromkeys(("all-gather", "all-reduce", "reduce-scatter"), 0)
        in_loops = 0
        for operation, size, times in row["collectives"]:
            if times == 1:
                kinds[operation] += size
            else:
                in_loops += size
        sent = *kinds.values(), in_loops
        assert sent == SENT_BY_THE_LOSS[row["layout"]], row


@pytest.mark.mesh
@pytest.mark.slow
def test_the_loss_is_that_of_one_device_and_sends_what_it_must():
    check_losses(run_on_devices("losses.py", "Auto"), 4)


@pytest.mark.slow
def test_the_loss_in_every_layout():
    check_losses(run_on_devices("losses.py", "Auto", "some"))


@pytest.mark.mesh
@pytest.mark.slow
def test_the_loss_takes_its_layout_from_the_types():
    check_losses(run_on_devices("losses.py", "Explicit", "few types"), 4)


@pytest.mark.slow
def test_the_loss_takes_every_layout_from_the_types():
    check_losses(run_on_devices("losses.py", "Explicit", "types"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_every_option_of_the_loss_in_every_layout(kind):
    check_losses(run_on_devices("losses.py", kind, "all"))


def check_facts(found, size, errors):
    """`found` is what a program printed: `size` facts, and the errors of bad calls."""
    raised = found.pop("errors")
    assert [name for name, is_true in found.items() if is_true is not True] == []
    assert len(found) == size
    assert raised.keys() == errors.keys()
    for name, pattern in errors.items():
        kind, message = raised[name]
        is_kind = name in ("kind", "kind of axis_name", "forward mode")
        assert kind == ("TypeError" if is_kind else "ValueError"), name
        assert re.search(pattern, message), message


@pytest.mark.parametrize("kind", kinds(IN_MESH_STEP, pytest.mark.slow))
def test_facts(kind):
    check_facts(run_on_devices("facts.py", kind), 31, ERRORS)


ERRORS = {
    "no mesh": "needs a mesh in context, got none",
    "unknown axis": r"must name axes of the mesh in context, which has \('data', 'seq'\)",
    "size": r"splits axis 0 of float32\[6,8,3\] over 4 devices \(data\)",
    "no batch": "every result needs a batch axis beside time",
    "inside shard_map": "over which a jax.shard_map around this call runs already",
    "kind": "sharding must be a jax.sharding.PartitionSpec",
    "three axes": r"must name the mesh axes of \(batch, time\), and no more",
    "twice": "must name each mesh axis once",
    "nothing": "must name at least one mesh axis",
    "spmd_axis_name": "Give only sharding",
    "carried over time": "Split the batch alone",
    "no batch in an argument": "need one batch axis beside it, of the same size in all",
    "another batch in a result": "every result needs a batch axis beside time, of 2",
    "no batch in a layer's result": "every result needs a batch axis beside time, of 2",
    "axis_name": "a device has a part of them",
    "a mask of another layout": r"mask must have shape \(batch, time\) = \(8, 6\)",
    "varying": "give that jax.shard_map check_vma=False",
}


@pytest.mark.parametrize("kind", kinds(IN_MESH_STEP, pytest.mark.slow))
def test_facts_of_the_loss(kind):
    check_facts(run_on_devices("loss_facts.py", kind), 13, ERRORS_OF_THE_LOSS)


ERRORS_OF_THE_LOSS = {
    "unknown axis": r"must name axes of the mesh in context, which has \('data', 'seq'\)",
    "kind": r"kernel_sharding must be a jax.sharding.PartitionSpec of \(features, words\)",
    "three axes": "sharding must name the mesh axes of the axes of labels, and no more",
    "twice": "kernel_sharding must name each mesh axis once",
    "size": "Pad steps with a mask, and words with a bias of -inf",
    "words and steps": "Give words mesh axes that all split steps, or of which none does",
    "kind of axis_name": "axis_name must be the name of a mesh axis, or a tuple of names",
    "axis_name and none": "needs reduction='mean' or 'sum', got 'none'",
    "forward mode": "no forward-mode derivative",
}


@pytest.mark.slow
def test_facts_without_sharding_under_automatic_axes():
    found = run_on_devices("explicit_facts.py", "Auto")
    assert found["errors"] == {"closed over": None}
    check_facts({**found, "errors": {}}, 14, {})


@pytest.mark.mesh
@pytest.mark.slow
def test_facts_without_sharding_under_explicit_axes():
    errors = {"closed over": "Pass them as arguments, None in in_axes"}
    check_facts(run_on_devices("explicit_facts.py", "Explicit"), 14, errors)
