"""PyTorch again, through `torch.compile`: where there is something to fuse."""

import shutil

from benchmarks.candidate import Candidate
from benchmarks.peers import torch_folded


def candidate(case) -> Candidate:
    if case.layer == "Dense":
        raise NotImplementedError("one product: nothing to fuse")
    if shutil.which("g++") is None:
        raise NotImplementedError("torch.compile needs g++")
    return torch_folded.candidate(case, compiled=True)
