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


def rich_table(candidates: list[Candidate], best: Candidate, title: str) -> Any:
    """A `rich.table.Table`: the chosen lowering, the others by time, the refused."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("method", "chunk", "unroll", "remat"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "ratio", "memory", "compile", "deviation"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    order = lambda c: (c is not best, not c.measured, c.run_seconds or 1e9)
    tried = [c for c in candidates if c.verdict != "no time left"]
    for candidate in sorted(tried, key=order):
        verdict = "chosen" if candidate is best else candidate.verdict
        style = "bold" if candidate is best else "" if candidate.measured else "dim"
        table.add_row(*_cells(candidate, best), verdict, style=style)
    left = len(candidates) - len(tried)
    if left:
        table.caption = f"{left} more were not tried; a larger budget= gives them time."
    return table


def _cells(candidate: Candidate, best: Candidate) -> list[str]:
    ratio = lambda seconds: f"{seconds / best.run_seconds:.2f}"
    show = lambda value, text: "" if value is None else text(value)
    lowering = candidate.lowering
    return [
        lowering.method,
        "all" if lowering.chunk_size is None else str(lowering.chunk_size),
        str(lowering.unroll),
        "yes" if lowering.remat else "no",
        show(candidate.run_seconds, format_seconds),
        show(candidate.run_seconds, ratio),
        show(candidate.temporary_bytes, format_bytes),
        show(candidate.compile_seconds, format_seconds),
        show(candidate.deviation, lambda deviation: f"{deviation:.0e}"),
    ]


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
