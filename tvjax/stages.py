"""A model as a tuple of stages run in order, and the layout of the rows between them.

Memory and compile time of everything that walks a model must not grow with its depth, so a model is cut where one
residual stream crosses: embed, block 0 .. block L-1, head. Equal blocks share ONE function (the same Python object),
so XLA compiles one block, not L; each stage says which leaves of the parameters are its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from tvjax import tree
from tvjax.kinds import kind_of
from tvjax.on_disk import read

PyTree = Any


class Stream(NamedTuple):
    """Layout of one token axis of the activations of a stage (``[batch, tokens, features]``).

    Attributes:
      special: how many tokens come before the patch grid (class token, registers).
      grid: height and width of the patch grid, or None where the tokens are not a grid.
      mask: key of the carry that holds the padding mask, ``[batch, tokens]``, True at real tokens; None: all are.
    """

    special: int = 0
    grid: tuple[int, int] | None = None
    mask: str | None = None

    @property
    def tokens(self) -> int | None:
        """Number of tokens of the grid layout, None where there is no grid."""
        return None if self.grid is None else self.special + self.grid[0] * self.grid[1]


class HeadAxis(NamedTuple):
    """The heads that the inputs or the outputs of a layer are split into: one head's units, then the next one's.

    Attributes:
      units: ``<attention>:<units>``: the layers of one attention begin alike, and layers whose units inside a head
        correspond have one name (``heads:query_key``, ``heads:value_out``).
      number: how many heads; the layers of one attention with the fewest have one for each group of the others'.
      frequencies: by how much a token's position turns the pairs of units (j, j + size / 2) of a head, in radians; ()
        where positions turn none.
      shared: the layer acts on every head alike (a norm inside the heads): its rows are tokens times heads.
    """

    units: str
    number: int
    frequencies: tuple[float, ...] = ()
    shared: bool = False

    @property
    def attention(self) -> str:
        """Name of the attention."""
        return self.units.partition(":")[0]


LayerHeads = tuple[HeadAxis | None, HeadAxis | None]
"""The heads of the inputs and of the outputs of a layer."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a model: ``carry = function(params, carry)``.

    Attributes:
      name: unique name within the model (``vision/blocks/3``).
      function: pure ``(params, carry) -> carry``; the SAME object for every stage that computes alike.
      paths: ``(local, global)`` prefixes: the subtree of the model's parameters at ``global`` is given to the function
        at ``local`` (``""``: the whole tree). What two stages share is a tied leaf; the first of them owns it.
      group: stages of one group are the layers that depth pairing matches (``vision/blocks``).
      streams: layout of the token axis inside the stage; where the carry holds several (encoder and decoder), a mapping
        from the carry's leaf (``"hidden"``) to the layout of its tokens.
      fixed: local paths of kernels (or biases) whose outputs have a meaning of their own, such as classes or a shared
        embedding: their output is never rotated.
      heads: the heads of the inputs and outputs of layers, by the local paths of their leaves.
      vocabulary: ``(path, local path)`` of layers whose outputs are the words of a vocabulary: the path of the kernel
        in models that have one, and the leaf that this stage uses for it: the kernel, or the token table that it is
        tied to.
    """

    name: str
    function: Callable[[PyTree, PyTree], PyTree]
    paths: tuple[tuple[str, str], ...] = (("", ""),)
    group: str = ""
    streams: Stream | Mapping[str, Stream] | tuple[tuple[str, Stream], ...] = Stream()
    fixed: tuple[str, ...] = ()
    heads: Mapping[str, LayerHeads] | tuple[tuple[str, LayerHeads], ...] = ()
    vocabulary: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("streams", "heads"):
            value = getattr(self, name)
            if isinstance(value, Mapping):  # hashable, as all that is static
                object.__setattr__(self, name, tuple(value.items()))

    def stream(self, carried: str) -> Stream:
        """The layout of the tokens of a leaf of the carry.

        Raises:
          ValueError: the stage declares streams, and none for this leaf.
        """
        if isinstance(self.streams, Stream):
            return self.streams
        known = dict(self.streams)
        if carried not in known:
            raise ValueError(
                f"stage {self.name!r} has rows that are tokens of {carried!r}, and declares the streams "
                f"{sorted(known)}: add {carried!r}"
            )
        return known[carried]


def _no_loss(loss_params: PyTree, outputs: PyTree, labels: PyTree) -> jax.Array:
    raise ValueError("this model has no loss: give one with Model.with_loss(loss, loss_params)")


class Batch(NamedTuple):
    """One batch of examples as one model sees it.

    Attributes:
      inputs: pytree of arrays, the example axis first; what the model's first stage takes.
      labels: pytree of arrays for the loss, the example axis first; None where there are none.
    """

    inputs: PyTree
    labels: PyTree = None


@partial(jax.tree_util.register_dataclass, data_fields=("params", "loss_params"), meta_fields=("stages", "loss"))
@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters, the stages that read them, and the loss on what the last stage returns.

    A pytree: `params` and `loss_params` are its children, the rest is static. Calling it runs the stages.

    Attributes:
      params: pytree of parameters; a leaf is the parameter block of the papers.
      stages: run in order, the carry threaded through; the first takes ``Batch.inputs``.
      loss: ``(loss_params, outputs, labels) -> [batch]``, one loss per example.
      loss_params: arrays of the loss that are no parameters (a zero-shot classifier).
    """

    params: PyTree
    stages: tuple[Stage, ...]
    loss: Callable[[PyTree, PyTree, PyTree], jax.Array] = _no_loss
    loss_params: PyTree = None

    def __call__(self, inputs: PyTree) -> PyTree:
        """The outputs of the last stage; each stage is compiled once per function and shape."""
        carry = inputs
        for stage in self.stages:
            carry = run_stage(stage.function, read(local_params(stage, self.params)), carry)
        return carry

    def replace(self, **changes: Any) -> Model:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def with_loss(self, loss: Callable[[PyTree, PyTree, PyTree], jax.Array], loss_params: PyTree = None) -> Model:
        """A copy with this loss, ``(loss_params, outputs, labels) -> [batch]``."""
        return dataclasses.replace(self, loss=loss, loss_params=loss_params)

    @property
    def has_loss(self) -> bool:
        """Whether a loss was given."""
        return self.loss is not _no_loss


