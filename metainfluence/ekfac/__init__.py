"""EK-FAC: Kronecker-factored curvature of networks whose layers are declared, or found in Flax models.

Give `metainfluence.solvers.ekfac` an operator whose losses call `Dense` and `Conv` of this module, or Flax's own
`Dense`, `Linear` and `Conv`, which are recognised without a change to the model. Calling a layer computes only the
layer.
"""

from metainfluence.ekfac._factors import Block as Block
from metainfluence.ekfac._factors import Factors as Factors
from metainfluence.ekfac._factors import estimate as estimate
from metainfluence.ekfac._layers import Conv as Conv
from metainfluence.ekfac._layers import Dense as Dense
from metainfluence.ekfac._layers import outputs as outputs

__all__ = ["Block", "Conv", "Dense", "Factors", "estimate", "outputs"]
