"""Features of many images: decoded in threads while the network computes, shared out among processes."""

import collections
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm.auto import tqdm

from ddpm_hf.evaluation.features.extractors import Extractor
from ddpm_hf.evaluation.image_sets import ImageSet
from ddpm_hf.evaluation.processes import Processes
from ddpm_hf.fast.allocator import keep_freed_memory

READERS = min(4, os.cpu_count() or 1)


def extract(
    images: ImageSet,
    extractor: Extractor,
    batch_size: int = 64,
    processes: Processes | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Compute the features of all images, each process those of its share.

    Args:
        batch_size: images in one call of the network; it changes features by rounding only.
        processes: those that share the images; None for this one alone.
        progress: show a bar with images per second (never in logs).

    Returns:
        In every process: what the extractor gives, "features" (N, D) at least, float32 on the CPU, in the images' order.

    Raises:
        ValueError: features that are not finite, a broken image, or fewer images than processes.
    """
    processes = processes or Processes()
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more")
    if len(images) < processes.world_size:
        raise ValueError(f"{len(images)} images are too few for {processes.world_size} processes; use fewer processes")
    if extractor.device.type == "cpu":
        keep_freed_memory()  # twice as fast with efficientnet-lite0
    rows = range(len(images))[processes.share(len(images))]
    results: dict[str, torch.Tensor] = {}
    hidden = None if progress and processes.is_main else True
    with tqdm(total=len(rows), desc=f"{extractor.name} features", unit=" images", disable=hidden) as bar:
        for batch, pixels in _batches(images, rows, batch_size):
            for name, values in extractor(pixels).items():
                if not values.isfinite().all():
                    row = batch[int((~values.isfinite()).any(1).nonzero()[0])]
                    raise ValueError(f"{name} of {images.name_of(row)} by {extractor.name} are not finite")
                if name not in results:
                    results[name] = torch.empty((len(rows), values.shape[1]))
                results[name][batch.start - rows.start : batch.stop - rows.start] = values.cpu()
            bar.update(len(batch))
    return {name: processes.gather(values) for name, values in results.items()}


def _batches(images: ImageSet, rows: range, batch_size: int) -> Iterator[tuple[range, torch.Tensor]]:
    """Batches of rows with their pixels; the next ones are read ahead in threads."""
    readers = 1 if images.is_sequential else READERS
    batches = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    with ThreadPoolExecutor(readers) as pool:

        def begin(batch):
            return batch, pool.submit(images.read, batch)

        pending = collections.deque(map(begin, itertools.islice(batches, readers + 1)))
        try:
            while pending:
                batch, reading = pending.popleft()
                pixels = reading.result()
                pending.extend(map(begin, itertools.islice(batches, 1)))
                yield batch, pixels
        finally:
            for _, reading in pending:
                reading.cancel()
