"""A stage of the target and its partner in the source: what the links of a transport are fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tvjax import tree
from tvjax.align import depth as layers
from tvjax.align import tokens as token_alignment
from tvjax.capture import SiteTable
from tvjax.spread import mesh_of
from tvjax.stages import Model, owner_paths
from tvjax.walk import Walk


class Leaf(NamedTuple):
    """A leaf of a target stage and its partner.

    Attributes:
      local: path within the stage.
      target: path in the target model.
      source: path in the source model, None where the source stage has no such leaf.
      shape: of the target leaf.
      source_shape: of the source leaf, () where there is none.
      source_local: path within the source stage; another than `local` where the source's layer is tied.
    """

    local: str
    target: str
    source: str | None
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    source_local: str = ""


class Pair:
    """A stage of the target and its partner in the source, with the calibration rows of both.

    Attributes:
      source: the source model on the calibration rows.
      source_index: position of the stage in the source.
      target: the target model on the calibration rows.
      target_index: position of the stage in the target.
      tokens: token alignment mode.
      board: what links leave for stages that are visited later (sums over tied leaves).
      moved: whether an earlier link has brought the task vector into the target's parameters.
      depth: which source layer a target layer is paired with, for layers that a stage stacks.
      overlaps: by batch the overlaps of the tokens, of texts that two tokenizers cut differently.
      finetuned: the fine-tuned source on the calibration rows, where a link is fitted with the task vector.
      tau: this task vector.
    """

    def paired_layers(self, depth_a: int, depth_b: int) -> tuple[int, ...]:
        """For each of the layers that a scan stacks in the target, the one in the source."""
        stage = self.stages[1]
        rule = self.depth
        if isinstance(rule, Mapping):
            rule = rule.get(stage.group or stage.name, "uniform")
        if rule == "cka":
            raise ValueError(
                f"stage {stage.name!r} stacks its layers, whose activations depth='cka' does not see: give a list of "
                "layers, or take the stack apart into stages (tvjax.unstack)"
            )
        return layers.pair_layers(depth_a, depth_b, rule)

    def __init__(
        self,
        source: Walk,
        source_index: int,
        target: Walk,
        target_index: int,
        tokens: token_alignment.Mode,
        board: dict[str, Any],
        moved: bool,
        depth: Any = "uniform",
        overlaps: Sequence[Mapping[str, Any]] = (),
        finetuned: Walk | None = None,
        tau: Any = None,
    ):
        self.source, self.source_index = source, source_index
        self.target, self.target_index = target, target_index
        self.tokens, self.board, self.moved, self.depth = tokens, board, moved, depth
        self.name = target.model.stages[target_index].name
        self.batches = len(target.batches)
        self.finetuned, self.tau = finetuned, tau
        self.overlaps = overlaps or [{}] * self.batches
        self.stages = source.model.stages[source_index], target.model.stages[target_index]

    @cached_property
    def mesh(self) -> Mesh | None:
        """The mesh that the target lies over, or else the source; None where both lie on one device."""
        return mesh_of(self.target.model.params, self.source.model.params)

    @property
    def other_words(self) -> bool:
        """Whether the two models have different vocabularies, whose words do not correspond."""
        return any(self.overlaps)

    @property
    def source_leaves(self) -> dict[str, jax.Array]:
        """The parameters of the source stage by local path; not kept here, for they may be on disk."""
        return tree.flatten(self.source.params(self.source_index))

    @property
    def target_leaves(self) -> dict[str, jax.Array]:
        """The parameters of the target stage by local path."""
        return tree.flatten(self.target.params(self.target_index))

    @cached_property
    def source_table(self) -> SiteTable:
        """The sites of the source stage."""
        return self.source.table(self.source_index)

    @cached_property
    def target_table(self) -> SiteTable:
        """The sites of the target stage."""
        return self.target.table(self.target_index)

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The floating leaves that the target stage owns, with their partners.

        The partner of a leaf has its local path, or is what the source's stage uses for it (`Stage.vocabulary`).
        """
        model, stage = self.target.model, self.target.model.stages[self.target_index]
        theirs = owner_paths(self.source.model.stages[self.source_index], self.source.model.params)
        stored = [
            tree.flatten(walk.stored(index))
            for walk, index in ((self.source, self.source_index), (self.target, self.target_index))
        ]
        used = dict(self.source.model.stages[self.source_index].vocabulary)
        owned = owner_of_leaves(model)
        found = []
        for local, path in owner_paths(stage, model.params).items():
            mine = stored[1][local]
            if owned[path] == stage.name and jnp.issubdtype(jnp.result_type(mine), jnp.floating):
                partner = local if local in theirs else used.get(path, "")
                shape = tuple(jnp.shape(stored[0][partner])) if partner else ()
                found.append(Leaf(local, path, theirs.get(partner), tuple(jnp.shape(mine)), shape, partner))
        return tuple(found)


def owner_of_leaves(model: Model) -> dict[str, str]:
    """For each leaf the name of the first stage that takes it: its owner."""
    owner: dict[str, str] = {}
    for stage in model.stages:
        for path in owner_paths(stage, model.params).values():
            owner.setdefault(path, stage.name)
    return owner
