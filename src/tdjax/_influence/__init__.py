"""Which output step depends on which input step, read from the program.

`step_influence` is the entrance. `interpreter` runs the program on `spread`s instead of
arrays: what each element depends on, and the range it stays in. `rules` and `moves` say
how each primitive passes dependence on, `ranges` how it passes ranges on.
"""
