"""The loss on a mesh: which part of each array a device gets, and what is gathered.

The steps stay where they are. Along a mesh axis that splits words, each device has its
own words, and the devices add up their softmax (`blocks`). All other mesh axes of the
kernel only store it in parts: it is gathered before the loop, and its gradient is split
again after it, and summed along the axes that split steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from tdjax._mesh import (
    check_sizes,
    constrain,
    explicit_axes,
    mesh_of,
    names_in,
    only_axes,
    over_mesh,
    refuse_varying,
    require_mesh,
    require_spec,
    reshard,
    typed_spec,
)

PADDING = (
    "Pad steps with a mask, and words with a bias of -inf (not if labels are smoothed)"
)


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

    @property
    def kernel(self) -> PartitionSpec:
        """How the kernel is split on the devices, before it is gathered there.

        The compiler gathers it along the other mesh axes.
        """
        names = {*self.step_axes, *self.word_axes}
        others = explicit_axes(self.mesh) - names
        if others and jax.__version_info__ >= (0, 11):
            # JAX's `all_gather` has no gradient beside explicit axes.
            names = {*self.word_axes}
        return only_axes(PartitionSpec(self.features, self.words), names, 2)

    def run(
        self, loss: Callable, reduction: str, outside, params, hidden, labels, mask
    ) -> Any:
        """`loss(params, hidden, labels, mask, *, ...)` on every device.

        `outside` are the mesh axes of a `jax.shard_map` around this.
        """
        arrays, treedef = jax.tree.flatten((params, hidden, labels, mask))
        stored = self._specs(PartitionSpec(self.features, self.words), params, mask)
        check_sizes(self.option, arrays, stored, self.mesh, PADDING)
        refuse_varying(self.option, arrays)
        specs = self._specs(self.kernel, params, mask)
        axes = {"step_axes": (*outside, *self.step_axes), "word_axes": self.word_axes}

        def call(arrays):
            params, *rest = jax.tree.unflatten(treedef, arrays)
            return loss(self._gather(params), *rest, **axes)

        names = {*self.step_axes, *self.word_axes}
        steps = PartitionSpec(*self.steps)
        out_spec = steps if reduction == "none" else PartitionSpec()
        if names:
            call = over_mesh(call, self.mesh, names, (specs,), out_spec)

        def run(arrays):
            arrays = reshard(arrays, specs, self.mesh)
            if stored != specs:
                # The first for the gradient, which is then split as the kernel is.
                arrays = constrain(
                    constrain(arrays, stored, self.mesh), specs, self.mesh
                )
            return call(arrays)

        # Outside of `jit`, JAX can't leave some axes of the mesh to the compiler.
        return jax.jit(run)(arrays)

    def _specs(self, kernel: PartitionSpec, params: Any, mask) -> list[PartitionSpec]:
        """How params, `hidden`, labels and mask are split."""
        of_params = {"kernel": kernel, "bias": PartitionSpec(kernel[1])}
        steps = PartitionSpec(*self.steps)
        of_steps = [steps, steps] if mask is None else [steps, steps, steps]
        return jax.tree.leaves(({name: of_params[name] for name in params}, of_steps))

    def _gather(self, params: Any) -> Any:
        """The params, whole along the mesh axes that split steps."""
        features, words = map(names_in, self.kernel)
        words = () if self.word_axes else words
        axes: dict[str, Any] = {"kernel": (features, words), "bias": (words,)}

        def whole(x, of_axes):
            for axis, names in enumerate(of_axes):
                if names:
                    x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
            return x

        return {name: whole(x, axes[name]) for name, x in params.items()}


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
    is_split = any(entry for x in arrays for entry in typed_spec(x))
    if not option and not is_split:
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
