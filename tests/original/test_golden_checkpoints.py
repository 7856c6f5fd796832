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
