"""A loss on the order of energies: of two candidates for one image, the one nearer to the clean image gets the lower energy.

Descent trains only the slope of the energy. Where the slope is small, between a finished and an overthought candidate, nothing
determines which energy is lower. This loss does. The energy can then verify: select among candidates, and decide when to stop.

If a single step of size alpha ends at the clean image, the energy is |candidate - clean|^2 / (2 alpha). Energies times
2 alpha / (number of values) therefore have the unit of a mean squared error, and need no free scale to be compared with one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def energy_as_error(energies: Tensor, step_size: Tensor, num_values: int) -> Tensor:
    """Scale energies to the unit of a mean squared error over `num_values` values, up to a constant per image; same shape."""
    return energies * (2.0 * step_size / num_values)


def energy_order_loss(energies: Tensor, errors: Tensor, scale: float) -> Tensor:
    """Bradley-Terry loss () over all pairs among the N candidates of each image; minimal if energies differ as errors do.

    `energies` (N, B) with a graph, in the unit of `errors` (see energy_as_error); `errors` (N, B), mean squared errors.
    Candidate i is better than j with probability sigmoid((error_j - error_i) / scale). The same formula with energies gives the
    prediction. The loss is the cross-entropy of the two, times scale. Pairs that differ by much more than `scale` are only
    ordered; for closer pairs the difference itself is regressed. Raises ValueError for one candidate.
    """
    if len(energies) < 2:
        raise ValueError("an order needs at least two candidates")
    first, second = torch.triu_indices(len(energies), len(energies), offset=1)
    logits = (energies[second] - energies[first]) / scale
    target = torch.sigmoid((errors[second] - errors[first]).detach() / scale)
    return scale * F.binary_cross_entropy_with_logits(logits, target)
