"""tdjax beside its peers: `python -m benchmarks`, one run, ratios."""
