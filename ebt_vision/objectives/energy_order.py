"""A loss on the order of energies: of two candidates for one image, the one nearer the clean image is to have the lower energy.

Descent alone trains the energy's slope; where the slope is small, between a finished candidate and an overthought one, nothing
says which of the two is lower. This loss says it, so that the energy can verify: choose among candidates, and stop.

An energy whose single step of size alpha ends at the clean image is |candidate - clean|^2 / (2 alpha). So energies times
2 alpha / values have the unit of a mean squared error, and differences of the two can be compared without a free scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def energy_as_error(energies: Tensor, step_size: Tensor, num_values: int) -> Tensor:
    """Energies in the unit of a mean squared error over `num_values` values, up to a constant for each image; same shape."""
    return energies * (2.0 * step_size / num_values)


def energy_order_loss(energies: Tensor, errors: Tensor, scale: float) -> Tensor:
    """Bradley-Terry loss () over all pairs among the N candidates of each image: lowest where energies differ as errors do.

    `energies` (N, B) with a graph, in the unit of `errors` (see energy_as_error); `errors` (N, B), mean squared errors. Of two
    candidates i and j, i is the better one with probability sigmoid((error_j - error_i) / scale). What the energies
    say of it is the same with energies; the loss is the cross-entropy of the two, times scale. Pairs that differ by much more
    than `scale` are only put in order, closer ones have their difference regressed. Raises ValueError for one candidate.
    """
    if len(energies) < 2:
        raise ValueError("an order needs two candidates or more")
    first, second = torch.triu_indices(len(energies), len(energies), offset=1)
    logits = (energies[second] - energies[first]) / scale
    target = torch.sigmoid((errors[second] - errors[first]).detach() / scale)
    return scale * F.binary_cross_entropy_with_logits(logits, target)
