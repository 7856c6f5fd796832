"""What the output of a network means, and what it is trained to give. Decided here and nowhere else.

At a noise level x_t = scale * x_0 + std * epsilon, with epsilon standard normal. An output of prediction type

    "epsilon"       is the noise (Ho, Jain, Abbeel 2020, eq. 11),
    "sample"        is x_0,
    "v_prediction"  is v = scale * epsilon - std * x_0 (Salimans & Ho 2022),
    "score"         is the gradient of log p(x_t) with respect to x_t, -epsilon / std (Score-SDE),
    "previous"      is the mean of q(x_{t-1} | x_t, x_0) (mu-tilde in Ho, Jain, Abbeel 2020, eq. 7), a step of a chain.

Each of x_0, epsilon and the score is then a weighted sum of x_t and the output. The functions below return the two weights.
`scale` and `std` are floats, float64 NumPy arrays or float64 tensors, and the weights are of the same kind and shape.
"""

from typing import TypeVar

import numpy as np
import torch

Coefficient = TypeVar("Coefficient", float, np.ndarray, torch.Tensor)


# Of a chain of discrete steps, and of a process in continuous time.
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "previous")
SDE_PREDICTIONS = ("epsilon", "score", "sample", "v_prediction")


# The types for which x_0 is off by at most the error of the output, at every noise level.
BOUNDED_PREDICTIONS = ("sample", "v_prediction")


def x_start_weights(
    prediction_type: str,
    scale: Coefficient,
    std: Coefficient,
    posterior: tuple[Coefficient, Coefficient] | None = None,
) -> tuple[Coefficient, Coefficient]:
    """The weights of x_t and of the output in x_0.

    Args:
        prediction_type: one of the types above.
        scale, std: the noise level. Where scale is 0 (zero terminal SNR), epsilon and the score say nothing of x_0, and both
            weights are 0: the middle of its range is predicted.
        posterior: the weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0); needed for "previous" alone.
    """
    match prediction_type:
        case "epsilon":
            return _inverse(scale), -std * _inverse(scale)
        case "sample":
            return 0 * std, 0 * std + 1
        case "v_prediction":
            return scale / (scale**2 + std**2), -std / (scale**2 + std**2)
        case "score":
            return _inverse(scale), std**2 * _inverse(scale)
        case "previous":
            assert posterior is not None
            of_x_start, of_x_t = posterior
            return -of_x_t / of_x_start, 1 / of_x_start
    raise _unknown(prediction_type)


def epsilon_weights(prediction_type: str, scale: Coefficient, std: Coefficient) -> tuple[Coefficient, Coefficient]:
    """The weights of x_t and of the output in epsilon; arguments as in `x_start_weights`, without "previous"."""
    match prediction_type:
        case "epsilon":
            return 0 * std, 0 * std + 1
        case "sample":
            return 1 / std, -scale / std
        case "v_prediction":
            return std / (scale**2 + std**2), scale / (scale**2 + std**2)
        case "score":
            return 0 * std, -std
    raise _unknown(prediction_type)


def score_weights(prediction_type: str, scale: Coefficient, std: Coefficient) -> tuple[Coefficient, Coefficient]:
    """The weights of x_t and of the output in the score, -epsilon / std; arguments as in `epsilon_weights`."""
    of_x_t, of_output = epsilon_weights(prediction_type, scale, std)
    return -of_x_t / std, -of_output / std


def prediction_target(
    prediction_type: str,
    *,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    noise: torch.Tensor,
    scale: torch.Tensor,
    std: torch.Tensor,
    posterior: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The right output for x_t = scale * x_start + std * noise, which a network is trained to give.

    Args:
        x_start, x_t, noise: images (B, C, H, W); the target has their shape.
        scale, std, posterior: as in `x_start_weights`, of shapes that broadcast to the images.
    """
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x_start
        case "v_prediction":
            return scale * noise - std * x_start
        case "score":
            return -noise / std
        case "previous":
            assert posterior is not None
            of_x_start, of_x_t = posterior
            return of_x_start * x_start + of_x_t * x_t
    raise _unknown(prediction_type)


def is_x_start(prediction_type: str) -> bool:
    """Whether the output is x_0 itself."""
    return prediction_type == "sample"


def is_posterior_mean(prediction_type: str) -> bool:
    """Whether the output is the mean of p(x_{t-1} | x_t) itself."""
    return prediction_type == "previous"


def _inverse(scale):
    """1 / scale, and 0 where scale is 0."""
    return (scale != 0) / (scale + (scale == 0))


def _unknown(prediction_type):
    names = ", ".join(dict.fromkeys((*PREDICTION_TYPES, *SDE_PREDICTIONS)))
    return ValueError(f"prediction_type={prediction_type!r} is not known here; choose one of {names}")
