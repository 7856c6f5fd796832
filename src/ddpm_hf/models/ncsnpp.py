"""The levels that NCSN++ adds to the U-Net (Score-SDE, Song et al. 2020, appendix H)."""

import torch.nn.functional as F
from torch import nn

from ddpm_hf.models.blocks import FIR, ActivatedNorm, DownLevel, UpLevel


class SkipDownLevel(DownLevel):
    """A level of the way down in NCSN++, which also hands the downsampled image to the next level ("input skip")."""

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
    """A level of the way up in NCSN++, which adds to the upsampled output image of the levels before it ("output skip")."""

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
            addition = self.skip_conv(self.skip_norm(x))
            image = addition if image is None else image + addition
            x = self.checkpointed(self.resnet_up, x, emb)
        return x, image
