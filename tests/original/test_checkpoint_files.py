"""Files of checkpoints: wrappers, TensorFlow's variables, and files that are refused in one line."""

import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ddpm_hf import DDPMImagePipeline, DDPMUNet, NoisyClassifier
from ddpm_hf.original.checkpoint import open_original
from ddpm_hf.original.files import read_tensors
from ddpm_hf.original.ho import pytorch_name, tensorflow_name
from support import original_checkpoints as golden

HO = {"image_size": 16, "var_type": "fixedlarge"}
ADM = {
    "image_size": 16,
    "num_heads": 1,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
}


@pytest.fixture(scope="module")
def ho_case():
    return golden.cases("pytorch_diffusion")["lsun_like"]


@pytest.fixture(scope="module")
def ho_state(ho_case):
    return golden.state_dict(ho_case)


@pytest.fixture(scope="module")
def adm_state():
    return golden.state_dict(golden.cases("guided_diffusion")["uncond_convresample_plain_onehead"])


def variables_of(state):
    """TensorFlow's variables for a state of pytorch_diffusion, by the golden table of names and layouts."""
    table = golden.cases("diffusion_tf")["cifar10"]["variables"]
    layout_of = {
        (theirs.rpartition(".")[0].rpartition(".")[2], len(shape)): layout for _, _, theirs, shape, layout in table
    }
    variables = {}
    for name, tensor in state.items():
        layout = layout_of[name.rpartition(".")[0].rpartition(".")[2], tensor.dim()]
        array = tensor.numpy()
        if layout.startswith("HWIO"):
            array = array.transpose(2, 3, 1, 0)
        elif layout.startswith("IO"):
            array = array.reshape(array.shape[:2]).T
        variables[tensorflow_name(name)] = np.ascontiguousarray(array)
    return variables


class TestTensorFlow:
    def test_names_are_those_of_the_golden_table(self):
        for theirs, _, name, _, _ in golden.cases("diffusion_tf")["cifar10"]["variables"]:
            assert tensorflow_name(name) == theirs and pytorch_name(theirs) == name

    def test_every_variable_of_the_golden_table_is_used(self):
        case = golden.cases("diffusion_tf")["cifar10"]
        variables = {name: torch.empty(shape, device="meta") for name, shape, *_ in case["variables"]}
        from ddpm_hf.original import ho
        from ddpm_hf.original.options import Options
        from ddpm_hf.original.pairs import to_ours

        description = ho.describe(variables, Options(HO))
        with torch.device("meta"):
            network = DDPMUNet(**description.config)
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        assert to_ours(ho.tensorflow_pairs(description.config, {}, shapes), variables, shapes).keys() == shapes.keys()
        assert sum(parameter.numel() for parameter in network.parameters()) == case["parameters"]

    @pytest.mark.parametrize("kind", ["npz", "folder", "flat folder"])
    def test_variables_give_the_network_of_the_converted_file(self, ho_case, ho_state, tmp_path, kind):
        variables = variables_of(ho_state)
        averages = {f"{name}/ExponentialMovingAverage": array for name, array in variables.items()}
        others = {f"{name}/Adam": array for name, array in variables.items()}
        raw = {name: np.zeros_like(array) for name, array in variables.items()}
        arrays = raw | averages | others | {"global_step": np.array(7), "beta1_power": np.float32(0.9)}
        path = tmp_path / "variables.npz" if kind == "npz" else tmp_path / "variables"
        if kind == "npz":
            np.savez(path, **arrays)
        else:
            for name, array in arrays.items():
                file = path / f"{name if kind == 'folder' else name.replace('/', '__')}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, array)
        network = DDPMUNet.from_single_file(path, **HO)
        t = torch.tensor(ho_case["inputs"]["t"])
        with torch.no_grad():
            output = network(golden.images(ho_case), t).sample
        assert golden.relative_error(output, ho_case["output_float32"]) < 1e-5
        assert not DDPMUNet.from_single_file(path, weights="raw", **HO).conv_in.weight.any()

        network.save_single_file(tmp_path / "again.npz", "diffusion")
        with np.load(tmp_path / "again.npz") as archive:
            assert {name: archive[name].tobytes() for name in averages} == {
                name: array.tobytes() for name, array in averages.items()
            }


