"""The softmax head of every step and its loss, without all logits at once.

`loss` checks the arguments and chooses the sizes of the blocks. `blocks` computes the
losses and their gradients, a block of logits at a time.
"""
