"""The loss over a large vocabulary: fused, beside Optax and PyTorch on all logits."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tdjax
from benchmarks.candidate import Program
from benchmarks.programs import Row, measure_programs


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
        Vocabulary(2048, 256, 32_000, "bfloat16"),
    ]
    if jax.default_backend() != "cpu":
        found.append(Vocabulary(8192, 2048, 128_000, "bfloat16"))
    return found


def rows(case: Vocabulary, of: str, effort) -> list[Row]:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (case.steps, case.features), case.dtype)
    params = tdjax.init_dense(keys[1], case.features, case.words, dtype=case.dtype)
    labels = jax.random.randint(keys[2], (case.steps,), 0, case.words)
    args = jax.block_until_ready((params, hidden, labels))
    fused = tdjax.linear_cross_entropy
    programs = {
        "Optax, all logits": _program(_by_optax, of),
        "linear_cross_entropy": _program(fused, of),
        "vocab_chunk_size=1024": _program(
            lambda *args: fused(*args, chunk_size=1024, vocab_chunk_size=1024), of
        ),
    }
    missing, about = [], {"case": case.name, "of": of, **case._asdict()}
    try:
        programs["PyTorch"] = TorchLoss(args, of).program()
    except (ImportError, NotImplementedError) as error:
        missing = [{**about, "candidate": "PyTorch", "missing": str(error)}]
    tol = 2e-3 if case.dtype == "float32" else 5e-2
    return measure_programs(about, programs, args, effort, tol) + missing


def _program(loss, of: str):
    return jax.value_and_grad(loss, (0, 1)) if of == "gradient" else loss


def _by_optax(params, hidden, labels):
    import optax

    logits = (hidden @ params["kernel"] + params["bias"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


class TorchLoss:
    """`cross_entropy` of `linear`, eager, on the device that JAX is on."""

    def __init__(self, args: tuple, of: str):
        import torch

        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch has no CUDA")
        self._torch, self._gradient = torch, of == "gradient"
        self._wait = torch.cuda.synchronize if on_gpu else time.perf_counter
        params, hidden, labels = args
        put = lambda a: self._from_jax(a).to("cuda" if on_gpu else "cpu")
        self._args = [put(a) for a in (hidden, params["kernel"].T, params["bias"])]
        self._labels = put(labels)
        for a in self._args:
            a.requires_grad_(self._gradient)

    def _from_jax(self, a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            return self._torch.from_numpy(np.array(a, np.int64))
        tensor = self._torch.from_numpy(np.array(a.astype(jnp.float32)))
        return tensor.to(getattr(self._torch, a.dtype.name)).contiguous()

    def program(self) -> Program:
        return Program(self.call, self.results, None, None)

    def call(self) -> list[Any]:
        functional = self._torch.nn.functional
        hidden, weight, bias = self._args
        logits = functional.linear(hidden, weight, bias).float()
        loss = functional.cross_entropy(logits, self._labels)
        out = [loss.detach()]
        if self._gradient:
            out += self._torch.autograd.grad(loss, self._args)
        self._wait()
        return out

    def results(self, out) -> list[np.ndarray]:
        """In the order of JAX's leaves: loss, bias, kernel, hidden."""
        arrays = [a.float().cpu().numpy() for a in out]
        if not self._gradient:
            return arrays
        loss, hidden, weight, bias = arrays
        return [loss, bias, weight.T, hidden]
