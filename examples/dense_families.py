"""Is Dense on a 3D tensor the same as TimeDistributed(Dense)? Why not Flatten first?

    python examples/dense_families.py

The first answer is yes. `Dense` multiplies the last axis, whatever stands before it:
same parameters, same numbers. There is one kernel for all steps, so a longer sequence
is welcome. `Flatten` and then `Dense` is another layer: it has one kernel for the whole
sequence, every step sees every step, and the number of steps is fixed. In between
stands one kernel for each step. With 24 steps of 3 features, and one output per step:

    layer          kernel          step t of the output depends on    parameters
    Dense          (3, 1)          step t, always by the same formula          4
    PerStepDense   (24, 3, 1)      step t, by a formula of its own            96
    FlattenDense   (72, 24)        all steps                                1752

So which one is right? The program trains them on three targets of made-up days at a
weather station, hour by hour. A layer that is too narrow cannot express the target.
One that is too wide can, but has more to learn from the same 150 days, and so is worse:
take the narrowest layer that can express what you look for. It takes less than a
minute on two CPU cores, and leaves a picture in runs/dense_families.

What to copy: `FAMILIES`, the three layers on `(batch, time, features)`; and `compare`,
which turns trained parameters into those of a wider layer, to go on from there.
"""

import argparse
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import tdjax.linen

HOURS, SENSORS, BEFORE, NOISE = 24, 3, 6, 0.1
DAYS, HELD_OUT_DAYS, STEPS = 150, 500, 500
TARGETS = ("same formula", "own formula", "other hours")
FAMILIES = {
    "Dense": nn.Dense(1),
    "PerStepDense": tdjax.linen.PerStepDense(1),
    "FlattenDense": tdjax.linen.FlattenDense(1),
}


def weather(seed, days):
    """Sensors, `(days, hours, sensors)`, and targets, `(targets, days, hours, 1)`.

    * "same formula": the temperature that is felt, from the hour's sensors.
    * "own formula": the heating needed, by a formula that changes over the day.
    * "other hours": how much warmer it is than 6 hours before, or than at midnight.
    """
    rng = np.random.default_rng(seed)
    hours = [rng.normal(size=(days, SENSORS))]
    for _ in range(HOURS - 1):
        hours.append(0.8 * hours[-1] + 0.6 * rng.normal(size=(days, SENSORS)))
    sensors = np.stack(hours, axis=1)
    angles = 2 * np.pi * np.arange(HOURS) / HOURS
    phases = 2 * np.pi * np.arange(SENSORS) / SENSORS
    weights = 0.7 * np.cos(angles[:, None] + phases)
    before = np.maximum(np.arange(HOURS) - BEFORE, 0)
    felt = sensors @ [0.8, 0.4, -0.4]
    heating = (sensors * weights).sum(axis=2) + np.sin(angles)
    warmer = sensors[..., 0] - sensors[:, before, 0]
    targets = np.stack([felt, heating, warmer])[..., None]
    targets += rng.normal(0, NOISE, targets.shape)
    return sensors.astype(np.float32), targets.astype(np.float32)


def squared_errors(params, days):
    """`(families, targets)`: means over days and hours."""
    sensors, targets = days
    # Each family is trained three times, once for each target: axis 0 of its params.
    predicted = [
        jax.vmap(model.apply, in_axes=(0, None))(params[name], sensors)
        for name, model in FAMILIES.items()
    ]
    return jnp.square(jnp.stack(predicted) - targets).mean(axis=(2, 3, 4))


def mean_of_the_hour(train, held_out):
    """`(targets,)`: errors of the mean of each hour, the baseline."""
    wrong = held_out[1] - train[1].mean(axis=1, keepdims=True)
    return np.sqrt(np.square(wrong).mean(axis=(1, 2, 3)))


