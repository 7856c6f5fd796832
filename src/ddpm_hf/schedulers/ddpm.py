"""The DDPM scheduler: the diffusion process q, the model p, the variational bound, and the samplers.

Equation numbers are those of Ho, Jain, Abbeel 2020 ("the paper") unless IDDPM (Nichol & Dhariwal 2021) or DDIM (Song,
Meng, Ermon 2020) is named. Timesteps are 0-based: t = 0 here is t = 1 in the paper. Likelihoods are in bits per dimension if
the name says so, otherwise in nats. All tables are float64.
"""

import json
import operator
from numbers import Integral, Real

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput, rescale_zero_terminal_snr
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.arguments import check_argument, checked_arguments, listed, shown
from ddpm_hf.files.pipeline_folder import GuardedConfig
from ddpm_hf.files.saved_config import SavedConfig, package_only, sorted_json
from ddpm_hf.schedulers.betas import BETA_SCHEDULES, MOST_TIMESTEPS, OWN_SCHEDULES, check_betas, space_timesteps
from ddpm_hf.schedulers.conditioning_times import rescales_timesteps
from ddpm_hf.schedulers.gaussian import Gaussian, discretized_gaussian_log_likelihood, gaussian_kl, nats_to_bits_per_dim
from ddpm_hf.schedulers.precision import in_working_precision
from ddpm_hf.schedulers.prediction import PREDICTION_TYPES, is_posterior_mean, is_x_start, prediction_target
from ddpm_hf.schedulers.tables import ChainTables, ddim_tables, weighted_sum

logger = logging.get_logger(__name__)


FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
LEARNED_VARIANCES = ("learned", "learned_range")  # the network's output has twice the channels of the images
VARIANCE_TYPES = (*FIXED_VARIANCES, *LEARNED_VARIANCES, "analytic")


TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "iddpm")


# Values that diffusers' classes do not know, and the values that they read instead: the first is saved, all are read back.
# "leading" stands for "iddpm": its strides are integers, as the steps of diffusers' DDPMScheduler and DDIMScheduler assume, and
# of all spacings it alone keeps solvers without clipping away from the end of a cosine schedule, where an error of epsilon
# becomes an error of x_0 20,000 times as large. Older folders have "linspace". Stock classes cannot sample a network that
# learned its log variance directly; with "fixed_small" they stop at the doubled channels instead of sampling NaN.
STOCK_VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "timestep_spacing": {"iddpm": ("leading", "linspace")},
    "variance_type": {"fixed_large_log": ("fixed_large",), "learned": ("fixed_small",), "analytic": ("fixed_small",)},
}


# The keys of the process that the network was trained for. They are passed on to every scheduler class: defaults differ.
PROCESS_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


# The schedule in a saved config that diffusers' classes must refuse; their message contains it.
REFUSED = "ddpm_hf.rescale_timesteps"


def _shortened(chain):
    """Timesteps in an error message, of many the first and the last."""
    if len(chain) <= 8:
        return str(chain)
    first, last = (", ".join(map(str, part)) for part in (chain[:3], chain[-3:]))
    return f"[{first}, ..., {last}] of {len(chain)} timesteps"