@runtime_checkable
class ModelLike(Protocol):
    """What objectives and scores need of a model; `Model` and `tvjax.compose.Linearised` have it."""

    @property
    def loss(self) -> Callable[[PyTree, PyTree, PyTree], jax.Array]:
        """``(loss_params, outputs, labels) -> [batch]``."""

    @property
    def loss_params(self) -> PyTree:
        """Arrays of the loss."""

    @property
    def params(self) -> PyTree:
        """Parameters."""

    @property
    def has_loss(self) -> bool:
        """Whether a loss was given."""

    def replace(self, **changes: Any) -> Any:
        """A copy with other fields."""

    def __call__(self, inputs: PyTree) -> PyTree:
        """The outputs."""


def check_model(name: str, model: Any, expected: type = Model) -> None:
    """Raises a ValueError unless this is a `Model`; or what is as good as one, where `ModelLike` is expected.

    >>> check_model("source", {"kernel": 1.0})
    Traceback (most recent call last):
    ...
    ValueError: the source is a dict, expected a tvjax.Model
    """
    if not isinstance(model, expected):
        instead = ": give its .model" if isinstance(getattr(model, "model", None), Model) else ""
        raise ValueError(f"the {name} is {kind_of(model)}, expected a tvjax.Model{instead}")


@partial(jax.jit, static_argnums=0)
def run_stage(function: Callable[[PyTree, PyTree], PyTree], params: PyTree, carry: PyTree) -> PyTree:
    """``function(params, carry)``, compiled once per function object and shapes."""
    return function(params, carry)


def local_params(stage: Stage, params: PyTree) -> PyTree:
    """The parameters that a stage's function takes: the subtrees of `params` that its `paths` name."""
    local: PyTree = {}
    for local_prefix, prefix in stage.paths:
        local = tree.put(local, local_prefix, tree.get(params, prefix))
    return local


