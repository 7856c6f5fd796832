import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from ddpm_hf import NoisyClassifier, VariationalDDPMScheduler
from ddpm_hf.models.classifier import AttentionPool
from support.networks import SIZES

BASE = SIZES | dict(
    num_classes=5,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    layers_per_block=2,
    attention_head_dim=8,
)


@pytest.mark.parametrize("pool", ["attention", "average"])
@pytest.mark.parametrize("sample_size", [8, (8, 16)])
def test_logits(pool, sample_size, tmp_path):
    classifier = NoisyClassifier(**BASE | dict(pool=pool, sample_size=sample_size)).eval()
    height, width = (8, 8) if sample_size == 8 else sample_size
    x, t = torch.randn(3, 1, height, width), torch.tensor([0, 500, 999])
    logits = classifier(x, t)
    assert logits.shape == (3, 5) and logits.std() > 0
    for i in range(3):
        torch.testing.assert_close(classifier(x[i : i + 1], int(t[i]))[0], logits[i], rtol=1e-4, atol=1e-5)
    classifier.save_pretrained(tmp_path)
    torch.testing.assert_close(NoisyClassifier.from_pretrained(tmp_path)(x, t), logits, rtol=0, atol=0)


def test_the_way_down_is_that_of_diffusers():
    """The trunk's output, of weights that UNet2DModel has too, is what comes out of that class's middle."""
    classifier = NoisyClassifier(**BASE).eval()
    arguments = {key: BASE[key] for key in BASE if key in inspect.signature(UNet2DModel).parameters}
    stock = UNet2DModel(
        **arguments,
        out_channels=1,
        downsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    shared = {
        name: value for name, value in classifier.state_dict().items() if not name.startswith(("head", "conv_norm"))
    }
    result = stock.load_state_dict(shared, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith(("up_blocks", "conv_norm_out", "conv_out")) for name in result.missing_keys)
    recorded = []
    stock.mid_block.register_forward_hook(lambda module, args, output: recorded.append(output))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    stock(x, t)
    torch.testing.assert_close(classifier.encode(x, classifier.embed(t))[0], recorded[0], rtol=1e-4, atol=1e-5)


def test_attention_pool_is_clips():
    pool, x = AttentionPool(6, 16, 4, 5), torch.randn(2, 16, 2, 3)
    tokens = x.flatten(2).permute(2, 0, 1)
    tokens = torch.cat((tokens.mean(0, keepdim=True), tokens)) + pool.positional_embedding[:, None]
    expected, _ = F.multi_head_attention_forward(
        query=tokens[:1], key=tokens, value=tokens, embed_dim_to_check=16, num_heads=4, in_proj_weight=None,
        in_proj_bias=torch.cat((pool.to_q.bias, pool.to_k.bias, pool.to_v.bias)), bias_k=None, bias_v=None,
        add_zero_attn=False, dropout_p=0.0, out_proj_weight=pool.to_out.weight, out_proj_bias=pool.to_out.bias,
        use_separate_proj_weight=True, q_proj_weight=pool.to_q.weight, k_proj_weight=pool.to_k.weight,
        v_proj_weight=pool.to_v.weight,
    )  # fmt: skip
    torch.testing.assert_close(pool(x), expected[0])


def test_gradient_is_that_of_finite_differences():
    classifier = NoisyClassifier(**BASE).double().eval()
    torch.nn.init.normal_(classifier.head.to_out.weight)
    x, t, labels = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([5, 800]), torch.tensor([4, 0])
    scale, direction, step = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.randn_like(x), 1e-5
    gradient = classifier.gradient(x, t, labels, scale)
    assert gradient.dtype == torch.float32 and gradient.shape == x.shape
    with torch.no_grad():
        above, below = (
            classifier(x + sign * step * direction, t).log_softmax(-1)[torch.arange(2), labels] for sign in (1, -1)
        )
    slope = scale.flatten() * (above - below) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in classifier.parameters())


