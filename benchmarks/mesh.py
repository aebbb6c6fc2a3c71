"""On a mesh: what each device computes, holds and sends, as devices are added.

Each device has the same number of examples or steps, however many devices there are. So
without needless work and communication the figures of a device stay the same.

    python -m benchmarks.mesh CASE OF quick|full

prints the rows of one case as JSON. The suite runs it in a process of its own: on a CPU
it makes eight virtual devices, whose figures are read from the compiled programs.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tdjax
from benchmarks.candidate import to_numpy
from benchmarks.collectives import has_loops, sent_bytes
from benchmarks.layers import LAYERS
from benchmarks.measure import deviation
from benchmarks.ragged import block, block_params

Row = dict[str, Any]
DEVICES = (1, 2, 4, 8)
EXAMPLES, STEPS = P("devices"), P(None, "devices")
WORDS = P(None, "devices")
OURS, COMPILER = "tdjax", "tdjax, sharding left to the compiler"


class Inputs(NamedTuple):
    """The arguments of all programs of a case, and how they are split."""

    args: tuple[Any, ...]
    specs: tuple[Any, ...]


class Case(NamedTuple):
    """Programs by name, made for some number of devices."""

    name: str
    make: Callable[[int, bool], tuple[Inputs, dict[str, Callable]]]


def _batch(devices: int, spec: P) -> tuple[int, int]:
    """Examples and steps: two examples of 8 steps for each device."""
    return (2 * devices, 8) if spec == EXAMPLES else (2, 8 * devices)


def _conv_net(spec: P, devices: int, quick: bool):
    size = 8 if quick else 32
    keys = jax.random.split(jax.random.key(0), 2)
    shape = *_batch(devices, spec), size, size, 3
    x = jax.random.normal(keys[0], shape)
    net = LAYERS["conv net"]
    params = net.init(keys[1], x[:, 0])
    over_time = functools.partial(tdjax.time_distributed, net.step, in_axes=(None, 1))

    def folded(params, x):
        apply = nn.BatchApply(functools.partial(net.step, params), num_dims=2)
        return apply(x)

    programs = {
        "jax.vmap": jax.vmap(net.step, in_axes=(None, 1), out_axes=1),
        "nn.BatchApply": folded,
        COMPILER: over_time(),
        OURS: over_time(sharding=spec),
    }
    return Inputs((params, x), (P(), spec)), programs


def _packed(devices: int, quick: bool):
    width, tokens = (16, 4) if quick else (64, 16)
    keys = jax.random.split(jax.random.key(0), 2)
    batch, timesteps = 2 * devices, 10
    x = jax.random.normal(keys[0], (batch, timesteps, tokens, width))
    params = block_params(keys[1], x)
    mask = np.arange(timesteps) < np.tile([2, 4], devices)[:, None]
    over_time = functools.partial(tdjax.time_distributed, block, in_axes=(None, 1))

    def call(apply):
        return lambda params, x, mask: apply(params, x, mask=mask)

    def padded(params, x, mask):
        y = jax.vmap(block, in_axes=(None, 1), out_axes=1)(params, x)
        return jnp.where(mask[..., None, None], y, 0)

    programs = {
        "jax.vmap, padded": padded,
        COMPILER: call(over_time(capacity=6 * devices, method="fold")),
        OURS: call(over_time(capacity=6, method="fold", sharding=EXAMPLES)),
    }
    return Inputs((params, x, mask), (P(), EXAMPLES, EXAMPLES)), programs


def _loss(words_split: bool, devices: int, quick: bool):
    steps, features, words = (32, 16, 512) if quick else (512, 64, 8192)
    rows = 2 * (1 if words_split else devices)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, steps // 2, features))
    params = tdjax.init_dense(keys[1], features, words)
    labels = jax.random.randint(keys[2], hidden.shape[:2], 0, words)

    def by_optax(params, hidden, labels):
        logits = hidden @ params["kernel"] + params["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    of_steps, kernel = (P(), WORDS) if words_split else (EXAMPLES, P())
    over_mesh = functools.partial(
        tdjax.linear_cross_entropy, sharding=of_steps, kernel_sharding=kernel
    )
    head = {"kernel": kernel, "bias": P(*kernel[1:])}
    programs = {
        "Optax, all logits": by_optax,
        COMPILER: tdjax.linear_cross_entropy,
        OURS: over_mesh,
    }
    return Inputs((params, hidden, labels), (head, of_steps, of_steps)), programs


CASES = {
    case.name: case
    for case in (
        Case("conv net, examples split", functools.partial(_conv_net, EXAMPLES)),
        Case("conv net, time split", functools.partial(_conv_net, STEPS)),
        Case("transformer block, packed, examples split", _packed),
        Case("loss, examples split", functools.partial(_loss, False)),
        Case("loss, words split", functools.partial(_loss, True)),
    )
}


def cases(quick: bool) -> list[Case]:
    return [*CASES.values()][-2:-1] if quick else [*CASES.values()]


def rows(case: Case, of: str, quick: bool) -> list[Row]:
    """The rows of a case, from a process that has the devices."""
    kind = "quick" if quick else "full"
    command = [sys.executable, "-m", "benchmarks.mesh", case.name, of, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _rows(case: Case, of: str, quick: bool) -> Iterator[Row]:
    for devices in (1, 2) if quick else DEVICES:
        if devices > jax.device_count():
            return
        chosen = jax.devices()[:devices]
        mesh = jax.make_mesh(
            (devices,), ("devices",), devices=chosen, axis_types=(AxisType.Auto,)
        )
        with jax.set_mesh(mesh):
            inputs, programs = case.make(devices, quick)
            args = [_place(mesh, *pair) for pair in zip(inputs.args, inputs.specs)]
            want: list[np.ndarray] = []
            for name, program in programs.items():
                fun = program if of == "forward" else _gradient(program)
                about = {"case": case.name, "of": of, "devices": devices}
                row, got = _measure(fun, args)
                want = want or got
                row["deviation"] = deviation(name, got, want)
                if devices == 1:  # XLA keeps the sums of one device with itself.
                    row["sent_bytes"] = 0
                if not row["deviation"] <= 2e-3:
                    raise AssertionError(f"{name} differs in {about}: {row}.")
                yield {**about, "candidate": name, **row}


def _place(mesh, tree, spec):
    if isinstance(spec, dict):
        return {name: _place(mesh, x, spec[name]) for name, x in tree.items()}
    return jax.device_put(tree, NamedSharding(mesh, spec))


def _gradient(program: Callable) -> Callable:
    """By parameters and inputs, of a sum that has a different slope at each result."""

    def run(params, x, *rest):
        loss = lambda params, x: jnp.mean(jnp.sin(program(params, x, *rest)))
        return jax.value_and_grad(loss, (0, 1))(params, x)

    return run


def _measure(fun: Callable, args: list) -> tuple[Row, list[np.ndarray]]:
    """What one device computes, holds and sends, and the results."""
    compiled: Any = jax.jit(fun).lower(*args).compile()
    text = compiled.as_text()
    row: Row = {"sent_bytes": sent_bytes(text)}
    row["temporary_bytes"] = int(compiled.memory_analysis().temp_size_in_bytes)
    if not has_loops(text):  # XLA counts a loop once.
        row["device_flops"] = int(compiled.cost_analysis()["flops"])
    return row, [to_numpy(leaf) for leaf in jax.tree.leaves(compiled(*args))]


if __name__ == "__main__":
    name, of, kind = sys.argv[1:]
    if jax.config.jax_platforms in (None, "cpu"):  # pyright: ignore
        jax.config.update("jax_num_cpu_devices", max(DEVICES))
    print(json.dumps(list(_rows(CASES[name], of, kind == "quick"))))
