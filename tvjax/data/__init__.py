"""Batches of arrays and of images in folders, and the embedded digits and models."""

from tvjax.data.batches import examples, few_shot, herding, k_medoids, split, take
from tvjax.data.images import ImageFolder, read_folder, read_image

__all__ = [
    "ImageFolder",
    "examples",
    "few_shot",
    "herding",
    "k_medoids",
    "read_folder",
    "read_image",
    "split",
    "take",
]