class VariationalDDPMScheduler(SavedConfig, GuardedConfig, DDPMScheduler):
    """diffusers' `DDPMScheduler` with all of the paper: exact tables, posteriors, the variational bound and its decoder.

    "The chain" is the list of timesteps of the last call of `set_timesteps`, or all T timesteps before any call. q, p, the
    bound and `step` act on the chain, with betas and variances recomputed for it. `t` is always an original, 0-based timestep:
    an int, a 0-d tensor, or an int64 tensor (B,) with one for each image. A `t` outside the chain raises ValueError, except in
    a tensor on an accelerator, where the check would wait for the device: there the image becomes NaN.

    Args in addition to those of `DDPMScheduler`:
        beta_schedule: also "quad", "warmup10", "warmup50", "const", "jsd" (the paper's code), "cosine" (IDDPM eq. 17) and
            "linear_scaled_by_T", which multiplies beta_start and beta_end by 1000 / T as IDDPM's linear schedule does. Other
            schedules do not depend on `num_train_timesteps` in this way. `schedulers.betas` describes each. "learned" needs
            `trained_betas`, which were trained with the network.
        variance_type: "fixed_small" (the posterior variance, 0 at the first step), "fixed_large" (beta, and at the first step
            the posterior variance of the second), "learned" (the second half of the output channels is the log variance) or
            "learned_range" (it interpolates between the logarithms of the two fixed variances, IDDPM eq. 15).
            "analytic" is the variance with the lowest bound (Bao et al. 2022), from `x_start_mse`.
            "fixed_small_log" and "fixed_large_log" are the same distributions. The log variance of the first step is always
            that of the second step's posterior, as in the paper's code.
        prediction_type: also "previous": the output is the mean of x_{t-1} (the paper's mu-tilde prediction).
        timestep_spacing: also "iddpm": even fractional strides that keep both ends, as `space_timesteps(T, n)`.
        levels: number of grey levels of the data for the decoder L_0, 256 for 8 bits.
        rescale_timesteps: whether the network is given t * 1000 / T in place of t (IDDPM's code); see `conditioning_times`. No
            class of diffusers opens what is then saved. `from_config` of its schedulers keeps the setting.
        x_start_mse: (T,) numbers in [0, 1], the mean squared error of the predicted x_0 at each timestep, for the variance
            "analytic"; see `likelihood.estimate_reverse_variances`.
        timestep_lists: chains by name and number of steps, {"optimal": {"25": [...]}}, for `set_timesteps(25, "optimal")`.

    `config` holds keys and values that diffusers' classes understand, and the others under "_ddpm_hf". A schedule that some of
    these classes do not know is saved as `trained_betas` too. `from_config` of any scheduler accepts the config, and the config
    of that scheduler can be converted back.

    At most 100,000 timesteps and 2**24 grey levels are accepted, so that a config from elsewhere cannot exhaust the memory.

    Raises:
        ValueError: a value that is not supported (the message lists those that are); betas outside [1e-15, 1], or so large that
            nothing is left of x_0 before the last timestep.
    """

    stock_class = "DDPMScheduler"
    source_name = "ddpm_scheduler"
    stands_for = ("DDPMScheduler",)
    is_continuous = False

    @checked_arguments(
        num_train_timesteps="[1, 100000]",
        beta_start="[1e-15, 1)",
        beta_end="[1e-15, 1]",
        beta_schedule=(*BETA_SCHEDULES, "learned"),
        prediction_type=PREDICTION_TYPES,
        dynamic_thresholding_ratio="(0, 1]",
        clip_sample_range="(0, 1000000]",
        sample_max_value="(0, 1000000]",
        timestep_spacing=TIMESTEP_SPACINGS,
        steps_offset="[0, 99999]",
        levels="[2, 16777216]",
        x_start_mse="[0, 1]",
    )
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        levels: int = 256,
        rescale_timesteps: bool = False,
        x_start_mse: np.ndarray | list[float] | None = None,
        timestep_lists: dict | None = None,
    ):
        if variance_type not in VARIANCE_TYPES:
            if variance_type is not None:  # configs of other schedulers have None
                logger.warning(
                    f"variance_type={shown(variance_type)} is not known; 'fixed_small' is used, as in diffusers. Choose one of "
                    f"{', '.join(VARIANCE_TYPES)}"
                )
            variance_type = "fixed_small"
        if trained_betas is not None:
            if not 1 <= len(trained_betas) <= MOST_TIMESTEPS:
                raise ValueError(
                    f"trained_betas has {len(trained_betas)} entries; give 1 to {MOST_TIMESTEPS}, one for each timestep"
                )
            betas = np.array(trained_betas, dtype=np.float64)
            num_train_timesteps = len(betas)
        elif beta_schedule == "learned":
            raise ValueError("beta_schedule='learned' has no formula; give trained_betas, which training has learned")
        else:
            betas = BETA_SCHEDULES[beta_schedule](num_train_timesteps, beta_start, beta_end)
        if rescale_betas_zero_snr and num_train_timesteps < 2:
            raise ValueError(f"rescale_betas_zero_snr=True needs num_train_timesteps >= 2, not {num_train_timesteps}")
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(torch.from_numpy(betas)).numpy()
        # the rescaled betas are saved for classes that do not rescale; rescaling them again changes nothing
        own_keys = {
            "levels": levels,
            "rescale_timesteps": rescale_timesteps or None,
            "x_start_mse": None if x_start_mse is None else list(x_start_mse),
            "timestep_lists": timestep_lists,
        }
        self._make_config_stock(betas, beta_schedule, trained_betas, variance_type, own_keys)
        schedule = "trained_betas"
        if trained_betas is None:
            schedule = (
                f"beta_schedule={beta_schedule!r} with num_train_timesteps={num_train_timesteps}, beta_start={beta_start} and "
                f"beta_end={beta_end}"
            )
        check_betas(betas, schedule)
        check_chain_keys(num_train_timesteps, variance_type, prediction_type, x_start_mse, timestep_lists)
        if steps_offset >= num_train_timesteps:
            raise ValueError(f"steps_offset={steps_offset} must be less than num_train_timesteps={num_train_timesteps}")

        self.levels = levels
        self.variance_type = variance_type
        self.prediction_type = prediction_type
        self.timestep_spacing = timestep_spacing
        self.x_start_mse = None
        if variance_type == "analytic":
            self.x_start_mse = torch.tensor(x_start_mse, dtype=torch.float64, device="cpu").clamp(min=1e-30)
        self.timestep_lists = timestep_lists or {}
        self.betas = torch.from_numpy(betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0

        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._all_steps = self._chain = self._make_chain(range(num_train_timesteps))

    # configuration

    def _make_config_stock(self, betas, beta_schedule, trained_betas, variance_type, own_keys):
        extra = {key: value for key, value in own_keys.items() if value is not None}
        stock = {"num_train_timesteps": len(betas), "variance_type": variance_type}
        for key, replacements in STOCK_VALUES.items():
            value = stock.get(key, self.config[key])
            if value in replacements:
                extra[key], stock[key] = value, replacements[value][0]
        if trained_betas is not None or beta_schedule in OWN_SCHEDULES or self.config.rescale_betas_zero_snr:
            stock["trained_betas"] = betas.tolist()
            if trained_betas is None:
                extra["trained_betas"] = None  # to be computed from the schedule's name
        config = {key: value for key, value in {**self.config, **stock}.items() if key not in own_keys}
        config["_ddpm_hf"] = extra
        if "_use_default_values" in config:
            explicit = {*own_keys, *PROCESS_KEYS, *extra}
            config["_use_default_values"] = [key for key in config["_use_default_values"] if key not in explicit]
        self._internal_dict = FrozenDict(config)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """diffusers' hook in `from_config`: restore the values that `config` keeps under "_ddpm_hf"."""
        config_dict = dict(config_dict)
        for key, value in check_argument("_ddpm_hf", config_dict.pop("_ddpm_hf", None) or {}, dict).items():
            replaced = STOCK_VALUES.get(key, {}).get(value) if isinstance(value, str) else None
            # not if the value was changed while the config belonged to another class
            if replaced is None or config_dict.get(key) in replaced:
                config_dict[key] = value
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def is_stock(self) -> bool:
        """Whether diffusers' pipelines tell the network what it was trained with."""
        return not rescales_timesteps(self.config)

    def to_json_string(self) -> str:
        """The config as JSON. Unless `is_stock`, its schedule stands under "_ddpm_hf", so that diffusers' classes refuse it."""
        text = super().to_json_string()
        if self.is_stock:
            return text
        config = json.loads(text)
        schedule = {key: config[key] for key in ("beta_schedule", "trained_betas")}
        config |= {"beta_schedule": REFUSED, "trained_betas": None, "_ddpm_hf": schedule | config["_ddpm_hf"]}
        return sorted_json(config)

    @package_only
    def use_betas(self, betas: torch.Tensor, alphas_cumprod: torch.Tensor) -> None:
        """Replace the betas, as while they are learned; the chain keeps its timesteps.

        q, p and the bound are then differentiable in them. `config`, and with it what is saved or copied by `from_config`,
        keeps the betas that it has.

        Args:
            betas, alphas_cumprod: (T,) float64 (float32 on Apple's GPUs), beside the images.

        Raises:
            ValueError: another shape than (T,). Values are not checked: that would wait for a device.
        """
        shape = (self.config.num_train_timesteps,)
        if tuple(betas.shape) != shape or tuple(alphas_cumprod.shape) != shape:
            raise ValueError(
                f"betas and alphas_cumprod have the shapes {tuple(betas.shape)} and {tuple(alphas_cumprod.shape)}; give {shape}"
            )
        timesteps = self._chain.timesteps
        self.betas, self.alphas, self.alphas_cumprod = betas, 1.0 - betas, alphas_cumprod
        self._all_steps = self._make_chain(range(len(betas)))
        self._chain = self._all_steps if len(timesteps) == len(betas) else self._make_chain(timesteps)

    @property
    def learns_variance(self) -> bool:
        """Whether the second half of the network's output channels determines the variance."""
        return self.variance_type in LEARNED_VARIANCES

    # the chain

    @property
    def chain(self) -> list[int]:
        """The original timesteps of the chain, ascending."""
        return list(self._chain.timesteps)

    def _make_chain(self, timesteps, variance_type=None):
        variance_type = variance_type or self.variance_type
        mse = self.x_start_mse if variance_type == "analytic" else None
        options = variance_type, self.prediction_type, mse
        return ChainTables(list(timesteps), self.betas, self.alphas_cumprod, *options)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | str | None = None,
    ) -> None:
        """Set the chain: `num_inference_steps` timesteps by `timestep_spacing`, or exactly `timesteps`.

        Args:
            num_inference_steps: 1 to num_train_timesteps.
            device: the device of `self.timesteps`. On the CPU, a loop over it never waits for an accelerator.
            timesteps: strictly descending original timesteps; or, with num_inference_steps, a name in `timestep_lists`.

        Raises:
            ValueError: both arguments or neither are given; timesteps that are not strictly descending in [0, T); an unknown
                name, or one without a list of so many steps.
        """
        T = self.config.num_train_timesteps
        if isinstance(timesteps, str):
            num_inference_steps, timesteps = None, self._named_timesteps(timesteps, num_inference_steps)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps")
        if timesteps is None and not (isinstance(num_inference_steps, Integral) and 1 <= num_inference_steps <= T):
            raise ValueError(
                f"num_inference_steps={num_inference_steps!r} must be an integer, 1 to {T}, the steps of the process"
            )
        chain = self._spaced(num_inference_steps) if timesteps is None else [_index(t) for t in timesteps][::-1]
        if not chain or chain[0] < 0 or chain[-1] >= T or any(a >= b for a, b in zip(chain, chain[1:])):
            source = "timesteps" if timesteps is not None else f"steps_offset={self.config.steps_offset}"
            raise ValueError(
                f"{source} makes the chain {_shortened(chain[::-1])}; timesteps must be strictly descending within "
                f"{T - 1} to 0"
            )
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chain)
        self.timesteps = torch.tensor(chain[::-1], device=device)
        if chain != self._chain.timesteps:
            self._chain = self._all_steps if len(chain) == T else self._make_chain(chain)

    def _named_timesteps(self, name, n):
        """The descending timesteps of a list in `timestep_lists`."""
        lists = self.timestep_lists.get(name)
        if lists is None:
            known = listed(self.timestep_lists) or "none: `ddpm-hf optimize-chain` computes them"
            raise ValueError(f"timesteps={shown(name)} is no list of this scheduler; it has {known}")
        if str(n) not in lists:
            raise ValueError(
                f"num_inference_steps={n!r}: the lists of timesteps={shown(name)} have {listed(sorted(lists, key=int))} steps"
            )
        return lists[str(n)][::-1]

    def _spaced(self, n):
        """n ascending timesteps by `timestep_spacing` (Lin et al. 2024, table 2; IDDPM section 4)."""
        T = self.config.num_train_timesteps
        if self.timestep_spacing == "iddpm":
            return space_timesteps(T, n)
        if self.timestep_spacing == "linspace":
            steps = np.linspace(0, T - 1, n).round()
        elif self.timestep_spacing == "leading":
            steps = np.arange(n) * (T // n) + self.config.steps_offset
        else:
            steps = np.round(T - np.arange(n)[::-1] * (T / n)) - 1
        return steps.astype(np.int64).tolist()

    def previous_timestep(self, timestep: int) -> torch.Tensor:
        """The next lower timestep of the chain, a 0-d tensor; -1 after the last."""
        position = self._position(timestep)
        return torch.tensor(self._chain.timesteps[position - 1] if position > 0 else -1)

    def _position(self, t, like=None):
        """The position of timestep t in the chain: an int for one timestep, a tensor on the device of `like` for (B,)."""
        chain = self._chain
        if isinstance(t, torch.Tensor) and t.dim() > 0:
            position = t = self._in_range(t if like is None else t.to(like.device))
            if chain is not self._all_steps:
                position = chain.table_on("positions", t.device)[t]
                if t.device.type == "cpu" and (outside := position == len(chain.timesteps)).any():
                    self._refuse(t[outside][0].item())
            return position
        position = chain.position.get(_index(t))
        return position if position is not None else self._refuse(_index(t))

    def _in_range(self, t):
        if t.is_floating_point():
            raise ValueError(f"timesteps of dtype {t.dtype} must be integers")
        t, T = t.long(), self.config.num_train_timesteps
        if t.device.type == "cpu" and (outside := (t < 0) | (t >= T)).any():
            raise ValueError(f"timestep {t[outside].flatten()[0].item()} is outside of the process, 0 to {T - 1}")
        return t

    def _refuse(self, t):
        steps = self._chain.timesteps
        raise ValueError(
            f"timestep {t} is not in the chain of {len(steps)} steps from {steps[0]} to {steps[-1]}; see set_timesteps"
        )

    # q

    @package_only
    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor | int, noise: torch.Tensor) -> torch.Tensor:
        """Draw x_t from q(x_t | x_0) with the given noise: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, eq. 4.

        Args:
            x_start: images (B, C, H, W) in [-1, 1].
            t: 0-based timesteps of the chain.
            noise: standard normal, of the shape of x_start.

        Returns:
            x_t (B, C, H, W), in the dtype of x_start.
        """
        return self._noised(self._chain, x_start, self._position(t, x_start), noise)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | int
    ) -> torch.Tensor:
        """`q_sample` with the argument order of diffusers, for any of the T timesteps, in the chain or not."""
        timesteps = self._in_range(torch.as_tensor(timesteps)).reshape(-1).to(original_samples.device)
        return self._noised(self._all_steps, original_samples, timesteps, noise)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | int) -> torch.Tensor:
        """The target of v-prediction, sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022), for any timestep."""
        timesteps = self._in_range(torch.as_tensor(timesteps)).reshape(-1).to(noise.device)
        return self._noised(self._all_steps, noise, timesteps, -in_working_precision(sample))

    @staticmethod
    def _noised(chain, a, position, b):
        dtype, a, b = a.dtype, in_working_precision(a), in_working_precision(b)
        return weighted_sum(chain.columns_at("x_t", position, a), a, b).to(dtype)

    @package_only
    def epsilon_from_x_start(self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
        """The noise between x_0 and x_t, (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t), eq. 9; images (B, C, H, W)."""
        x_start, x_t, position = in_working_precision(x_start), in_working_precision(x_t), self._position(t, x_t)
        # divided by sqrt(abar_t) first, as where x_0 is predicted, so that the rounding errors of the two cancel
        unscaled = x_t * self._chain.column_at("reciprocal_sqrt_alphas_cumprod", position, x_t)
        return (unscaled - x_start) * self._chain.column_at("sqrt_snr", position, x_t)

    @package_only
    def prediction_target(
        self, x_start: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor | int
    ) -> torch.Tensor:
        """The output that the network is trained to give at (x_t, t). Images (B, C, H, W); t 0-based, of the chain."""
        x_start, x_t, noise = (in_working_precision(images) for images in (x_start, x_t, noise))
        position = self._position(t, x_t)
        scale, std = self._chain.columns_at("x_t", position, x_t)
        posterior = self._chain.columns_at("posterior_mean", position, x_t)
        images = dict(x_start=x_start, x_t=x_t, noise=noise)
        return prediction_target(self.prediction_type, **images, scale=scale, std=std, posterior=posterior)

    @package_only
    def draw_timesteps(
        self, batch_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Draw timesteps of the chain uniformly: 0-based original timesteps, int64 (batch_size,) on `device`.

        They are drawn on the device of the generator, if there is one.
        """
        chain, source = self._chain, device if generator is None else generator.device
        index = torch.randint(len(chain.timesteps), (batch_size,), generator=generator, device=source)
        return chain.table_on("timesteps", index.device)[index].to(device)

    @package_only
    def q_mean_variance(self, x_start: torch.Tensor, t: torch.Tensor | int) -> Gaussian:
        """q(x_t | x_0), eq. 4. x_start (B, C, H, W) in [-1, 1]; t 0-based, of the chain."""
        x_start, position = in_working_precision(x_start), self._position(t, x_start)
        mean = self._chain.column_at("sqrt_alphas_cumprod", position, x_start) * x_start
        variance = self._full("one_minus_alphas_cumprod", position, x_start)
        return Gaussian(mean, variance, self._full("log_one_minus_alphas_cumprod", position, x_start))

    @package_only
    def q_posterior(self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | int) -> Gaussian:
        """q(x_{t-1} | x_t, x_0), eq. 6-7. Images (B, C, H, W); t: 0-based, of the chain.

        At the chain's first step the variance is 0, and the log variance that of the second step.
        """
        x_start, x_t, position = in_working_precision(x_start), in_working_precision(x_t), self._position(t, x_t)
        return Gaussian(
            weighted_sum(self._chain.columns_at("posterior_mean", position, x_t), x_start, x_t),
            self._full("posterior_variance", position, x_t),
            self._full("posterior_log_variance_clipped", position, x_t),
        )

    @package_only
    def _full(self, name, position, like):
        """The entry of a table, expanded to the shape of `like`."""
        if isinstance(position, int):
            return self._chain.table_on(name, like.device)[position].to(like.dtype).expand(like.shape)
        return self._chain.column_at(name, position, like).expand(like.shape)

    # p

    @package_only
    def p_mean_variance(
        self,
        model_output: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor | int,
        clip_sample: bool | None = None,
    ) -> Gaussian:
        """p(x_{t-1} | x_t) from the network's output, eq. 1 and 11, with `.pred_original_sample`.

        Args:
            model_output: (B, C, H, W), or (B, 2C, H, W) if the variance is learned.
            x_t: (B, C, H, W).
            t: 0-based timesteps of the chain.
            clip_sample: whether to clip (or threshold) the predicted x_0; None for the config's value. With "previous"
                prediction the mean is the output itself, and only the predicted x_0 is clipped.

        Raises:
            ValueError: wrong number of channels in model_output, or a timestep outside the chain.
        """
        x_t = in_working_precision(x_t)
        position = self._position(t, x_t)
        output, values = self._split(model_output, x_t)
        x_start = self._pred_x_start(output, x_t, position, clip_sample)
        if is_posterior_mean(self.prediction_type):
            mean = output
        else:
            mean = weighted_sum(self._chain.columns_at("posterior_mean", position, x_t), x_start, x_t)
        if values is None:
            variance = self._full("model_variance", position, x_t)
            return Gaussian(mean, variance, self._full("model_log_variance", position, x_t), x_start)
        log_variance = self._learned_log_variance(values, position)
        return Gaussian(mean, log_variance.exp(), log_variance, x_start)

    def _split(self, model_output, x_t):
        output = model_output if model_output.dtype is x_t.dtype else model_output.to(x_t.dtype)
        if not self.learns_variance and output.shape == x_t.shape:
            return output, None
        channels = x_t.shape[1]
        needed = channels * (2 if self.learns_variance else 1)
        if self.variance_type == "analytic":  # it replaces a learned variance
            output = output[:, :channels]
        if output.shape[1] != needed:
            raise ValueError(
                f"model_output has {output.shape[1]} channels for images of {channels}; variance_type="
                f"{self.variance_type!r} needs {needed}; choose the variance_type that the network was trained with"
            )
        return output.split(channels, dim=1) if self.learns_variance else (output, None)

    def _learned_log_variance(self, values, position):
        return values if self.variance_type == "learned" else self._interpolated_log_variance(values, position)

    def _interpolated_log_variance(self, values, position):
        # IDDPM eq. 15, with values in [-1, 1]
        low = self._chain.column_at("posterior_log_variance_clipped", position, values)
        high = self._chain.column_at("log_betas", position, values)
        return low + (values + 1) * (0.5 * (high - low))

    def _pred_x_start(self, output, x_t, position, clip_sample):
        if is_x_start(self.prediction_type):
            x_start = output
        else:
            x_start = weighted_sum(self._chain.columns_at("x_start", position, x_t), x_t, output)
        config = self.config
        if clip_sample is None:
            clip_sample = config.clip_sample or config.thresholding
        if not clip_sample:
            return x_start
        if config.thresholding:
            return self._threshold_sample(x_start)
        clip = x_start.clamp if x_start is output else x_start.clamp_  # in place if the tensor is not the caller's
        return clip(-config.clip_sample_range, config.clip_sample_range)

    def _get_variance(self, t, predicted_variance=None, variance_type=None):
        """The variance of p(x_{t-1} | x_t), never its logarithm; some code calls this private method of diffusers."""
        variance_type = variance_type or self.variance_type
        position = self._position(t)
        if variance_type == "learned":
            return predicted_variance.exp()
        if variance_type == "learned_range":
            return self._interpolated_log_variance(predicted_variance, position).exp()
        chain = self._chain
        if variance_type != self.variance_type:
            chain = self._make_chain(chain.timesteps, variance_type)
        return chain.tables["model_variance"][position].clone()

    # the bound

    @package_only
    def vlb_term(
        self,
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor | int,
        clip_sample: bool | None = None,
    ) -> torch.Tensor:
        """One term of the variational bound for each image, eq. 5: L_{t-1}, or L_0 at the chain's first step.

        Args:
            model_output: the network's output at (x_t, t).
            x_start: (B, C, H, W) in [-1, 1], on the grid of `levels` grey levels.
            x_t: drawn from q(x_t | x_start), (B, C, H, W).
            t: 0-based timesteps of the chain.
            clip_sample: as in `p_mean_variance`.

        Returns:
            Bits per dimension (B,): KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), or the decoder's negative log-likelihood
            (eq. 13).
        """
        p = self.p_mean_variance(model_output, x_t, t, clip_sample)
        first = self._position(t, x_t) == 0
        if first is True:
            return self.decoder_bits_per_dim(p, x_start)
        kl = self.kl_bits_per_dim(p, x_start, x_t, t)
        return kl if first is False else torch.where(first, self.decoder_bits_per_dim(p, x_start), kl)

    @package_only
    def kl_bits_per_dim(
        self, p: Gaussian, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor | int
    ) -> torch.Tensor:
        """L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p) of eq. 5, (B,) bits per dimension; not for the chain's first step.

        p is a result of `p_mean_variance`. Images (B, C, H, W); t 0-based, of the chain.
        """
        q = self.q_posterior(x_start, x_t, t)
        return nats_to_bits_per_dim(gaussian_kl(q.mean, q.log_variance, p.mean, p.log_variance))

    @package_only
    def decoder_bits_per_dim(self, p: Gaussian, x_start: torch.Tensor, levels: int | None = None) -> torch.Tensor:
        """L_0 of eq. 13, (B,) bits per dimension.

        Args:
            p: result of `p_mean_variance` at the chain's first step.
            x_start: (B, C, H, W) in [-1, 1], on the grid of `levels` grey levels.
            levels: number of grey levels of the data; None for that of the config.
        """
        x_start, log_scale = in_working_precision(x_start), 0.5 * p.log_variance
        return nats_to_bits_per_dim(
            -discretized_gaussian_log_likelihood(x_start, p.mean, log_scale, self.levels if levels is None else levels)
        )

    @package_only
    def prior_bits_per_dim(self, x_start: torch.Tensor) -> torch.Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, 1)) of eq. 5 at the chain's last step, (B,) bits/dim. x_start: (B, C, H, W)."""
        last = torch.full((len(x_start),), self._chain.timesteps[-1], device=x_start.device)
        q = self.q_mean_variance(x_start, last)
        zero = torch.zeros_like(q.mean)
        return nats_to_bits_per_dim(gaussian_kl(q.mean, q.log_variance, zero, zero))

    # sampling

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float | None = None,
        variance_noise: torch.Tensor | None = None,
        gradient: torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Make a step from x_t to the next lower timestep of the chain.

        Args:
            model_output: the network's output at (sample, timestep).
            timestep: 0-based, of the chain; fastest as an int.
            sample: x_t, (B, C, H, W). Half precision is computed in float32 and returned in half precision.
            generator: a generator, or a list with one for each image.
            return_dict: False for a tuple (prev_sample, pred_original_sample).
            eta: None for ancestral sampling (Algorithm 2); a number in [0, 1] for DDIM (DDIM eq. 12 and 16), which recomputes
                epsilon from the clipped x_0.
            variance_noise: standard normal noise to use instead of drawing it.
            gradient: gradient of scale * log p(y | x_t) with respect to x_t, of the shape of sample, for classifier guidance.
                After x_0 is clipped, the mean is shifted by variance * gradient (ADM, Algorithm 1), or with eta, epsilon by
                -sqrt(1 - abar) * gradient (ADM, Algorithm 2).

        Returns:
            `DDPMSchedulerOutput` with `.prev_sample` and `.pred_original_sample`, in the dtype of `sample`. The chain's first
            step returns the mean, which is x_0, without noise.

        Raises:
            ValueError: timestep outside the chain, wrong number of channels, or eta outside [0, 1].
        """
        x_t = in_working_precision(sample)
        position = self._position(timestep, x_t)
        output, values = self._split(model_output, x_t)
        x_start = self._pred_x_start(output, x_t, position, None)
        if gradient is not None and eta is not None:
            x_start = x_start + self._chain.column_at("x_start_of_gradient", position, x_t) * gradient.to(x_t.dtype)
        tables, name = (self._chain, "ancestral") if eta is None else (self._ddim(eta), "ddim")
        of_x_start, of_x_t, std = tables.columns_at(name, position, x_t)
        last = isinstance(position, int) and position == 0
        if eta is None and values is not None and not last:
            std = torch.exp(0.5 * self._learned_log_variance(values, position)) * (std > 0)  # no noise at the last step
        noise = (
            None
            if last or (eta == 0 and self.x_start_mse is None)
            else _scaled_noise(std, x_t, generator, variance_noise)
        )
        if eta is None and is_posterior_mean(self.prediction_type):
            prev_sample = output.clone() if noise is None else noise + output
        else:
            prev_sample = weighted_sum((of_x_start, of_x_t), x_start, x_t, onto=noise)
        if gradient is not None and eta is None:
            if values is None:
                variance = self._chain.column_at("model_variance", position, x_t)
            else:
                variance = self._learned_log_variance(values, position).exp()
            prev_sample.addcmul_(gradient.to(x_t.dtype), variance)
        if x_t is not sample:
            prev_sample, x_start = prev_sample.to(sample.dtype), x_start.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample, x_start) if return_dict else (prev_sample, x_start)

    def _ddim(self, eta):
        check_ddim_eta(eta)
        return ddim_tables(self._chain, float(eta))

    @package_only
    def reverse_step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> DDPMSchedulerOutput:
        """Make a deterministic step of DDIM's ODE up the chain, to encode an image (DDIM section 4.3).

        Args:
            model_output: the network's output at (sample, timestep).
            timestep: the timestep of sample, 0-based, of the chain.
            sample: (B, C, H, W).

        Returns:
            `DDPMSchedulerOutput`; `.prev_sample` is the sample at the next higher timestep of the chain, or after the last
            timestep at abar = 0.
        """
        x_t = in_working_precision(sample)
        position = self._position(timestep, x_t)
        output, _ = self._split(model_output, x_t)
        x_start = self._pred_x_start(output, x_t, position, None)
        result = weighted_sum(self._chain.columns_at("reverse", position, x_t), x_start, x_t)
        return DDPMSchedulerOutput(prev_sample=result.to(sample.dtype), pred_original_sample=x_start.to(sample.dtype))


def check_ddim_eta(eta: float) -> None:
    """Raise ValueError for an eta of DDIM outside [0, 1]."""
    if not (isinstance(eta, Real) and 0 <= eta <= 1):
        raise ValueError(f"eta={eta!r} must be in [0, 1]: 0 is deterministic DDIM, 1 has the posterior's variance")


def _index(t):
    try:
        return operator.index(t)
    except TypeError:
        raise ValueError(f"timestep {t!r} must be an integer") from None


def _scaled_noise(std, x, generator, noise):
    """std times standard normal noise of x's shape: times `noise` if given, else drawn from the generator(s)."""
    if noise is None and std.dim() == 0 and (generator is None or getattr(generator, "device", None) == x.device):
        # the same values as std * randn, in one pass less
        return torch.empty_like(x, memory_format=torch.contiguous_format).normal_(0.0, std, generator=generator)
    if noise is None:
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return noise.to(x.dtype) * std


