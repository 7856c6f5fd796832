"""`from_single_file` of pipelines, and `ddpm-hf convert`: the process of each checkpoint, guidance, and the command."""

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors import SafetensorError

from ddpm_hf import (
    DDPMImagePipeline,
    DDPMSuperResolutionPipeline,
    DDPMUNet,
    NoisyClassifier,
    SubVPSDEScheduler,
    VariationalDDPMScheduler,
    VESDEScheduler,
    VPSDEScheduler,
)
from ddpm_hf.cli import main
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.original.published import PUBLISHED
from support import original_checkpoints as golden
from support.scripts import script

ADM = {
    "image_size": 16,
    "num_heads": 4,
    "num_head_channels": 32,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
}


def save(folder, code, name, file_name="model.pt"):
    path = folder / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(golden.state_dict(golden.cases(code)[name]), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "adm": save(folder, "guided_diffusion", "cond_updown_scaleshift_headch", "adm.pt"),
        "classifier": save(folder, "guided_diffusion", "classifier_attention_pool", "classifier.pt"),
        "upsampler": save(folder, "guided_diffusion", "superres_cond_updown", "upsampler.pt"),
        "iddpm": save(folder, "improved_diffusion", "cifar_like_rescaled_t", "iddpm.pt"),
        "ho": save(folder, "pytorch_diffusion", "lsun_like", "ho.ckpt"),
        "vp": save(folder, "score_sde", "ddpm_vp_continuous", "vp.pth"),
        "ve": save(folder, "score_sde", "ncsnpp_ve_skips", "ve.pth"),
        "ve discrete": save(folder, "score_sde", "ddpm_ve", "ve_discrete.pth"),
    }


class TestProcess:
    def test_adm_and_iddpm(self, files):
        pipe = DDPMImagePipeline.from_single_file(files["adm"], **ADM)
        assert type(pipe.scheduler) is VariationalDDPMScheduler
        assert pipe.scheduler.variance_type == "learned_range" and pipe.scheduler.betas[-1] == 0.02
        pipe = DDPMImagePipeline.from_single_file(
            files["iddpm"], **ADM | {"noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True}
        )
        assert len(pipe.scheduler.betas) == 4000 and pipe.scheduler.alphas_cumprod[3999] < 1e-6
        told = []
        pipe.unet.register_forward_pre_hook(lambda module, arguments: told.append(float(arguments[1])))
        pipe(1, num_inference_steps=2, output_type="pt")
        assert told == [999.75, 0.0]

    def test_linear_betas_of_another_number_of_steps_are_scaled(self, files):
        pipe = DDPMImagePipeline.from_single_file(files["adm"], **ADM | {"diffusion_steps": 4000})
        assert pipe.scheduler.betas[0].item() == pytest.approx(0.1 / 4000)
        assert pipe.scheduler.betas[-1].item() == pytest.approx(20 / 4000)

    @pytest.mark.parametrize("var_type, first", [("fixedlarge", "fixed_large"), ("fixedsmall", "fixed_small")])
    def test_ho(self, files, var_type, first):
        pipe = DDPMImagePipeline.from_single_file(files["ho"], image_size=16, var_type=var_type)
        assert pipe.scheduler.variance_type == first and pipe.scheduler.config.num_train_timesteps == 1000

    def test_song(self, files):
        options = {"image_size": 8, "model": "ddpm"}
        pipe = DDPMImagePipeline.from_single_file(files["vp"], sde="vpsde", continuous=True, **options)
        assert type(pipe.scheduler) is VPSDEScheduler and pipe.scheduler.sde.prediction_type == "epsilon"
        assert (
            type(DDPMImagePipeline.from_single_file(files["vp"], sde="subvpsde", **options).scheduler)
            is SubVPSDEScheduler
        )
        pipe = DDPMImagePipeline.from_single_file(files["vp"], sde="vpsde", continuous=False, **options)
        assert type(pipe.scheduler) is VariationalDDPMScheduler
        torch.testing.assert_close(pipe.scheduler.betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))

        pipe = DDPMImagePipeline.from_single_file(files["ve"], image_size=16, skip_rescale=True)
        assert type(pipe.scheduler) is VESDEScheduler and pipe.scheduler.config.centered is False
        assert (pipe.scheduler.config.sigma_min, pipe.scheduler.config.sigma_max) == (0.01, 380)
        assert pipe.unet.config.center_input_sample
        pipe = DDPMImagePipeline.from_single_file(files["ve discrete"], sde="vesde", continuous=False, **options)
        told = []
        pipe.unet.register_forward_pre_hook(lambda module, arguments: told.append(float(arguments[1])))
        images = pipe(2, num_inference_steps=3, output_type="pt").images
        assert told[0] == 0 and told[-1] == 999 and images.min() >= 0

    def test_upsampler(self, files):
        with pytest.raises(ValueError, match="is for DDPMSuperResolutionPipeline"):
            DDPMImagePipeline.from_single_file(files["upsampler"], small_size=4, **ADM | {"num_head_channels": -1})
        with pytest.raises(ValueError, match="is for DDPMImagePipeline"):
            DDPMSuperResolutionPipeline.from_single_file(files["adm"], **ADM)
        pipe = DDPMSuperResolutionPipeline.from_single_file(
            files["upsampler"], small_size=4, **ADM | {"num_head_channels": -1}
        )
        low = golden.images(golden.cases("guided_diffusion")["superres_cond_updown"], "low_res")
        assert pipe(low, class_labels=[1, 3], num_inference_steps=2, output_type="pt").images.shape == (2, 3, 16, 16)


