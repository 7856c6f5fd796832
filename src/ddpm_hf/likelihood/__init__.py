"""Likelihoods in bits per dimension, by the variational bound and by the ODE; encodings by the ODE."""

from ddpm_hf.likelihood.bound import BitsPerDim, bits_per_dim, progressive_coding, rate_distortion
from ddpm_hf.likelihood.encoding import Encoding, decode, encode, interpolate_latents
from ddpm_hf.likelihood.estimate import BitsPerDimEstimate, estimate_bits_per_dim
from ddpm_hf.likelihood.ode import OdeBitsPerDim, OdeLikelihood, OdeStopped, ode_bits_per_dim, ode_log_likelihood

__all__ = [
    "BitsPerDim",
    "BitsPerDimEstimate",
    "Encoding",
    "OdeBitsPerDim",
    "OdeLikelihood",
    "OdeStopped",
    "bits_per_dim",
    "decode",
    "encode",
    "estimate_bits_per_dim",
    "interpolate_latents",
    "ode_bits_per_dim",
    "ode_log_likelihood",
    "progressive_coding",
    "rate_distortion",
]
