"""What an example has to say for `run_example` to train it."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import optax
from rich.console import Console

from _batches import fingerprint
from _options import Settings

Quantities = Mapping[str, str]
Baselines = Mapping[str, Mapping[str, float]]
QUANTITIES: Quantities = {"loss": ".3f", "accuracy": ".1%"}


class Problem(abc.ABC):
    """Data, a model, its loss and what to show of it.

    It is made from the settings, and raises `InputError` if they are of no use. All
    that the training depends on is in the settings, the data, the step and the key that
    `loss` is given: then a resumed run ends as one without a break. The first line of a
    subclass's docstring is what `--help` says.

    Attributes:
      train: the training examples, a pytree of arrays with the examples as first axis.
      held_out: the same of examples that training never sees.
      quantities: what `evaluate` measures, and how to print it. Each has a panel in the
        picture of the learning curve; formats that end in `%` are of fractions.
      baselines: what a simpler method reaches, by quantity and name, as
        `{"accuracy": {"majority class": 0.27}}`; lines in that picture.
    """

    train: Any
    held_out: Any
    quantities: ClassVar[Quantities] = QUANTITIES
    baselines: Baselines

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Any:
        """The parameters to start from, any pytree of arrays."""

    @abc.abstractmethod
    def loss(
        self, params: Any, batch: Any, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and other quantities to show while training, if any; is jitted.

        Args:
          params: as from `init`.
          batch: as `train`, of `settings.batch_size` examples.
          key: for noise such as dropout, another one at every step.
        """

    @abc.abstractmethod
    def evaluate(self, params: Any, examples: Any) -> dict[str, float]:
        """All `quantities`, of examples as in `train` and `held_out`; is not jitted."""

    @abc.abstractmethod
    def report(self, params: Any, console: Console, out: Path) -> None:
        """Shows a sample and the results beside a baseline; `out` is for its files."""

    def optimizer(self, settings: Settings) -> optax.GradientTransformation:
        """Adam, with clipped gradients and a warm-up, down to 0 at the last step."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, settings.learning_rate, settings.steps // 20, settings.steps
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, beside the settings, as JSON."""
        return {
            "training data": fingerprint(self.train),
            "held-out data": fingerprint(self.held_out),
        }


def each_alone(
    optimizers: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """For the parameters of several models by name: each trains as if alone.

    Clipped together, the gradients of one would change the steps of the others.
    """
    transforms: Any = dict(optimizers)
    return optax.multi_transform(transforms, {name: name for name in optimizers})
