"""An example from the command line to its last line of output."""

import inspect
import json
import sys
from collections.abc import Callable

from rich.console import Console

from _checkpoints import Checkpoints, checksum, write_atomically
from _display import save_curve
from _options import (
    InputError,
    Settings,
    SettingsType,
    parse_settings,
    resume_command,
)
from _problem import Problem
from _training import Run, train


def run_example(
    problem: Callable[[SettingsType], Problem],
    settings: type[SettingsType],
    arguments: list[str],
) -> int:
    """Trains a problem and reports; `sys.exit` takes what it returns.

    Returns:
      0; 2 if what the user gave cannot be used; 130 after Ctrl-C.
    """
    description = (inspect.getdoc(problem) or "").split("\n")[0]
    chosen = parse_settings(arguments, settings, description)
    console = Console()
    try:
        run = Run(problem(chosen), chosen, open_checkpoints(chosen))
        if chosen.resume:
            print(f"Goes on from step {run.state.step} of {chosen.steps}.")
        train(run, console)
        report(run, console)
    except KeyboardInterrupt:
        print("\nInterrupted. Go on with:", resume_command(sys.argv[0], arguments))
        return 130
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def open_checkpoints(settings: Settings) -> Checkpoints:
    """The checkpoints of the run to go on with; a new run has none yet."""
    checkpoints = Checkpoints(settings.out / "checkpoints")
    if checkpoints.latest is not None and not settings.resume:
        raise InputError(
            f"{settings.out} holds a run already: go on with it with --resume, or "
            "give another folder with --out"
        )
    return checkpoints


def report(run: Run, console: Console) -> None:
    """Shows what the problem has to show, and says where everything is."""
    problem, out = run.problem, run.settings.out
    plot, numbers = out / "learning_curve.png", out / "learning_curve.json"
    save_curve(plot, run.curve, problem.quantities, problem.baselines)
    content = json.dumps({"baselines": problem.baselines, "curve": run.curve}, indent=1)
    write_atomically(numbers, lambda file: file.write(content.encode()))
    problem.report(run.state.params, console, out)
    print(f"learning curve  {plot} ({numbers.name})")
    print(f"checkpoint      {run.checkpoints.path()}")
    print(f"parameters      {checksum(run.state.params)}")
