"""Doctests in docstrings are shown as code: Google style has them in a section of their own, ours stand in the text."""

import re

import griffe

BLOCK = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


class Doctests(griffe.Extension):
    """Fences every block that begins with a prompt."""

    def on_instance(self, *, obj, **kwargs):
        """Called for every object that is found in the source."""
        if not obj.is_alias and obj.docstring is not None:
            obj.docstring.value = BLOCK.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
