"""One kernel for all steps, one for each step, or one for the whole sequence.

    python examples/dense_families.py

trains the three Dense families on three targets of a day at a weather station, hour by
hour: the shared family (`Dense`, which is `TimeDistributed(Dense)`), `PerStepDense` and
`FlattenDense`. One target takes the same formula at every hour, one takes a formula of
its own for each hour, and one takes other hours than its own. A family that is too
narrow cannot tell the target. One that is too wide has more to learn from the same days
and so is worse too. It takes about 20 seconds on two CPU cores.

The program also shows which families take a longer day, that each function of a family
is one of the wider families too, and pictures of which hour depends on which.

What to copy:

* `FAMILIES`: the three layers, on `(batch, time, features)`.
* `wider`: trained weights of a narrow family as those of a wider one, to go on from.
* `DenseFamilies.optimizer`: nine models in one program, each trained as if alone.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tdjax.linen
from _batches import in_batches
from _display import results
from _influence_picture import save_picture
from _main import run_example
from _options import Settings, option
from _problem import Problem
from _station import HOURS, NOISE, SAME, SENSORS, TARGETS, read_days

FAMILIES: dict[str, nn.Module] = {
    "shared": tdjax.linen.TimeDistributed(nn.Dense(1)),
    "per step": tdjax.linen.PerStepDense(1),
    "flattened": tdjax.linen.FlattenDense(1),
}
# What else the function of a family can be written as.
SAME_FUNCTIONS: dict[str, dict[str, nn.Module]] = {
    "shared": {
        "Dense": nn.Dense(1),
        "per step": FAMILIES["per step"],
        "flattened": FAMILIES["flattened"],
    },
    "per step": {"flattened": FAMILIES["flattened"]},
}


@dataclass(frozen=True)
class DenseSettings(Settings):
    """The options of this example beside those of all."""

    out: Path = Path("runs/dense_families")
    steps: int = 2000
    learning_rate: float = 1e-2
    days: int = option(150, "days to learn from")


class DenseFamilies(Problem):
    """Trains the three Dense families on three targets."""

    quantities = {f"{name} error": ".3f" for name in FAMILIES}

    def __init__(self, settings: DenseSettings):
        self.train = read_days(1, settings.days)
        self.held_out = read_days(2, 500)
        mean = {name: y.mean(0) for name, y in self.train.targets.items()}
        self.mean_errors = {
            name: rms(mean[name] - y) for name, y in self.held_out.targets.items()
        }
        baseline = float(np.mean([*self.mean_errors.values()]))
        self.baselines = {x: {"mean of the hour": baseline} for x in self.quantities}

    def init(self, key):
        x = self.train.sensors[:1]
        params = {name: model.init(key, x) for name, model in FAMILIES.items()}
        return dict.fromkeys(TARGETS, params)

    def optimizer(self, settings):
        # Clipped by the norm of all, the models would have an influence on each other.
        alone = super().optimizer(settings)
        names = {t: {family: f"{t}, {family}" for family in FAMILIES} for t in TARGETS}
        return optax.multi_transform(
            dict.fromkeys(jax.tree.leaves(names), alone), names
        )

    def loss(self, params, batch, key):
        x, targets = batch
        errors = [
            optax.squared_error(y, targets[target]).mean()
            for target, families in predict_all(params, x).items()
            for y in families.values()
        ]
        return jnp.stack(errors).sum(), {}

    def errors(self, params, days) -> dict[str, dict[str, float]]:
        """The root of the mean squared error, by family and target."""
        predict = functools.partial(jax.jit(predict_all), params)
        predicted = in_batches(predict, days.sensors, 100)
        return {
            family: {t: rms(predicted[t][family] - days.targets[t]) for t in TARGETS}
            for family in FAMILIES
        }

    def evaluate(self, params, examples):
        errors = self.errors(params, examples)
        return {
            f"{family} error": float(np.mean([*by_target.values()]))
            for family, by_target in errors.items()
        }

    def report(self, params, console, out):
        console.print(results("error on held-out days", self.table(params)))
        days = self.held_out.sensors
        console.print(results("the same function", same_function(params, days)))
        print(f"{2 * HOURS} hours instead of {HOURS}:")
        for family, model in FAMILIES.items():
            print(f"  {family}: {longer_day(model, params[SAME][family])}")
        save_picture(out / "influence.png", FAMILIES, params)
        print(f"\npicture         {out / 'influence.png'}")

    def table(self, params) -> dict[str, dict[str, str]]:
        rows = {**self.errors(params, self.held_out)}
        rows["mean of the hour (baseline)"] = self.mean_errors
        rows["noise alone"] = dict.fromkeys(TARGETS, NOISE)
        table = {}
        for name, errors in rows.items():
            size = f"{count(params[SAME][name]):,}" if name in FAMILIES else ""
            shown = {target: f"{error:.3f}" for target, error in errors.items()}
            table[name] = {"parameters": size, **shown}
        return table


def predict_all(params, x) -> dict[str, dict[str, Any]]:
    """What each model of each target says."""
    return {
        target: {name: FAMILIES[name].apply(own, x) for name, own in families.items()}
        for target, families in params.items()
    }


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def wider(variables, family: str) -> dict[str, Any]:
    """Variables of a family before it in `FAMILIES` as those of `family`."""
    widen = {"per step": tdjax.as_per_step, "flattened": tdjax.as_flatten}[family]
    return {"params": widen(variables["params"], HOURS)}


def same_function(params, x) -> dict[str, dict[str, str]]:
    """Trained models, each written in the wider families and compared with itself."""
    rows = {}
    for family, others in SAME_FUNCTIONS.items():
        variables = params[SAME][family]
        expected: Any = FAMILIES[family].apply(variables, x)
        for name, other in others.items():
            written = variables if name == "Dense" else wider(variables, name)
            difference = jnp.abs(other.apply(written, x) - expected).max()
            rows[f"{family} as {name}"] = {
                "parameters": f"{count(variables):,} -> {count(written):,}",
                "largest difference": f"{difference:.1e}",
            }
    return rows


def longer_day(model: nn.Module, variables) -> str:
    """The shape of what a trained model says of a longer day, or why it cannot."""
    day = jax.ShapeDtypeStruct((1, 2 * HOURS, SENSORS), jnp.float32)
    try:
        y: Any = jax.eval_shape(model.apply, variables, day)
    except ValueError as error:
        return f"ValueError: {error}"
    return f"output {y.shape}"


def main(arguments: list[str]) -> int:
    return run_example(DenseFamilies, DenseSettings, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
