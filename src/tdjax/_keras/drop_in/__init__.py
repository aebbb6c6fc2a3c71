"""The drop-in `TimeDistributed` of Keras: all steps of a Keras layer as one program.

`steps` runs them, with the layer's variables, losses and masks. `independent` says for
which layers steps can be examples of one large batch.
"""
