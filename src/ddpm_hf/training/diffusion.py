"""Training of a diffusion model (Ho, Jain, Abbeel 2020, Algorithm 1), in discrete or continuous time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ddpm_hf.arguments import shown
from ddpm_hf.data.pixels import pixels_to_batch
from ddpm_hf.extras import require_extra
from ddpm_hf.likelihood.ode import dequantized
from ddpm_hf.likelihood.solver import check_network
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.schedulers.betas import check_betas
from ddpm_hf.training.averages import Average, averaged, evaluating
from ddpm_hf.training.config import ConfigError, TrainConfig, image_size, nearest
from ddpm_hf.training.errors import PIPELINE_ERRORS, as_config_error
from ddpm_hf.training.from_pipeline import check_class_names
from ddpm_hf.training.inputs import check_pixels, held_out_images, some_training_images
from ddpm_hf.training.interrupts import Stopped
from ddpm_hf.training.losses import ContinuousBoundObjective, DiffusionObjective, ScoreObjective, drop_labels
from ddpm_hf.training.low_resolution import conditioned, in_channels, make_pipeline, pipeline_class
from ddpm_hf.training.measurements import held_out_bits_per_dim, held_out_loss
from ddpm_hf.training.messages import warn_on_write_error
from ddpm_hf.training.optimizer import check_schedule
from ddpm_hf.training.plots import LOG_SNR_PLACES
from ddpm_hf.training.processes import make_noise_schedule, make_scheduler
from ddpm_hf.training.publisher import Publisher
from ddpm_hf.training.sample_metrics import SampleMetrics
from ddpm_hf.training.saving import save_pipeline
from ddpm_hf.training.sheets import Sheets
from ddpm_hf.training.task import BatchLoss, Task
from ddpm_hf.training.timesteps import TIMESTEPS, ContinuousTimes, FractionalTimesteps
from ddpm_hf.training.trackers import check_trackers

SMALLEST_RANGE = 1.0  # of the log SNR; that of the linear schedule is 19


class DiffusionTask(Task):
    """A U-Net that predicts epsilon, x_0 or the score, with a sampler of timesteps and averaged weights."""

    def __init__(self, config: TrainConfig):
        self.config = config
        check_schedule(config)
        with torch.device("cpu"):  # a config is checked with its network, but not its process, on the meta device
            self.scheduler, self.noise_schedule = make_scheduler(config), make_noise_schedule(config)
            _check_sample_steps(config, self.scheduler)
        check_pixels(config)
        check_trackers(config.trackers)
        require_extra("matplotlib", "train", "plots")
        self.network = DDPMUNet(
            sample_size=image_size(config),
            in_channels=in_channels(config),
            out_channels=config.channels * (2 if self.scheduler.learns_variance else 1),
            **config.unet | with_null_class(config),
        )
        self.network.reset_parameters(config.init)
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self._make_objective()
        self.t_end = self.objective.end

    def _make_objective(self):
        config = self.config
        if self.scheduler.is_continuous:
            sde = self.scheduler.sde
            check_network(self.network, sde, config.channels)
            with torch.device("cpu"):
                sampling = config.timesteps
                self.timesteps = ContinuousTimes(
                    sde, sampling == "importance", low_discrepancy=sampling == "low_discrepancy"
                )
            self.objective = ScoreObjective(sde, config.weighting or "variance")
        elif config.loss == "vlb_continuous":
            self.timesteps = FractionalTimesteps(self.scheduler, config.timesteps == "low_discrepancy")
            self.objective = ContinuousBoundObjective(self.scheduler, self.noise_schedule)
        elif config.timesteps in TIMESTEPS:
            self.timesteps = TIMESTEPS[config.timesteps](self.scheduler)
            options = config.loss, config.vlb_weight, config.weighting, self.noise_schedule
            self.objective = DiffusionObjective(self.scheduler, *options)
        else:
            raise ConfigError(f"timesteps={shown(config.timesteps)} is not known{nearest(config.timesteps, TIMESTEPS)}")

    def open_inputs(self, data, accelerator, is_new):
        config, self.data = self.config, data
        if config.init_from and is_new:
            check_class_names(config, data.class_names)
        self.held_out = self.trained_on = None
        if config.eval_every:
            self.held_out = held_out_images(config, data.class_names)
            self.trained_on = some_training_images(config, data)
        self.sample_metrics = None
        if config.eval_metrics:
            self.sample_metrics = SampleMetrics(config, self.network, self.scheduler, accelerator)
        # after the data was opened: no repository is created for data that does not exist
        self.publisher = Publisher(config) if config.push_to_hub and accelerator.is_main_process else None
        if config.init_from and is_new:
            with as_config_error(f"init_from={config.init_from!r}", PIPELINE_ERRORS):
                base = pipeline_class(config).from_pretrained(config.init_from)
                self.network.load_state_dict(base.unet.state_dict())
        return data

    def begin(self, accelerator, dataset, log, interrupts):
        self.accelerator, self.log, self.interrupts = accelerator, log, interrupts
        # the weights are the same in all processes by now
        self.average = Average(self.network.parameters(), decay=self.config.ema_decay, foreach=True)
        shared = {"ema": self.average, "timesteps": self.timesteps}
        if self.noise_schedule is not None:
            parameters = self.noise_schedule.parameters()
            self.average_of_schedule = Average(parameters, decay=self.config.ema_decay, foreach=True)
            shared |= {"noise_schedule": self.noise_schedule, "noise_schedule_ema": self.average_of_schedule}
        options = dict(accelerator=accelerator, log=log, interrupts=interrupts, average=self.average)
        self.sheets = Sheets(self.config, self.network, self.scheduler, dataset, **options)
        if self.sample_metrics:
            self.sample_metrics.open_reference(self.data)
        return shared

    def loss(self, network, batch):
        config, levels = self.config, self.scheduler.levels
        x_start = pixels_to_batch(batch["pixels"], levels, config.random_flip)
        if config.dequantize:
            x_start = dequantized(x_start, levels)
        t, weights = self.timesteps.sample(len(x_start), x_start.device)
        labels = batch.get("class_labels")
        if config.label_dropout:
            labels = drop_labels(labels, self.network.null_class, config.label_dropout)
        losses = self.objective(conditioned(config, network, x_start), x_start, labels, t)
        self.timesteps.update(t, losses)
        return BatchLoss(x_start, t, losses, weights)

    def after_step(self):
        self.average.step(self.network.parameters())
        values = {"ema_decay": self.average.cur_decay_value}
        if self.noise_schedule is not None:
            self.average_of_schedule.step(self.noise_schedule.parameters())
            with torch.no_grad():
                positions = torch.linspace(0, 1, len(LOG_SNR_PLACES), device=self.accelerator.device)
                log_snr = -self.noise_schedule(positions)
            values |= {f"log_snr_at_{percent}": value for percent, value in zip(LOG_SNR_PLACES, log_snr)}
        return values

    @contextlib.contextmanager
    def _averaged_betas(self) -> Iterator[None]:
        """Within the block a learned noise schedule is the averaged one; the process has its betas from now on.

        Raises:
            Stopped: the schedule has collapsed.
        """
        if self.noise_schedule is None:
            yield
            return
        with averaged(self.noise_schedule, self.average_of_schedule):
            betas, alphas_cumprod = (table.detach().cpu().double() for table in self.noise_schedule.betas())
            _check_learned(betas, alphas_cumprod)
            self.scheduler.use_betas(betas, alphas_cumprod)
            self.scheduler.register_to_config(trained_betas=betas.tolist())
            yield

    def measure(self, step):
        config, is_last = self.config, step == self.config.steps
        # a preset's sheet may take longer than a short run of it
        draws = config.sample_every and (step % config.sample_every == 0 or (is_last and config.preset is None))
        measures = config.eval_every and (step % config.eval_every == 0 or is_last)
        rows, best = [], None
        if draws or measures:
            with self._averaged_betas():
                if draws:
                    rows.append(self.sheets.draw(step))
                if measures:
                    rows.append(self._measure_held_out(step))
                    best = rows[-1][config.best_by]
        for row in rows:  # none of them where a signal came meanwhile: then they are measured again
            self.log.note(step, **row)
        return best

    def _measure_held_out(self, step):
        config = self.config
        self.log.begin_work(step, f"measuring {len(self.held_out[0])} held-out images")
        with evaluating(self.network, self.average):
            process = self.scheduler, self.objective
            row = held_out_bits_per_dim(config, self.interrupts, self.network, *process, *self.held_out)
            images = self.held_out, self.trained_on
            row |= held_out_loss(config, self.interrupts, self.network, self.objective, *images)
            if self.sample_metrics:
                self.log.begin_work(step, f"drawing {config.eval_samples:,} samples for fd")
                row |= self.sample_metrics.measure(self.interrupts)
        return row

    def time_sample_metrics(self, accelerator):
        if not self.config.eval_metrics:
            return super().time_sample_metrics(accelerator)
        return SampleMetrics(self.config, self.network, self.scheduler, accelerator).time()

    def save_at_checkpoint(self, step, interrupted):
        self.log.plot()
        with warn_on_write_error("the pipeline could not be written"):
            self.save(step)
            if self.publisher and not interrupted:
                self.publisher.push(step)

    def save(self, step):
        facts = dict(class_names=self.data.class_names, split_size=self.data.split_size)
        facts["held_out_images"] = self.held_out and len(self.held_out[0])
        with evaluating(self.network, self.average), self._averaged_betas():
            pipeline = make_pipeline(self.config, self.network, self.scheduler)
            save_pipeline(pipeline, self._folder, config=self.config, step=step, **facts)

    def saved_as(self):
        return str(self._folder)

    def publish(self):
        return self.publisher.finish() if self.publisher else None

    def how_to_publish(self):
        return self.publisher.how_to_publish() if self.publisher else ""

    @property
    def _folder(self):
        return Path(self.config.output_dir, self.config.RESULT)


def with_null_class(config: TrainConfig) -> dict:
    """The keys of a network whose last label means "no class", where label dropout needs one."""
    classes = config.unet.get("num_class_embeds")
    return dict(num_class_embeds=classes + 1, _ddpm_hf={"null_class": classes}) if config.label_dropout else {}


def _check_learned(betas, alphas_cumprod):
    """Raise Stopped for learned betas that no process can have, or whose noise levels are all alike."""
    first, last = torch.logit(alphas_cumprod)[[0, -1]].tolist()
    try:
        check_betas(betas.numpy(), "the learned noise schedule")
        if first - last < SMALLEST_RANGE:
            raise ValueError(
                f"the learned noise schedule has collapsed: its log SNR falls from {first:.4g} to {last:.4g}"
            )
    except ValueError as error:
        raise Stopped(
            f"{error}; start again with a lower noise_schedule_learning_rate and another output_dir"
        ) from None


def _check_sample_steps(config, scheduler):
    if config.sample_steps is None and not config.sample_every and not config.eval_metrics:
        return
    try:
        steps = config.sample_steps or scheduler.config.num_train_timesteps
        type(scheduler).from_config(scheduler.config).set_timesteps(steps)
    except ValueError as error:
        raise ConfigError(str(error).replace("num_inference_steps", "sample_steps")) from None
