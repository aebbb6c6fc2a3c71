"""Reads films of different lengths: a conv net for every frame, a GRU over the frames.

    python examples/video.py

A handwritten digit moves across a canvas, in films of 2 to 9 frames that have lost some
pixels. The question is which digit it is and which way it goes, 40 answers in all. What
a mean over the frames can tell of the way is the same for the film run backwards, so a
model without order can hope to be right in half of the films. Such a model trains
beside ours as the baseline: the same conv net, then a mean in place of the GRU. The
images are scikit-learn's; those of the held-out films are in no training film. All
takes less than a minute on two CPU cores.

The films of a batch are padded to 9 frames, but the conv net computes those alone that
are there: `capacity` is the most frames that any batch of the run has. The report says
what that saves, and that the same variables give the same answers without it. It ends
with a picture of held-out films and what the model says of each.

What to copy:

* `FilmReader`: `tdjax.linen.TimeDistributed` with `mask` and `capacity`, then an RNN
  with `seq_lengths`.
* `most_steps` in `_batches.py`: a capacity that no batch of the run exceeds.
* `each_alone` in `_problem.py`: two models in one run, and neither feels the other.
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
from _batches import batch_rows, in_batches, most_steps, take
from _display import results, save_figure
from _film_strips import film_strips
from _main import run_example
from _moving_digits import (
    DIGITS,
    LABELS,
    LONGEST,
    SHORTEST,
    WAYS,
    Films,
    moving_digits,
)
from _options import Settings, option
from _problem import Problem, each_alone

EVALUATION_BATCH = 99
OURS, BASELINE = "GRU over frames", "mean baseline"


@dataclass(frozen=True)
class VideoSettings(Settings):
    """The options of this example beside those of all."""

    out: Path = Path("runs/video")
    steps: int = 600
    hidden: int = option(64, "features of a frame and of the GRU")


class FrameNet(nn.Module):
    """`(frames, height, width)` from 0 to 255 to `(frames, 2 * hidden)`."""

    hidden: int

    @nn.compact
    def __call__(self, frames):
        x = frames[..., None] / 255.0
        x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x))
        what = nn.Conv(self.hidden, (3, 3))(x).max((1, 2))
        where = nn.Dense(self.hidden)(x.reshape(len(x), -1))
        return nn.LayerNorm()(jnp.concatenate([what, where], axis=-1))


class FilmReader(nn.Module):
    """`(films, time, height, width)` to `(films, LABELS)` logits.

    With `capacity` only the frames within `lengths` are computed, at most so many in
    all films together. With `in_order=False` a mean over time is in place of the GRU.
    """

    hidden: int
    capacity: int | None = None
    in_order: bool = True

    @nn.compact
    def __call__(self, frames, lengths):
        mask = tdjax.lengths_to_mask(lengths, frames.shape[1])
        x = tdjax.linen.TimeDistributed(
            FrameNet(self.hidden), method="fold", capacity=self.capacity
        )(frames, mask=mask)
        if self.in_order:
            gru = nn.RNN(nn.GRUCell(self.hidden), return_carry=True)
            x, _ = gru(x, seq_lengths=lengths)
        else:
            x = nn.relu(nn.Dense(self.hidden)(tdjax.masked_mean(x, mask, axis=1)))
        # The logit of an answer is that of its digit plus that of its way.
        digit, way = nn.Dense(DIGITS)(x), nn.Dense(len(WAYS))(x)
        return (digit[:, :, None] + way[:, None, :]).reshape(-1, LABELS)


class Video(Problem):
    """Reads films of moving digits: a conv net for every frame, a GRU over the frames.

    A batch is `Films`.
    """

    quantities = {"loss": ".3f", "accuracy": ".1%", "accuracy without order": ".1%"}

    def __init__(self, settings: VideoSettings):
        self.train, self.held_out = moving_digits()
        answer = np.bincount(self.train.labels).argmax()
        self.majority = np.full(len(self.held_out.labels), answer)
        right = float((self.majority == self.held_out.labels).mean())
        lines = {"majority class": right, "at best, without order": 0.5}
        self.baselines = {"accuracy": lines, "accuracy without order": lines}
        self.capacity = most_steps(self.train.lengths, settings)
        rows = batch_rows(settings.seed, 0, settings.batch_size, len(self.train.labels))
        self.first_batch = take(self.train, rows)
        self.models = {
            OURS: FilmReader(settings.hidden),
            BASELINE: FilmReader(settings.hidden, in_order=False),
        }

    def init(self, key):
        inputs = self.train.frames[:1], self.train.lengths[:1]
        return {
            name: jax.jit(model.init)(key, *inputs)
            for name, model in self.models.items()
        }

    def optimizer(self, settings):
        return each_alone(dict.fromkeys(self.models, super().optimizer(settings)))

    def loss(self, params, batch, key):
        judged = {
            name: judge(model.clone(capacity=self.capacity), params[name], batch)
            for name, model in self.models.items()
        }
        losses, right = judged[OURS]
        total = losses.mean() + judged[BASELINE][0].mean()
        return total, {"loss": losses.mean(), "accuracy": right.mean()}

    def evaluate(self, params, examples):
        judged = {}
        for name, model in self.models.items():
            fun = functools.partial(judge, model, params[name])
            judged[name] = in_batches(fun, examples, EVALUATION_BATCH)
        losses, right = judged[OURS]
        without_order = judged[BASELINE][1].mean()
        values = losses.mean(), right.mean(), without_order
        return dict(zip(self.quantities, map(float, values)))

    def report(self, params, console, out):
        answers = {name: self.answers(params, name) for name in self.models}
        answers["majority baseline"] = self.majority
        rows = {name: score(answer, self.held_out) for name, answer in answers.items()}
        count = len(self.held_out.labels)
        console.print(results(f"right in {count:,} held-out films", rows))
        console.print(self.packing(params[OURS]))
        save_figure(out / "films.png", film_strips(self.held_out, answers[OURS]))
        print(f"films           {out / 'films.png'}")

    def answers(self, params, name: str) -> np.ndarray:
        fun = functools.partial(logits, self.models[name], params[name])
        return in_batches(fun, self.held_out, EVALUATION_BATCH).argmax(-1)

    def packing(self, params):
        """What `capacity` saved, and how far it changes an answer."""
        padded, batch = self.models[OURS], self.first_batch
        packed = padded.clone(capacity=self.capacity)
        both = [logits(model, params, batch) for model in (padded, packed)]
        difference = float(jnp.abs(both[0] - both[1]).max())
        total = len(batch.labels) * LONGEST
        present = len(batch.labels) * self.train.lengths.mean()
        frames = {
            "padded": total,
            "packed": self.capacity,
            "there, on average": present,
        }
        rows = {
            name: {"frames": f"{count:.0f}", "share": f"{count / total:.1%}"}
            for name, count in frames.items()
        }
        rows["packed"]["logits differ by"] = f"{difference:.0e}"
        return results("frames through the conv net in a step of training", rows)


@functools.partial(jax.jit, static_argnums=0)
def logits(model: FilmReader, params, films: Films) -> Any:
    return model.apply(params, films.frames, films.lengths)


def judge(model: FilmReader, params, films: Films) -> tuple[jax.Array, jax.Array]:
    """The loss for each film, and whether the answer is right."""
    given = logits(model, params, films)
    losses = optax.softmax_cross_entropy_with_integer_labels(given, films.labels)
    return losses, given.argmax(-1) == films.labels


def score(answers: np.ndarray, films: Films) -> dict[str, str]:
    """The shares that are right: of all films, of the shortest, of the longest."""
    (digits, ways), (said_digits, said_ways) = (
        np.divmod(labels, len(WAYS)) for labels in (films.labels, answers)
    )
    right = answers == films.labels
    shares = {
        "digit and way": right,
        f"in {SHORTEST} frames": right[films.lengths == SHORTEST],
        f"in {LONGEST} frames": right[films.lengths == LONGEST],
        "digit": digits == said_digits,
        "way": ways == said_ways,
    }
    return {name: f"{share.mean():.1%}" for name, share in shares.items()}


def main(arguments: list[str]) -> int:
    return run_example(Video, VideoSettings, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