def main(steps=STEPS, out=Path("runs/dense_families")):
    """Trains, reports and draws; returns the held-out errors by family and target."""
    train, held_out = weather(1, DAYS), weather(2, HELD_OUT_DAYS)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, steps))
    keys = jax.random.split(jax.random.key(0), len(TARGETS))
    params = {
        name: jax.vmap(model.init, in_axes=(0, None))(keys, train[0])
        for name, model in FAMILIES.items()
    }

    @jax.jit
    def train_step(params, state):
        # Adam treats every parameter alone, so nine models train as if each were alone.
        loss = lambda params: squared_errors(params, train).sum()
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    held_out_errors = jax.jit(lambda params: jnp.sqrt(squared_errors(params, held_out)))
    state, start = optimizer.init(params), time.perf_counter()
    for step in range(1, steps + 1):
        params, state, value = train_step(params, state)
        if step % -(-steps // 10) == 0 or step == steps:
            means = held_out_errors(params).mean(axis=1)
            print(
                f"step {step:4}/{steps}  loss {value:.3f}  held-out error",
                *(f"{name} {mean:.3f} " for name, mean in zip(FAMILIES, means)),
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )

    rows = dict(zip(FAMILIES, np.asarray(held_out_errors(params))))
    rows["baseline, mean of the hour"] = mean_of_the_hour(train, held_out)
    print(f"\n{'error on held-out days':28}", *(f"{name:>14}" for name in TARGETS))
    for name, errors in rows.items():
        print(f"{name:28}", *(f"{error:14.3f}" for error in errors))
    print(f"{'noise alone':28}", *(f"{NOISE:14.3f}" for _ in TARGETS))
    compare(params, held_out[0])
    print("picture:", draw(params, rows, out))
    return {name: dict(zip(TARGETS, errors.tolist())) for name, errors in rows.items()}


def first(params):
    """The parameters for the first target, out of those for all three."""
    return jax.tree.map(lambda leaf: leaf[0], params)


def compare(params, sensors):
    """Shows which layers are the same function, and which take a longer day."""
    dense = first(params["Dense"])
    y = nn.Dense(1).apply(dense, sensors)
    wrapped = tdjax.linen.TimeDistributed(nn.Dense(1)).apply(dense, sensors)
    wide = {"params": tdjax.as_flatten(dense["params"], HOURS)}
    flat = tdjax.linen.FlattenDense(1).apply(wide, sensors)
    difference = lambda other: jnp.abs(jnp.subtract(other, y)).max()
    kernel = wide["params"]["kernel"]
    used = f"{(kernel != 0).sum()} of its {kernel.size} weights are not zero"
    print("\nThe trained Dense written as another layer:")
    print("TimeDistributed(Dense), same parameters: differs by", difference(wrapped))
    print(f"FlattenDense: differs by {difference(flat):.1e}; {used}")
    day = jnp.ones((1, 2 * HOURS, SENSORS))
    for name, model in FAMILIES.items():
        try:
            print(f"{name}, 48 hours:", model.apply(first(params[name]), day).shape)
        except ValueError as error:
            print(f"{name}, 48 hours: ValueError: {error}")


def draw(params, rows, out):
    """Above which hour depends on which; below the errors, and in grey the baseline."""
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    figure, panels = plt.subplots(2, 3, figsize=(8, 5.2), height_ratios=(2, 1))
    *families, baseline = rows
    more = rows["FlattenDense"][0] / rows["Dense"][0] - 1
    figure.suptitle(
        "Only FlattenDense sees other hours.\n"
        f"Where Dense suffices, the error of FlattenDense is {more:.0%} higher.",
        x=0.02,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    day = jnp.ones((1, HOURS, SENSORS))
    for (above, below), name in zip(panels.T, families):
        influence = tdjax.step_influence(
            FAMILIES[name].apply, first(params[name]), day, argnums=1
        )
        tdjax.plot_step_influence(influence, ax=above)
        above.set_title(name, fontsize=11)
        above.set(xlabel="hour of the sensors", ylabel="hour of the output")
        below.barh(TARGETS, rows[baseline], color="C3")
        below.barh(TARGETS, rows[name], color="C0", height=0.4)
        for row, error in enumerate(rows[name]):
            below.text(1.25, row, f"{error:.2f}", va="center", color="C0")
        below.set(xlim=(0, 1.7), xticks=[0, 1])
        below.invert_yaxis()
    panels[1, 1].set_xlabel("error of the layer, and in grey of the mean of the hour")
    for ax in panels[:, 1:].flat:
        ax.set_ylabel("")
        ax.tick_params(labelleft=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "families.png")
    return out / "families.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/dense_families"))
    main(**vars(parser.parse_args()))
