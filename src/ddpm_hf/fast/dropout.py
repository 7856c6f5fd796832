"""Dropout for a compiled network on the CPU: 16 random bits an element, drawn by one call and outside of the graph."""

import torch
from torch import nn


# the tag: with gradient checkpointing the mask is drawn twice, from the same state of the generator
@torch.library.custom_op("ddpm_hf::dropout_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def keep(x: torch.Tensor, p: float) -> torch.Tensor:
    """A mask of the shape and layout of x, bool, that is False with probability p, rounded to a multiple of 2**-16."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = torch.empty_like(x, dtype=torch.bool)  # dense, whatever x is
    torch.ge(words.view(torch.int16)[: x.numel()], round(p * 2**16) - 2**15, out=mask.as_strided((x.numel(),), (1,)))
    return mask


@keep.register_fake
def _(x, p):
    return torch.empty_like(x, dtype=torch.bool)


class FastDropout(nn.Dropout):
    """`nn.Dropout` by `keep`: the same distribution, other numbers."""

    def forward(self, x):
        kept = 1 - round(self.p * 2**16) / 2**16
        return x * keep(x.detach(), self.p) / kept if self.training and 0 < kept < 1 else super().forward(x)
