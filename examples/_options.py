"""The command line of `tagging.py`."""

import argparse
import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The options and their defaults."""

    steps: int = 1000
    batch_size: int = 32
    length: int = 128
    hidden: int = 64
    learning_rate: float = 5e-3
    seed: int = 0
    checkpoint_every: int = 100
    out: Path = Path("runs/tagging")
    resume: bool = False
    conllu: tuple[str, str] | None = None

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, by option."""
        free = ("checkpoint_every", "out", "resume", "conllu")
        fields = dataclasses.asdict(self).items()
        return {_option(name): value for name, value in fields if name not in free}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def positive_int(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**32 - 1, got {text}")
    return value


def parse_settings(arguments: list[str], description: str) -> Settings:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def add(name, kind, text, **options):
        default = getattr(Settings, name)
        parser.add_argument(
            _option(name), type=kind, help=text, default=default, **options
        )

    add("steps", positive_int, "steps of training")
    add("batch_size", positive_int, "sequences in a step")
    add("length", positive_int, "characters (or words) in a sequence, at most")
    add("hidden", positive_int, "features of the embedding and of each direction")
    add("learning_rate", positive_float, "the highest of the schedule")
    add("seed", seed, "of the parameters, the noise and the order of the data")
    add("checkpoint_every", positive_int, "steps from one checkpoint to the next")
    add("out", Path, "folder of the checkpoints and the learning curve")
    files = {"nargs": 2, "metavar": ("TRAIN", "DEV")}
    add("conllu", str, "tag parts of speech in CoNLL-U files instead", **files)
    go_on = "go on from the newest checkpoint in --out"
    parser.add_argument("--resume", action="store_true", help=go_on)
    return Settings(**vars(parser.parse_args(arguments)))


def resume_command(script: str, arguments: list[str]) -> str:
    rest = [argument for argument in arguments if argument != "--resume"]
    return shlex.join(["python", script, *rest, "--resume"])
