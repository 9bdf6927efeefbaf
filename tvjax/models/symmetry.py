"""Which units of a family's model may be permuted, derived from its layer table.

Permuted together are the features of a residual stream, through all its layers; the hidden units of each MLP; the heads
of each attention layer; and inside a head the units of queries and keys, and those of values and the output projection.

The features of a residual stream may change their signs as well where every norm that reads it is an RMS norm (a scale
without a bias, in the table): it neither centres nor shifts.

Where several query heads share one key and value head (grouped queries), a head of the symmetry is a key head with all
its queries, whose units stay in their order; so do units that positions rotate, each pair at a frequency of its own.
What is left out so (an exchange of the query heads of one key head, and what the values of grouped queries allow) makes
the group smaller, and every permutation in it still a symmetry.
"""

from __future__ import annotations

from typing import Any

from tvjax.align.permutations import Row, Symmetry
from tvjax.models.families import family_of_config
from tvjax.models.layer_table import Heads, config_of, in_towers, leaf_spaces, leaves


def symmetry_of_config(config: Any) -> Symmetry:
    """The permutation symmetry of a model.

    Args:
      config: shape of the model.

    Returns:
      The axes of its family's table, with the heads of this model.

    Raises:
      ValueError: for an object that is no config of a family.

    >>> from tvjax.models.vit import ViTConfig
    >>> symmetry_of_config(ViTConfig(num_attention_heads=6)).heads
    {'vision/blocks/{i}/heads': 6}
    """
    table = in_towers(family_of_config(config).table, config)
    counts: dict[Heads, int] = {
        space: getattr(config_of(config, space.group), space.number)
        for row in table.rows
        for space in row.spaces
        if isinstance(space, Heads) and not space.shared
    }
    heads = {space.group: min(n for other, n in counts.items() if other.group == space.group) for space in counts}
    names = {space: _name(space, count // heads[space.group]) for space, count in counts.items()}
    rigid = {
        names[space]
        for space in counts
        if space.rotary or any(heads[s.group] != n for s, n in counts.items() if s[:2] == space[:2])
    }
    rows = tuple(
        Row(
            row.path + leaf.ours,
            tuple(names.get(s) if isinstance(s, Heads) else s for s in leaf_spaces(row, leaf)),
            even=row.kind == "scale",
        )
        for row, leaf in leaves(table)
    )
    normalised = {kind: {s for row in table.rows if row.kind == kind for s in row.spaces} for kind in ("scale", "norm")}
    signed = [s for s in normalised["scale"] - normalised["norm"] if isinstance(s, str)]
    fixed = tuple(
        stream for stream, field in table.outputs.items() if getattr(config_of(config, stream), field) is None
    )
    return Symmetry(rows, heads, fixed, tuple(sorted(rigid)), tuple(sorted(signed)))


def _name(space: Heads, shared: int) -> str:
    """Name of an axis; one of `shared` heads to each head of the symmetry has a length of its own."""
    return f"{space.group}:{space.units}" + (f"*{shared}" if shared > 1 else "")
