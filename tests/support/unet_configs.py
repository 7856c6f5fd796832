"""Configs of `UNet2DModel` for tests: those of known checkpoints, and small ones."""

# google/ddpm-cifar10-32, and the one network of ddpm-celebahq-256, ddpm-church-256, ddpm-bedroom-256 and ddpm-cat-256
CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
}
SIX_LEVELS = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}

BASE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
ATTENTION = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
# google/ncsnpp-church-256, and the same network of ncsnpp-celebahq-256, ncsnpp-bedroom-256 and ncsnpp-ffhq-256
NCSNPP_256 = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "fourier",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "block_out_channels": (128, 128, 256, 256, 256, 256, 256),
    "down_block_types": ("SkipDownBlock2D",) * 4 + ("AttnSkipDownBlock2D",) + ("SkipDownBlock2D",) * 2,
    "up_block_types": ("SkipUpBlock2D",) * 2 + ("AttnSkipUpBlock2D",) + ("SkipUpBlock2D",) * 4,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1.41421356237,
    "act_fn": "silu",
    "attention_head_dim": None,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
}
NCSNPP = NCSNPP_256 | {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("SkipDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"),
}
LEARNED = {"time_embedding_type": "learned", "num_train_timesteps": 50}


def levels(channels, **overrides):
    """As many plain levels as channels, attention in the innermost one."""
    n = len(channels) - 1
    down, up = ("DownBlock2D",) * n + ("AttnDownBlock2D",), ("AttnUpBlock2D",) + ("UpBlock2D",) * n
    return {"block_out_channels": channels, "down_block_types": down, "up_block_types": up} | overrides
