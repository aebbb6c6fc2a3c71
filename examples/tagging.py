"""Trains a sequence tagger: a bidirectional GRU with a Dense layer at every step.

    python examples/tagging.py

reads the Python standard library that is on every machine, each character labelled by
`tokenize` as part of a keyword, a name, a string, ..., and learns to colour source code
of files that it has not seen. It takes about a minute on two CPU cores. It leaves the
learning curve and its checkpoints in `runs/tagging`, and goes on from there with
`--resume` after Ctrl-C or `kill -9`. On the CPU of one machine, the resumed run gives
exactly the numbers of a run without a break.

    python examples/tagging.py --conllu en_atis-ud-train.conllu en_atis-ud-dev.conllu

trains the same model as a part-of-speech tagger on any two CoNLL-U files of Universal
Dependencies (https://universaldependencies.org).

Sequences are ragged: a batch is padded, and `tdjax.lengths_to_mask` says which steps
are there. `--head dense` puts a bare `Dense` at the end instead of
`TimeDistributed(Dense)`: the parameters, the loss and every step of training are the
same. Only the masked head gives zeros at padding, which no loss sees. The report shows
both on the same parameters.

What to copy:

* `Tagger`: lengths keep padding out of the recurrence, and
  `tdjax.linen.TimeDistributed` applies the output layer to every valid step.
* `masked_cross_entropy`: `tdjax.masked_mean` over the steps that have a label, whatever
  is in the others.
* `Tagging`: what `run_example` needs to know of a problem. The loop that it runs is in
  `_training.py`.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import tdjax.linen
from _batches import in_batches, take
from _conllu import conllu_task
from _display import results
from _main import run_example
from _options import Settings, option
from _problem import Problem
from _python_source import python_task
from _sequences import NO_LABEL, Task, majority_accuracy
from _tags_in_colour import snippet

EVALUATION_BATCH = 128
HEADS = ("time_distributed", "dense")


@dataclass(frozen=True)
class TaggingSettings(Settings):
    """The options of this example beside those of all."""

    out: Path = Path("runs/tagging")
    length: int = option(128, "characters (or words) in a sequence, at most")
    hidden: int = option(64, "features of the embedding and of each direction")
    head: str = option("time_distributed", "the output layer, the same", choices=HEADS)
    conllu: tuple[str, str] | None = option(
        None,
        "tag parts of speech in CoNLL-U files instead",
        same_on_resume=False,
        nargs=2,
        metavar=("TRAIN", "DEV"),
    )


class Tagger(nn.Module):
    """`(batch, time, features)` ids to `(batch, time, tags)` logits.

    A symbol's embedding is the sum over its features. Nothing at or after a sequence's
    length reaches the logits before it. At and after it the logits are 0 with the head
    `"time_distributed"`, and of no use with `"dense"`.
    """

    vocabulary: int
    tags: int
    hidden: int
    head: str = "time_distributed"
    dropout: float = 0.1

    @nn.compact
    def __call__(self, ids, lengths, train=False):
        x = nn.Embed(self.vocabulary, self.hidden)(ids).sum(axis=2)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        forward, backward = (nn.RNN(nn.GRUCell(self.hidden)) for _ in range(2))
        x = nn.Bidirectional(forward, backward)(x, seq_lengths=lengths)
        head = nn.Dense(self.tags)
        if self.head == "dense":
            return head(x)
        mask = tdjax.lengths_to_mask(lengths, ids.shape[1])
        return tdjax.linen.TimeDistributed(head)(x, mask=mask)


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`(batch, time)`; 0 where there is no label, whatever the logits are there."""
    labelled = labels != NO_LABEL
    # Masked before the loss and not after: 0 times a NaN gradient is NaN.
    logits = jnp.where(labelled[..., None], logits, 0.0)
    labels = jnp.where(labelled, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(labelled, losses, 0.0)


def masked_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over all labelled steps of the batch, 0 if there are none."""
    return tdjax.masked_mean(cross_entropies(logits, labels), labels != NO_LABEL)


class Score(NamedTuple):
    """A tag that training never saw is an error, and has no loss."""

    loss: float
    accuracy: float
    predicted: np.ndarray


class Tagging(Problem):
    """Trains a sequence tagger.

    A batch is `(ids, labels, lengths)`, as in `Windows`.
    """

    def __init__(self, settings: TaggingSettings):
        self.task = load_task(settings)
        self.train = self.task.train.arrays
        self.held_out = self.task.held_out.arrays
        self.majority = majority_accuracy(self.task)
        self.baselines = {"accuracy": {"majority class": self.majority}}
        sizes = self.task.vocabulary, len(self.task.tags), settings.hidden
        self.model = Tagger(*sizes, settings.head)

    def identity(self):
        task = self.task
        names = {"task": task.name, "tags": list(task.tags)}
        return {**names, "vocabulary": task.vocabulary, **super().identity()}

    def init(self, key):
        ids, _, lengths = self.train
        return jax.jit(self.model.init)(key, ids[:1], lengths[:1])["params"]

    def loss(self, params, batch, key):
        ids, labels, lengths = batch
        variables, rngs = {"params": params}, {"dropout": key}
        logits: Any = self.model.apply(variables, ids, lengths, True, rngs=rngs)
        accuracy = jnp.sum(logits.argmax(-1) == labels) / jnp.sum(lengths)
        return masked_cross_entropy(logits, labels), {"accuracy": accuracy}

    def score(self, params, examples) -> Score:
        predict = functools.partial(_predict, self.model, params)
        losses, predicted = in_batches(predict, examples, EVALUATION_BATCH)
        _, labels, lengths = examples
        loss = losses.sum() / max((labels != NO_LABEL).sum(), 1)
        accuracy = (predicted == labels).sum() / lengths.sum()
        return Score(float(loss), float(accuracy), predicted)

    def evaluate(self, params, examples):
        score = self.score(params, examples)
        return {"loss": score.loss, "accuracy": score.accuracy}

    def report(self, params, console, out):
        task, score = self.task, self.score(params, self.held_out)
        total = task.held_out.lengths.sum()
        title = f"{task.name}: held out, {total:,} {task.unit}s"
        accuracies = {
            "tagger": score.accuracy,
            "majority-class baseline": self.majority,
        }
        rows = {
            name: {"accuracy": f"{x:.2%}", "wrong": f"{round((1 - x) * total):,}"}
            for name, x in accuracies.items()
        }
        console.print(snippet(task, score.predicted))
        console.print(results(title, rows))
        batch = take(self.held_out, slice(EVALUATION_BATCH))
        heads = compare_heads(self.model, params, batch)
        console.print(results("the same parameters under both heads", heads))


@functools.partial(jax.jit, static_argnums=0)
def _predict(model: Tagger, params, batch):
    ids, labels, lengths = batch
    logits: Any = model.apply({"params": params}, ids, lengths)
    return cross_entropies(logits, labels), logits.argmax(-1)


def compare_heads(model: Tagger, params, batch) -> dict[str, dict[str, str]]:
    """What both heads make of one batch with the same parameters."""
    ids, labels, lengths = batch
    padding = ~np.asarray(tdjax.lengths_to_mask(lengths, ids.shape[1]))
    rows = {}
    for head in HEADS:
        with_head = model.clone(head=head)
        own = jax.eval_shape(with_head.init, jax.random.key(0), ids, lengths)
        logits: Any = jax.jit(with_head.apply)({"params": params}, ids, lengths)
        at_padding = np.abs(np.asarray(logits)[padding]).max(initial=0)
        rows[head] = {
            "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(own)):,}",
            "loss": f"{masked_cross_entropy(logits, labels):.7f}",
            "largest logit at padding": f"{at_padding:.2f}",
        }
    return rows


def load_task(settings: TaggingSettings) -> Task:
    if settings.conllu:
        return conllu_task(*settings.conllu, settings.length)
    return python_task(settings.length)


def main(arguments: list[str]) -> int:
    return run_example(Tagging, TaggingSettings, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