def check_chain_keys(T, variance_type, prediction_type, x_start_mse, timestep_lists):
    """Raise ValueError for errors of x_0 or lists of timesteps that do not fit T timesteps."""
    if variance_type == "analytic" and x_start_mse is None:
        raise ValueError("variance_type='analytic' needs x_start_mse; estimate_reverse_variances computes both")
    if variance_type == "analytic" and is_posterior_mean(prediction_type):
        raise ValueError("variance_type='analytic' is for networks whose output gives x_0, not for 'previous'")
    if x_start_mse is not None and len(x_start_mse) != T:
        raise ValueError(f"x_start_mse has {len(x_start_mse)} entries; give one for each of {T} timesteps")
    for name, lists in (timestep_lists or {}).items():
        if not (isinstance(name, str) and isinstance(lists, dict) and lists):
            raise ValueError(
                f"timestep_lists={shown(timestep_lists)} must have names, and for each lists by number of steps"
            )
        for count, chain in lists.items():
            valid = isinstance(chain, (list, tuple)) and chain and all(type(t) is int and 0 <= t < T for t in chain)
            if not valid or str(len(chain)) != count or any(a >= b for a, b in zip(chain, chain[1:])):
                raise ValueError(
                    f"timestep_lists: {shown(name)}, {shown(count)} must have that number of ascending timesteps below {T}"
                )
