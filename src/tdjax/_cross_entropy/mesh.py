"""The loss on a mesh: which part of each array a device gets, and what is gathered.

The steps stay where they are. Along a mesh axis that splits words, each device has its
own words, and the devices add up their softmax (`blocks`). All other mesh axes of the
kernel only store it in parts: it is gathered before the loop, and its gradient is
summed and split again after it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from tdjax._mesh import (
    check_sizes,
    explicit_axes,
    mesh_of,
    names_in,
    over_mesh,
    refuse_varying,
    require_mesh,
    require_spec,
    reshard,
    typed_spec,
)

PADDING = "Pad steps with a mask, and words with a bias of -inf"


class Layout(NamedTuple):
    """The mesh axes that split each axis of labels, the features, and the words."""

    mesh: Any
    option: str
    steps: tuple[Any, ...]
    features: Any
    words: Any

    @property
    def step_axes(self) -> tuple[str, ...]:
        return tuple(name for entry in self.steps for name in names_in(entry))

    @property
    def word_axes(self) -> tuple[str, ...]:
        """Those along which each device computes with its own words."""
        names = names_in(self.words)
        return () if {*names} & {*self.step_axes} else names

    def run(
        self, loss: Callable, reduction: str, params: Any, hidden, labels, mask
    ) -> Any:
        """`loss(params, hidden, labels, mask, *, ...)` on every device."""
        steps = PartitionSpec(*self.steps)
        kernel = PartitionSpec(self.features, self.words)
        of_params = {"kernel": kernel, "bias": PartitionSpec(self.words)}
        arrays, treedef = jax.tree.flatten((params, hidden, labels, mask))
        # No mask is no array.
        of_mask = None if mask is None else steps
        of_params = {name: of_params[name] for name in params}
        specs = jax.tree.leaves((of_params, steps, steps, of_mask))
        check_sizes(self.option, arrays, specs, self.mesh, PADDING)
        refuse_varying(self.option, arrays)
        axes = {"step_axes": self.step_axes, "word_axes": self.word_axes}

        def call(arrays):
            params, *rest = jax.tree.unflatten(treedef, arrays)
            return loss(self._gather(params), *rest, **axes)

        out_spec = steps if reduction == "none" else PartitionSpec()
        names = {*self.step_axes, *names_in(self.features), *names_in(self.words)}
        if names:
            call = over_mesh(call, self.mesh, names, (specs,), out_spec)
        run = lambda arrays: call(reshard(arrays, specs, self.mesh))
        # Outside of `jit`, JAX can't leave some axes of the mesh to the compiler.
        return jax.jit(run)(arrays)

    def _gather(self, params: Any) -> Any:
        """The params, whole along the mesh axes that only store them in parts."""
        gathered_words = () if self.word_axes else names_in(self.words)
        gather = functools.partial(jax.lax.all_gather, tiled=True)
        of_axes: dict[str, tuple[Any, ...]] = {
            "kernel": (names_in(self.features), gathered_words),
            "bias": (gathered_words,),
        }

        def whole(x, axes):
            for axis, names in enumerate(axes):
                x = gather(x, names, axis=axis) if names else x
            return x

        return {name: whole(x, of_axes[name]) for name, x in params.items()}


def layout_on_mesh(
    sharding: Any, kernel_sharding: Any, params: Any, hidden, labels, mask
) -> Layout | None:
    """Where everything is, from the options or, without them, from the types."""
    arrays = jax.tree.leaves((hidden, labels, mask, params))
    rank = labels.ndim
    steps: list[Any] = [None] * rank
    kernel: list[Any] = [None, None]
    if sharding is not None:
        steps = require_spec("sharding", sharding, rank, "the axes of labels")
    if kernel_sharding is not None:
        meaning = "(features, words)"
        kernel = require_spec("kernel_sharding", kernel_sharding, 2, meaning)
    given = {"sharding": sharding, "kernel_sharding": kernel_sharding}
    option = ", ".join(f"{k}={v}" for k, v in given.items() if v is not None)
    if option:
        names = [name for entry in (*steps, *kernel) for name in names_in(entry)]
        mesh = require_mesh(option, names, arrays)
    else:
        mesh = mesh_of(arrays)
    if explicit_axes(mesh):
        if sharding is None:
            steps = _first_split(rank, hidden, labels, mask)
        if kernel_sharding is None:
            kernel = [*typed_spec(params["kernel"])]
    if not option and not any((*steps, *kernel)):
        return None
    option = option or "the type under explicit axes"
    layout = Layout(mesh, option, tuple(steps), *kernel)
    _check_words(layout)
    return layout


def _first_split(rank: int, *arrays: Any) -> list[Any]:
    """How the types split the steps: as `hidden`, or as the first that is split."""
    specs = [[*typed_spec(x)][:rank] for x in arrays if x is not None]
    return next((spec for spec in specs if any(spec)), [None] * rank)


def _check_words(layout: Layout) -> None:
    names, steps = {*names_in(layout.words)}, {*layout.step_axes}
    if names & steps and not names <= steps:
        raise ValueError(
            f"{layout.option} splits words over {layout.words}, of which some split "
            f"the steps too ({', '.join(sorted(names & steps))}). Give words mesh axes "
            "that all split steps, or of which none does."
        )
