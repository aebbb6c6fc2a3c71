"""What `tdjax.keras` is made of: the drop-in's steps, and Keras models as Flax ones.

The Flax modules know nothing of Keras and are unpickled without it: `graph`, `layers`,
`merging`, `normalization`, `operations`, `recurrent`, `stateless`, `time`. The rules
say which Keras layer becomes which of them.
"""
