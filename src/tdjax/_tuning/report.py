"""How the tuner shows its work: a bar while it runs, a table of the results."""

import contextlib
from typing import Any

from tdjax._tuning.candidates import Candidate
from tdjax._tuning.processes import is_first


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
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("model",) if is_model else ("method", "chunk", "unroll", "remat"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "ratio", "memory", "compile", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    order = lambda c: (c is not best, not c.measured, c.ratio or 1e9)
    tried = [c for c in candidates if not c.is_left]
    for candidate in sorted(tried, key=order):
        verdict = "chosen" if candidate is best else candidate.verdict
        if candidate.is_default and not is_model:
            verdict = "default" if candidate.measured else f"default, {verdict}"
            verdict = f"{verdict}, chosen" if candidate is best else verdict
        style = "bold" if candidate is best else "" if candidate.measured else "dim"
        what = _of_model(candidate) if is_model else _of_lowering(candidate, candidates)
        table.add_row(*what, *_measures(candidate), verdict, style=style)
    left = len(candidates) - len(tried)
    notes = [f"options {i}: {text}" for i, text in enumerate(_options(candidates), 1)]
    if not finished:
        missing = f"{left} more were not tried" if left else "more rounds are needed"
        notes.append(
            f"Not finished: {missing}. A larger budget= gives them time; with cache= "
            "the next call goes on."
        )
    table.caption = "\n".join(notes) or None
    return table


def _options(candidates: list[Candidate]) -> list[str]:
    """The options of the compiler that some candidates have, each once."""
    texts = [str(c.compiler_options) for c in candidates if c.compiler_options]
    return [*dict.fromkeys(texts)]


def _of_model(candidate: Candidate) -> list[str]:
    return ["as given" if candidate.is_default else "tuned"]


def _of_lowering(candidate: Candidate, candidates: list[Candidate]) -> list[str]:
    lowering, options = candidate.lowering, ""
    if candidate.compiler_options:
        number = 1 + _options(candidates).index(str(candidate.compiler_options))
        options = f", options {number}"
    return [
        lowering.method,
        "all" if lowering.chunk_size is None else str(lowering.chunk_size),
        str(lowering.unroll),
        ("yes" if lowering.remat else "no") + options,
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