def test_guidance_by_a_converted_classifier(files):
    """One ancestral step is that of ADM, Algorithm 1: the mean moves by scale * variance * gradient of log p(y | x_t)."""
    classifier = NoisyClassifier.from_single_file(files["classifier"], **ADM)
    pipe = DDPMImagePipeline.from_single_file(files["adm"], classifier=classifier, **ADM)
    x_t, y = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 3])
    scheduler = pipe.scheduler
    scheduler.set_timesteps(timesteps=[700, 300])
    output = pipe.unet(x_t, 700, y).sample.detach()
    gradient = classifier.gradient(x_t, 700, y, scale=3.0)
    mean = scheduler.step(output, 700, x_t, gradient=gradient, variance_noise=torch.zeros_like(x_t)).prev_sample

    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    at, before = alpha_bar[700], alpha_bar[300]
    beta = 1 - at / before
    epsilon, v = output.double().chunk(2, dim=1)
    x_start = ((x_t - (1 - at).sqrt() * epsilon) / at.sqrt()).clamp(-1, 1)
    expected = before.sqrt() * beta / (1 - at) * x_start + (at / before).sqrt() * (1 - before) / (1 - at) * x_t
    small = torch.log(beta * (1 - before) / (1 - at))
    variance = torch.exp((v + 1) / 2 * beta.log() + (1 - v) / 2 * small)
    x = x_t.clone().requires_grad_()
    torch.log_softmax(classifier(x, 700), dim=-1)[[0, 1], y].sum().backward()
    assert (variance * x.grad).abs().max() > 1e-4
    torch.testing.assert_close(mean.double(), expected + 3.0 * variance * x.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, options",
    [
        ("iddpm", ADM | {"noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True}),
        ("vp", {"image_size": 8, "model": "ddpm", "sde": "vpsde", "continuous": True}),
    ],
)
def test_fine_tuning(files, tmp_path, name, options):
    """A run begins with the converted weights, keeps the network and the process, and its network can be written again."""
    DDPMImagePipeline.from_single_file(files[name], **options).save_pretrained(tmp_path / "base")
    short = {"steps": 2, "batch_size": 4, "sample_every": 0, "eval_every": 0, "learning_rate": 1e-12, "data": "digits"}
    words = [word for key, value in short.items() for word in (f"--{key}", value)]
    script("train.py", *words, "--init_from", tmp_path / "base", "--output_dir", tmp_path / "run")
    base, tuned = (DDPMImagePipeline.from_pretrained(tmp_path / place) for place in ("base", "run/pipeline"))
    size = options["image_size"]
    assert tuned.unet.arguments == base.unet.arguments | {"sample_size": [size, size], "dropout": 0.0}
    for key, value in base.unet.state_dict().items():
        torch.testing.assert_close(tuned.unet.state_dict()[key], value, rtol=0, atol=1e-9)
    own_settings = tuned.scheduler.config.get("_ddpm_hf", {})
    assert tuned.scheduler.config.num_train_timesteps == base.scheduler.config.num_train_timesteps
    assert own_settings.get("rescale_timesteps", False) == options.get("rescale_timesteps", False)
    if name == "iddpm":
        tuned.unet.save_single_file(tmp_path / "tuned.pt", "improved-diffusion", **options)


class TestCommand:
    def run(self, capsys, *words):
        main(["convert", *map(str, words)])
        return capsys.readouterr().out

    def refused(self, *words):
        with pytest.raises(SystemExit) as caught:
            main(["convert", *map(str, words)])
        return str(caught.value)

    def options(self, options):
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def test_there_and_back(self, files, tmp_path, capsys):
        out = self.run(capsys, files["ho"], "--out", tmp_path / "ho", "--image_size", 16, "--var_type", "fixedsmall")
        assert out.startswith("4,873,731 parameters, float32 -> ") and "plain diffusers opens it" in out
        assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "ho"), DDPMPipeline)
        assert DDPMImagePipeline.from_pretrained(tmp_path / "ho").scheduler.variance_type == "fixed_small"
        assert "converted from a checkpoint" in write_model_card(tmp_path / "ho").read_text()
        self.run(capsys, tmp_path / "ho", "--to", "ddim", tmp_path / "again.pth")
        again = DDPMUNet.from_single_file(tmp_path / "again.pth", image_size=16, var_type="fixedsmall")
        assert torch.equal(
            again.conv_in.weight, DDPMUNet.from_pretrained(tmp_path / "ho", subfolder="unet").conv_in.weight
        )

    def test_a_classifier_beside_its_model(self, files, tmp_path, capsys):
        words = ["--classifier", files["classifier"], "--dtype", "bfloat16", *self.options(ADM)]
        out = self.run(capsys, files["adm"], "--out", tmp_path / "guided", *words)
        assert "bfloat16" in out and "opens it, but cannot sample from it" in out
        assert DDPMImagePipeline.from_pretrained(tmp_path / "guided").classifier.num_classes == 10
        out = self.run(capsys, files["classifier"], "--out", tmp_path / "alone", *self.options(ADM))
        assert out.rstrip().endswith("a NoisyClassifier")
        NoisyClassifier.from_pretrained(tmp_path / "alone")
        self.run(capsys, tmp_path / "alone", "--to", "guided-diffusion", tmp_path / "again.pt")
        words = ["--classifier", tmp_path / "alone", *self.options(ADM)]
        self.run(capsys, files["adm"], "--out", tmp_path / "guided again", *words)

    def test_what_stock_diffusers_cannot_compute_it_refuses(self, files, tmp_path, capsys):
        words = self.options({"image_size": 8, "model": "ddpm", "sde": "vpsde", "continuous": False})
        assert "plain diffusers opens it only with trust_remote_code=True" in self.run(
            capsys, files["vp"], "--out", tmp_path / "vp", *words
        )
        with pytest.raises(ValueError, match="trust_remote_code|does not exist"):
            DiffusionPipeline.from_pretrained(tmp_path / "vp")
        pipe = DDPMImagePipeline.from_pretrained(tmp_path / "vp")
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        assert pipe(1, num_inference_steps=4, output_type="pt").images.isfinite().all()

    def test_the_dtype_stays(self, files, tmp_path, capsys):
        words = self.options({"image_size": 16, "var_type": "fixedsmall", "dtype": "bfloat16"})
        self.run(capsys, files["ho"], "--out", tmp_path / "ho", *words)
        assert "bfloat16" in self.run(capsys, tmp_path / "ho", "--to", "pytorch_diffusion", tmp_path / "again.ckpt")
        weights = torch.load(tmp_path / "again.ckpt")
        assert torch.equal(weights["conv_in.weight"], torch.load(files["ho"])["conv_in.weight"].bfloat16())

    def test_a_full_disk_is_one_error_and_leaves_nothing(self, files, tmp_path, capsys, monkeypatch):
        def fail(*arguments, **kwargs):
            raise error

        words = self.options({"image_size": 16, "var_type": "fixedsmall"})
        self.run(capsys, files["ho"], "--out", tmp_path / "ho", *words)
        error = SafetensorError("I/O error: No space left on device")
        monkeypatch.setattr(DDPMUNet, "save_pretrained", fail)
        assert "cannot be written" in self.refused(files["ho"], "--out", tmp_path / "a", *words)
        error = RuntimeError("unexpected pos 2715456 vs 2715344")
        monkeypatch.setattr(torch, "save", fail)
        assert "a.pth cannot be written" in self.refused(tmp_path / "ho", "--to", "ddim", tmp_path / "a.pth")
        assert [path.name for path in tmp_path.iterdir()] == ["ho"]

    def test_mistakes_write_nothing(self, files, tmp_path):
        before = sorted(tmp_path.iterdir())
        for words, text in (
            ([tmp_path / "none.pt", "--out", tmp_path / "a"], "there is no file"),
            ([files["ho"]], "give either --out FOLDER or --to FORMAT FILE"),
            ([files["ho"], "--out", tmp_path], "exists; give a new folder"),
            ([files["ho"], "--out", tmp_path / "x" / "y"], "there is no folder"),
            ([files["ho"], "--out", tmp_path / "a"], "does not say image_size, var_type"),
            ([files["ho"], "--out", tmp_path / "a", "--like", "64x64_diffusion"], "is of another code base"),
            ([files["ho"], "--out", tmp_path / "a", "--image_size", "big"], "image_size='big' must be an integer"),
            ([files["classifier"], "--out", tmp_path / "a", "--push", "a/b", *self.options(ADM)], "is a classifier"),
            ([files["ho"], "--to", "ddim", tmp_path / "a.pth"], "ho.ckpt"),
            ([files["ho"], "--to", "ddim", tmp_path / "a.pth", "--like", "ddim_celeba"], "--like is for --out"),
            ([files["ho"], "--to", "ddim", tmp_path / "x" / "a.pth"], "must be a file in a folder that exists"),
            ([files["ho"], "--to", "ddim", tmp_path], "must be a file in a folder that exists"),
            ([files["ho"], "--out", tmp_path / "a", "--private"], "--private is for the repository of --push"),
            ([files["ho"], "--out", tmp_path / "a", "--image_size", "[" * 9999], "image_size="),
            ([files["adm"], "--out", tmp_path / "a", "--classifier", "", *self.options(ADM)], "there is no file ''"),
            ([files["adm"], "--out", tmp_path / "a", "--push", "a/b/c", *self.options(ADM)], "no name of a repository"),
        ):
            assert text in self.refused(*words)
            assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_known_checkpoint_has_all_options(name):
    """No option of a known checkpoint is missing: `like` alone is enough."""
    published = PUBLISHED[name]
    required = {
        "openai": {"image_size", "noise_schedule", "diffusion_steps", "rescale_timesteps"},
        "ho": {"image_size", "var_type"},
        "score_sde": {"image_size", "sde", "continuous", "model"},
    }[published.code]
    assert required <= published.options.keys()
