"""Checkpoints made from the golden files open, give the original networks' outputs, and are written again byte for byte."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ddpm_hf import DDPMUNet, NoisyClassifier
from ddpm_hf.models.conditioning import condition_planes
from ddpm_hf.original.checkpoint import open_original
from ddpm_hf.original.files import read_tensors
from support import original_checkpoints as golden

CODES = ("guided_diffusion", "improved_diffusion", "pytorch_diffusion", "ddim", "score_sde")
FORMATS = {
    "guided_diffusion": ("guided-diffusion", "a.pt"),
    "improved_diffusion": ("improved-diffusion", "a.pt"),
    "pytorch_diffusion": ("pytorch_diffusion", "a.ckpt"),
    "ddim": ("ddim", "a.pth"),
    "score_sde": ("score_sde_pytorch", "a.pth"),
}
REFUSED = {"classifier_spatial_pool": "classifier_pool='spatial'"}
CASES = [(code, name) for code in CODES for name in golden.cases(code) if name not in REFUSED]


def options_of(code: str, case: dict) -> dict:
    """What the file of a golden case does not say, in the words of its configuration."""
    configuration = case["configuration"]
    if code in ("pytorch_diffusion", "ddim"):
        return {"image_size": 16, "var_type": "fixedlarge"}
    if code == "score_sde":
        model, size = configuration["model"], configuration["data"]["image_size"]
        sde = "vesde" if not configuration["data"]["centered"] else "vpsde"
        continuous = configuration["training"]["continuous"]
        options = {"image_size": size, "sde": sde, "continuous": continuous, "model": model["name"]}
        return options | (
            {"fir": model["fir"], "skip_rescale": model["skip_rescale"]} if model["name"] == "ncsnpp" else {}
        )
    flags = configuration.get("flags") or configuration["arguments"]
    options = {
        "image_size": case["inputs"]["x"]["shape"][-1],
        "num_heads": flags["num_heads"],
        "num_head_channels": flags.get("num_head_channels", -1),
        "num_heads_upsample": flags["num_heads_upsample"],
        "use_new_attention_order": flags.get("use_new_attention_order", False),
        "noise_schedule": "linear",
        "diffusion_steps": 1000,
        "rescale_timesteps": False,
    }
    return options | ({"small_size": case["inputs"]["low_res"]["shape"][-1]} if "low_res" in case["inputs"] else {})


def content_of_file(code: str, state: dict) -> object:
    """A state dict as the code base saves it."""
    if code == "ddim":
        return [{f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}, {}, 3, 500, state]
    if code == "score_sde":
        fixed = ("sigmas", "all_modules.0.W")
        model = {f"module.{name}": state[name] if name in fixed else torch.zeros_like(state[name]) for name in state}
        averages = [tensor for name, tensor in state.items() if name not in fixed]
        ema = {"decay": 0.999, "num_updates": 7, "shadow_params": averages}
        return {"optimizer": {"state": {}, "param_groups": []}, "model": model, "ema": ema, "step": 7}
    return state


def output_of(network, case, dtype):
    """The network's output for the inputs of a case, in a dtype."""
    network, inputs = network.to(dtype), case["inputs"]
    x = golden.images(case).to(dtype)
    if "low_res" in inputs:
        x = torch.cat((x, condition_planes(golden.images(case, "low_res").to(dtype), x.shape[-2:])), dim=1)
    times = next(inputs[key] for key in ("timesteps", "labels", "time_cond", "t") if key in inputs)
    t = torch.tensor(times)
    t = t.float().to(dtype) if t.is_floating_point() else t
    with torch.no_grad():
        output = network(x, t, torch.tensor(inputs["y"])) if "y" in inputs else network(x, t)
    return output if isinstance(network, NoisyClassifier) else output.sample


def network_of(path, code, case):
    original = open_original(path, **options_of(code, case))
    cls = NoisyClassifier if original.description.network == "NoisyClassifier" else DDPMUNet
    return cls.from_original(original)


@pytest.fixture(params=CASES, ids="-".join)
def case_in_file(request, tmp_path):
    code, name = request.param
    case = golden.cases(code)[name]
    path = tmp_path / "original.pth"
    torch.save(content_of_file(code, golden.state_dict(case)), path)
    return code, case, path


