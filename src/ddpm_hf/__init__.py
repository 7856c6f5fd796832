from .likelihood import BitsPerDim, bits_per_dim
from .scheduler import (
    Gaussian,
    VariationalDDPMScheduler,
    discretized_gaussian_log_likelihood,
    space_timesteps,
)
from .unet import DDPMUNet
