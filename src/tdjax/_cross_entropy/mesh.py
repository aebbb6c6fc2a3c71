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

from tdjax._checks import is_array
from tdjax._cross_entropy.head import LAYOUTS
from tdjax._cross_entropy.products import weight_name
from tdjax._cross_entropy.steps import Inputs
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
    "Pad steps with a mask, and words with a bias of -inf (and a class weight of 0, if "
    "labels are smoothed)"
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

    def run(self, call: Callable, out_spec: Any, outside, inputs: Inputs) -> Any:
        """`call(inputs, step_axes, word_axes)` on every device.

        `outside` are the mesh axes of a `jax.shard_map` around this. `out_spec` is of
        results that have the steps of labels where it says "steps", else of sums.
        """
        arrays, treedef = jax.tree.flatten(inputs)
        stored = self._specs(PartitionSpec(self.features, self.words), inputs)
        check_sizes(self.option, arrays, stored, self.mesh, PADDING)
        refuse_varying(self.option, arrays)
        specs = self._specs(self.kernel, inputs)
        step_axes = *outside, *self.step_axes

        def on_device(arrays):
            inputs = self._gather(jax.tree.unflatten(treedef, arrays))
            return call(inputs, step_axes, self.word_axes)

        names = {*self.step_axes, *self.word_axes}
        spec_of = {"steps": PartitionSpec(*self.steps), "sum": PartitionSpec()}
        out_specs = jax.tree.map(spec_of.get, out_spec)
        on_devices = on_device
        if names:
            on_devices = over_mesh(on_device, self.mesh, names, (specs,), out_specs)

        def run(arrays):
            arrays = reshard(arrays, specs, self.mesh)
            if stored != specs:
                # The first for the gradient, which is then split as the kernel is.
                arrays = constrain(
                    constrain(arrays, stored, self.mesh), specs, self.mesh
                )
            return on_devices(arrays)

        # Outside of `jit`, JAX can't leave some axes of the mesh to the compiler.
        return jax.jit(run)(arrays)

    def _specs(self, kernel: PartitionSpec, inputs: Inputs) -> list[PartitionSpec]:
        """How each array of the inputs is split."""
        features, words = kernel
        of_words = PartitionSpec(words)
        of_params = {
            "kernel": kernel,
            "embedding": PartitionSpec(words, features),
            "bias": of_words,
        }
        steps = PartitionSpec(*self.steps)
        specs = Inputs(
            params=of_params, class_weights=of_words,
            hidden=steps, labels=steps, mask=steps, weights=steps,
            scalars=dict.fromkeys(inputs.scalars, PartitionSpec()),
        )  # fmt: skip
        paths = jax.tree_util.tree_flatten_with_path(inputs)[0]
        return [_at_path(specs, path) for path, _ in paths]

    def _gather(self, inputs: Inputs) -> Inputs:
        """The inputs, with params whole along the mesh axes that split steps."""
        features, words = map(names_in, self.kernel)
        words = () if self.word_axes else words
        axes: dict[str, Any] = {
            "kernel": (features, words),
            "embedding": (words, features),
            "bias": (words,),
        }

        def whole(x, of_axes):
            for axis, names in enumerate(of_axes):
                if names:
                    x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
            return x

        params = {name: whole(x, axes[name]) for name, x in inputs.params.items()}
        class_weights = inputs.class_weights
        if class_weights is not None:
            class_weights = whole(class_weights, (words,))
        return inputs._replace(params=params, class_weights=class_weights)


def _at_path(specs: Any, path: Any) -> PartitionSpec:
    for key in path:
        specs = specs[key.key] if hasattr(key, "key") else getattr(specs, key.name)
    return specs


def layout_on_mesh(
    sharding: Any, kernel_sharding: Any, inputs: Inputs
) -> Layout | None:
    """Where everything is, from the options or, without them, from the types."""
    of_steps = inputs.hidden, inputs.labels, inputs.mask, inputs.weights
    arrays = [x for x in jax.tree.leaves((of_steps, inputs)) if is_array(x)]
    rank = inputs.labels.ndim
    name = weight_name(inputs.params)
    steps: list[Any] = [None] * rank
    kernel: list[Any] = [None, None]
    if sharding is not None:
        steps = require_spec("sharding", sharding, rank, "the axes of labels")
    if kernel_sharding is not None:
        meaning = LAYOUTS[name]
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
            steps = _first_split(rank, *of_steps)
        if kernel_sharding is None:
            kernel = [*typed_spec(inputs.params[name])]
    is_split = any(entry for x in arrays for entry in typed_spec(x))
    if not option and not is_split:
        return None
    option = option or "the type under explicit axes"
    features, words = kernel if name == "kernel" else kernel[::-1]
    layout = Layout(mesh, option, tuple(steps), features, words)
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
