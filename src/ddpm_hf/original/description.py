"""What a checkpoint of another code base holds, in the words of this package."""

from dataclasses import dataclass


class UnsupportedNetwork(ValueError):
    """An error that says which variant of a network is not supported, or which option does not fit the tensors."""


@dataclass
class Description:
    """A network and its process.

    Attributes:
        network: the class, "DDPMUNet" or "NoisyClassifier".
        config: arguments of that class.
        scheduler: the class of the scheduler.
        scheduler_config: arguments of that class.
        low_resolution: side of the images that an upsampler enlarges; None for other networks.
    """

    network: str
    config: dict
    scheduler: str
    scheduler_config: dict
    low_resolution: int | None = None
