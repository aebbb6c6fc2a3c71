"""Steps on 8 devices: equal numbers, and nothing sent but one sum of the gradients."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_on_devices(program, *arguments):
    """Runs a program of this folder on 8 devices, and returns its JSON."""
    command = [sys.executable, str(HERE / program), *arguments]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_programs(rows):
    assert len(rows) >= 60
    for row in rows:
        assert row["deviation"] < 1e-5, row
        if row["is_gradient"]:
            # Its own sum, of the parameters' size and outside of loops, and no more.
            only = [["all-reduce", row["parameter_bytes"], False]]
            assert row["collectives"] == only, row
        else:
            assert row["collectives"] == [], row


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_every_lowering_is_equal_and_sends_one_sum(kind):
    check_programs(run_on_devices("programs.py", kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_every_lowering_of_every_layer_in_every_layout(kind):
    check_programs(run_on_devices("programs.py", kind, "all"))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
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


one_worker = pytest.mark.xdist_group("facts on a mesh")


@pytest.fixture(scope="module", params=["Auto", "Explicit"])
def facts(request):
    return run_on_devices("facts.py", request.param)


FACTS = (
    "time_major",
    "pytrees_and_shared_arguments",
    "results_that_all_steps_share",
    "negative_axes",
    "a_loop_inside_of_fun",
    "nested_calls",
    "statistics_over_the_whole_batch",
    "other_mesh_axes_stay_with_the_compiler",
    "each_part_of_the_batch_has_its_own_noise",
    "overflow_on_one_device_alone",
    "nan_in_masked_steps",
    "no_time_axis_of_the_mesh",
    "eager_calls",
    "pickles",
    "layers_have_the_gradients_of_one_device",
    "steps_of_all_devices_make_one_state",
    "statistics_over_all_devices_on_request",
    "nnx_state_is_that_of_one_device",
    "dropout_differs_from_step_to_step_and_example_to_example",
    "carried_state_with_the_batch_split",
    "masked_mean_over_devices",
    "carried_state_keeps_dtypes_and_skips_devices_without_examples",
    "sown_values_count_valid_examples_alone",
    "packed_batch_norm_that_gets_the_mask",
    "untyped_keys_and_shared_keys_have_their_own_noise",
    "meshes_of_both_kinds",
)


@one_worker
@pytest.mark.parametrize("fact", FACTS)
def test_on_a_mesh(facts, fact):
    assert facts[fact] is True


@one_worker
def test_every_fact_is_looked_at(facts):
    assert facts.keys() - {"errors"} == {*FACTS}


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


@one_worker
@pytest.mark.parametrize("error", ERRORS)
def test_errors_say_what_to_write(facts, error):
    kind, message = facts["errors"][error]
    assert kind == ("TypeError" if error == "kind" else "ValueError")
    assert re.search(ERRORS[error], message)


@one_worker
def test_errors_are_those_that_are_raised(facts):
    assert facts["errors"].keys() == ERRORS.keys()
