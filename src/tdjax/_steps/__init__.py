"""Everything between a call of `time_distributed` and the program that XLA compiles.

A call goes through the modules in this order:

1. `transform` (functions) and `stateful` (Flax layers with state and random keys) are
   the entrances.
2. `axes` pairs each array of the arguments with its time axis.
3. `masked` and `packed` say which steps are computed and what a masked step sees.
4. `lowering` compiles the steps: `"vmap"` or `"fold"`, in blocks and loops.

`carried` runs what goes from step to step, such as Keras' running statistics.
`cpu_convolution` rewrites convolutions in compiled loops on a CPU.
"""
