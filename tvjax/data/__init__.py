"""Images and texts of files, archives and datasets; batches of them made in the background; the embedded models."""

from tvjax.data.archives import read_archive
from tvjax.data.batches import as_batch, few_shot, herding, k_medoids, split, take
from tvjax.data.datasets import read_dataset, read_text_dataset
from tvjax.data.examples import Examples
from tvjax.data.folders import read_folder
from tvjax.data.images import Images, read_image
from tvjax.data.loader import Loader, Processed, image_batches, prefetch
from tvjax.data.source import open_examples
from tvjax.data.spans import Spans, token_overlap
from tvjax.data.text_files import read_text_file
from tvjax.data.texts import Texts
from tvjax.data.tokens import Encoder, Tokens

__all__ = [
    "Encoder",
    "Examples",
    "Images",
    "Loader",
    "Processed",
    "Spans",
    "Texts",
    "Tokens",
    "as_batch",
    "few_shot",
    "herding",
    "image_batches",
    "k_medoids",
    "open_examples",
    "prefetch",
    "read_archive",
    "read_dataset",
    "read_folder",
    "read_image",
    "read_text_dataset",
    "read_text_file",
    "split",
    "take",
    "token_overlap",
]
