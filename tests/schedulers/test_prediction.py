"""What the output of a network means: from the right output follow x_0, epsilon and the score that it was made of."""

import numpy as np
import pytest
import torch

from ddpm_hf.schedulers.prediction import (
    PREDICTION_TYPES,
    SDE_PREDICTIONS,
    epsilon_weights,
    prediction_target,
    score_weights,
    x_start_weights,
)

TYPES = dict.fromkeys((*PREDICTION_TYPES, *SDE_PREDICTIONS))
POSTERIOR = (0.3, 0.65)  # the weights of x_0 and x_t in the mean of q(x_{t-1} | x_t, x_0)
NOISE_LEVELS = [(0.8, 0.6), (1e-5, 1.0), (1.0, 50.0), (0.999, 0.01)]  # variance preserving, and exploding


def right_output(prediction_type, scale, std):
    x_start, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    x_t = scale * x_start + std * noise
    level = dict(scale=scale, std=std, posterior=POSTERIOR)
    return x_start, noise, x_t, prediction_target(prediction_type, x_start=x_start, x_t=x_t, noise=noise, **level)


@pytest.mark.parametrize(("scale", "std"), NOISE_LEVELS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_right_output_gives_everything_back(prediction_type, scale, std):
    x_start, noise, x_t, output = right_output(prediction_type, scale, std)
    a, b = x_start_weights(prediction_type, scale, std, POSTERIOR)
    torch.testing.assert_close(a * x_t + b * output, x_start, rtol=1e-9, atol=1e-14 * std / scale + 1e-12)
    if prediction_type != "previous":
        a, b = epsilon_weights(prediction_type, scale, std)
        torch.testing.assert_close(a * x_t + b * output, noise, rtol=1e-9, atol=1e-9)
        a, b = score_weights(prediction_type, scale, std)
        torch.testing.assert_close(a * x_t + b * output, -noise / std, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_numbers_arrays_and_tensors_have_the_same_weights(prediction_type):
    levels = np.array([*NOISE_LEVELS, (0.0, 1.0)]).T  # with zero terminal SNR

    def of_x_start(scale, std):
        return x_start_weights(prediction_type, scale, std, tuple(0 * std + weight for weight in POSTERIOR))

    functions = [of_x_start]
    if prediction_type != "previous":
        functions += [lambda scale, std, f=f: f(prediction_type, scale, std) for f in (epsilon_weights, score_weights)]
    for weights in functions:
        expected = np.array([weights(scale, std) for scale, std in levels.T.tolist()]).T
        np.testing.assert_allclose(weights(*levels), expected, rtol=1e-14)
        np.testing.assert_allclose(torch.stack(weights(*torch.tensor(levels))).numpy(), expected, rtol=1e-14)


def test_where_nothing_of_x_0_is_left():
    """At zero terminal SNR epsilon and the score say nothing of x_0, and 0 is predicted; x_0 and v still say it."""
    for prediction_type in ("epsilon", "score"):
        assert x_start_weights(prediction_type, 0.0, 1.0) == (0, 0)
    assert x_start_weights("sample", 0.0, 1.0) == (0, 1)
    assert x_start_weights("v_prediction", 0.0, 1.0) == (0, -1)


def test_an_unknown_type_is_named():
    for function in (x_start_weights, epsilon_weights, score_weights):
        with pytest.raises(ValueError, match="^prediction_type='flow' is not known.*epsilon, sample, v_prediction"):
            function("flow", 0.8, 0.6)
