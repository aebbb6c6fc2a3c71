"""Flax modules that do what Keras' layers do. Nothing below imports Keras.

Parameters have Flax's names and Keras' shapes, so that a converted model's leaves are
the weights of the Keras model as they are.
"""
