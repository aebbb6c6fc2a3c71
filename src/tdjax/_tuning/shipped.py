"""Tables that ship with the library: what `"auto"` takes where no other has a place.

`tables/DEVICE.json` holds options by `table.key_of`, as `python -m benchmarks.tables`
has written it on such a device.
"""

import functools
import importlib.resources
import json
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

from tdjax._steps.lowering import Lowering
from tdjax._steps.places import Place
from tdjax._tuning.table import Options, default_device, device_kind, key_of, run_with

T = TypeVar("T")


class Shipped:
    """The resolver of places with `method="auto"` where none is in effect."""

    asks_all = False

    def run(self, place: Place, run: Callable[[Lowering], T]) -> T:
        table = options_of(device_kind((place.args, place.kwargs)))
        options = table.get(key_of(place)) if table else None
        if options is None:
            return run(place.lowering)
        return run_with(options, place, run, platform=_platform())


def _platform() -> str:
    """What `jax.lax.platform_dependent` calls the platform of the default device."""
    device = default_device()
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


@functools.cache
def options_of(device: str) -> Mapping[str, Options]:
    """The table for a kind of device; empty if there is none."""
    file = importlib.resources.files("tdjax._tuning") / "tables" / file_name(device)
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def file_name(device: str) -> str:
    """What the table for a kind of device is called."""
    return re.sub(r"[^a-z0-9.]+", "-", device.lower()) + ".json"
