"""Images in folders, archives and datasets; batches of them made in the background; the embedded digits and models."""

from tvjax.data.archives import read_archive
from tvjax.data.batches import examples, few_shot, herding, k_medoids, split, take
from tvjax.data.datasets import read_dataset
from tvjax.data.folders import read_folder
from tvjax.data.images import Images, read_image
from tvjax.data.loader import Loader, prefetch
from tvjax.data.source import open_images
from tvjax.data.tasks import TASKS, Task, find_task

__all__ = [
    "Images",
    "Loader",
    "TASKS",
    "Task",
    "examples",
    "few_shot",
    "find_task",
    "herding",
    "k_medoids",
    "open_images",
    "prefetch",
    "read_archive",
    "read_dataset",
    "read_folder",
    "read_image",
    "split",
    "take",
]
