"""Select the trunk of a config: the plain one, or the one with a convolutional stem."""

from ebt_vision.models.conv_trunk import ConvTrunk
from ebt_vision.models.patch_trunk import PatchTrunk
from ebt_vision.models.trunk_config import TrunkConfig


def build_trunk(config: TrunkConfig, *, num_inputs: int = 1) -> PatchTrunk:
    """Build the plain trunk, or with config.stem_widths the one with a convolutional stem."""
    if config.stem_widths:
        return ConvTrunk(config, num_inputs=num_inputs)
    return PatchTrunk(config, num_inputs=num_inputs)
