"""A user's own function and shapes: `python -m benchmarks my_module:my_function`.

The function takes no arguments and returns what `tdjax.autotune` is called with:
`(fun, args)` or `(fun, args, keywords)`, such as `(step, (params, x), {"in_axes":
(None, 1), "argnums": 0})`. Every lowering is compared with the reference and timed.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import tdjax
from benchmarks.programs import Row

_EXAMPLE = "def case(): return step, (params, x), {'in_axes': (None, 1)}"


def load(spec: str) -> Callable[[], Any]:
    """The function that `module:name` names; modules here are found too."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise SystemExit(f"Give module:function, got {spec!r}: {_EXAMPLE}.")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{spec} can't be found: {error}") from error
    if not callable(function):
        raise SystemExit(f"{spec} must be a function: {_EXAMPLE}.")
    return function


def rows(spec: str, budget: float) -> list[Row]:
    """Prints the tuner's table, and returns a row for each lowering that was timed."""
    function = load(spec)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise SystemExit(f"{spec} must take no arguments: {_EXAMPLE}.") from error
    given = function()
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        raise SystemExit(f"{spec} must return (fun, args[, keywords]): {_EXAMPLE}.")
    fun, args, *rest = given
    keywords = {"budget": budget, **(rest[0] if rest else {})}
    result = tdjax.autotune(fun, *args, **keywords)
    result.show()
    of = "forward" if keywords.get("argnums") is None else "gradient"
    return [
        {
            "suite": "own",
            "case": spec,
            "of": of,
            "candidate": str(each),
            "seconds": each.run_seconds,
            "ratio": each.ratio,
            "quartiles": each.ratio_spread or (),
            "compile_seconds": each.compile_seconds,
            "temporary_bytes": each.temporary_bytes,
            "deviation": each.deviation,
            "chosen": each is result.best,
        }
        for each in result.candidates
        if each.ratio is not None
    ]