class TestWrappers:
    def test_raw_weights_of_ddim_and_score_sde(self, ho_state, tmp_path):
        raw = {f"module.{name}": tensor + 1 for name, tensor in ho_state.items()}
        torch.save([raw, {}, 3, 500, ho_state], tmp_path / "ckpt.pth")
        assert torch.equal(read_tensors(tmp_path / "ckpt.pth", "ema")["conv_in.bias"], ho_state["conv_in.bias"])
        assert torch.equal(read_tensors(tmp_path / "ckpt.pth", "raw")["conv_in.bias"], ho_state["conv_in.bias"] + 1)
        torch.save([raw, {}, 3, 500], tmp_path / "ckpt.pth")  # not averaged
        assert torch.equal(read_tensors(tmp_path / "ckpt.pth", "ema")["conv_in.bias"], ho_state["conv_in.bias"] + 1)

        state = golden.state_dict(golden.cases("score_sde")["ncsnpp_ve_skips"])
        model = {f"module.{name}": tensor for name, tensor in state.items()}
        averages = [tensor + 1 for name, tensor in state.items() if name not in ("sigmas", "all_modules.0.W")]
        content = {"model": model, "ema": {"decay": 0.999, "num_updates": 1, "shadow_params": averages}, "step": 1}
        torch.save(content, tmp_path / "checkpoint_8.pth")
        read = read_tensors(tmp_path / "checkpoint_8.pth", "ema")
        name = "all_modules.4.GroupNorm_0.weight"
        assert torch.equal(read[name], state[name] + 1) and torch.equal(
            read["all_modules.0.W"], state["all_modules.0.W"]
        )
        assert torch.equal(read_tensors(tmp_path / "checkpoint_8.pth", "raw")[name], state[name])
        content["ema"]["shadow_params"] = averages[:-1]
        torch.save(content, tmp_path / "checkpoint_8.pth")
        with pytest.raises(ValueError, match="averages of .* parameters; weights='raw' ignores them"):
            read_tensors(tmp_path / "checkpoint_8.pth", "ema")

    @pytest.mark.parametrize("kind", ["legacy", "safetensors", "state_dict", "half"])
    def test_other_forms(self, ho_state, tmp_path, kind):
        path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.ckpt")
        if kind == "safetensors":
            save_file(ho_state, path)
        elif kind == "half":
            torch.save({name: tensor.half() for name, tensor in ho_state.items()}, path)
        else:
            content = {"state_dict": ho_state} if kind == "state_dict" else ho_state
            torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
        network = DDPMUNet.from_single_file(path, **HO)
        assert network.dtype == (torch.float16 if kind == "half" else torch.float32)
        assert DDPMUNet.from_single_file(path, torch_dtype=torch.float32, **HO).dtype == torch.float32
        assert not network.training and all(parameter.requires_grad for parameter in network.parameters())


