"""What `tdjax.keras` is made of.

* `drop_in`: Keras' own layer over all steps, as one program.
* `modules`: Flax modules that do what Keras' layers do. They know nothing of Keras and
  can be unpickled without it.
* `rules`: which Keras layer becomes which of those modules, with which weights.
* `convert`, `registry`, `file`: `to_flax` and the way back, by these rules.
"""
