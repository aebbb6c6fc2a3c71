"""How the tuner shows its work: a bar while it runs, a table of what it found."""

import contextlib
import importlib.util
from typing import Any

from tdjax._tuning.candidates import OPTIONS, Candidate


@contextlib.contextmanager
def progress_bar(total: int):
    """Yields `report(candidate)`, which moves a bar; silent where Rich is missing."""
    if importlib.util.find_spec("rich") is None:
        yield lambda candidate: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as p:
        task = p.add_task("Trying lowerings", total=total)
        yield lambda candidate: p.update(task, advance=1, description=str(candidate))


def rich_table(candidates: list[Candidate], best: Candidate, title: str) -> Any:
    """A `rich.table.Table`: the chosen first, then by time, then the refused."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("method", "chunk", "unroll", "remat"):
        table.add_column(name, no_wrap=True)
    for name in ("time", "ratio", "memory", "compile", "deviation"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    order = lambda each: (each is not best, not each.measured, each.run_seconds or 1e9)
    tried = [each for each in candidates if each.verdict != "no time left"]
    for each in sorted(tried, key=order):
        verdict = "chosen" if each is best else each.verdict
        style = "bold" if each is best else "" if each.measured else "dim"
        table.add_row(*_cells(each, best), verdict, style=style)
    left = len(candidates) - len(tried)
    if left:
        table.caption = f"No time was left for {left} more; budget= gives more."
    return table


def _cells(each: Candidate, best: Candidate) -> list[str]:
    ratio = lambda seconds: f"{seconds / best.run_seconds:.2f}"
    show = lambda value, text: "" if value is None else text(value)
    method, size, unroll, remat = (each.options[name] for name in OPTIONS)
    return [
        method,
        "all" if size is None else str(size),
        str(unroll),
        "yes" if remat else "no",
        show(each.run_seconds, format_seconds),
        show(each.run_seconds, ratio),
        show(each.temporary_bytes, format_bytes),
        show(each.compile_seconds, format_seconds),
        show(each.deviation, lambda deviation: f"{deviation:.0e}"),
    ]


def format_seconds(seconds: float) -> str:
    """With the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def format_bytes(size: int) -> str:
    """In megabytes of 10**6 bytes, or in smaller units."""
    if size >= 1e5:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e3:.1f} kB" if size >= 1e3 else f"{size} B"
