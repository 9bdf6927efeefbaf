"""What a model or a file holds, measured tensor by tensor: memory is bounded by the largest."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.capture import SiteTable, sites
from tvjax.checkpoints.fingerprints import Fingerprint
from tvjax.models.families import family_of_config
from tvjax.models.generic import GenericConfig, no_code
from tvjax.progress import Progress, counted
from tvjax.report.contents import MODEL, Contents
from tvjax.report.sums import Sums, sums_of
from tvjax.stages import Model, PyTree, local_params


class StageSites(NamedTuple):
    """The sites of stages that compute alike.

    Attributes:
      stages: their names.
      table: the sites, paths within a stage.
      tokens: rows of each example at each site, in the table's order.
    """

    stages: tuple[str, ...]
    table: SiteTable
    tokens: tuple[int, ...]


def measure(found: Contents, progress: Progress | None = None) -> dict[str, Sums]:
    """Reads every tensor, and sums over its entries.

    Args:
      found: of `contents`.
      progress: called with (leaves done, leaves in all, path).

    Returns:
      Sums by path.

    Raises:
      ValueError: where values are not finite.
    """
    sums = {}
    with found.reading() as read:
        for leaf in found.leaves:
            sums[leaf.path] = sums_of(read(leaf.path))
            if progress is not None:
                progress(len(sums), len(found.leaves), leaf.path)
    return sums


def base_sums(
    vector: Contents, model: Contents, progress: Progress | None = None
) -> tuple[dict[str, Sums], bool | None]:
    """The sums of the parameters that a task vector covers, and whether it was made for these very weights.

    Returns:
      Sums by path; and True or False where the file of the vector says for which weights, else None. Where it does all
      parameters are read, each once.

    Raises:
      ValueError: `model` is none, lacks a leaf of the vector, or has one of another shape.
    """
    if model.kind != MODEL:
        raise ValueError(f"found the {model.kind} {model.name!r}, expected the pre-trained model of {vector.name!r}")
    shapes = {leaf.path: leaf.shape for leaf in model.leaves}
    foreign = [leaf for leaf in vector.leaves if shapes.get(leaf.path) != leaf.shape]
    if foreign:
        leaf = foreign[0]
        raise ValueError(
            f"{len(foreign)} of {len(vector.leaves)} leaves of {vector.name!r} do not fit {model.name!r}: {leaf.path} "
            f"is {list(leaf.shape)} here and {list(shapes[leaf.path]) if leaf.path in shapes else 'missing'} there"
        )
    wanted = vector.about.get("base_fingerprint")
    covered = {leaf.path: Sums() for leaf in vector.leaves}
    identity = Fingerprint()
    with model.reading() as read:
        for path in counted(sorted(covered if wanted is None else shapes), progress, model.name):
            array = read(path)
            identity.add(path, np.asarray(array, order="C"))
            if path in covered:
                covered[path] = sums_of(array)
    return covered, None if wanted is None else identity.hexdigest() == wanted


def stage_sites(model: Model, inputs: PyTree) -> tuple[StageSites, ...]:
    """The sites of every kind of stage, from shapes alone: nothing is computed.

    Args:
      model: its parameters arrays or `jax.ShapeDtypeStruct`.
      inputs: of the first stage, two examples, arrays or shapes.

    Returns:
      A table for each function; stages that share one are named together.
    """
    names: dict[Any, list[str]] = {}
    tables: dict[Any, SiteTable] = {}
    carry = inputs
    for stage in model.stages:
        params = local_params(stage, model.params)
        names.setdefault(stage.function, []).append(stage.name)
        if stage.function not in tables:
            tables[stage.function] = sites(stage.function, params, carry)
        carry = jax.eval_shape(stage.function, params, carry)
    return tuple(
        StageSites(tuple(names[function]), table, tuple(math.prod(site.rows[1:]) for site in table.sites))
        for function, table in tables.items()
    )


def model_sites(found: Contents) -> tuple[StageSites, ...]:
    """The sites of the model of a folder; no weight is read.

    Raises:
      ValueError: what is no model.
    """
    if found.kind != MODEL:
        raise ValueError(f"found the {found.kind} {found.name!r}: only a model has sites")
    if isinstance(found.config, GenericConfig):
        raise ValueError(f"{found.name!r}: {no_code(found.about['model_type'])}")
    params = tree.nest({leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in found.leaves})
    family = family_of_config(found.config)
    return stage_sites(family.build(found.config, params), family.inputs(found.config, 2))
