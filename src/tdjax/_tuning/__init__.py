"""Measures the lowerings and chooses the fastest that agrees with the reference.

`autotune` is the entrance for a function or layer, `model` for a whole model. Below it:

- `candidates` are the lowerings to try, and the choice among them; `programs` compiles
  them; `independence` shows whether `"fold"` is allowed; `deviations` compares results.
- `search` tries them, `rounds` times them in turn, `going_on` continues a search.
- `result` is what users get, `report` shows it, `cache` keeps it under its `key`.
- `table` puts options in effect, `tuned` binds them to a model, `on_miss` finds them
  while a function is traced, `shipped` has those that come with the library.
"""
