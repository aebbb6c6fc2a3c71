"""Candidates: the lowerings to try, and what is known of each."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tdjax._steps.lowering import AUTO, METHODS, Lowering

OPTIONS = ("method", "chunk_size", "unroll", "remat")
# A straight line of more blocks than this takes too long to compile to be tried.
_LONGEST_LINE = 32
# Candidates this close to the fastest are as good; if it is within their spread, those
# that are this close.
_AS_GOOD, _WITHIN_SPREAD = 1.01, 1.03
# What the ratio of two single measurements may be by chance on a busy machine.
_NOISE = 1.25
# Less memory than this part of the default's is a reason to leave it.
_LESS_MEMORY = 0.95
# By what factor the ratio of the best measurements is another story than the median.
_ANOTHER = 1.25
# Of a whole model: its places have the options that were found.
TUNED = Lowering(AUTO)
# Verdicts of candidates that another search may still try.
NO_TIME = "no time left"
NOT_TRIED = "not tried"


@dataclasses.dataclass
class Candidate:
    """A lowering and what was measured of it.

    Attributes:
      lowering: how the steps are compiled; of a tuned model, `method="auto"`.
      blocks: the number of blocks of steps.
      compiler_options: options of the compiler, as `jax.jit` takes them.
      is_default: whether it is what was given to be tuned.
      verdict: `"measured"`; `"behind"` if too slow to be measured as often as the
        others; or why it was refused or not tried.
      compile_seconds: the time of tracing and compilation.
      run_seconds, spread: the time of one call, median and quartiles.
      ratio, ratio_spread: its time as a multiple of the default's (of the fastest's if
        the default was not timed), median and quartiles. Each is a ratio of two
        measurements of the same moment.
      rounds: the number of these ratios.
      best_ratio: its best measurement divided by the default's. Where other programs
        use the machine, this is closest to what a quiet one would give.
      temporary_bytes: the compiled program's memory for temporaries, without inputs
        and outputs.
      deviation: the largest difference from the reference, relative to the largest
        value of the result where it occurs.
    """

    lowering: Lowering
    blocks: int = 1
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_default: bool = False
    verdict: str = NOT_TRIED
    compile_seconds: float | None = None
    run_seconds: float | None = None
    spread: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_spread: tuple[float, float] | None = None
    rounds: int = 0
    best_ratio: float | None = None
    temporary_bytes: int | None = None
    deviation: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Its `method`, `chunk_size`, `unroll` and `remat`."""
        return {name: getattr(self.lowering, name) for name in OPTIONS}

    @property
    def measured(self) -> bool:
        """Whether it agrees with the reference and was timed."""
        return self.verdict == "measured"

    @property
    def is_left(self) -> bool:
        """Whether it is still to be tried."""
        return self.verdict in (NO_TIME, NOT_TRIED)

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them; an infinite deviation is None."""
        names = [field.name for field in dataclasses.fields(self)][1:]
        fields = {"options": self.options} | {
            name: getattr(self, name) for name in names
        }
        if self.deviation is not None and not math.isfinite(self.deviation):
            fields["deviation"] = None
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Candidate":
        """Reads what `as_json` wrote, field by field: it may come from anywhere."""
        if set(fields["options"]) != set(OPTIONS):
            raise ValueError(f"a candidate has the options {fields['options']}")
        numbers = {name: _number(float, fields[name]) for name in _NUMBERS}
        candidate = cls(
            Lowering(**fields["options"]),
            blocks=_number(int, fields["blocks"]),
            compiler_options=check_compiler_options(fields["compiler_options"]),
            is_default=bool(fields["is_default"]),
            verdict=str(fields["verdict"]),
            spread=_pair(fields["spread"]),
            ratio_spread=_pair(fields["ratio_spread"]),
            rounds=_number(int, fields["rounds"]) or 0,
            temporary_bytes=_number(int, fields["temporary_bytes"]),
            **numbers,
        )
        if candidate.measured and not (candidate.run_seconds and candidate.ratio):
            raise ValueError("a candidate was measured and has no time")
        return candidate

    def __str__(self):
        plain = Candidate(Lowering()).options
        # Compared by their text: True == 1, and means another thing.
        shown = {k: v for k, v in self.options.items() if repr(v) != repr(plain[k])}
        shown = {"method": self.lowering.method, **shown}
        if self.compiler_options:
            shown["compiler_options"] = self.compiler_options
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())


_NUMBERS = ("compile_seconds", "run_seconds", "ratio", "best_ratio", "deviation")


def _pair(values: Any) -> tuple[float, float] | None:
    if values is None:
        return None
    low, high = (_number(float, value) for value in values)
    if low is None or high is None:
        raise ValueError("a candidate has half of a spread")
    return low, high


def check_compiler_options(options: Any) -> dict[str, Any]:
    """Options of the compiler as a dict, after a check of their kinds."""
    kinds = str | bool | int | float
    is_mapping = isinstance(options, Mapping)
    if not is_mapping or not all(
        isinstance(k, str) and isinstance(v, kinds) for k, v in options.items()
    ):
        raise TypeError(
            "compiler_options must be mappings from names to strings, numbers or "
            f"bools, as jax.jit takes them, got {options!r:.80}."
        )
    return dict(options)


def _number(kind: type, value: Any) -> Any:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1e300:
        raise ValueError(f"a candidate holds {value!r:.40} in the place of a number")
    return kind(value)


def choose(candidates: Iterable[Candidate]) -> Candidate:
    """The fastest of those that were measured, unless the default is as good.

    Of candidates within the spread of the fastest, the one with the least memory is
    taken. The default stays if that one is not faster beyond the spread, and needs no
    less memory.
    """
    measured = [c for c in candidates if c.measured]
    fastest = min(measured, key=_ratio)
    memory = lambda candidate: candidate.temporary_bytes or 0
    best = min((c for c in measured if _is_as_good(c, fastest)), key=memory)
    default = next((c for c in measured if c.is_default), best)
    # Single measurements don't show that one is as fast.
    is_smaller = memory(best) < _LESS_MEMORY * memory(default) and best.ratio_spread
    keeps = not (_is_faster(best, default) or is_smaller)
    return default if keeps else best


def _ratio(candidate: Candidate) -> float:
    """Its ratio; or that of the best measurements, if it is much larger.

    Other programs slow one that uses all cores down more than one that uses one core,
    which may seem fast only as long as they run.
    """
    ratio, best_ratio = candidate.ratio or math.inf, candidate.best_ratio or 0.0
    return best_ratio if best_ratio > _ANOTHER * ratio else ratio


def _is_as_good(candidate: Candidate, fastest: Candidate) -> bool:
    low, _ = candidate.ratio_spread or (math.inf, 0.0)
    close = _WITHIN_SPREAD if low <= _ratio(fastest) else _AS_GOOD
    return _ratio(candidate) <= close * _ratio(fastest)


def _is_faster(candidate: Candidate, default: Candidate) -> bool:
    """Whether it beats the default beyond what is noise."""
    spread = candidate.ratio_spread
    if spread is None or default.ratio_spread is None:  # Of single measurements.
        return _ratio(candidate) < _ratio(default) / _NOISE
    limit = at_most(candidate.ratio or math.inf, spread, candidate.rounds)
    return max(limit, _ratio(candidate)) < _ratio(default)


def at_most(median: float, quartiles: tuple[float, float], count: int) -> float:
    """The upper end of a 95 % interval for a median of so many measurements.

    The standard error of a median is 0.93 of the distance of the quartiles, divided by
    the root of their number: McGill, Tukey and Larsen (1978), "Variations of Box
    Plots", The American Statistician 32(1). 2.5 of them are 95 % for four medians at
    once (Bonferroni); more are seldom close to each other in the end.
    """
    low, high = quartiles
    return median + 2.5 * 0.93 * (high - low) / math.sqrt(max(count, 1))


def list_candidates(
    base: Lowering, timesteps: int, with_remat: bool, given: Any
) -> list[Candidate]:
    """The candidates: the reference, `base` itself, then those given or the default.

    What `base` fixes besides the four options (`axis_name`, say) all of them have.
    """
    if given is None:
        lowerings = _default_lowerings(base, timesteps, with_remat)
    else:
        lowerings = [_changed(base, i, each) for i, each in enumerate(_listed(given))]
    # Compared by their text: True == 1, and means another thing.
    lowerings = {repr(x): x for x in (change(base), base, *lowerings)}.values()
    blocks = lambda size: math.ceil(timesteps / (size or timesteps))
    return [
        Candidate(x, blocks(x.chunk_size), is_default=repr(x) == repr(base))
        for x in lowerings
    ]


def _default_lowerings(
    base: Lowering, timesteps: int, with_remat: bool
) -> list[Lowering]:
    """The lowerings to try, the likely ones first."""
    # A few large blocks first: they compile fast, and are often nearly the best.
    sizes = [timesteps // n for n in (4, 8, 2, 16, 64)] + [1]
    sizes = [size for size in dict.fromkeys(sizes) if 0 < size < timesteps]
    options: list[dict[str, Any]] = [{"method": method} for method in METHODS]
    remats = []
    for size in sizes:
        # A block of one step is the same program under every method.
        for method in ("fold", "vmap") if size > 1 else ("vmap",):
            block = {"method": method, "chunk_size": size}
            if math.ceil(timesteps / size) <= _LONGEST_LINE:
                options.append({**block, "unroll": True})
            options.append(block)
            remats.append({**block, "remat": True})
    options += remats if with_remat else []
    return [change(base, **given) for given in options if _is_possible(base, given)]


def _is_possible(base: Lowering, options: dict[str, Any]) -> bool:
    """Named time axes need vmap, and `axis_name` all steps at once."""
    if options["method"] != "vmap":
        return base.axis_name is None and base.spmd_axis_name is None
    return "chunk_size" not in options or base.axis_name is None


def _listed(given: Any) -> Any:
    """The user's `candidates`."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        hint = f" Write [{given!r}]." if isinstance(given, Mapping) else ""
        raise TypeError(f"candidates must be a list of mappings, got {given!r}.{hint}")
    return given


def _changed(base: Lowering, i: int, options: Any) -> Lowering:
    try:
        return change(base, **_checked(options))
    except (TypeError, ValueError) as error:
        error.add_note(f"It is candidates[{i}].")
        raise


def _checked(options: Any) -> Mapping[str, Any]:
    """One of the user's `candidates`."""
    if not isinstance(options, Mapping) or not set(options) <= set(OPTIONS):
        raise TypeError(
            f"candidates must be mappings with the keys {', '.join(OPTIONS)}, got "
            f"{options!r}."
        )
    if options.get("method") == "auto":
        raise ValueError(
            "candidates must be lowerings to measure, got method='auto', which is "
            "whatever a table says. Write 'vmap' or 'fold'."
        )
    return options


def change(
    base: Lowering,
    method: Any = "vmap",
    chunk_size: int | None = None,
    unroll: int | bool = 1,
    remat: bool = False,
) -> Lowering:
    """`base` with other options; without arguments, the reference."""
    return dataclasses.replace(
        base, method=method, chunk_size=chunk_size, unroll=unroll, remat=remat
    )
