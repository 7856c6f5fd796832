import copy

import pytest
import torch

from ddpm_hf import InferenceUNet
from support.compare import assert_close
from support.networks import small_classifier

RGB = dict(in_channels=3, out_channels=3, sample_size=16)
NETWORKS = {
    "ddpm": {},
    "adm": dict(
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=4,
        num_class_embeds=5,
        out_channels=2,
    ),
    "ncsnpp": RGB
    | dict(
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
        norm_num_groups=8,
        mid_block_scale_factor=2**0.5,
    ),
    "ncsnpp_cifar10": RGB
    | dict(
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        freq_shift=1,
        norm_num_groups=None,
        num_attention_heads=2,
        up_attention="last",
        block_scale_factor=2**0.5,
        resample_shortcut=True,
        fir_resampling=True,
        input_pyramid="residual",
        sigma_table=(0.01, 50.0, 100),
    ),
    "features": dict(fourier_features=(7, 8), center_input_sample=True),
    "learned": dict(time_embedding_type="learned", num_train_timesteps=100, downsample_padding=0, dropout=0.1),
    "timestep_classes": dict(class_embed_type="timestep"),
}


def inputs(network, rows=3):
    config = network.config
    x = torch.randn(rows, config.in_channels, *[config.sample_size] * 2)
    t = torch.tensor([1, 40, 99][:rows])
    t = (t + 1) / 10 if config.time_embedding_type == "fourier" else t
    labels = torch.arange(rows) if network.class_embedding is not None else None
    return x, t, labels


def forward(network, device, x, t, labels):
    labels = None if labels is None else labels.to(device)
    t = t.to(device) if isinstance(t, torch.Tensor) and t.dim() else t
    return network(x.to(device), t, class_labels=labels).sample


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_gradients_are_those_of_the_cpu(device, unet, name):
    network = unet(**NETWORKS[name])
    there = copy.deepcopy(network).to(device)
    x, t, labels = inputs(network)
    outputs = [forward(net, target, x, t, labels) for net, target in ((network, "cpu"), (there, device))]
    assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().mean().backward()
    gradients = [{key: p.grad for key, p in net.named_parameters()} for net in (there, network)]
    assert_close(*gradients)


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp", "learned"])
def test_one_time_for_all_images_as_a_number_or_a_tensor_of_either_device(device, unet, name):
    network = unet(**NETWORKS[name])
    there = copy.deepcopy(network).to(device)
    x, t, labels = inputs(network)
    with torch.no_grad():
        expected = forward(network, "cpu", x, t[1], labels)
        for timestep in (t[1], t[1].item(), t[1].to(device), t[1].expand(3).to(device)):
            assert_close(forward(there, device, x, timestep, labels), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_checkpointing_changes_nothing_in_training_mode(device, unet, name):
    """Dropout draws from the device's generator, whose state the second pass forward must have too."""
    network = unet(**NETWORKS[name]).to(device).train()
    x, t, labels = inputs(network)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            network.enable_gradient_checkpointing()
        torch.manual_seed(0)
        forward(network, device, x, t, labels).square().mean().backward()
        gradients.append({key: p.grad for key, p in network.named_parameters()})
        network.zero_grad()
    assert_close(*gradients, tolerance=1e-5)


def test_dropout_draws_on_the_device(device, unet):
    network = unet(dropout=0.5).to(device).train()
    x, t, labels = inputs(network)
    before = torch.get_rng_state()
    one, other = (forward(network, device, x, t, labels) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pool", ["attention", "average"])
def test_classifier_and_its_gradient(device, pool):
    blocks = ("ResnetDownsampleBlock2D", "AttnDownBlock2D")
    classifier = small_classifier(down_block_types=blocks, attention_head_dim=4, pool=pool)
    there = copy.deepcopy(classifier).to(device)
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 1])
    for t in (7, torch.tensor(7), torch.tensor([7, 9, 0])):
        on_device = t.to(device) if isinstance(t, torch.Tensor) and t.dim() else t
        assert_close(there(x.to(device), on_device), classifier(x, t))
        actual = there.gradient(x.to(device), on_device, labels.to(device), 2.0)
        assert_close(actual, classifier.gradient(x, t, labels, 2.0))


@pytest.mark.parametrize("name", ["ddpm", "adm", "ncsnpp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_network_for_inference_is_the_network(device, unet, name, dtype, tolerance):
    """In half precision within the rounding of the CPU's: 8 bits, and 11."""
    network = unet(**NETWORKS[name])
    x, t, labels = inputs(network)
    there = InferenceUNet(copy.deepcopy(network).to(device), dtype=dtype, compile=False)
    with torch.no_grad():
        assert_close(forward(there, device, x, t, labels), forward(network, "cpu", x, t, labels), tolerance)
