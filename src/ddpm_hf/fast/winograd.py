"""3x3 convolutions by Winograd's F(4x4, 3x3) (Lavin & Gray 2016, section 4): the same results from 1/4 of the products.

For a 6x6 tile d of the input and 3x3 weights g, a 4x4 tile of the output is A^T [(G g G^T) * (B^T d B)] A: polynomials are
multiplied by multiplying their values at points. Over all channels, the product in brackets is one matrix product for each of
the 36 points, and each transform is one matrix product over the points. It is faster for float32 and many channels on the CPU,
where the products take most of the time.
"""

import torch
import torch.nn.functional as F
from torch import nn


def _values(n):
    """(6, n) matrix that maps the coefficients of a polynomial to its values at five points and at infinity.

    With these points the float32 errors are 1 to 2 times those of direct sums with AVX2, and 5 times with AVX-512, which rounds
    direct sums less; with the usual points 0, 1, -1, 2, -2 they are twice as large.
    """
    points = torch.tensor([0, 0.75, -0.75, 1.5, -1.5], dtype=torch.float64)
    return torch.cat((torch.linalg.vander(points, N=n), torch.eye(n, dtype=torch.float64)[-1:]))


# A^T, G and B^T, each for both dimensions at once
OUTPUT_TRANSFORM, WEIGHT_TRANSFORM, INPUT_TRANSFORM = (
    torch.kron(m, m) for m in (_values(4).T, _values(3), _values(6).inverse().T)
)


def _tiles_at_points(x):
    """Transforms the input: (B, C, H, W), padded by 1 here -> (36, tiles, C)."""
    b, c, height, width = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    image, row, pixel, _ = padded.stride()
    tiles = padded.as_strided((6, 6, b, height // 4, width // 4, c), (row, pixel, image, 4 * row, 4 * pixel, 1))
    return (INPUT_TRANSFORM.to(x.dtype) @ tiles.reshape(36, -1)).view(36, -1, c)


def _weights_at_points(weight):
    """Transforms the weights: (O, C, 3, 3) -> (36, C, O)."""
    out, channels = weight.shape[:2]
    return (WEIGHT_TRANSFORM.to(weight.dtype) @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, channels, out)


def _image(values, shape):
    """Transforms products back: (36, tiles, O) -> (B, O, H, W), for an input of `shape`."""
    b, _, height, width = shape
    tiles = (OUTPUT_TRANSFORM.to(values.dtype) @ values.flatten(1)).view(4, 4, b, height // 4, width // 4, -1)
    return tiles.permute(2, 5, 3, 0, 4, 1).reshape(b, -1, height, width)


class _Convolution(torch.autograd.Function):
    """A 3x3 convolution and its two gradients by tiles. Only input and weights are kept for the backward pass."""

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
        at_points = (OUTPUT_TRANSFORM.T.to(grad.dtype) @ tiles).view(36, -1, out)
        grad_weight = WEIGHT_TRANSFORM.T.to(grad.dtype) @ (_tiles_at_points(x).transpose(1, 2) @ at_points).flatten(1)
        return grad_x, grad_weight.view(3, 3, -1, out).permute(3, 2, 0, 1)


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1, by tiles where that is faster. `use_winograd` makes these modules.

    `at_points` holds the transformed weights if these no longer change. Otherwise it is None, and tiles are used in training
    mode only.
    """

    def forward(self, x):
        b, _, height, width = x.shape
        frozen, pixels = self.at_points is not None, b * height * width
        # with few pixels direct sums are faster; with many the tiles do not fit into caches
        too_few, too_many = pixels < (64 if frozen else 1024), pixels > 16384
        half = x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type)  # tiles would round more
        if too_few or too_many or half or height % 4 or width % 4 or not (frozen or self.training):
            return super().forward(x)
        if frozen:
            x = _image(_tiles_at_points(x) @ self.at_points, x.shape)
        else:
            x = _Convolution.apply(x, self.weight)
        return x + self.bias[:, None, None]


def use_winograd(network: nn.Module, min_channels: int, frozen: bool = False) -> int:
    """Turns the 3x3 convolutions with at least `min_channels` channels, in and out, into `WinogradConv2d`, in place.

    The class of each module is changed, not the module: parameters keep their names, and optimizers and averages, which refer
    to them, stay valid.

    Args:
        network: a `DDPMUNet`, or any module.
        min_channels: the fewest channels, see above.
        frozen: the weights no longer change: they are kept transformed too, which takes four times their memory.

    Returns:
        The number of convolutions that were turned.
    """
    convs = [module for module in network.modules() if type(module) is nn.Conv2d and module.kernel_size == (3, 3)]
    convs = [conv for conv in convs if conv.stride == conv.padding == (1, 1)]
    convs = [conv for conv in convs if min(conv.weight.shape[:2]) >= min_channels]
    for conv in convs:
        conv.__class__, at_points = WinogradConv2d, None
        if frozen:
            at_points = _weights_at_points(conv.weight.detach().double()).to(conv.weight.dtype)
            at_points = nn.Parameter(at_points, requires_grad=False)
        conv.register_parameter("at_points", at_points)
    return len(convs)


def use_direct_convolution(network: nn.Module) -> None:
    """Undoes `use_winograd`."""
    for conv in [module for module in network.modules() if isinstance(module, WinogradConv2d)]:
        del conv.at_points
        conv.__class__ = nn.Conv2d  # type: ignore[assignment]
