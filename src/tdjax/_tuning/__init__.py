"""Measures the lowerings and chooses the fastest that agrees with the reference.

`autotune` is the entrance. `candidates` are the lowerings to try, `search` is the order
in which they are tried and timed, `cache` keeps what was found, `report` shows it.
"""
