"""Trains a transformer on all devices there are, of one process or of many. Flax Linen.

    python examples/sharded_training.py
    python examples/sharded_training.py --devices 8
    python examples/sharded_training.py --processes 2 --devices 4

It reads rows of handwritten digits and says after each one which number the last three
of them spell. The three commands, on one CPU, on 8 virtual ones, and in two processes
with 4 each, print the same losses, until after dozens of steps rounding has grown. Who
knows the newest digit alone is right in 1%. The first two take half a minute on two
cores, the third two minutes, and leave a picture in runs/sharded_training. A run goes
on from its checkpoint with --resume, on any number of devices and processes.

What to copy: the mesh axis "data" splits examples, "model" splits weights (by `SPLIT`)
and the vocabulary, and only the mesh knows how many devices there are. On a cluster,
start it once on each machine, with --processes, --process and --coordinator; all must
see the folder of --out. On GPUs and TPUs leave out --devices.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import tdjax.linen

WIDTH, HEADS, LAYERS, NUMBERS = 64, 4, 2, 1000
SHORTEST, LONGEST, HELD_OUT, BATCH, STEPS = 4, 16, 297, 64, 600
OUT = Path("runs/sharded_training")
BY_INPUT, BY_OUTPUT = P("model"), P(None, "model")
SPLIT = dict.fromkeys(("query", "key", "value", "wide", "head"), BY_OUTPUT)
SPLIT |= dict.fromkeys(("out", "narrow"), BY_INPUT)


def split(path):
    """The mesh axes that split a leaf of the training state: Adam's as the weights'."""
    names = [str(getattr(key, "key", "")).split("_")[0] for key in path]
    is_matrix = names[-1] in ("kernel", "head")
    return next((SPLIT[x] for x in names if is_matrix and x in SPLIT), P())


class Eye(nn.Module):
    """One digit, `(batch, height, width)`, as `(batch, WIDTH)`."""

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(16, (3, 3))(image[..., None]))
        return nn.Dense(WIDTH)(x.reshape(len(x), -1))


class Reader(nn.Module):
    """`(batch, time, height, width)` to what the head gets, `(batch, time, WIDTH)`."""

    @nn.compact
    def __call__(self, images, mask):
        look = tdjax.linen.TimeDistributed(Eye(), method="fold", sharding=P("data"))
        place = self.param("place", nn.initializers.normal(0.1), (LONGEST, WIDTH))
        x, seen = look(images, mask=mask) + place, nn.make_causal_mask(mask)
        seen *= mask[:, None, None]
        for i in range(LAYERS):
            attend = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
            x += attend(nn.LayerNorm()(x), mask=seen)
            wide = nn.Dense(4 * WIDTH, name=f"wide_{i}")(nn.LayerNorm()(x))
            x += nn.Dense(WIDTH, name=f"narrow_{i}")(nn.relu(wide))
        self.param("head", nn.initializers.lecun_normal(), (WIDTH, NUMBERS))
        return nn.LayerNorm()(x)


# With Adam's own eps, 1e-8, the rounding of gradients that should be 0 moves weights,
# and rounding is another on every mesh.
model = Reader()
adam = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS), eps=1e-5)


def new_state(key):
    images, mask = jnp.zeros((1, LONGEST, 8, 8)), jnp.ones((1, LONGEST), bool)
    params = model.init(key, images, mask)["params"]
    return {"params": params, "adam": adam.init(params)}


@jax.jit
def train_step(state, images, mask, labels):
    def loss(params):
        hidden = model.apply({"params": params}, images, mask)
        return tdjax.linear_cross_entropy(
            {"kernel": params["head"]}, hidden, labels, mask=mask, ignore_class=-1,
            sharding=P("data"), kernel_sharding=P(None, "model"),
        )  # fmt: skip

    value, gradient = jax.value_and_grad(loss)(state["params"])
    updates, moments = adam.update(gradient, state["adam"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "adam": moments}, value


@jax.jit
def accuracy(state, images, mask, labels):
    hidden = model.apply({"params": state["params"]}, images, mask)
    right = (hidden @ state["params"]["head"]).argmax(-1) == labels
    return tdjax.masked_mean(right.astype(float), mask & (labels >= 0))


def rows_of_digits(seed, held_out=False):
    """`(images, mask, labels)`, padded with NaN; the first two digits spell nothing."""
    images, digits = load_digits(return_X_y=True)
    sides = np.split(np.random.default_rng(0).permutation(len(digits)), [-HELD_OUT])
    rng = np.random.default_rng([seed, held_out])
    chosen = rng.choice(sides[held_out], (BATCH, LONGEST))
    mask = np.arange(LONGEST) < rng.integers(SHORTEST, LONGEST + 1, (BATCH, 1))
    images = images[chosen].reshape(BATCH, LONGEST, 8, 8) / images.max()
    images[~mask], labels = np.nan, np.full(mask.shape, -1)
    hundreds, tens, ones = (digits[chosen][:, i : LONGEST - 2 + i] for i in range(3))
    labels[:, 2:] = 100 * hundreds + 10 * tens + ones
    return images.astype(np.float32), mask, labels.astype(np.int32)


def main(steps=STEPS, out=OUT, save_every=200, resume=False):
    """Trains on all devices; returns accuracies and the loss of each step."""
    by_model, is_first = 2 - jax.device_count() % 2, jax.process_index() == 0
    shape = jax.device_count() // by_model, by_model
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tell = print if is_first else lambda *_, **__: None
    tell(f"{jax.process_count()} process(es), mesh {dict(mesh.shape)}")
    if BATCH % shape[0]:
        sys.exit(f"{shape[0]} must divide the batch of {BATCH}: try other --devices")
    by_batch, start = NamedSharding(mesh, P("data")), time.perf_counter()
    # Of a batch, each process hands over what its devices need.
    own = lambda x: jax.make_array_from_callback(x.shape, by_batch, x.__getitem__)
    batch = lambda *args: map(own, rows_of_digits(*args))
    checkpoints = ocp.CheckpointManager((out / "checkpoints").absolute())
    if resume != bool(checkpoints.all_steps()):
        sys.exit(f"{out} holds {'no' if resume else 'a'} run: see --resume and --out")
    with jax.set_mesh(mesh), checkpoints:
        key, place = jax.random.key(0), lambda path, _: NamedSharding(mesh, split(path))
        places = jax.tree.map_with_path(place, jax.eval_shape(new_state, key))
        state, losses = jax.jit(new_state, out_shardings=places)(key), []
        if resume:
            state, losses = restore(checkpoints, state)
            tell(f"Goes on from step {len(losses)}.")
        for step in range(len(losses) + 1, steps + 1):
            state, loss = train_step(state, *batch(step))
            losses.append(float(loss))
            if step % -(-steps // 10) == 0 or step == steps:
                right = float(accuracy(state, *batch(0, True)))
                seconds = f"{time.perf_counter() - start:.0f} s"
                text = f"step {step:3}/{steps}  loss {loss:.4f}  held out {right:.1%}"
                tell(f"{text}  {seconds}", flush=True)
            if step % save_every == 0 or step == steps:
                save(checkpoints, state, losses)
        right = float(accuracy(state, *batch(0, True)))
    results = {"transformer": right, "newest digit alone": 0.01, "losses": losses}
    tell(f"right in held-out rows: {right:.1%}; by the newest digit alone: 1%")
    if is_first:
        (out / "results.json").write_text(json.dumps(results))
        print("picture:", draw(losses, right, out))
    return results


def save(checkpoints, state, losses):
    parts = {"state": ocp.args.StandardSave(state), "losses": ocp.args.JsonSave(losses)}
    checkpoints.save(len(losses), args=ocp.args.Composite(**parts))


def restore(checkpoints, state):
    """`(state, losses)` of the newest checkpoint, placed as `state` is."""
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    parts = {"state": ocp.args.StandardRestore(like), "losses": ocp.args.JsonRestore()}
    saved = checkpoints.restore(None, args=ocp.args.Composite(**parts))
    return saved["state"], saved["losses"]


def draw(losses, right, out):
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    figure, ax = plt.subplots(figsize=(7, 4))
    ax.plot(range(1, len(losses) + 1), losses)
    ax.axhline(np.log(NUMBERS), color="C2")
    ax.text(len(losses), np.log(NUMBERS), "guess", color="C2", ha="right", va="top")
    ax.set(xlabel="step", ylabel="loss, nats per digit", ylim=(0, None))
    ax.set_title(f"{right:.0%} of held-out numbers are right after {len(losses)} steps")
    figure.savefig(out / "losses.png")
    return out / "losses.png"


def launch(processes):
    """Runs this command in several processes on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", address, "--process"]
    running = [subprocess.Popen([*command, str(i)]) for i in range(processes)]
    return max(process.wait() for process in running)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--devices", type=int, help="virtual CPUs for each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, help="which one this is, from 0")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    options = vars(parser.parse_args())
    names = ("devices", "processes", "process", "coordinator")
    devices, processes, process, coordinator = map(options.pop, names)
    if processes > 1 and process is None:
        sys.exit(launch(processes))
    if devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(coordinator, processes, process)
    main(**options)