def test_the_parameters_of_adms_classifiers():
    """ADM, its table of classifiers: 43 M at 128 pixels, 54 M at 256, of 128 channels, depth 2, heads of 64 channels."""
    sizes = {128: (128, 128, 256, 384, 512), 256: (128, 128, 256, 256, 512, 512)}
    counts = {}
    for side, channels in sizes.items():
        plain = len(channels) - 3
        with torch.device("meta"):
            classifier = NoisyClassifier(
                sample_size=side,
                num_classes=1000,
                block_out_channels=channels,
                down_block_types=("ResnetDownsampleBlock2D",) * plain + ("AttnDownBlock2D",) * 3,
                layers_per_block=2,
            )
        counts[side] = round(classifier.num_parameters() / 1e6)
    assert counts == {128: 43, 256: 54}


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(num_classes=1), r"num_classes=1 must be an integer in \[2, "),
        (dict(pool="max"), "pool='max' is not known; choose one of attention, average"),
        (dict(sample_size=9), "sample_size=9 must be a multiple of 2"),
        (dict(attention_head_dim=5), "attention_head_dim=5 must divide the last of block_out_channels, 16"),
        (dict(down_block_types=("UpBlock2D", "DownBlock2D")), "not supported by NoisyClassifier"),
        (dict(down_block_types=("SkipDownBlock2D", "DownBlock2D")), "has Skip blocks, which are for DDPMUNet"),
        (dict(down_block_types=("DownBlock2D",)), "down_block_types has 1 entries and block_out_channels 2"),
        (dict(norm_num_groups=3), "norm_num_groups=3 must divide"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message) as error:
        NoisyClassifier(**BASE | config)
    assert "\n" not in str(error.value)


def test_bad_images():
    classifier = NoisyClassifier(**BASE)
    with pytest.raises(ValueError, match="this network takes"):
        classifier(torch.randn(2, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="sample is 16x16; this classifier takes 8x8"):
        classifier(torch.randn(2, 1, 16, 16), 0)


def test_the_process_is_saved_with_it(tmp_path):
    scheduler = VariationalDDPMScheduler(beta_schedule="cosine", levels=17)
    scheduler.save_pretrained(tmp_path / "scheduler")
    config = VariationalDDPMScheduler.load_config(tmp_path / "scheduler")
    NoisyClassifier(**BASE, scheduler=config).save_pretrained(tmp_path / "classifier")
    reopened = NoisyClassifier.from_pretrained(tmp_path / "classifier").config.scheduler
    torch.testing.assert_close(VariationalDDPMScheduler.from_config(reopened).alphas_cumprod, scheduler.alphas_cumprod)


def test_gradient_checkpointing_changes_nothing():
    classifier, x = NoisyClassifier(**BASE), torch.randn(2, 1, 8, 8)
    grads = []
    for _ in range(2):
        classifier.zero_grad()
        F.cross_entropy(classifier(x, 10), torch.tensor([1, 2])).backward()
        grads.append([p.grad.clone() for p in classifier.parameters()])
        classifier.enable_gradient_checkpointing()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_it_learns_and_is_sure_where_there_is_little_noise():
    """Two classes of constant images: distinguishable near t = 0, not at pure noise."""
    torch.manual_seed(1)
    classifier, scheduler = NoisyClassifier(**BASE | dict(num_classes=2)), VariationalDDPMScheduler()
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3)
    for _ in range(120):
        labels = torch.randint(2, (32,))
        x_start = (labels * 1.0 - 0.5).view(-1, 1, 1, 1).expand(32, 1, 8, 8)
        t = torch.randint(1000, (32,))
        logits = classifier(scheduler.q_sample(x_start, t, torch.randn(32, 1, 8, 8)), t)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    classifier.eval()
    labels = torch.arange(200) % 2
    x_start, noise = (labels * 1.0 - 0.5).view(-1, 1, 1, 1).expand(200, 1, 8, 8), torch.randn(200, 1, 8, 8)
    with torch.no_grad():
        loss = {t: F.cross_entropy(classifier(scheduler.q_sample(x_start, t, noise), t), labels) for t in (50, 999)}
    assert loss[50] < 0.1 < math.log(2) * 0.8 < loss[999]
