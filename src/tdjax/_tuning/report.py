"""How the tuner shows its work: a bar while it runs, a table of the results."""

import contextlib
from collections.abc import Iterable
from typing import Any

from tdjax._tuning.candidates import NOT_TRIED, TUNED, Candidate
from tdjax._tuning.processes import is_first

_GOES_ON = "With cache=, or in a file of tdjax.tuning, the next call goes on."
_MEASURES = ("time", "ratio", "memory", "compile", "error")


@contextlib.contextmanager
def progress_bar(total: int):
    """Yields `report(candidate)`, which moves a bar on a terminal."""
    # Imported here: `import tdjax` is to load as little as it can.
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    is_shown = console.is_terminal and is_first()
    with Progress(console=console, transient=True, disable=not is_shown) as p:
        task = p.add_task("Trying lowerings", total=total)
        yield lambda candidate: p.update(task, advance=1, description=str(candidate))


def rich_table(
    candidates: list[Candidate],
    best: Candidate,
    title: str,
    finished: bool = True,
    is_model: bool = False,
) -> Any:
    """A `rich.table.Table`: the chosen lowering, the others by time, the refused.

    Ratios are to the default's time of the same moment, with half the distance of their
    quartiles. Of a model, the candidates are it as it was given and tuned.
    """
    from rich.markup import escape
    from rich.table import Table

    order = lambda c: (c is not best, not c.measured, c.ratio or 1e9)
    tried = sorted((c for c in candidates if not c.is_left), key=order)
    options = _numbered(str(c.compiler_options) for c in tried if c.compiler_options)
    reasons = _numbered(c.verdict for c in tried if ": " in c.verdict)
    table = Table(
        title=escape(title), title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for name in ("model",) if is_model else ("method", "chunk", "unroll", "remat"):
        table.add_column(name, no_wrap=True)
    for name in (*["options"] * bool(options), *_MEASURES):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for candidate in tried:
        verdict = "chosen" if candidate is best else _verdict(candidate, reasons)
        if candidate.is_default and not is_model:
            is_plain = candidate.measured and candidate is not best
            verdict = "default" if is_plain else f"default, {verdict}"
        is_single = candidate.measured and candidate.ratio_spread is None
        if is_single and (is_model or not finished):
            once = "measured once"
            verdict = once if verdict == "measured" else f"{verdict}, {once}"
        style = "bold" if candidate is best else "" if candidate.measured else "dim"
        what = _of_model(candidate) if is_model else _of_lowering(candidate)
        number = options.get(str(candidate.compiler_options), "")
        what += [str(number)] * bool(options)
        row = *what, *_measures(candidate), escape(verdict)
        table.add_row(*row, style=style)
    notes = [f"options {number}: {text}" for text, number in options.items()]
    notes += [f"({number}) {text}" for text, number in reasons.items()]
    if not finished:
        notes.append(_unfinished(candidates))
    table.caption = escape("\n".join(notes)) or None
    return table


def _numbered(texts: Iterable[str]) -> dict[str, int]:
    """Each text once, with a number from 1."""
    return {text: i for i, text in enumerate(dict.fromkeys(texts), 1)}


def _verdict(candidate: Candidate, reasons: dict[str, int]) -> str:
    """A verdict; one with a reason is cut short, with the number of its note."""
    number = reasons.get(candidate.verdict)
    short = candidate.verdict.split(": ", 1)[0]
    return f"{short} ({number})" if number else short


def _unfinished(candidates: list[Candidate]) -> str:
    """What is missing in a search, and what to do about it."""
    left = sum(c.is_left for c in candidates)
    missing = f"{left} more were not tried" if left else "more rounds are needed"
    if any(c.verdict == NOT_TRIED for c in candidates):
        return f"Interrupted: {missing}. {_GOES_ON}"
    return f"Not finished: {missing}. A larger budget= gives them time. {_GOES_ON}"


def _of_model(candidate: Candidate) -> list[str]:
    return ["tuned" if candidate.lowering == TUNED else "as given"]


def _of_lowering(candidate: Candidate) -> list[str]:
    lowering = candidate.lowering
    return [
        lowering.method,
        "all" if lowering.chunk_size is None else str(lowering.chunk_size),
        str(lowering.unroll),
        "yes" if lowering.remat else "no",
    ]


def _measures(candidate: Candidate) -> list[str]:
    show = lambda value, text: "" if value is None else text(value)
    return [
        show(candidate.run_seconds, format_seconds),
        show(candidate.ratio, lambda ratio: _format_ratio(ratio, candidate)),
        show(candidate.temporary_bytes, format_bytes),
        show(candidate.compile_seconds, format_seconds),
        show(candidate.deviation, lambda deviation: f"{deviation:.0e}"),
    ]


def _format_ratio(ratio: float, candidate: Candidate) -> str:
    spread = candidate.ratio_spread
    return f"{ratio:.2f}" + (f"±{(spread[1] - spread[0]) / 2:.2f}" if spread else "")


def format_seconds(seconds: float) -> str:
    """Seconds as text, with a unit that suits them."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def format_bytes(size: int) -> str:
    """In megabytes of 10**6 bytes, or in smaller units."""
    if size >= 1e5:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e3:.1f} kB" if size >= 1e3 else f"{size} B"
