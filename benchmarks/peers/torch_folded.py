"""PyTorch: the usual TimeDistributed, which merges batch and time around a module.

Eager, on the CPU or on CUDA, as JAX is; convolutions in channels-last memory format.
"""

import os
import time
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.candidate import Candidate, Program
from benchmarks.layers import CHANNELS, CONVOLUTIONS, HEADS


def candidate(case, compiled: bool = False) -> Candidate:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    name = "PyTorch, compiled" if compiled else "PyTorch"
    return TorchCandidate(name, compiled)


class TorchCandidate(Candidate):
    """The same case as a `torch.nn.Module`, with the same numbers."""

    def __init__(self, name: str, compiled: bool):
        super().__init__(name, lambda params, x: None)
        self.compiled = compiled

    def compile(self, case, of: str) -> Program:
        import torch

        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch has no CUDA")
        device = "cuda" if on_gpu else "cpu"
        to_torch = lambda a: _to_torch(torch, a, device)
        model = _model(torch, case).to(device, to_torch(case.x).dtype)
        weights = _WEIGHTS.get(case.layer, _linear)(case.params)
        model.load_state_dict({name: to_torch(w) for name, w in weights.items()})
        self.names = [name for name, _ in model.named_parameters()]
        self.weights_of = _WEIGHTS.get(case.layer, _linear)
        x = to_torch(case.x).requires_grad_(of == "gradient")
        cotangent, params = to_torch(case.cotangent), list(model.parameters())
        run = _compiled(torch, model) if self.compiled else model

        def call():
            if of == "forward":
                with torch.inference_mode():
                    out = [run(x)]
            else:
                y = run(x)
                gradients = torch.autograd.grad(y, [x, *params], cotangent)
                out = [y.detach(), *gradients]
            if on_gpu:
                torch.cuda.synchronize()
            return out

        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        to_numpy = lambda t: t.float().cpu().numpy().astype(np.float64)
        return Program(call, lambda out: [to_numpy(t) for t in out], seconds, None)

    def expected(self, common: list) -> list[np.ndarray]:
        as_numpy = lambda a: np.asarray(jnp.asarray(a, jnp.float32), np.float64)
        if len(common) < 3:
            return [as_numpy(a) for a in common]
        weights = self.weights_of(common[2], gradient=True)
        arrays = [*common[:2], *(weights[name] for name in self.names)]
        return [as_numpy(a) for a in arrays]


def _compiled(torch, model):
    # After a few models PyTorch would run the next one without compiling it.
    torch.compiler.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model, dynamic=False)


def _to_torch(torch, a, device: str):
    # NumPy has no bfloat16; every bfloat16 is a float32.
    values = np.array(jnp.asarray(a, jnp.float32))
    return torch.from_numpy(values).to(
        device, getattr(torch, jnp.asarray(a).dtype.name)
    )


def _model(torch, case):
    nn, width = torch.nn, case.x.shape[-1]
    functional = nn.functional

    class MLP(nn.Sequential):
        def __init__(self):
            gelu = nn.GELU(approximate="tanh")
            super().__init__(
                nn.Linear(width, 4 * width), gelu, nn.Linear(4 * width, width)
            )

    class NormBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.linear = nn.Linear(width, width)

        def forward(self, x):
            return x + functional.relu(self.linear(self.norm(x)))

    class ConvNet(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [width, *[CHANNELS] * len(CONVOLUTIONS)]
            convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes)]
            self.convs = nn.ModuleList(convs).to(memory_format=torch.channels_last)

        def forward(self, x):
            x = x.permute(0, 3, 1, 2)  # a view that is channels-last in memory
            for conv in self.convs:
                x = functional.relu(conv(x))
            return x.permute(0, 2, 3, 1)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    class TimeDistributed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            y = self.layer(x.reshape(-1, *x.shape[2:]))
            return y.reshape(*x.shape[:2], *y.shape[1:])

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(width, width, batch_first=True)
            self.head = TimeDistributed(nn.Linear(width, width))

        def forward(self, x):
            return self.head(self.gru(x)[0])

    layers = {
        "Dense": lambda: nn.Linear(width, width),
        "MLP": MLP,
        "LayerNorm block": NormBlock,
        "conv net": ConvNet,
        "attention": Attention,
    }
    if case.layer == "GRU and head":
        return Tagger()
    return TimeDistributed(layers[case.layer]())


def _named(name: str, params) -> dict:
    return {f"{name}.weight": params["kernel"].T, f"{name}.bias": params["bias"]}


def _linear(params, gradient: bool = False) -> dict:
    return _named("layer", params)


def _mlp(params, gradient: bool = False) -> dict:
    first, second = params["Dense_0"], params["Dense_1"]
    return {**_named("layer.0", first), **_named("layer.2", second)}


def _norm_block(params, gradient: bool = False) -> dict:
    norm = params["norm"]
    norm = {"layer.norm.weight": norm["scale"], "layer.norm.bias": norm["bias"]}
    return {**norm, **_named("layer.linear", params["Dense_0"])}


def _conv_net(params, gradient: bool = False) -> dict:
    weights = {}
    for i, name in enumerate(CONVOLUTIONS):
        kernel = params[name]["kernel"].transpose(3, 2, 0, 1)
        weights[f"layer.convs.{i}.weight"] = kernel
        weights[f"layer.convs.{i}.bias"] = params[name]["bias"]
    return weights


def _attention(params, gradient: bool = False) -> dict:
    inner = [params[name] for name in ("query", "key", "value")]
    return {
        "layer.attention.in_proj_weight": jnp.concatenate(
            [p["kernel"].T for p in inner]
        ),
        "layer.attention.in_proj_bias": jnp.concatenate([p["bias"] for p in inner]),
        **_named("layer.attention.out_proj", params["out"]),
    }


def _gru(params, gradient: bool = False) -> dict:
    cell = params["gru"]
    kernels = lambda names: jnp.concatenate([cell[n]["kernel"].T for n in names])
    biases = [cell[name]["bias"] for name in ("ir", "iz", "in")]
    # The reset and update gates have two biases that are added.
    second = biases[:2] if gradient else [jnp.zeros_like(b) for b in biases[:2]]
    return {
        "gru.weight_ih_l0": kernels(("ir", "iz", "in")),
        "gru.weight_hh_l0": kernels(("hr", "hz", "hn")),
        "gru.bias_ih_l0": jnp.concatenate(biases),
        "gru.bias_hh_l0": jnp.concatenate([*second, cell["hn"]["bias"]]),
        **_named("head.layer", params["head"]),
    }


_WEIGHTS = {
    "MLP": _mlp,
    "LayerNorm block": _norm_block,
    "conv net": _conv_net,
    "attention": _attention,
    "GRU and head": _gru,
}
