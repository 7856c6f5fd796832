"""3x3 convolutions by Winograd's F(4x4, 3x3) (Lavin & Gray 2016, section 4): 1/4 of the products, the same sums.

For a tile d, 6x6, and weights g, 3x3, a 4x4 tile of the result is A^T [(G g G^T) * (B^T d B)] A: polynomials are multiplied by
their values at points. Over all channels the product in brackets is a matrix product for each of the 36 points, and each of the
transforms is one over the points. For float32 and many channels on the CPU, where products are what takes the time.
"""

import torch
import torch.nn.functional as F
from torch import nn


def _values(n):
    """(6, n): coefficients -> values at the points and at infinity.

    At these points errors in float32 are 1 to 2 times those of direct sums with AVX2, 5 times with AVX-512, whose direct sums
    are rounded less; at the usual 0, 1, -1, 2, -2 twice that.
    """
    points = torch.tensor([0, 0.75, -0.75, 1.5, -1.5], dtype=torch.float64)
    return torch.cat((torch.linalg.vander(points, N=n), torch.eye(n, dtype=torch.float64)[-1:]))


# A^T, G and B^T for both dimensions at once
INVERSE, KERNEL, TILE = (torch.kron(m, m) for m in (_values(4).T, _values(3), _values(6).inverse().T))


def _tiles_at_points(x):
    """(B, C, H, W), padded by 1 -> (36, tiles, C)"""
    b, c, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, row, pixel, _ = padded.stride()
    tiles = padded.as_strided((6, 6, b, height // 4, width // 4, c), (row, pixel, image, 4 * row, 4 * pixel, 1))
    return (TILE.to(x.dtype) @ tiles.reshape(36, -1)).view(36, -1, c)


def _weights_at_points(weight):
    """(O, C, 3, 3) -> (36, C, O)"""
    out, channels = weight.shape[:2]
    return (KERNEL.to(weight.dtype) @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, channels, out)


def _image(values, shape):
    """(36, tiles, O) -> (B, O, H, W)"""
    b, _, height, width = shape
    tiles = (INVERSE.to(values.dtype) @ values.flatten(1)).view(4, 4, b, height // 4, width // 4, -1)
    return tiles.permute(2, 5, 3, 0, 4, 1).reshape(b, -1, height, width)


class _Convolution(torch.autograd.Function):
    """All three convolutions of a training step by tiles; what is kept for the way back is the input alone."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _image(_tiles_at_points(x) @ _weights_at_points(weight), x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        b, out, height, width = grad.shape
        flipped = weight.flip(2, 3).transpose(0, 1)
        grad_x = _image(_tiles_at_points(grad) @ _weights_at_points(flipped), x.shape)
        # the adjoints of _image, the product and _weights_at_points
        tiles = grad.view(b, out, height // 4, 4, width // 4, 4).permute(3, 5, 0, 2, 4, 1).reshape(16, -1)
        at_points = (INVERSE.T.to(grad.dtype) @ tiles).view(36, -1, out)
        grad_weight = KERNEL.T.to(grad.dtype) @ (_tiles_at_points(x).transpose(1, 2) @ at_points).flatten(1)
        return grad_x, grad_weight.view(3, 3, -1, out).permute(3, 2, 0, 1)


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution, padding 1, by tiles where that is faster, in float32 or float64. `by_tiles` makes such ones.

    Its `at_points` are the weights at the points where they no longer change; else None, and tiles are for training mode.
    """

    def forward(self, x):
        b, _, height, width = x.shape
        frozen, pixels = self.at_points is not None, b * height * width
        # few: the products are sooner done one by one; many: the tiles are larger than caches
        few, many = pixels < (64 if frozen else 1024), pixels > 16384
        half = x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type)  # there tiles would round more
        if few or many or half or height % 4 or width % 4 or not (frozen or self.training):
            return super().forward(x)
        if frozen:
            x = _image(_tiles_at_points(x) @ self.at_points, x.shape)
        else:
            x = _Convolution.apply(x, self.weight)
        return x + self.bias[:, None, None]


def by_tiles(unet: nn.Module, channels: int, frozen: bool = False) -> int:
    """Turns 3x3 convolutions of so many channels and more, in and out, into `WinogradConv2d`, in place.

    Args:
        unet: a `DDPMUNet`; its parameters, their names and its buffers stay.
        channels: the fewest.
        frozen: the weights no longer change: they are kept transformed too, in four times their memory.

    Returns:
        How many convolutions it did.
    """
    found = [module for module in unet.modules() if type(module) is nn.Conv2d and module.kernel_size == (3, 3)]
    found = [conv for conv in found if conv.stride == conv.padding == (1, 1)]
    convs = [conv for conv in found if min(conv.weight.shape[:2]) >= channels]
    for conv in convs:
        conv.__class__, at_points = WinogradConv2d, None
        if frozen:
            at_points = _weights_at_points(conv.weight.detach().double()).to(conv.weight.dtype)
            at_points = nn.Parameter(at_points, requires_grad=False)
        conv.register_parameter("at_points", at_points)
    return len(convs)
