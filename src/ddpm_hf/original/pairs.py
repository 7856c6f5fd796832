"""Pairs of tensors with the same numbers: one of another code base, and one or more of `DDPMUNet`."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

logger = logging.get_logger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Layout(NamedTuple):
    """How the elements of a tensor are arranged in another code base; both functions only rearrange them."""

    to_ours: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    to_theirs: Callable[..., torch.Tensor]


def _of_one(to_ours, to_theirs):
    return Layout(lambda tensor: (to_ours(tensor),), to_theirs)


SAME = _of_one(lambda x: x, lambda x: x)

# theirs is a convolution with a kernel of one pixel, along one or two axes; ours is linear
POINTWISE_1D = _of_one(lambda x: x[..., 0], lambda x: x[..., None])
POINTWISE_2D = _of_one(lambda x: x[..., 0, 0], lambda x: x[..., None, None])

# theirs is a matrix (in, out); ours is linear (out, in), or a convolution with a kernel of one pixel
TRANSPOSED = _of_one(lambda x: x.t(), lambda x: x.t())
TRANSPOSED_TO_2D = _of_one(lambda x: x.t()[..., None, None], lambda x: x[..., 0, 0].t())

# theirs is a convolution (height, width, in, out) of TensorFlow
HWIO = _of_one(lambda x: x.permute(3, 2, 0, 1), lambda x: x.permute(2, 3, 1, 0))


def fused_qkv(heads: int, is_weight: bool) -> Layout:
    """One tensor (3C, ...) of a 1D convolution for q, k and v: for each head its q, then its k, then its v.

    With heads=1 it is q of all heads, then k, then v: guided-diffusion's "new attention order".
    """

    def to_ours(tensor):
        tensor = tensor[..., 0] if is_weight else tensor
        width = len(tensor) // 3
        by_head = tensor.reshape(heads, 3, width // heads, *tensor.shape[1:])
        return tuple(by_head[:, i].reshape(width, *tensor.shape[1:]) for i in range(3))

    def to_theirs(*projections):
        by_head = [x.reshape(heads, -1, *x.shape[1:]) for x in projections]
        tensor = torch.stack(by_head, dim=1).reshape(-1, *projections[0].shape[1:])
        return tensor[..., None] if is_weight else tensor

    return Layout(to_ours, to_theirs)


class Pair(NamedTuple):
    """The name of a tensor of another code base, our names for the same numbers, and how theirs are arranged."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = SAME


def parameter_pairs(
    ours: str, theirs: str, layout: Layout = SAME, names: Mapping[str, str] | None = None
) -> Iterator[Pair]:
    """Pairs the weight, by `layout`, and the bias of a module of each. `names`: what theirs are called."""
    names = names or {}
    yield Pair(f"{theirs}.{names.get('weight', 'weight')}", (f"{ours}.weight",), layout)
    yield Pair(f"{theirs}.{names.get('bias', 'bias')}", (f"{ours}.bias",))


def module_pairs(
    ours: str,
    theirs: str,
    modules: Mapping[str, str],
    layout: Layout = SAME,
    names: Mapping[str, str] | None = None,
) -> Iterator[Pair]:
    """`parameter_pairs` of the modules within a module of each. `modules`: our name -> theirs."""
    for our_name, their_name in modules.items():
        yield from parameter_pairs(f"{ours}.{our_name}", f"{theirs}.{their_name}", layout, names)


def fused_qkv_pairs(ours: str, theirs: str, heads: int) -> Iterator[Pair]:
    """Pairs our to_q, to_k and to_v in a module with their one layer, by `fused_qkv`."""
    for kind in ("weight", "bias"):
        projections = tuple(f"{ours}.to_{letter}.{kind}" for letter in "qkv")
        yield Pair(f"{theirs}.{kind}", projections, fused_qkv(heads, kind == "weight"))


def to_ours(
    pairs: Iterable[Pair], tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Rearranges the tensors of a checkpoint for `DDPMUNet`. Tensors that need no rearranging are not copied.

    Args:
        pairs: one for each tensor of the checkpoint.
        tensors: those of the checkpoint, by name.
        shapes: those of the network's tensors, by name.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape; the message names up to five.
    """
    pairs = [pair for pair in pairs if all(name in shapes for name in pair.ours)]
    expected = {pair.theirs for pair in pairs}
    for problem, names in (
        ("lacks", [pair.theirs for pair in pairs if pair.theirs not in tensors]),
        ("holds, beside its network,", [name for name in tensors if name not in expected]),
    ):
        if names:
            raise ValueError(f"it {problem} {first_five(names)}")
    result: dict[str, torch.Tensor] = {}
    misfits, not_finite, addresses = [], [], set()
    for pair in tqdm(pairs, desc="converting", unit=" tensors", leave=False, disable=None):
        tensor = tensors[pair.theirs]
        wanted = [tuple(shapes[name]) for name in pair.ours]
        try:
            parts = pair.layout.to_ours(tensor)
        except (IndexError, RuntimeError):  # another number of dimensions, or one that heads do not divide
            parts = ()
        if (
            [tuple(part.shape) for part in parts] != wanted
            or tensor.dtype not in DTYPES
            or tensor.layout != torch.strided
        ):
            misfits.append(f"{pair.theirs} of the shape {tuple(tensor.shape)}, {tensor.dtype}")
            continue
        for name, part in zip(pair.ours, parts):
            part = part.contiguous()
            if part.data_ptr() in addresses and not part.is_meta:  # a tensor that the file has under two names
                part = part.clone()
            addresses.add(part.data_ptr())
            result[name] = part
        if not tensor.is_meta and not tensor.isfinite().all():
            not_finite.append(pair.theirs)
    if misfits:
        raise ValueError(f"its network does not fit {first_five(misfits)}")
    missing = shapes.keys() - result.keys()
    if missing:
        raise ValueError(f"it has nothing for {first_five(sorted(missing))} of DDPMUNet")
    if not_finite:
        logger.warning(f"NaN or infinite values in {first_five(not_finite)}; the network's outputs will have them too")
    return result


def to_theirs(pairs: Iterable[Pair], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of `to_ours`: the tensors of `DDPMUNet` under the names of another code base, in its order."""
    return {
        pair.theirs: pair.layout.to_theirs(*(tensors[name] for name in pair.ours)).contiguous()
        for pair in pairs
        if all(name in tensors for name in pair.ours)
    }


def count_numbered(pattern: str, names: Collection[str]) -> int:
    """One more than the highest number, the group of a pattern that names begin with. Raises LookupError for absurd ones."""
    count = 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)
    if not 0 < count <= len(names):
        raise LookupError(f"{count} modules in {len(names)} tensors")
    return count


def first_five(names: Iterable[str]) -> str:
    """ "7 tensors (a, b, c, d, e, ...)" of names of untrusted length."""
    names = list(names)
    listing = ", ".join(repr(name[:80])[1:-1] for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({listing})"
