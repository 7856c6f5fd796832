"""The levels that NCSN++ adds to the U-Net (Score-SDE, Song et al. 2020, appendix H)."""

import torch.nn.functional as F
from torch import nn

from ddpm_hf.models.blocks import FIR, ActivatedNorm, DownLevel, UpLevel


class SkipDownLevel(DownLevel):
    """A level of NCSN++: the next one is also given the image, made smaller ("input skip")."""

    def __init__(self, resnets, attentions, resnet_down):
        super().__init__(resnets, attentions, None)
        self.resnet_down = resnet_down
        self.skip_conv = nn.Conv2d(3, resnet_down.norm1.num_channels, 1) if resnet_down else None

    def forward(self, x, emb, skips, image):
        x, image = super().forward(x, emb, skips, image)
        if self.resnet_down is not None:
            image = self.resnet_down.resample(image)
            x = self.skip_conv(image) + self.checkpointed(self.resnet_down, x, emb)
            skips.append(x)
        return x, image


class SkipUpLevel(UpLevel):
    """A level of NCSN++: its part of the resulting image is added to that of the levels before, made larger ("output skip")."""

    def __init__(self, resnets, attentions, resnet_up):
        super().__init__(resnets, attentions, None)
        self.fir, self.resnet_up = FIR(up=True), resnet_up
        self.skip_norm = self.skip_conv = None
        if resnet_up is not None:
            norm = resnet_up.norm1
            self.skip_norm = ActivatedNorm(norm.num_groups, norm.num_channels, norm.eps, F.silu)
            self.skip_conv = nn.Conv2d(norm.num_channels, 3, 3, padding=1)

    def forward(self, x, emb, skips, image):
        x, image = super().forward(x, emb, skips, image)
        if image is not None:
            image = self.fir(image)
        if self.resnet_up is not None:
            part = self.skip_conv(self.skip_norm(x))
            image = part if image is None else image + part
            x = self.checkpointed(self.resnet_up, x, emb)
        return x, image
