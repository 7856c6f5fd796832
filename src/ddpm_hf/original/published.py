"""The checkpoints that their authors published: what their files do not say of them."""

from typing import NamedTuple


class Published(NamedTuple):
    """A published checkpoint.

    Attributes:
        code: the module of `original` for its code base.
        options: what `original.options` calls them.
        network: keys of the network's config that it must have: these tell it from other networks of the same file name.
    """

    code: str
    options: dict
    network: dict


def _published(code, size, channels, multipliers, blocks, attention, options, **network):
    """A checkpoint for images `size` pixels wide; attention is at these sides in pixels."""
    network = {
        "block_out_channels": [int(channels * multiplier) for multiplier in multipliers],
        "layers_per_block": blocks,
        "attention": [size // 2**level in attention for level in range(len(multipliers))],
        **network,
    }
    return Published(code, {"image_size": size, **options}, network)


def _openai(size, channels, multipliers, blocks, attention, classes=None, **options):
    return _published("openai", size, channels, multipliers, blocks, attention, options, classes=classes)


ADM = {
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
}
HEADS_OF_64, FOUR_HEADS = {"num_head_channels": 64}, {"num_heads": 4}
NEW_ORDER_COSINE = {"use_new_attention_order": True, "noise_schedule": "cosine"}
COSINE = {"noise_schedule": "cosine"}
IDDPM = {
    "use_new_attention_order": False,
    "noise_schedule": "cosine",
    "diffusion_steps": 4000,
    "rescale_timesteps": True,
    "num_heads": 4,
}
BY_SIZE = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
IMAGENET_64 = _openai(64, 128, BY_SIZE[64], 3, (16, 8), **IDDPM)
CIFAR_10 = _openai(32, 128, (1, 2, 2, 2), 3, (16, 8), **IDDPM, dropout=0.3)
LSUN_IDDPM = _openai(
    256,
    128,
    BY_SIZE[256],
    2,
    (16,),
    num_heads=1,
    noise_schedule="linear",
    diffusion_steps=1000,
    rescale_timesteps=False,
)


def _lsun(dropout=0.1):
    return _openai(256, 256, BY_SIZE[256], 2, (32, 16, 8), **ADM, **HEADS_OF_64, dropout=dropout)


def _classifier(size, **options):
    return _openai(size, 128, BY_SIZE[size], 4 if size == 64 else 2, (32, 16, 8), 1000, **ADM | HEADS_OF_64 | options)


def _ho(size, channels, multipliers, var_type, dropout=0.0):
    return _published("ho", size, channels, multipliers, 2, (16,), {"var_type": var_type, "dropout": dropout})


HO_256 = _ho(256, 128, (1, 1, 2, 2, 4, 4), "fixedsmall")
HO_CIFAR_10 = _ho(32, 128, (1, 2, 2, 2), "fixedlarge", dropout=0.1)


def _song(size, channels, multipliers, blocks, sde, continuous, **options):
    options = {"sde": sde, "continuous": continuous, **options}
    return _published("score_sde", size, channels, multipliers, blocks, (16,), options)


def _song_cifar_10(blocks, sde, continuous, **options):
    return _song(32, 128, (1, 2, 2, 2), blocks, sde, continuous, dropout=0.1, **options)


DDPM, DDPMPP = {"model": "ddpm"}, {"model": "ncsnpp", "skip_rescale": True, "fir": False}
NCSNPP = {"model": "ncsnpp", "skip_rescale": True, "fir": True}


def _song_256(sigma_max, snr):
    return _song(
        256, 128, (1, 1, 2, 2, 2, 2, 2), 2, "vesde", True, sigma_max=sigma_max, num_scales=2000, snr=snr, **NCSNPP
    )


# name -> checkpoint; names of OpenAI are those of files, the others those of folders
PUBLISHED = {
    "64x64_diffusion": _openai(
        64, 192, BY_SIZE[64], 3, (32, 16, 8), 1000, **ADM | HEADS_OF_64 | NEW_ORDER_COSINE, dropout=0.1
    ),
    "128x128_diffusion": _openai(128, 256, BY_SIZE[128], 2, (32, 16, 8), 1000, **ADM, **FOUR_HEADS),
    "256x256_diffusion": _openai(256, 256, BY_SIZE[256], 2, (32, 16, 8), 1000, **ADM, **HEADS_OF_64),
    "256x256_diffusion_uncond": _openai(256, 256, BY_SIZE[256], 2, (32, 16, 8), **ADM, **HEADS_OF_64),
    "512x512_diffusion": _openai(512, 256, BY_SIZE[512], 2, (32, 16, 8), 1000, **ADM, **HEADS_OF_64),
    "64_256_upsampler": _openai(256, 192, BY_SIZE[256], 2, (32, 16, 8), 1000, **ADM, **FOUR_HEADS, small_size=64),
    "128_512_upsampler": _openai(512, 192, BY_SIZE[256], 2, (32, 16), 1000, **ADM, **HEADS_OF_64, small_size=128),
    "lsun_bedroom": _lsun(),
    "lsun_cat": _lsun(),
    "lsun_horse": _lsun(),
    "lsun_horse_nodropout": _lsun(dropout=0.0),
    "64x64_classifier": _classifier(64, **COSINE),
    "128x128_classifier": _classifier(128),
    "256x256_classifier": _classifier(256),
    "512x512_classifier": _classifier(512),
    "imagenet64_uncond_100M_1500K": IMAGENET_64,
    "imagenet64_uncond_vlb_100M_1500K": IMAGENET_64,
    "imagenet64_cond_270M_250K": _openai(
        64, 192, BY_SIZE[64], 3, (16, 8), 1000, **IDDPM | {"rescale_timesteps": False}
    ),
    "cifar10_uncond_50M_500K": CIFAR_10,
    "cifar10_uncond_vlb_50M_500K": CIFAR_10,
    "upsample_cond_500K": _openai(
        256,
        192,
        BY_SIZE[256],
        2,
        (16, 8),
        1000,
        **IDDPM | {"rescale_timesteps": False, "noise_schedule": "linear", "small_size": 64},
    ),
    "lsun_uncond_100M_1200K_bs128": LSUN_IDDPM,
    "lsun_uncond_100M_2400K_bs64": LSUN_IDDPM,
    "diffusion_cifar10_model": HO_CIFAR_10,
    "diffusion_lsun_bedroom_model": HO_256,
    "diffusion_lsun_cat_model": HO_256,
    "diffusion_lsun_church_model": HO_256,
    "diffusion_celebahq_model": HO_256,
    "ddim_celeba": _ho(64, 128, (1, 2, 2, 2, 4), "fixedlarge", dropout=0.1),
    "vp/cifar10_ddpm": _song_cifar_10(2, "vpsde", False, **DDPM),
    "vp/cifar10_ddpm_continuous": _song_cifar_10(2, "vpsde", True, **DDPM),
    "vp/cifar10_ddpmpp": _song_cifar_10(4, "vpsde", False, **DDPMPP),
    "vp/cifar10_ddpmpp_continuous": _song_cifar_10(4, "vpsde", True, **DDPMPP),
    "vp/cifar10_ddpmpp_deep_continuous": _song_cifar_10(8, "vpsde", True, **DDPMPP),
    "subvp/cifar10_ddpm_continuous": _song_cifar_10(2, "subvpsde", True, **DDPM),
    "subvp/cifar10_ddpmpp_continuous": _song_cifar_10(4, "subvpsde", True, **DDPMPP),
    "subvp/cifar10_ddpmpp_deep_continuous": _song_cifar_10(8, "subvpsde", True, **DDPMPP),
    "ve/cifar10_ncsnpp": _song_cifar_10(4, "vesde", False, **NCSNPP),
    "ve/cifar10_ncsnpp_continuous": _song_cifar_10(4, "vesde", True, **NCSNPP),
    "ve/cifar10_ncsnpp_deep_continuous": _song_cifar_10(8, "vesde", True, **NCSNPP),
    "ve/church_ncsnpp_continuous": _song_256(380.0, 0.075),
    "ve/bedroom_ncsnpp_continuous": _song_256(378.0, 0.075),
    "ve/ffhq_256_ncsnpp_continuous": _song_256(348.0, 0.075),
    "ve/celebahq_256_ncsnpp_continuous": _song_256(348.0, 0.075),
    "ve/ffhq_1024_ncsnpp_continuous": _song(
        1024, 16, (1, 2, 4, 8, 16, 32, 32, 32), 1, "vesde", True, sigma_max=1348.0, num_scales=2000, snr=0.15, **NCSNPP
    ),
}

# of pytorch_diffusion's files, which have one name in many folders
MD5 = {
    "82ed3067fd1002f5cf4c339fb80c4669": "diffusion_cifar10_model",
    "1fa350b952534ae442b1d5235cce5cd3": "diffusion_cifar10_model",
    "f70280ac0e08b8e696f42cb8e948ff1c": "diffusion_lsun_bedroom_model",
    "1921fa46b66a3665e450e42f36c2720f": "diffusion_lsun_bedroom_model",
    "bbee0e7c3d7abfb6e2539eaf2fb9987b": "diffusion_lsun_cat_model",
    "646f23f4821f2459b8bafc57fd824558": "diffusion_lsun_cat_model",
    "eb619b8a5ab95ef80f94ce8a5488dae3": "diffusion_lsun_church_model",
    "fdc68a23938c2397caba4a260bc2445f": "diffusion_lsun_church_model",
}
