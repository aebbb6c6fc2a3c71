"""The loss over a large vocabulary: fused, beside its peers, and beside its floor."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tdjax
from benchmarks.candidate import Program
from benchmarks.peers.torch_losses import TorchLoss
from benchmarks.programs import Row, compiled, measure_programs

LOSS = ("forward", "gradient")
PACKED, LOG_PROBS = "gradient, 30 % valid", "gradient of log-probabilities"
FLOOR = "three products, in chunks"


class Vocabulary(NamedTuple):
    """The sizes and the dtype of one softmax head and its batch."""

    steps: int
    features: int
    words: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        sizes = f"{self.steps} steps, {self.features} features, {self.words} words"
        return f"{sizes}, {self.dtype}"


def cases(quick: bool) -> list[Vocabulary]:
    if quick:
        return [Vocabulary(64, 16, 500)]
    found = [
        Vocabulary(4096, 256, 32_000),
        Vocabulary(4096, 256, 8_000),
        Vocabulary(1024, 1024, 8_000),
        Vocabulary(1024, 256, 128_000),
        Vocabulary(512, 256, 262_144),
        Vocabulary(2048, 256, 32_000, "bfloat16"),
    ]
    if jax.default_backend() != "cpu":
        found.append(Vocabulary(8192, 4096, 128_256, "bfloat16"))
        found.append(Vocabulary(32_768, 2560, 128_256, "bfloat16"))
    return found


def more_cases(quick: bool) -> list[Vocabulary]:
    """For packed batches, and for log-probabilities and entropies."""
    if quick:
        return cases(quick)
    return [Vocabulary(8192, 256, 32_000), Vocabulary(512, 256, 262_144)]


def rows(case: Vocabulary, of: str, effort) -> list[Row]:
    args = _arguments(case)
    about = {"case": case.name, "of": of, **case._asdict()}
    tol = 2e-3 if case.dtype == "float32" else 5e-2
    if of == PACKED:
        return measure_programs(about, _packed(args), args, effort, tol)
    if of == LOG_PROBS:
        others = ("linear_cross_entropy",)
        return measure_programs(about, _log_probs(), args, effort, tol, others=others)
    programs: dict[str, Any] = {
        "Optax, all logits": _by_optax,
        "linear_cross_entropy": tdjax.linear_cross_entropy,
        "vocab_chunk_size=1024": functools.partial(
            tdjax.linear_cross_entropy, chunk_size=1024, vocab_chunk_size=1024
        ),
        "all options": functools.partial(_with_all_options, case),
    }
    missing = []
    if of == "gradient":
        programs["scan over chunks, checkpointed"] = _by_scan
        programs = {name: _gradient(loss) for name, loss in programs.items()}
        programs["tied embedding"] = _tied(args)
        programs[FLOOR] = _unchecked(_three_products, args)
    for name, chunked in {"PyTorch": False, "PyTorch, chunked": True}.items():
        try:
            if chunked and case.words > 128_000:
                raise NotImplementedError("it takes half a minute")
            programs[name] = TorchLoss(args, of, chunked).program()
        except (ImportError, NotImplementedError) as error:
            missing.append({**about, "candidate": name, "missing": str(error)})
    want = _in_float64(*args, gradient=of == "gradient")
    others = ("all options", FLOOR)  # They compute something else.
    return measure_programs(about, programs, args, effort, tol, want, others) + missing


def _arguments(case: Vocabulary) -> tuple:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (case.steps, case.features), case.dtype)
    params = tdjax.init_dense(keys[1], case.features, case.words, dtype=case.dtype)
    labels = jax.random.randint(keys[2], (case.steps,), 0, case.words)
    return jax.block_until_ready((params, hidden, labels))


def _gradient(loss):
    return jax.value_and_grad(loss, (0, 1))


def _by_optax(params, hidden, labels):
    import optax

    logits = (hidden @ params["kernel"] + params["bias"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def _by_scan(params, hidden, labels):
    """The loss of a chunk at a time, computed again in the backward pass.

    As MaxText does it (`num_vocab_tiling`), and others by hand. Eight chunks.
    """

    def add_chunk(total, rows):
        return total + _by_optax(params, *rows), None

    chunks = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), (hidden, labels))
    return jax.lax.scan(jax.checkpoint(add_chunk), 0.0, chunks)[0] / 8


def _with_all_options(case: Vocabulary, params, hidden, labels):
    weights = jnp.full(case.steps, 0.7)
    loss, aux = tdjax.linear_cross_entropy(
        params, hidden, labels, weights=weights, label_smoothing=0.1, z_loss=1e-4,
        class_weights=jnp.full(case.words, 0.9), logits_soft_cap=30.0, has_aux=True,
    )  # fmt: skip
    return loss + 0 * (jnp.mean(aux.correct) + jnp.mean(aux.log_probs))


def _three_products(params, hidden, labels):
    """What no gradient can leave out: logits, and two products with their gradient.

    In chunks of 512 steps, with the logits in place of their gradient.
    """
    kernel = params["kernel"]
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def add_chunk(d_kernel, rows):
        logits = product(rows, kernel).astype(rows.dtype)
        return d_kernel + product(logits.T, rows), product(logits, kernel.T)

    chunks = hidden.reshape(-1, min(512, hidden.shape[0]), hidden.shape[1])
    zeros = jnp.zeros(kernel.shape[::-1], jnp.float32)
    d_kernel, d_hidden = jax.lax.scan(add_chunk, zeros, chunks)
    cast = lambda x, like: x.reshape(like.shape).astype(like.dtype)
    return cast(d_kernel.T, kernel), cast(d_hidden, hidden)


def _unchecked(fun, args: tuple) -> Program:
    return compiled(fun, args)._replace(results=lambda out: [])


def _tied(args: tuple) -> Program:
    params, *rest = args
    tied = {"embedding": params["kernel"].T.copy(), "bias": params["bias"]}
    program = compiled(_gradient(tdjax.linear_cross_entropy), (tied, *rest))

    def results(out):
        loss, bias, embedding, hidden = program.results(out)
        return [loss, bias, embedding.T, hidden]

    return program._replace(results=results)


def _packed(args: tuple) -> dict[str, Any]:
    """The loss of a batch that is 30 % valid."""
    steps = args[2].shape[0]
    mask = jax.random.permutation(jax.random.key(3), jnp.arange(steps) < 0.3 * steps)
    count = int(mask.sum())
    loss = functools.partial(tdjax.linear_cross_entropy, mask=mask)
    packed = functools.partial(loss, capacity=count)
    return {"padded": _gradient(loss), "packed": _gradient(packed)}


def _log_probs() -> dict[str, Any]:
    """Log-probabilities and entropies, as policy gradients need them."""

    def plain(params, hidden, labels):
        logits = (hidden @ params["kernel"] + params["bias"]).astype(jnp.float32)
        log_probs = jax.nn.log_softmax(logits)
        entropies = -(jnp.exp(log_probs) * log_probs).sum(-1)
        return log_probs[jnp.arange(labels.size), labels], entropies

    def total(fun, *args):
        log_probs, entropies = fun(*args)
        return jnp.mean(log_probs) + 0.01 * jnp.mean(entropies)

    programs = {
        "plain JAX, all logits": functools.partial(total, plain),
        "linear_log_probs": functools.partial(total, tdjax.linear_log_probs),
        "linear_cross_entropy": tdjax.linear_cross_entropy,
    }
    return {name: _gradient(fun) for name, fun in programs.items()}


def _in_float64(params, hidden, labels, gradient: bool) -> list[np.ndarray]:
    """Loss, and gradients by bias, kernel and hidden, by NumPy."""
    wide = lambda x: np.asarray(jnp.asarray(x, jnp.float32), np.float64)
    kernel, bias, hidden = wide(params["kernel"]), wide(params["bias"]), wide(hidden)
    labels, steps = np.asarray(labels), len(hidden)
    loss, d_kernel, d_bias = 0.0, np.zeros_like(kernel), np.zeros_like(bias)
    d_hidden = np.zeros_like(hidden)
    for start in range(0, steps, 256):
        rows = slice(start, start + 256)
        logits = hidden[rows] @ kernel + bias
        logits -= logits.max(-1, keepdims=True)
        at_labels = np.arange(len(logits)), labels[rows]
        exponentials = np.exp(logits)
        sums = exponentials.sum(-1)
        loss += (np.log(sums) - logits[at_labels]).sum() / steps
        if gradient:
            exponentials /= sums[:, None]
            exponentials[at_labels] -= 1
            exponentials /= steps
            d_kernel += hidden[rows].T @ exponentials
            d_bias += exponentials.sum(0)
            d_hidden[rows] = exponentials @ kernel.T
    return [np.asarray(loss), d_bias, d_kernel, d_hidden][: 4 if gradient else 1]
