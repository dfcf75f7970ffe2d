"""The size of a PatchDiffusion, separate from the network, because importing diffusers takes seconds."""

from dataclasses import dataclass

from ebt_vision.models.trunk_config import TrunkConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchDiffusionConfig(TrunkConfig):
    """The fields of the trunk. noise_process is "vp": for a photograph, sampling starts at the timestep of its noise."""

    def __post_init__(self) -> None:
        TrunkConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        if self.noise_process != "vp":
            raise ValueError(f"noise_process={self.noise_process!r} is not for a diffusion model; use 'vp'")
