"""Data sets of images, of any kind that Hugging Face `datasets` reads, as pixels and tensors in [-1, 1], and back."""

from ddpm_hf.extras import require_extra

require_extra("datasets", "data", "data sets")

from ddpm_hf.data.dataset import held_out_rows, training_set  # noqa: E402
from ddpm_hf.data.labels import label_names  # noqa: E402
from ddpm_hf.data.pixels import image_to_pixels, image_transform, pixels_to_batch, pixels_to_tensor, tensor_to_pixels  # noqa: E402
from ddpm_hf.data.sources import load_images  # noqa: E402

__all__ = [
    "held_out_rows",
    "image_to_pixels",
    "image_transform",
    "label_names",
    "load_images",
    "pixels_to_batch",
    "pixels_to_tensor",
    "tensor_to_pixels",
    "training_set",
]
