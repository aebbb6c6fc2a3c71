"""Every kind of layer, under every lowering, forward and gradient, beside a loop."""

import pytest

import zoo

FRAMEWORKS = {"linen": zoo.linen_functional, "nnx": zoo.nnx_functional}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "fold"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_lowering_agrees_with_a_loop_over_steps(name, framework, method):
    kind = zoo.ZOO[name]
    functional = FRAMEWORKS[framework](kind)
    if name == "own layer, shared input":
        assert kind.inputs[1].ndim == 1  # no batch axis: fold can share it
    # The lowerings are the same code under both; one of the two sees them all.
    every = 1 if framework == "linen" else 3
    for options, deviation in zoo.deviations(kind, functional, method, every).items():
        assert deviation < 2e-5, options
