"""Rules: which Keras layer becomes which Flax module, with which weights.

To import this package registers them all.
"""

from tdjax._keras.rules import layers as layers
from tdjax._keras.rules import models as models
from tdjax._keras.rules import operations as operations
from tdjax._keras.rules import recurrent as recurrent
from tdjax._keras.rules import stateless as stateless
from tdjax._keras.rules import time as time
