"""Task vectors of checkpoints on disk, extracted and applied tensor by tensor.

What is in memory at once is a few tensors, whatever the size of the model. Both directions compute on the host, in
float32, and hash the models as they read them: a task vector's file names the weights that it was made for and made
from, and what was made for other weights never becomes a model.
"""

from tvjax.checkpoints.adapter_extraction import ExtractedAdapter, extract_low_rank
from tvjax.checkpoints.edits import Applied, Origin, apply, apply_trees
from tvjax.checkpoints.extraction import Extracted, extract, extract_adapter

__all__ = [
    "Applied",
    "Extracted",
    "ExtractedAdapter",
    "Origin",
    "apply",
    "apply_trees",
    "extract",
    "extract_adapter",
    "extract_low_rank",
]
