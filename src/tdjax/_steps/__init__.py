"""Everything between a call of `time_distributed` and the program that XLA compiles.

A call goes through the modules in this order:

1. `transform` (functions) and `stateful` (Flax layers with state and random keys) are
   the entrances; `_keras.drop_in.steps` is that of Keras layers.
2. `axes` pairs each array of the arguments with its time axis.
3. `select_steps` says which steps are computed: all (`steps`), those that a mask hides
   replaced (`masked`), or only the valid ones (`packed`).
4. `lowering` compiles the steps: by `vmap` or `fold`, at once or in the `loops`.

`places` describes a call to whoever chooses its lowering: `_tuning` for
`method="auto"`, and where a whole model is tuned.

`carried` runs state that goes from step to step, such as Keras' running statistics.
`cpu_convolution` rewrites convolutions in compiled loops on a CPU. `hints` adds notes
to errors.
"""
