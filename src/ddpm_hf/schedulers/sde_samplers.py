"""Samplers of the reverse SDE as diffusers schedulers (Song et al. 2020, "Score-SDE"): predictors and correctors."""

from numbers import Integral

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ddpm_hf.arguments import check_argument, checked_arguments, shown
from ddpm_hf.files.pipeline_folder import GuardedConfig
from ddpm_hf.files.saved_config import SavedConfig
from ddpm_hf.schedulers.betas import MOST_TIMESTEPS
from ddpm_hf.schedulers.precision import in_working_precision
from ddpm_hf.schedulers.prediction import x_start_weights
from ddpm_hf.schedulers.sde import SDE, SDE_RANGES, VESDE, VPSDE, ChainSDE, SubVPSDE


class SDEScheduler(SavedConfig, GuardedConfig, SchedulerMixin, ConfigMixin):
    """The base class of the samplers of reverse SDEs: predictor steps from each time to the next, corrector steps before them.

    `timesteps` are the conditioning times that the network is given: t (N - 1) for VP and sub-VP, sigma or an index for VE. A
    pipeline therefore needs no knowledge of the process. Times run evenly from 1 down to `sampling_eps`. Each predictor step
    uses the process's own transition between two times; the last one goes to data, and returns the mean without noise.

    `step` makes one predictor step from one network output. `DDPMImagePipeline` calls the network again for each of the
    `correct_steps` corrector steps (Algorithms 2 and 3); other pipelines make no corrector steps.

    Args, of `VPSDEScheduler`, `SubVPSDEScheduler` and `VESDEScheduler`:
        num_train_timesteps: N of the process; the network was trained with timesteps in [0, N - 1].
        beta_min, beta_max, or sigma_min, sigma_max: noise levels of the process, see `VPSDE` and `VESDE`.
        sampling_eps: the time at which sampling ends, above 0.
        predictor: "reverse_diffusion" (eq. 46); "ancestral" (appendix F; the steps of DDPM and of NCSN, not for sub-VP);
            "euler_maruyama"; "probability_flow" (reverse diffusion steps of the ODE, without noise); "ddim" (DDIM eq. 13, exact
            for the ODE if the predicted noise is constant); "none". "euler_maruyama" and "probability_flow" are refused if a
            step has a beta of 0.9 or more, as with few steps, or at the noisy end of a cosine schedule.
        corrector: "langevin" (Algorithms 4 and 5, with the norms of each image by itself), or "annealed_langevin" (NCSN: steps
            of (snr * std)^2; with predictor "none" this is the whole sampler of NCSN).
        correct_steps: number of corrector steps at each time.
        snr: signal-to-noise ratio r of a corrector step.
        prediction_type: the meaning of the network's output: "epsilon", "score", "sample" or "v_prediction".
        levels: number of grey levels of the data, 256 for 8 bits.
        rescale_timesteps: of VP and sub-VP, see `VPSDE`. From the config of a DDPM the DDPM's value is taken.
        clip_sample: whether predictor steps and the ODE clip the predicted x_0 to [-1, 1], as DDPM samplers do. Without
            clipping, the ODE multiplies the network's errors by thousands at the noisy end of a cosine schedule. From the
            config of a DDPM the DDPM's value is taken.

    `from_config` accepts configs of diffusers' ScoreSdeVeScheduler and ScoreSdeVpScheduler, and of a DDPM: its linear schedule
    becomes beta_min = T beta_start and beta_max = T beta_end. Other schedules are for VP alone, which takes their betas to a
    `ChainSDE`.

    Raises:
        ValueError: a value that is not supported; the message names it.
    """

    _compatibles = ["DDPMScheduler", "ScoreSdeVeScheduler"]  # their keys stay in the config
    source_name = "sde_scheduler"
    is_continuous = True  # in time: it has an `sde`, and no chain of timesteps
    learns_variance = False
    process_class: type[SDE]  # the SDE that it samples
    order = 1
    init_noise_sigma = 1.0

    def _build(self, sde):
        config = self.config
        if config.predictor == "ancestral" and isinstance(sde, SubVPSDE):
            raise ValueError("predictor='ancestral' is for VP and VE; choose 'reverse_diffusion' or 'euler_maruyama'")
        if config.predictor == "none" and config.correct_steps == 0:
            raise ValueError("predictor='none' with correct_steps=0 does nothing; give correct_steps")
        self.sde, self.init_noise_sigma, self.levels = sde, sde.prior_std, config.levels
        self.timesteps, self.num_inference_steps = None, None
        self._positions, self._tables = {}, {}

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set `timesteps` and the coefficients of each step.

        Args:
            num_inference_steps: at least 2.
            device: the device of `timesteps` (float32; int64 for indices); None for the CPU.

        Raises:
            ValueError: too few steps for the predictor, or so many that two have the same timestep.
        """
        if not (isinstance(num_inference_steps, Integral) and num_inference_steps >= 2):
            raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer, 2 or more")
        n, config, sde = int(num_inference_steps), self.config, self.sde
        t = torch.linspace(1.0, max(config.sampling_eps, sde.t_min), n, dtype=torch.float64)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        # Each step goes to the next time, the last one to data; x_t given x at the next time is N(ratio x, G^2).
        times = t
        # NCSN's sigmas go down to t = 0, its conditioning times only to sampling_eps
        if isinstance(sde, VESDE) and config.sampling_eps <= 1e-5:
            times = torch.linspace(1.0, 0.0, n, dtype=torch.float64)
        if sde.has_levels:
            t = times = sde.trained_times(times)
        scale, std = torch.cat((sde.scale(times), one[:1])), torch.cat((sde.std(times), zero[:1]))
        scale, std, next_scale, next_std = scale[:-1], std[:-1], scale[1:], std[1:]
        ratio = scale / next_scale
        G2 = std**2 - (ratio * next_std) ** 2
        if config.predictor in ("euler_maruyama", "probability_flow") and ratio.square().min() < 0.1:
            raise ValueError(
                f"num_inference_steps={n} makes a step with beta={1 - ratio.square().min():.3f}, but "
                f"predictor={config.predictor!r} takes Euler steps, for beta below 0.9; give more steps or predictor='ddim'"
            )
        if config.predictor == "reverse_diffusion":
            of_x_t, of_score, of_noise = 2 - ratio, G2, G2.sqrt()
        elif config.predictor == "probability_flow":
            of_x_t, of_score, of_noise = 2 - ratio, 0.5 * G2, zero
        elif config.predictor == "euler_maruyama":
            step = -torch.diff(t, append=zero[:1])
            g2 = sde.diffusion(t) ** 2 * step
            of_x_t, of_score, of_noise = 1 - sde.drift_coefficient(t) * step, g2, g2.sqrt()
        elif config.predictor == "ancestral":  # NCSN's have the variance of the posterior, DDPM's have beta
            variance = G2 * (next_std / std) ** 2 if isinstance(sde, VESDE) else G2
            of_x_t, of_score, of_noise = 1 / ratio, G2 / ratio, variance.sqrt()
        elif config.predictor == "ddim":  # to the next time with the same x_0 and epsilon; at last to x_0
            of_x_t = 1 / ratio
            of_score, of_noise = std**2 / ratio - next_std * std, zero
        else:
            of_x_t, of_score, of_noise = one, zero, zero
        before = (t - 1 / sde.N).clamp(min=0.0)
        alpha = (2 * (sde.log_scale(t) - sde.log_scale(before))).exp()  # the correctors' alpha, Algorithm 5
        if times is t:
            x_start = x_start_weights(sde.prediction_type, scale, std)
        else:  # of Tweedie's formula: the score is that of the network's time, the variance that of the step
            of_x_t_in_score, of_output_in_score = sde.score_weights(t)
            x_start = (1 + std**2 * of_x_t_in_score) / scale, std**2 * of_output_in_score / scale
        columns = {
            # weights of x_t, x_0 and the noise, with the score (scale x_0 - x_t) / std^2
            "step": (of_x_t - of_score / std**2, of_score * scale / std**2, of_noise),
            "x_start": x_start,
            "score": sde.score_weights(t),
            "correct": (alpha, std),
        }
        self._tables = {name: list(zip(*(column.tolist() for column in row))) for name, row in columns.items()}
        timesteps = sde.conditioning_times(t)
        timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps
        self.timesteps, self.num_inference_steps = timesteps.to(device), n
        self._positions = {timestep: i for i, timestep in enumerate(timesteps.tolist())}
        if len(self._positions) < n:
            raise ValueError(f"num_inference_steps={n} gives two steps the same timestep; give fewer steps")

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the sample unchanged; the network takes it as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        variance_noise: torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Make a predictor step to the next time.

        Args:
            model_output: the network's output at (sample, timestep), (B, C, H, W).
            timestep: one of `timesteps`.
            sample: x_t, (B, C, H, W). Half precision is computed in float32.
            generator: a generator, or a list with one for each image.
            return_dict: False for a tuple (prev_sample, pred_original_sample).
            variance_noise: standard normal noise to use instead of drawing it.

        Returns:
            `DDPMSchedulerOutput` in the dtype of sample; `.pred_original_sample` is the network's E[x_0 | x_t].

        Raises:
            ValueError: timestep is not in `timesteps`, or `set_timesteps` has not been called.
        """
        i = self._index(timestep)
        x = in_working_precision(sample)
        output = model_output.to(x.dtype)
        of_x_t, of_output = self._tables["x_start"][i]
        x_start = (x * of_x_t).add_(output, alpha=of_output)
        if self.config.clip_sample:
            x_start.clamp_(*clip_limits(self.config))
        of_x_t, of_x_start, of_noise = self._tables["step"][i]
        prev_sample = (x * of_x_t).add_(x_start, alpha=of_x_start)
        if of_noise != 0 and i + 1 < self.num_inference_steps:
            noise = _noise(x, generator) if variance_noise is None else variance_noise.to(x.dtype)
            prev_sample.add_(noise, alpha=of_noise)
        prev_sample, x_start = prev_sample.to(sample.dtype), x_start.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample, x_start) if return_dict else (prev_sample, x_start)

    def step_correct(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        variance_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Make a step of Langevin dynamics at the same time, with the arguments of `step`; return the sample (B, C, H, W)."""
        i = self._index(timestep)
        x = in_working_precision(sample)
        output = model_output.to(x.dtype)
        of_x_t, of_output = self._tables["score"][i]
        score = (x * of_x_t).add_(output, alpha=of_output)
        noise = _noise(x, generator) if variance_noise is None else variance_noise.to(x.dtype)
        alpha, std = self._tables["correct"][i]
        if self.config.corrector == "langevin":
            norm = score.flatten(1).norm(dim=1)
            ratio = torch.where(norm > 0, noise.flatten(1).norm(dim=1) / norm, 0.0)  # where the score is 0, no step
            size = 2 * alpha * (self.config.snr * ratio).square().view(-1, *[1] * (x.dim() - 1))
        else:
            size = torch.full_like(x[:1, :1, :1, :1], 2 * alpha * (self.config.snr * std) ** 2)
        return (x + size * score + (2 * size).sqrt() * noise).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """x_t (B, C, H, W) from x_0 and standard normal noise; timesteps (B,) may lie between those of `timesteps`."""
        return self.sde.sample(original_samples, self.sde.times(timesteps), noise)

    def _index(self, timestep):
        if self.timesteps is None:
            raise ValueError("timesteps are not set; call set_timesteps(num_inference_steps) before the first step")
        timestep = float(timestep)
        if timestep not in self._positions:
            raise ValueError(f"timestep={timestep} is not in `timesteps`; give one of its {self.num_inference_steps}")
        return self._positions[timestep]

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """diffusers' hook in `from_config`: express the schedule of a DDPM by the arguments of the process."""
        config_dict = dict(config_dict)
        own_keys = check_argument("_ddpm_hf", config_dict.get("_ddpm_hf") or {}, dict)
        variance_exploding = issubclass(cls.process_class, VESDE)
        if "predictor" not in config_dict:  # the config of another class, with other defaults
            config_dict["_use_default_values"] = []
            if variance_exploding and "sigma_min" in config_dict:  # ScoreSdeVeScheduler's
                config_dict.setdefault("centered", False)
        sde_keys = {"beta_min", "sigma_min"} & set(config_dict)
        if sde_keys == {"beta_min" if variance_exploding else "sigma_min"}:
            raise ValueError(f"{cls.__name__} cannot be built from a config with {sde_keys.pop()}")
        if {"beta_start", "beta_schedule"} & set(config_dict) and not sde_keys:
            schedule, T = config_dict.get("beta_schedule", "linear"), config_dict.get("num_train_timesteps", 1000)
            T = check_argument("num_train_timesteps", T, int, SDE_RANGES["N"])
            # the config also holds the betas of a schedule whose name other classes do not know
            by_name = schedule == "linear_scaled_by_T" and "trained_betas" in own_keys
            linear = schedule == "linear" and config_dict.get("trained_betas") is None
            if (by_name or linear) and not config_dict.get("rescale_betas_zero_snr"):
                factor = 1000 if by_name else T
                first, last = (  # the defaults of diffusers
                    check_argument(key, config_dict.get(key, default), float, "(0, 1]")
                    for key, default in (("beta_start", 1e-4), ("beta_end", 0.02))
                )
                config_dict |= {"beta_min": first * factor, "beta_max": last * factor, "trained_betas": None}
            elif cls.process_class is VPSDE:
                config_dict["trained_betas"] = DDPMScheduler.from_config(config_dict).betas.tolist()
            if variance_exploding or (cls.process_class is not VPSDE and "beta_min" not in config_dict):
                raise ValueError(
                    f"{cls.__name__} has no process for beta_schedule={schedule!r}; use VPSDEScheduler, which takes every "
                    "schedule, or with beta_schedule='linear' SubVPSDEScheduler"
                )
        for key in own_keys.keys() & {"levels", "rescale_timesteps"}:
            config_dict.setdefault(key, own_keys[key])
        return super().extract_init_dict(config_dict, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class VPSDEScheduler(SDEScheduler):
    """Samplers of `VPSDE`, or with `trained_betas`, the betas of a discrete chain, of `ChainSDE`; see `SDEScheduler`."""

    process_class = VPSDE
    stands_for: tuple[str, ...] = ("ScoreSdeVpScheduler",)

    @checked_arguments(**SDE_RANGES)
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        sampling_eps: float = 1e-3,
        predictor: str = "reverse_diffusion",
        corrector: str = "langevin",
        correct_steps: int = 0,
        snr: float = 0.16,
        prediction_type: str = "epsilon",
        trained_betas: list[float] | None = None,
        levels: int = 256,
        clip_sample: bool = False,
        rescale_timesteps: bool = False,
    ):
        if trained_betas is not None:
            if self.process_class is not VPSDE or not 1 <= len(trained_betas) <= MOST_TIMESTEPS:
                raise ValueError(
                    f"trained_betas={shown(trained_betas)} must be 1 to {MOST_TIMESTEPS:,} betas, for VPSDEScheduler alone"
                )
            num_train_timesteps = len(trained_betas)
            self.register_to_config(num_train_timesteps=num_train_timesteps, trained_betas=list(trained_betas))
            alphas_cumprod = torch.cumprod(1 - torch.tensor(trained_betas, dtype=torch.float64), dim=0)
            try:
                sde = ChainSDE(alphas_cumprod, prediction_type, rescale_timesteps)
            except ValueError as error:
                raise ValueError(f"trained_betas={shown(trained_betas)}: {error}") from None
        else:
            sde = self.process_class(beta_min, beta_max, num_train_timesteps, prediction_type, rescale_timesteps)
        self._build(sde)


class SubVPSDEScheduler(VPSDEScheduler):
    """Samplers of `SubVPSDE`; see `SDEScheduler`."""

    process_class = SubVPSDE
    stands_for = ()


class VESDEScheduler(SDEScheduler):
    """Samplers of `VESDE`; see `SDEScheduler`.

    Further arguments:
        centered: whether the images are in [-1, 1]; False for [0, 1], as in NCSN and diffusers' ScoreSdeVeScheduler.
        conditioning: "sigma", or "level_index" for networks of N discrete noise levels, see `VESDE`. Times are then those of
            the levels, and there are at most N steps.
    """

    process_class = VESDE
    stands_for = ("ScoreSdeVeScheduler",)

    @checked_arguments(**SDE_RANGES)
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        sampling_eps: float = 1e-5,
        predictor: str = "reverse_diffusion",
        corrector: str = "langevin",
        correct_steps: int = 1,
        snr: float = 0.16,
        prediction_type: str = "score",
        centered: bool = True,
        levels: int = 256,
        clip_sample: bool = False,
        conditioning: str = "sigma",
    ):
        self._build(self.process_class(sigma_min, sigma_max, num_train_timesteps, prediction_type, conditioning))


def clip_limits(config: dict) -> tuple[float, float]:
    """Range that a scheduler of this config clips the predicted x_0 to: +-`clip_sample_range`, or from 0 if not `centered`."""
    most = config.get("clip_sample_range", 1.0)
    return -most if config.get("centered", True) else 0.0, most


def _noise(x, generator):
    return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
