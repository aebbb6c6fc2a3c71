"""Trains a tagger in a run that survives Ctrl-C and `kill -9`.

    python examples/resumable_training.py
    python examples/resumable_training.py --resume

The first command takes less than a minute on two cores. Stop it, and the second goes on
from the newest checkpoint in runs/resumable_training, on a CPU bit-for-bit like an
uninterrupted run: both end with the same checksum of the parameters.

Model and data are those of `tagging.py`. To make your own run resumable, copy `main`
(all that a step needs is a function of seed and step, or is in the checkpoint) and the
functions from `save` on. They need `flock`, which Linux and macOS have.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

import tagging
import tdjax

STEPS, SAVE_EVERY, OUT = 300, 50, Path("runs/resumable_training")
OPTIONS = ocp.CheckpointManagerOptions(
    max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
)
# Orbax logs its own workings as warnings; what fails still raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Refused(Exception):
    """The run cannot go on as asked; the message says why."""


def main(steps=STEPS, out=OUT, seed=0, save_every=SAVE_EVERY, resume=False):
    """Trains from the start or from a checkpoint; returns the results."""
    if min(steps, save_every) < 1 or not 0 <= seed < 2**32:
        raise Refused("--steps and --save-every start at 1, --seed is below 2**32")
    path = out.absolute() / "checkpoints"
    with claimed(out), ocp.CheckpointManager(path, options=OPTIONS) as checkpoints:
        train, held_out, tags, vocabulary = tagging.python_task()
        settings = {"--steps": steps, "--seed": seed}
        settings |= {x: getattr(tagging, x) for x in ("BATCH", "HIDDEN", "LENGTH")}
        settings |= {"data checksum": checksum([train, held_out])}
        refuse_other_run(out, settings, resume)

        model = tagging.Tagger(vocabulary, len(tags))
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
        key, start = jax.random.key(seed), time.perf_counter()
        params = jax.jit(model.init)(key, train[0][:1], train[2][:1])
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
        curve, state = restore(checkpoints, state.replace(step=jnp.array(0)))
        if resume:
            print(f"Goes on from step {state.step} of {steps}.")
        with noticed_interrupt() as interrupted:
            for step in range(int(state.step) + 1, steps + 1):
                rng = np.random.default_rng([seed, step])
                rows = rng.integers(len(train[0]), size=tagging.BATCH)
                batch = [array[rows] for array in train]
                state, loss = train_step(state, batch, jax.random.fold_in(key, step))
                if step % -(-steps // 10) == 0 or step == steps:
                    curve.append([step, float(accuracy(state, held_out))])
                    report = f"step {step:4}/{steps}  loss {loss:.3f}  "
                    report += f"held out {curve[-1][1]:.2%}  "
                    print(f"{report}{time.perf_counter() - start:.0f} s", flush=True)
                stop = interrupted.is_set()
                if stop or step % save_every == 0 or step == steps:
                    save(checkpoints, curve, state)
                if stop:
                    raise KeyboardInterrupt

        majority, baseline = tagging.majority_baseline(train, held_out)
        results = {"tagger": curve[-1][1], "baseline": baseline, "curve": curve}
        results["parameters"] = checksum(state.params)
        print(f"tagger: {curve[-1][1]:.2%} of held-out steps right")
        print(f"baseline, always {tags[majority]!r}: {baseline:.2%}")
        print("parameters:", results["parameters"])
        with replaced_at_once(out) as folder:
            tagging.draw(curve, tags[majority], baseline, folder)
            (folder / "results.json").write_text(json.dumps(results))
        print("picture:", out / "learning_curve.png")
        return results


@jax.jit
def train_step(state, batch, dropout_key):
    ids, labels, lengths = batch

    def compute_loss(params):
        rngs = {"dropout": dropout_key}
        logits = state.apply_fn(params, ids, lengths, train=True, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return tdjax.masked_mean(losses, tdjax.lengths_to_mask(lengths, ids.shape[1]))

    loss, gradient = jax.value_and_grad(compute_loss)(state.params)
    return state.apply_gradients(grads=gradient), loss


@jax.jit
def accuracy(state, examples):
    ids, labels, lengths = examples
    is_right = state.apply_fn(state.params, ids, lengths).argmax(-1) == labels
    mask = tdjax.lengths_to_mask(lengths, ids.shape[1])
    return tdjax.masked_mean(is_right.astype(float), mask)


def save(checkpoints, curve, state):
    # On a full disk Orbax would print the tracebacks of its threads.
    size = 2**20 + 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if shutil.disk_usage(checkpoints.directory).free < size:
        raise Refused(f"disk full at step {state.step}: make room, then add --resume")
    record = {"curve": curve, "checksum": checksum([curve, state])}
    parts = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    checkpoints.save(int(state.step), args=ocp.args.Composite(**parts))


def restore(checkpoints, like):
    """Learning curve and state of the newest sound checkpoint, or of a new run."""
    parts = {"state": ocp.args.StandardRestore(like), "record": ocp.args.JsonRestore()}
    damaged = []
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            saved = checkpoints.restore(step, args=ocp.args.Composite(**parts))
            curve, state = saved["record"]["curve"], saved["state"]
            # Orbax restores a flipped bit as it is.
            if saved["record"]["checksum"] != checksum([curve, state]):
                raise ValueError("checksum differs")
        except Exception as error:  # of any kind, where a file is damaged
            damaged.append(step)
            print(f"{checkpoints.directory}/{step} is damaged: {error!r:.100}")
        else:
            for newer in damaged:
                checkpoints.delete(newer)
            return curve, state
    if damaged:
        raise Refused("every checkpoint is damaged: start again, with another --out")
    return [], like


def refuse_other_run(out, settings, resume):
    path = out / "settings.json"
    if not path.exists():
        with replaced_at_once(out) as folder:
            (folder / path.name).write_text(json.dumps(settings))
    elif not resume:
        raise Refused(f"{out} holds a run: add --resume, or give another --out")
    saved = json.loads(path.read_text())
    if names := [x for x in settings if settings[x] != saved.get(x)]:
        words = [f"{name} is {settings[name]}, was {saved.get(name)}" for name in names]
        raise Refused(f"{out} holds another run: {'; '.join(words)}")


def checksum(tree):
    """Of every bit of the arrays, numbers and strings in a pytree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        head = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        digest.update(head.encode() + array.tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def noticed_interrupt():
    """Notes the first Ctrl-C, so that it cannot break a step; the second one acts."""
    interrupted = threading.Event()

    def note(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def claimed(out):
    """Keeps other processes out; the system drops the lock when this one ends."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another process is at work in {out}") from None
        yield


@contextlib.contextmanager
def replaced_at_once(out):
    """A folder for files, each of which replaces the old one in `out` at once."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        yield Path(folder)
        for path in Path(folder).iterdir():
            path.replace(out / path.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=SAVE_EVERY)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--resume", action="store_true")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        again = [word for word in sys.argv if word != "--resume"] + ["--resume"]
        print("\nInterrupted. Go on with:", shlex.join(["python", *again]))
        sys.exit(130)
    except (Refused, OSError) as error:
        parser.exit(2, f"error: {error}\n")
