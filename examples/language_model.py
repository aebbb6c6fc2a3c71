"""Trains a language model: a GRU that reads English and writes on, by character.

    python examples/language_model.py

reads the language reference that Python's `help` shows, and learns to predict each
character from those before it. What it has learned is told in bits per character of
chapters that it has not seen, beside n-grams and a compressor. Then it writes: from a
prompt on, one character after the other, each drawn from what it expects next. It takes
about a minute on two CPU cores. Afterwards

    python examples/language_model.py --resume --prompt "A class " --temperature 0.3 0.7

writes something else without more training. A low temperature takes likely characters
more often than the model would.

What to copy:

* `losses`: `tdjax.linear_cross_entropy` is the output layer and its loss in one. It
  makes the logits, the largest array of many a language model, a block at a time.
* `generate`: one input, many outputs. The state of the GRU goes from step to step in
  `jax.lax.scan`, compiled once; all temperatures at a time.
* `CharacterGRU`: one module for windows, for the prompt and for a single step.
* `random_spans`: windows of the text give new examples in every step, from the key that
  the loss is given. The state of the GRU starts at zero in each.
"""

import functools
import math
import sys
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.panel import Panel
from rich.text import Text

import tdjax
from _batches import in_batches
from _display import results
from _english import SYMBOLS, english_split, to_ascii, to_symbols, to_text, windows
from _main import run_example
from _options import InputError, Settings, option, positive_float
from _problem import Problem
from _text_baselines import lzma_bits, n_gram_bits

EMBEDDING = 64
EVALUATION_BATCH = 40
# The context with which n-grams predict the held-out text best.
CONTEXT = 4


def prompt(text: str) -> str:
    if not text:
        raise ArgumentTypeError("must have at least one character")
    return to_ascii(text)


@dataclass(frozen=True)
class LanguageSettings(Settings):
    """The options of this example beside those of all."""

    out: Path = Path("runs/language_model")
    steps: int = 800
    learning_rate: float = 1e-2
    window: int = option(512, "characters to predict in a window of the text")
    length: int = option(96, "characters of a window that a step learns from")
    hidden: int = option(192, "features of the GRU")
    prompt: str = option(
        "The ", "what the written text begins with", same_on_resume=False, type=prompt
    )
    characters: int = option(400, "how many to write", same_on_resume=False)
    temperature: tuple[float, ...] = option(
        (0.5, 1.0),
        "of the written text, one or more",
        same_on_resume=False,
        type=positive_float,
        nargs="+",
    )


class CharacterGRU(nn.Module):
    """`(batch, time)` symbols to the last state and `(batch, time, features)`."""

    hidden: int

    @nn.compact
    def __call__(self, symbols, carry=None):
        x = nn.Embed(SYMBOLS, EMBEDDING)(symbols)
        gru = nn.RNN(nn.GRUCell(self.hidden), return_carry=True)
        return gru(x, initial_carry=carry)


def losses(model: CharacterGRU, params, windows, reduction) -> jax.Array:
    """In nats, of each character of the windows but the first."""
    _, hidden = read(model, params, windows[:, :-1])
    head, labels = params["head"], windows[:, 1:]
    return tdjax.linear_cross_entropy(head, hidden, labels, reduction=reduction)


def random_spans(key, windows, length: int) -> jax.Array:
    """`(batch, length)`: a part of each window, from a random place on."""
    last = windows.shape[1] - length
    starts = jax.random.randint(key, (len(windows), 1), 0, last + 1)
    return jnp.take_along_axis(windows, starts + jnp.arange(length), axis=1)


def read(model: CharacterGRU, params, symbols, carry=None) -> Any:
    return model.apply({"params": params["gru"]}, symbols, carry)


@functools.partial(jax.jit, static_argnums=0)
def losses_of_characters(model, params, windows):
    return losses(model, params, windows, "none")


@functools.partial(jax.jit, static_argnums=(0, 4))
def generate(
    model: CharacterGRU, params, key, prompt, characters: int, temperature
) -> jax.Array:
    """Writes on from a prompt.

    Args:
      model: what was trained.
      params: its parameters and those of its head.
      key: of what is drawn.
      prompt: `(time,)`, symbols.
      characters: how many to write.
      temperature: `(texts,)`, of each text.

    Returns:
      `(texts, characters)`, symbols.
    """
    prompts = jnp.tile(prompt, (len(temperature), 1))
    carry, hidden = read(model, params, prompts)

    def write(state, key):
        carry, hidden = state
        logits = tdjax.dense(params["head"], hidden) / temperature[:, None]
        symbol = jax.random.categorical(key, logits)
        carry, hidden = read(model, params, symbol[:, None], carry)
        return (carry, hidden[:, -1]), symbol

    keys = jax.random.split(key, characters)
    return jax.lax.scan(write, (carry, hidden[:, -1]), keys)[1].T


class LanguageModel(Problem):
    """Trains a language model of characters and writes with it.

    A batch is `(batch, window + 1)` symbols.
    """

    quantities = {"bits": ".3f"}

    def __init__(self, settings: LanguageSettings):
        if settings.length > settings.window:
            raise InputError(
                f"--length must be at most --window, which is {settings.window}, got "
                f"{settings.length}"
            )
        texts = english_split()
        self.train, self.held_out = (windows(text, settings.window) for text in texts)
        bits = {
            "single characters": n_gram_bits(*texts, 0, SYMBOLS),
            f"n-grams of {CONTEXT + 1}": n_gram_bits(*texts, CONTEXT, SYMBOLS),
            "LZMA": lzma_bits(*texts),
        }
        self.baselines = {"bits": bits}
        self.settings = settings
        self.model = CharacterGRU(settings.hidden)

    def init(self, key):
        keys = jax.random.split(key)
        gru = jax.jit(self.model.init)(keys[0], self.train[:1])["params"]
        head = tdjax.init_dense(keys[1], self.settings.hidden, SYMBOLS)
        return {"gru": gru, "head": head}

    def loss(self, params, batch, key):
        spans = random_spans(key, batch, self.settings.length + 1)
        loss = losses(self.model, params, spans, "mean")
        return loss, {"bits": loss / math.log(2)}

    def evaluate(self, params, examples):
        fun = functools.partial(losses_of_characters, self.model, params)
        nats = in_batches(fun, examples, EVALUATION_BATCH).mean()
        return {"bits": float(nats) / math.log(2)}

    def report(self, params, console, out):
        settings = self.settings
        begin, key = to_symbols(settings.prompt), jax.random.key(settings.seed)
        how = settings.characters, jnp.array(settings.temperature)
        texts = generate(self.model, params, key, begin, *how)
        for temperature, text in zip(settings.temperature, np.asarray(texts)):
            written = Text(settings.prompt, "bold").append(to_text(text), "not bold")
            console.print(Panel(written, title=f"temperature {temperature:g}"))
        rows = {"GRU": self.evaluate(params, self.held_out)["bits"]}
        rows |= {f"{k} (baseline)": v for k, v in self.baselines["bits"].items()}
        table = {name: {"bits": f"{bits:.3f}"} for name, bits in rows.items()}
        console.print(results("bits per held-out character", table))


def main(arguments: list[str]) -> int:
    return run_example(LanguageModel, LanguageSettings, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
