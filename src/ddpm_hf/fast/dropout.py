"""Dropout for compiled networks on the CPU: 16 random bits per element, drawn by one call outside of the compiled graph."""

import torch
from torch import nn

OP = "ddpm_hf::dropout_mask"


# the tag: with gradient checkpointing the mask is drawn twice, from the same state of the generator
# (`torch.library.custom_op` takes tags since torch 2.8 only)
torch.library.define(OP, "(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


@torch.library.impl(OP, "CompositeExplicitAutograd")
def dropout_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """Draws a bool mask with the shape and layout of x; an element is False with probability p, rounded to 2**-16."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = torch.empty_like(x, dtype=torch.bool)  # dense, whatever x is
    torch.ge(words.view(torch.int16)[: x.numel()], round(p * 2**16) - 2**15, out=mask.as_strided((x.numel(),), (1,)))
    return mask


@torch.library.register_fake(OP)
def _(x, p):
    return torch.empty_like(x, dtype=torch.bool)


class FastDropout(nn.Dropout):
    """`nn.Dropout` with the masks of `dropout_mask`: the same distribution, but other random numbers."""

    def forward(self, x):
        kept = 1 - round(self.p * 2**16) / 2**16
        if not (self.training and 0 < kept < 1):
            return super().forward(x)
        return x * torch.ops.ddpm_hf.dropout_mask(x.detach(), self.p) / kept


def use_fast_dropout(network: nn.Module) -> None:
    """Turns every dropout of a network into `FastDropout`, in place, by changing the class of the module."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.__class__ = FastDropout