def owner_paths(stage: Stage, params: PyTree) -> dict[str, str]:
    """For each leaf that a stage takes, by its local path, the path of that leaf in the whole model."""
    paths: dict[str, str] = {}
    for local_prefix, prefix in stage.paths:
        for path in tree.flatten(tree.get(params, prefix)):
            paths["/".join(filter(None, (local_prefix, path)))] = "/".join(filter(None, (prefix, path)))
    return paths


def single_stage(
    function: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    *,
    loss: Callable[[PyTree, PyTree, PyTree], jax.Array] = _no_loss,
    loss_params: PyTree = None,
    streams: Stream | Mapping[str, Stream] | None = None,
    fixed: tuple[str, ...] = (),
    heads: Mapping[str, LayerHeads] | None = None,
) -> Model:
    """A plain function ``function(params, inputs) -> outputs`` as a model of one stage.

    Args:
      function: any JAX function; the example axis of its inputs comes first.
      params: any pytree of parameters.
      loss: ``(loss_params, outputs, labels) -> [batch]``.
      loss_params: arrays of the loss.
      streams: layout of the token axis of its activations, or of several, by the input that they belong to.
      fixed: paths of kernels whose outputs have a meaning of their own.
      heads: the heads of the inputs and outputs of layers, by the paths of their leaves.

    The memory of a fit grows with what one stage computes, so with the depth of a scanned stack; a stack that is taken
    apart into stages (`tvjax.unstack`) needs that of one layer.

    >>> import jax.numpy as jnp
    >>> model = single_stage(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((3, 2))})
    >>> model(jnp.ones((5, 3))).shape
    (5, 2)
    """
    stage = Stage("model", function, streams=streams or Stream(), fixed=fixed, heads=heads or ())
    return Model(params, (stage,), loss, loss_params)


def tower(model: Model, name: str) -> Model:
    """One tower of a model alone: the stages named ``name/...``, their parameters under ``name/`` as before.

    Raises:
      ValueError: for a model without such stages.
    """
    stages = tuple(stage for stage in model.stages if stage.name.startswith(f"{name}/"))
    if not stages:
        raise ValueError(f"the model has no {name} tower: its stages are {[stage.name for stage in model.stages]}")
    return Model({name: tree.get(model.params, name)}, stages)


def layer_groups(model: Model) -> dict[str, tuple[Stage, ...]]:
    """The stages of each group in order; a stage without a group stands alone under its name."""
    groups: dict[str, list[Stage]] = {}
    for stage in model.stages:
        groups.setdefault(stage.group or stage.name, []).append(stage)
    return {name: tuple(stages) for name, stages in groups.items()}


def reindex(model: Model, layers: dict[str, tuple[int, ...]]) -> Model:
    """The model rebuilt with the layers of some groups repeated or dropped, in the given order.

    A repeated layer shares its parameters with the layer that it repeats. This is the published way to bring a source
    to the target's depth before its activations are collected; pairing layers of the untouched source is the other.

    Args:
      model: the model.
      layers: for each group to rebuild, the index of the layer at each new position.

    Raises:
      ValueError: an unknown group, or an index out of range.
    """
    groups = layer_groups(model)
    for group, indices in layers.items():
        depth = len(groups.get(group, ()))
        if depth == 0 or not all(0 <= i < depth for i in indices):
            raise ValueError(f"cannot rebuild {group!r} from layers {indices}: the model has {_depths(groups)}")
    stages: list[Stage] = []
    for name, members in groups.items():
        indices = layers.get(name, tuple(range(len(members))))
        stages += [
            dataclasses.replace(members[i], name=f"{name}/{position}" if name in layers else members[i].name)
            for position, i in enumerate(indices)
        ]
    return model.replace(stages=tuple(stages))


def _depths(groups: dict[str, tuple[Stage, ...]]) -> str:
    return ", ".join(f"{name} ({len(stages)})" for name, stages in groups.items())