def refusal(path, **options):
    with pytest.raises(ValueError) as caught:
        open_original(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


class TestRefused:
    @pytest.mark.parametrize(
        "names, text",
        [
            (["model.diffusion_model.input_blocks.0.0.weight"], "a latent diffusion model"),
            (["unet.down.lora_A.weight", "unet.down.lora_B.weight"], "a LoRA"),
            (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a network of diffusers"),
            ([f"synthesis.b{i}.weight" for i in range(7)], "but 7 tensors (synthesis.b0.weight, "),
        ],
    )
    def test_other_models(self, tmp_path, names, text):
        torch.save({name: torch.zeros(1) for name in names}, tmp_path / "a.pt")
        assert text in refusal(tmp_path / "a.pt")

    def test_files_that_are_no_checkpoints(self, tmp_path, ho_state):
        torch.save({"state": {}, "param_groups": []}, tmp_path / "opt000000.pt")
        assert "holds the state of an optimizer" in refusal(tmp_path / "opt000000.pt")
        torch.save(torch.zeros(3), tmp_path / "tensor.pt")
        assert "holds a Tensor, not the weights of a network" in refusal(tmp_path / "tensor.pt")
        torch.save(ho_state, tmp_path / "whole.ckpt")
        content = (tmp_path / "whole.ckpt").read_bytes()
        for name, part in (("half.ckpt", content[: len(content) // 2]), ("text.ckpt", b"<html>"), ("empty.ckpt", b"")):
            (tmp_path / name).write_bytes(part)
            message = refusal(tmp_path / name, **HO)
            assert "damaged" in message or "is empty" in message
        assert "folder without .npy files" in refusal(tmp_path)
        (tmp_path / "model_index.json").write_text("{}")
        assert "open it with from_pretrained" in refusal(tmp_path)
        (tmp_path / "a.npz").write_bytes(b"no archive")
        assert "is damaged" in refusal(tmp_path / "a.npz")
        np.savez(tmp_path / "b.npz", other=np.zeros(3))
        assert "has no variable model/..." in refusal(tmp_path / "b.npz")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("kind", ["pt", "legacy.pt", "safetensors", "npz", "compressed.npz"])
    def test_damaged_bytes_are_one_error(self, tmp_path, kind):
        """Files with random bytes open, or are refused by a ValueError or OSError: whatever the libraries raise for them."""
        path, random = tmp_path / f"a.{kind}", np.random.default_rng(0)
        tensors = {f"model/temb/dense{i}/W": torch.randn(4, 4) for i in range(9)}
        if kind == "safetensors":
            save_file(tensors, path)
        elif path.suffix == ".npz":
            save = np.savez_compressed if kind == "compressed.npz" else np.savez
            save(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pt")
        content, refused = path.read_bytes(), 0
        for _ in range(200):
            damaged = np.frombuffer(content, dtype=np.uint8).copy()
            damaged[random.integers(len(damaged), size=random.integers(1, 20))] = random.integers(256)
            path.write_bytes(damaged.tobytes())
            try:
                read_tensors(path, "ema")
            except (ValueError, OSError) as error:
                refused += 1
                assert "\n" not in str(error)
        assert refused > 20

    def test_arrays_that_numpy_cannot_read(self, tmp_path):
        path, name = tmp_path / "a.npz", "model/temb/dense0/W"
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
        assert "holds more than arrays" in refusal(path)
        for shape in (b"(1000000000000000,), ", b"(4, ((((("):  # larger than any memory; no Python
            header = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + shape
            header = (header + (b"}" if b"," in shape[-2:] else b"")).ljust(117) + b"\n"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
            assert "larger than the memory" in refusal(path)
        for dtype in (">f4", np.longdouble, np.int32):
            np.savez(path, **{name: np.zeros((2, 2), dtype)})
            assert "not float16, float32 or float64" in refusal(path)

    def test_tensors_of_other_kinds(self, tmp_path, ho_state):
        name, path = "temb.dense.0.weight", tmp_path / "a.ckpt"
        weight = ho_state[name]
        for tensor in (weight.to_sparse(), weight.int(), weight.to(torch.float8_e4m3fn), weight.to(torch.complex64)):
            torch.save({**ho_state, name: tensor}, path)
            with pytest.raises(ValueError, match=rf"does not fit 1 tensor \({name}"):
                DDPMUNet.from_single_file(path, **HO)
        torch.save({**ho_state, name: weight.to("meta")}, path)
        assert "names and shapes of 1 tensor (temb.dense.0.weight) without numbers" in refusal(path, **HO)
        torch.save({**ho_state, f"module.{name}": weight}, path)
        assert "with and without 'module.'" in refusal(path, **HO)
        torch.save({**ho_state, "down.99999999.block.0.conv1.weight": weight}, path)
        assert "lacks tensors" in refusal(path, **HO)
        torch.save({**ho_state, "down.0.block.0.conv1.weight": torch.zeros(0, 64, 3, 3)}, path)
        with pytest.raises(ValueError, match=r"a\.ckpt: ch_mult whose first number is not 1"):
            DDPMUNet.from_single_file(path, **HO)

    def test_a_tensor_of_two_names_becomes_two(self, tmp_path, ho_state):
        ho_state = {**ho_state, "norm_out.weight": ho_state["norm_out.bias"]}
        torch.save(ho_state, tmp_path / "a.ckpt")
        network = DDPMUNet.from_single_file(tmp_path / "a.ckpt", **HO)
        network.conv_norm_out.weight.data.fill_(7)
        assert torch.equal(network.conv_norm_out.bias, ho_state["norm_out.bias"])
        network.save_pretrained(tmp_path / "saved")  # safetensors refuses tensors that share memory

    def test_averages_and_noise_levels(self, tmp_path):
        state, path = golden.state_dict(golden.cases("score_sde")["ddpm_vp"]), tmp_path / "a.pth"
        averages = [tensor for name, tensor in state.items() if name != "sigmas"]
        for shadow_params, text in (
            (averages[::-1], "shapes of its parameters"),
            ([1] * len(averages), "are no tensors"),
        ):
            torch.save({"model": state, "ema": {"shadow_params": shadow_params}}, path)
            assert text in refusal(path)
        for sigmas in (state["sigmas"][None], state["sigmas"] / 0, torch.arange(1000)):
            torch.save({**state, "sigmas": sigmas}, path)
            assert "its table of noise levels is" in refusal(path, image_size=8, model="ddpm", sde="vpsde")

    def test_code_is_not_run(self, tmp_path):
        class Exploit:
            def __reduce__(self):
                return (open, (str(tmp_path / "made by the file"), "w"))

        torch.save({"a": Exploit()}, tmp_path / "a.pt")
        assert "would run code" in refusal(tmp_path / "a.pt")
        with (tmp_path / "b.pt").open("wb") as file:
            pickle.dump(Exploit(), file, protocol=2)
        refusal(tmp_path / "b.pt")
        np.savez(tmp_path / "c.npz", **{"model/temb/dense0/W": np.array([Exploit()], dtype=object)})
        refusal(tmp_path / "c.npz")
        assert not (tmp_path / "made by the file").exists()

    def test_tensors_left_over_and_missing(self, tmp_path, ho_state):
        torch.save({**ho_state, **{f"more.{i}": torch.zeros(1) for i in range(7)}}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"holds, beside its network, 7 tensors \(more.0, .*more.4, \.\.\.\)"):
            DDPMUNet.from_single_file(tmp_path / "a.ckpt", **HO)
        torch.save({name: tensor for name, tensor in ho_state.items() if "conv2" not in name}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"lacks 28 tensors \(down.0.block.0.conv2.weight, "):
            DDPMUNet.from_single_file(tmp_path / "a.ckpt", **HO)
        torch.save({**ho_state, "norm_out.bias": torch.zeros(7)}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"does not fit 1 tensor \(norm_out.bias of the shape \(7,\)"):
            DDPMUNet.from_single_file(tmp_path / "a.ckpt", **HO)
        torch.save({"temb.dense.0.weight": torch.zeros(4, 4)}, tmp_path / "a.ckpt")
        assert "download it again" in refusal(tmp_path / "a.ckpt", **HO)

    def test_options(self, tmp_path, adm_state, ho_state):
        path = tmp_path / "model.pt"
        torch.save(adm_state, path)
        assert "does not say num_heads or num_head_channels, use_new_attention_order, image_size" in refusal(path)
        assert "like='64x64_difusion' is no published checkpoint; did you mean '64x64_diffusion'?" in str(
            pytest.raises(ValueError, open_original, path, "64x64_difusion").value
        )
        assert "is not like 64x64_diffusion: its block_out_channels is [64, 128]" in refusal(
            path, like="64x64_diffusion"
        )
        assert "is of another code base" in refusal(path, like="vp/cifar10_ddpm")
        for options, text in (
            (
                ADM | {"var_type": "fixedlarge", "fir": True},
                "guided-diffusion, improved-diffusion have no var_type, fir; leave these options out",
            ),
            ({"image_sizes": 3}, "unknown option 'image_sizes'; did you mean 'image_size'?"),
            ({"image_size": "x"}, "image_size='x' must be an integer"),
            ({"noise_schedule": "square"}, "choose one of linear, cosine"),
            ({"weights": "average"}, "weights='average' is not known; choose one of ema, raw"),
        ):
            with pytest.raises(ValueError, match=text.replace("?", r"\?")):
                open_original(path, **options)
        assert "num_heads=3 does not divide the 128 channels" in refusal(path, **ADM | {"num_heads": 3})
        with pytest.raises(FileNotFoundError, match="there is no file"):
            open_original(tmp_path / "none.pt")
        with pytest.raises(ValueError, match="is not the address of a file on the Hub"):
            open_original("https://example.org/model.pt")

    @pytest.mark.parametrize(
        "options, text",
        [
            ({"num_heads_upsample": 3}, "num_heads_upsample=3 does not divide the 128 channels"),
            ({"num_heads_upsample": 0}, "num_heads_upsample=0 does not divide"),
            ({"num_head_channels": 7}, "num_head_channels=7 does not divide"),
            ({"small_size": 8}, "takes 3 channels and gives 3; .* leave out small_size"),
            ({"sde": "vpsde", "snr": 1}, "have no sde, snr; leave these options out"),
        ],
    )
    def test_options_that_do_not_fit(self, tmp_path, adm_state, options, text):
        torch.save(adm_state, tmp_path / "a.pt")
        assert re.search(text, refusal(tmp_path / "a.pt", **ADM | {"use_new_attention_order": False} | options))

    def test_a_known_name_of_another_network_needs_options(self, tmp_path, adm_state):
        torch.save(adm_state, tmp_path / "64x64_diffusion.pt")
        message = refusal(tmp_path / "64x64_diffusion.pt")
        assert "is not the published 64x64_diffusion (its block_out_channels is [64, 128], not [192, " in message
        assert ") and does not say num_heads" in message
        assert open_original(tmp_path / "64x64_diffusion.pt", **ADM).description.config["sample_size"] == 16

    def test_the_class_must_be_that_of_the_file(self, tmp_path, adm_state):
        path = tmp_path / "model.pt"
        torch.save(adm_state, path)
        with pytest.raises(ValueError, match="holds a DDPMUNet; open it with DDPMUNet.from_single_file"):
            NoisyClassifier.from_single_file(path, **ADM)
        case = golden.cases("guided_diffusion")["classifier_attention_pool"]
        torch.save(golden.state_dict(case), path)
        options = ADM | {"num_head_channels": 32, "use_new_attention_order": False}
        with pytest.raises(ValueError, match="open it with NoisyClassifier.from_single_file"):
            DDPMImagePipeline.from_single_file(path, **options)
        with pytest.raises(ValueError, match="image_size=64, but its pool is for 16 pixels"):
            NoisyClassifier.from_single_file(path, **options | {"image_size": 64})

    def test_a_truncated_archive_in_the_middle(self, tmp_path, ho_state):
        """A file whose directory is whole, but not its content."""
        torch.save(ho_state, tmp_path / "a.ckpt")
        with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
            names = archive.namelist()
        with zipfile.ZipFile(tmp_path / "a.ckpt") as archive, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as copy:
            for name in names[:-4]:
                copy.writestr(name, archive.read(name))
        assert "damaged" in refusal(tmp_path / "b.ckpt", **HO)


def test_write_refuses_what_the_format_lacks(tmp_path, ho_state):
    torch.save(ho_state, tmp_path / "a.ckpt")
    network = DDPMUNet.from_single_file(tmp_path / "a.ckpt", **HO)
    for path, format, text in (
        ("b.ckpt", "ddpm", "format='ddpm' is not known"),
        ("b.zip", "ddim", "must end in .pth"),
        ("b.pt", "guided-diffusion", "guided-diffusion"),
    ):
        with pytest.raises(ValueError, match=text):
            network.save_single_file(tmp_path / path, format, **ADM | {"use_new_attention_order": False})
        assert not (tmp_path / path).exists()


def test_a_network_without_options_is_written_if_the_file_needs_none(tmp_path, ho_state):
    torch.save(ho_state, tmp_path / "a.ckpt")
    network = DDPMUNet.from_single_file(tmp_path / "a.ckpt", **HO)
    network.register_to_config(_ddpm_hf={})  # as after training
    network.save_single_file(tmp_path / "b.ckpt", "pytorch_diffusion")
    assert torch.equal(torch.load(tmp_path / "b.ckpt")["conv_in.weight"], ho_state["conv_in.weight"])
    torch.save(golden.state_dict(golden.cases("score_sde")["ddpm_ve"]), tmp_path / "a.pth")
    song = {"model": "ddpm", "sde": "vesde", "continuous": False}
    network = DDPMUNet.from_single_file(tmp_path / "a.pth", image_size=8, **song)
    for original, options, text in (
        ({}, {}, "does not say model, sde, continuous"),
        ({}, song, "does not say sigma_min, sigma_max, num_scales"),
        (5, {}, "original=5 must be a dictionary"),
        ({"sigmas": "x"}, {}, "original.sigmas='x' must be a list"),
    ):
        network.register_to_config(_ddpm_hf={**network.own_settings(), "original": original})
        with pytest.raises(ValueError, match=text):
            network.save_single_file(tmp_path / "b.pth", "score_sde_pytorch", **options)