def test_the_output_is_the_original_networks_and_the_file_is_written_again(case_in_file, tmp_path):
    code, case, path = case_in_file
    network = network_of(path, code, case)
    assert golden.relative_error(output_of(network, case, torch.float32), case["output_float32"]) < 1e-5
    assert sum(p.numel() for p in network.parameters()) == case["parameters"]

    format, file_name = FORMATS[code]
    network.save_pretrained(tmp_path / "saved")
    network = type(network).from_pretrained(tmp_path / "saved")
    network.save_single_file(tmp_path / file_name, format)
    again = read_tensors(tmp_path / file_name, "ema")
    expected = golden.state_dict(case)
    assert list(again) == list(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == again[name].dtype and torch.equal(tensor, again[name]), name


def test_a_table_of_noise_levels_of_another_machine_is_written_again(tmp_path):
    case = golden.cases("score_sde")["ddpm_vp_continuous"]
    state = golden.state_dict(case)
    state["sigmas"][3] *= 1 + 2e-16
    torch.save(content_of_file("score_sde", state), tmp_path / "a.pth")
    network_of(tmp_path / "a.pth", "score_sde", case).save_single_file(tmp_path / "b.pth", "score_sde_pytorch")
    assert torch.equal(read_tensors(tmp_path / "b.pth", "ema")["sigmas"], state["sigmas"])


def test_a_pool_that_is_not_supported_is_refused_by_its_name(tmp_path):
    case = golden.cases("guided_diffusion")["classifier_spatial_pool"]
    torch.save(golden.state_dict(case), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="classifier_pool='spatial' and 'spatial_v2' are not supported"):
        open_original(tmp_path / "a.pt", **options_of("guided_diffusion", case))


def saved(path, code, name, change=None):
    """Saves the state of a golden case, changed by a function, and returns its options."""
    case = golden.cases(code)[name]
    state = golden.state_dict(case)
    if change is not None:
        change(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content_of_file(code, state), path)
    return options_of(code, case)


def table_in_equal_steps(state):
    state["sigmas"] = torch.linspace(50, 0.01, 1000, dtype=torch.float64)


def first_multiplier_of_two(state):
    """As if the first convolution had half as many channels as the first level."""
    for name in ("temb.dense.0.weight", "all_modules.0.weight"):
        if name in state:
            state[name] = torch.zeros(128, 32)
    for name in ("conv_in", "all_modules.2"):
        if f"{name}.weight" in state:
            state[f"{name}.weight"] = torch.zeros(32, 3, 3, 3)


def concatenated_pyramid(state):
    """As if the image were put before the output of the first level: the next block has twice as many channels."""
    state["all_modules.7.Conv_0.weight"] = torch.zeros(64, 64, 3, 3)
    del state["all_modules.7.Conv_2.weight"], state["all_modules.7.Conv_2.bias"]


def grey_images(state):
    state["all_modules.3.weight"] = torch.zeros(32, 1, 3, 3)


UPSAMPLER, CLASSIFIER = "superres_cond_updown", "classifier_attention_pool"
PLAIN, VE = "uncond_convresample_plain_onehead", "ncsnpp_ve_continuous_inputresidual_narrow"


@pytest.mark.parametrize(
    "code, name, change, options, text",
    [
        ("guided_diffusion", PLAIN, None, {"num_head_channels": 48}, "num_head_channels=48 does not divide the 128 "),
        ("guided_diffusion", PLAIN, None, {"num_head_channels": 0}, "num_head_channels=0 does not divide the 128 "),
        ("guided_diffusion", PLAIN, None, {"num_heads_upsample": 3}, "num_heads_upsample=3 does not divide the 128 "),
        ("guided_diffusion", PLAIN, None, {"small_size": 8}, "takes 3 channels and gives 3; those of an image, "),
        ("guided_diffusion", PLAIN, None, {"image_size": 15}, "image_size=15 must be a multiple of 2"),
        ("guided_diffusion", PLAIN, None, {"num_heads": None}, "does not say num_heads or num_head_channels; "),
        ("guided_diffusion", UPSAMPLER, None, {"small_size": None}, "does not say small_size; "),
        ("guided_diffusion", CLASSIFIER, None, {"num_head_channels": -1}, "does not say num_head_channels; "),
        ("pytorch_diffusion", "cifar_like", first_multiplier_of_two, {}, "ch_mult whose first number is not 1"),
        ("score_sde", "ddpm_vp", first_multiplier_of_two, {}, "ch_mult whose first number is not 1"),
        ("score_sde", "ncsnpp_ve_skips", concatenated_pyramid, {}, "progressive_combine='cat' is not supported"),
        ("score_sde", "ddpm_ve", table_in_equal_steps, {}, "noise levels are not in geometric steps"),
        (
            "score_sde",
            "ncsnpp_ddpm_blocks",
            None,
            {"fir": True},
            "fir=True, but its resampling convolutions have no FIR",
        ),
        ("score_sde", VE, None, {"fir": False}, "fir=False, but its input pyramid has a FIR filter"),
        ("score_sde", VE, None, {"model": "ddpm"}, "model='ddpm', but its blocks or its embedding are those of 'ncsn"),
    ],
)
def test_what_contradicts_the_tensors_is_refused(tmp_path, code, name, change, options, text):
    path = tmp_path / "a.pt"
    known = saved(path, code, name, change)
    if change is None:
        open_original(path, **known)
    with pytest.raises(ValueError) as caught:
        open_original(path, **known | options)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_network_refuses_is_refused_with_the_name_of_the_file(tmp_path):
    options = saved(tmp_path / "a.pth", "score_sde", "ncsnpp_ve_skips", grey_images)
    with pytest.raises(ValueError, match="a.pth: in_channels=1 must be 3 with the Skip blocks"):
        DDPMUNet.from_single_file(tmp_path / "a.pth", **options)


@pytest.mark.parametrize(
    "code, name, file, omitted",
    [
        ("guided_diffusion", CLASSIFIER, "64x64_classifier.pt", "image_size"),
        ("score_sde", "ncsnpp_ve_skips", "ve/church_ncsnpp_continuous/checkpoint_8.pth", "sde"),
    ],
)
def test_the_name_of_a_published_checkpoint_does_not_decide_on_another_network(tmp_path, code, name, file, omitted):
    """Its options contradict the tensors, as its images have another size, or its table another length."""
    options = saved(tmp_path / file, code, name)
    del options[omitted]
    original = open_original(tmp_path / file, **options)
    assert original.description.config["sample_size"] == 16


def test_a_classifier_ignores_the_number_of_heads_on_the_way_up(tmp_path):
    case = golden.cases("guided_diffusion")["classifier_adaptive_pool"]
    options = saved(tmp_path / "a.pt", "guided_diffusion", "classifier_adaptive_pool") | {"num_heads_upsample": 1}
    network = NoisyClassifier.from_single_file(tmp_path / "a.pt", **options)
    assert golden.relative_error(output_of(network, case, torch.float32), case["output_float32"]) < 1e-5


@pytest.mark.parametrize("pool", ["attention", "average"])
def test_a_classifier_with_levels_of_one_width(tmp_path, pool):
    """Its tensors fit two levels of one block, and one level of three; the size of an attention pool decides."""
    types = ("ResnetDownsampleBlock2D",) * 2
    network = NoisyClassifier(8, 4, 3, (32, 32), types, 1, attention_head_dim=16, pool=pool)
    known = options_of("guided_diffusion", golden.cases("guided_diffusion")[CLASSIFIER])
    known |= {"image_size": 8, "num_head_channels": 16}
    network.save_single_file(tmp_path / "a.pt", "guided-diffusion", **known, num_res_blocks=1)
    if pool == "average":
        with pytest.raises(ValueError, match="does not say num_res_blocks; "):
            open_original(tmp_path / "a.pt", **known)
        known["num_res_blocks"] = 2
        with pytest.raises(ValueError, match="its 4 input blocks are not levels of 2 residual blocks for 8 pixels"):
            open_original(tmp_path / "a.pt", **known)
        known["num_res_blocks"] = 1
    again = NoisyClassifier.from_single_file(tmp_path / "a.pt", **known)
    x = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    assert torch.equal(again(x, 3), network.eval()(x, 3))


def double_precision_errors(path, cases):
    """The error of each case in float64, by its name."""
    errors = {}
    for code, name in cases:
        case = golden.cases(code)[name]
        torch.save(content_of_file(code, golden.state_dict(case)), path)
        network = network_of(path, code, case)
        errors[name] = golden.relative_error(output_of(network, case, torch.float64), case["output_float64"])
    return errors


SMALL = {
    "uncond_convresample_plain_onehead",
    "cond_heads4_twolevels",
    "lsun_like",
    "ddpmpp_vp_narrow",
    "ddpm_vp_continuous",
}


@pytest.mark.parametrize("cases", [pytest.param("all", marks=pytest.mark.slow), "small"])
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="exp of the frequencies is rounded as MKL rounds it")
def test_outputs_in_float64(cases, tmp_path):
    """The golden outputs have the frequencies of MKL's path for all processors: exp in float32 depends on the processor."""
    chosen = [case for case in CASES if cases == "all" or case[1] in SMALL]
    call = f"tests.double_precision_errors({str(tmp_path / 'a.pt')!r}, {chosen})"
    script = f"import json, {__name__} as tests; print(json.dumps({call}))"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"MKL_CBWR": "COMPATIBLE", "PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    errors = json.loads(result.stdout)
    assert len(errors) == len(chosen) and max(errors.values()) < 1e-10, errors
