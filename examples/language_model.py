"""Trains a language model of words: a tied embedding and a fused softmax loss.

    python examples/language_model.py

A GRU reads the language reference that Python's `help` shows, and predicts each word
from those before it; rare words are spelled. Its result is in bits per character of
unseen chapters, beside a compressor and n-grams of characters. Then it writes. It takes
a minute on two CPU cores, and leaves its curve in runs/language_model.

Copy `mean_loss`: the output layer is the transposed embedding, and without storing its
logits, a loss of the whole held-out text takes 28 MB instead of 223. The gradient of
the shared table is the sum of those of both uses; `compare_gradients` shows it.
"""

import argparse
import collections
import lzma
import re
import time
import zlib
from pathlib import Path
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import tdjax

LENGTH, FEATURES, BATCH, STEPS = 64, 192, 32, 800
PROMPT, WRITTEN, TEMPERATURE = "The", 100, 0.7
# A word or signs, with the space before it; a line break with the indentation after it.
PIECE = re.compile(r" ?[A-Za-z_]+|\n\s*| ?[^\w\s]+|.", re.DOTALL)


class LanguageModel(nn.Module):
    """`(batch, time)` ids to the last state and `(batch, time, FEATURES)`."""

    words: int

    @nn.compact
    def __call__(self, ids, carry=None):
        dropout = nn.Dropout(0.3, deterministic=not self.has_rng("dropout"))
        x = dropout(nn.Embed(self.words, FEATURES, name="embed")(ids))
        gru = nn.RNN(nn.GRUCell(FEATURES), return_carry=True)
        carry, x = gru(x, initial_carry=carry)
        self.param("bias", nn.initializers.zeros, self.words)  # of the output layer
        return carry, dropout(x)


def tied_head(params):
    """The output layer: the embedding, and a bias."""
    return {"embedding": params["embed"]["embedding"], "bias": params["bias"]}


