"""Parameter trees of other codes: from the models here, so from Hugging Face folders, and back."""

from tvjax.interop.maxtext import from_maxtext, maxtext_names, to_maxtext
from tvjax.interop.tunix import from_tunix, to_tunix, tunix_names

__all__ = ["from_maxtext", "from_tunix", "maxtext_names", "to_maxtext", "to_tunix", "tunix_names"]