def mean_loss(model, params, ids, dropout_key=None, head=None):
    """In nats, of each id but the first, from those before it."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    _, hidden = model.apply({"params": params}, ids[:, :-1], rngs=rngs)
    return tdjax.linear_cross_entropy(head or tied_head(params), hidden, ids[:, 1:])


def compare_gradients(model, params, ids):
    """The gradient of the tied table is the sum of those of its two uses."""
    gradient = lambda argnums: jax.jit(jax.grad(mean_loss, argnums), static_argnums=0)
    tied = gradient(1)(model, params, ids)["embed"]["embedding"]
    rest, head = gradient((1, 4))(model, params, ids, None, tied_head(params))
    uses = rest["embed"]["embedding"], head["embedding"]
    norms = [np.linalg.norm(x) for x in (*uses, tied, tied - sum(uses))]
    print("gradient of the table: {:.3f} as embedding, {:.3f} as head,".format(*norms))
    print("{:.3f} tied, which differs by {:.0e} from their sum".format(*norms[2:]))


def read_chapters():
    """`[train, held_out]`: texts of different chapters, each paragraph only once."""
    names = sorted(topics, key=lambda name: zlib.crc32(name.encode()), reverse=True)
    first, sides = {}, ([], [])
    for name in names:
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            first.setdefault(" ".join(paragraph.split()), (name, paragraph))
    for name, paragraph in first.values():
        sides[name in names[-8:]].append(paragraph)
    return ["\n\n".join(side).encode("ascii", "replace").decode() for side in sides]


def vocabulary(text):
    """ASCII, and all pieces of the text that occur three times or more."""
    counts = collections.Counter(PIECE.findall(text))
    words = [piece for piece in counts if counts[piece] > 2 and len(piece) > 1]
    return [*map(chr, range(128)), *words]


def encode(text, words):
    """`(time,)` ids; pieces that are not in the vocabulary are spelled."""
    ids = {word: id for id, word in enumerate(words)}
    pieces = ([piece] if piece in ids else piece for piece in PIECE.findall(text))
    return np.array([ids[word] for piece in pieces for word in piece])


def lzma_bits(train, held_out):
    """How much longer a compressed file gets by the held-out text, per character."""
    sizes = [len(lzma.compress(text.encode())) for text in (train, train + held_out)]
    return 8 * (sizes[1] - sizes[0]) / len(held_out)


def n_gram_bits(train, held_out, context=4):
    """Counts of what follows up to `context` characters, mixed as in Witten-Bell."""
    counts = collections.defaultdict(collections.Counter)
    for length in range(context + 1):
        for place in range(length, len(train)):
            counts[train[place - length : place]][train[place]] += 1
    bits = 0.0
    for place, character in enumerate(held_out):
        p = 1 / 128
        for length in range(min(context, place) + 1):
            if after := counts.get(held_out[place - length : place]):
                p = (after[character] + len(after) * p) / (after.total() + len(after))
        bits -= np.log2(p)
    return float(bits / len(held_out))


def write(model, params, key, prompts, temperature):
    """`(texts, WRITTEN)`: ids drawn one after the other, after `(texts, time)` ids."""
    carry, hidden = model.apply({"params": params}, prompts)

    def step(state, key):
        carry, hidden = state
        logits = hidden[:, -1] @ params["embed"]["embedding"].T + params["bias"]
        ids = jax.random.categorical(key, logits / temperature)
        return model.apply({"params": params}, ids[:, None], carry), ids

    keys = jax.random.split(key, WRITTEN)
    return jax.lax.scan(step, (carry, hidden[:, -1:]), keys)[1].T


def main(steps=STEPS, out=Path("runs/language_model")):
    """Trains, reports, writes and draws; returns bits per held-out character."""
    texts = read_chapters()
    words = vocabulary(texts[0])
    train, held_out = encode(texts[0], words), encode("\n" + texts[1], words)[None]
    bits_of_mean = (held_out.size - 1) / len(texts[1]) / np.log(2)
    model, key = LanguageModel(len(words)), jax.random.key(0)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, steps), weight_decay=0.01)

    @jax.jit
    def train_step(params, state, ids, step):
        compute = jax.value_and_grad(mean_loss, argnums=1)
        value, gradient = compute(model, params, ids, jax.random.fold_in(key, step))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    loss, rng = jax.jit(mean_loss, static_argnums=0), np.random.default_rng(0)
    params = jax.jit(model.init)(key, held_out[:, :9])["params"]
    state, curve, start = optimizer.init(params), [], time.perf_counter()
    for step in range(1, steps + 1):
        starts = rng.integers(len(train) - LENGTH, size=(BATCH, 1))
        ids = train[starts + np.arange(LENGTH + 1)]
        params, state, value = train_step(params, state, ids, step)
        if step % -(-steps // 10) == 0 or step == steps:
            curve.append((step, bits_of_mean * float(loss(model, params, held_out))))
            print(
                f"step {step:4}/{steps}  loss {value:.3f}  held out {curve[-1][1]:.3f} "
                f"bits per character  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    prompt, write_ids = encode(PROMPT, words)[None], jax.jit(write, static_argnums=0)
    (ids,) = write_ids(model, params, key, prompt, TEMPERATURE)
    print(PROMPT + "".join(words[id] for id in ids))
    compare_gradients(model, params, held_out[:, :LENGTH])
    result = {"words": curve[-1][1], "LZMA": lzma_bits(*texts)}
    result["n-grams"] = n_gram_bits(*texts)
    print("bits per held-out character: {words:.3f}".format(**result))
    print("baselines: LZMA {LZMA:.3f}, n-grams of 5 {n-grams:.3f}".format(**result))
    print("picture:", draw(curve, result, out))
    return result


def draw(curve, result, out):
    plt.switch_backend("Agg")
    plt.style.use("tdjax.plots")
    figure, ax = plt.subplots()
    ax.plot(*zip(*curve), color="C0", marker="o")
    for name, color in ("LZMA", "C1"), ("n-grams", "C2"):
        ax.axhline(result[name], color=color)
        ax.text(curve[-1][0], result[name] + 0.02, name, color=color, ha="right")
    ax.set(xlabel="training steps", ylabel="bits per character", xlim=(0, None))
    ax.text(*curve[-1], "GRU\n", color="C0", ha="right")
    ax.set_title(f"{result['words']:.2f} bits for each character of unseen chapters")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "learning_curve.png")
    return out / "learning_curve.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/language_model"))
    main(**vars(parser.parse_args()))
