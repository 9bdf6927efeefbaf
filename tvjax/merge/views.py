"""How a leaf is a stack of matrices: one letter for each of its axes.

======  ============================================================  ==================================
letter  the axis                                                      for example
======  ============================================================  ==================================
``l``   stacked layers, whose depth counts for weights by depth       ``lio``: a scanned kernel
``s``   matrices side by side                                         ``sio``: experts
``i``   inputs                                                        ``iio``: an output kernel of heads
``o``   outputs                                                       ``ioo``: a query kernel of heads
``v``   entries of a vector, which is no matrix                       ``lv``: a scanned norm
======  ============================================================  ==================================

Several axes of one letter are one side of the matrix. `matrix_views` reads the letters off a function; where nobody
says them a leaf of two axes is one matrix ``[in, out]``, one of four axes may be a convolution, one called ``weight`` a
convolution as PyTorch stores it, and a leaf of more axes than two that is neither is an error: which of its axes are
stacked cannot be seen from its shape.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax import tree
from tvjax.capture import Site, sites
from tvjax.capture.views import View

PyTree = Any
Shape = tuple[int, ...]
Matrices = str | Sequence[str] | Mapping[str, str] | None

VECTORS = ("scale", "bias", "shift")  # kinds of sites at which a leaf is no matrix
_LETTERS = "l layers, s side by side, i inputs, o outputs, v no matrix"
_WAYS_OUT = (
    f"give the axes of each, a letter an axis ({_LETTERS}): matrices={{'**/query/kernel': 'ioo', ...}}, by hand or by "
    "tvjax.merge.matrix_views; or take scanned layers apart first (tvjax.unstack)"
)


class Part(NamedTuple):
    """One matrix (or vector) of a leaf.

    Attributes:
      path: of the leaf.
      where: it lies along the stacked axes: a number there, a whole slice elsewhere; () if nothing is stacked.
      layer: its number among the layers, None where no axis is one of layers.
      axes: letters of the axes that it has itself.
      shape: its own.
    """

    path: str
    where: tuple[Any, ...]
    layer: int | None
    axes: str
    shape: Shape

    @property
    def name(self) -> str:
        """Path and number of the layer: the path that settings by path and depth see."""
        return self.path if self.layer is None else f"{self.path}/{self.layer}"

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns as a matrix."""
        rows, columns = (math.prod(n for n, c in zip(self.shape, self.axes, strict=True) if c == side) for side in "io")
        return rows, columns

    def of(self, leaf: Any) -> Any:
        """This part of a leaf; NumPy arrays and memory maps are not copied."""
        return leaf[self.where] if self.where else leaf


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Axes:
    """The letters of the axes of a leaf, known to the compiler."""

    letters: str


def parts(path: str, shape: Shape, axes: str) -> list[Part]:
    """The matrices (or vectors) that a leaf is a stack of, in the order of the stacked axes.

    >>> [(part.name, part.axes, part.shape) for part in parts("up/kernel", (2, 3, 4), "lio")]
    [('up/kernel/0', 'io', (3, 4)), ('up/kernel/1', 'io', (3, 4))]
    """
    own = tuple(axis for axis, letter in enumerate(axes) if letter not in "ls")
    letters, rest = "".join(axes[axis] for axis in own), tuple(shape[axis] for axis in own)
    if len(own) == len(shape):
        return [Part(path, (), None, letters, rest)]
    found = []
    for index in itertools.product(
        *(range(n) if c in "ls" else [slice(None)] for n, c in zip(shape, axes, strict=True))
    ):
        layer = 0
        for number, size, letter in zip(index, shape, axes, strict=True):
            layer = layer * size + number if letter == "l" and isinstance(number, int) else layer
        found.append(Part(path, index, layer if "l" in axes else None, letters, rest))
    return found


def join(pieces: Sequence[Array], shape: Shape, axes: str) -> Float[Array, "*shape"]:
    """The leaf whose `parts` are given.

    >>> leaf = jnp.arange(24.0).reshape(2, 3, 4)
    >>> bool((join([part.of(leaf) for part in parts("w", (2, 3, 4), "ilo")], (2, 3, 4), "ilo") == leaf).all())
    True
    """
    stacked = [axis for axis, letter in enumerate(axes) if letter in "ls"]
    if not stacked or 0 in shape:
        return pieces[0]
    together = jnp.stack(pieces).reshape(*(shape[axis] for axis in stacked), *pieces[0].shape)
    return jnp.moveaxis(together, range(len(stacked)), stacked)


def as_matrix(part: Float[Array, "*shape"], axes: str) -> Float[Array, "inputs outputs"]:
    """A part as the matrix ``[inputs, outputs]``.

    >>> as_matrix(jnp.zeros((3, 3, 16, 32)), "iiio").shape, as_matrix(jnp.zeros((5, 7)), "oi").shape
    ((144, 32), (7, 5))
    """
    columns = math.prod(n for n, letter in zip(part.shape, axes, strict=True) if letter == "o")
    order = _order(axes)
    return (part if order == sorted(order) else jnp.transpose(part, order)).reshape(-1, columns)


def from_matrix(matrix: Float[Array, "inputs outputs"], shape: Shape, axes: str) -> Float[Array, "*shape"]:
    """The part of that shape; the inverse of `as_matrix`.

    >>> from_matrix(jnp.zeros((7, 5)), (5, 7), "oi").shape
    (5, 7)
    """
    order = _order(axes)
    whole = matrix.reshape([shape[axis] for axis in order])
    return whole if order == sorted(order) else jnp.transpose(whole, sorted(order, key=order.__getitem__))


def _order(axes: str) -> list[int]:
    return sorted(range(len(axes)), key=lambda axis: axes[axis] == "o")


def leaf_axes(shapes: Mapping[str, Shape], matrices: Matrices) -> dict[str, str]:
    """The letters of the axes of each leaf.

    Args:
      shapes: by path.
      matrices: letters by path pattern, a later pattern winning, for every leaf that is no vector by the rule; or only
        patterns of the leaves that are matrices, their axes by the rule; None: all leaves by the rule. The rule: two
        axes are ``io``, fewer a vector; of more axes those of size one do not count, and four, ``[h, w, in, out]``, are
        a convolution, ``iiio``, if its window is square and smaller than its outputs; so are ``[out, in, h, w]`` of a
        leaf called ``weight``, ``oiii``, and ``[out, in, w]`` of one in a module whose name has ``conv``.

    Raises:
      ValueError: a pattern that matches nothing, letters that do not fit a leaf, or a leaf of which nothing says how it
        is to be seen.

    >>> leaf_axes({"up/kernel": (4, 8), "up/bias": (8,)}, None)
    {'up/kernel': 'io', 'up/bias': 'v'}
    >>> leaf_axes({"query/kernel": (2, 8, 4, 2), "norm/scale": (2, 8)}, {"query": "lioo", "norm": "lv"})
    {'query/kernel': 'lioo', 'norm/scale': 'lv'}
    """
    paths = list(shapes)
    patterns = [matrices] if isinstance(matrices, str) else [] if matrices is None else matrices
    if not isinstance(patterns, Mapping | list | tuple) or not all(isinstance(one, str) for one in patterns):
        raise ValueError(f"`matrices` is {matrices!r}, expected patterns of paths, or letters by pattern")
    if isinstance(matrices, Mapping):
        given = {path: axes for pattern, axes in matrices.items() for path in tree.match(paths, pattern)}
        rule = {path: _by_rule(shapes[path], path) for path in paths if path not in given}
        left = [f"{path}: {shapes[path]}" for path, axes in rule.items() if axes is None or "i" in axes]
        if left:
            raise ValueError(f"`matrices` says nothing of {len(left)} leaves:\n{tree.list_some(left)}\n{_WAYS_OUT}")
        _check_letters(shapes, given)
        return {path: given.get(path, "v" * len(shapes[path])) for path in paths}
    chosen = set(paths)
    if matrices is not None:
        chosen = {path for pattern in patterns for path in tree.match(paths, pattern)}
        flat = [f"{path}: {shapes[path]}" for path in paths if path in chosen and len(shapes[path]) < 2]
        if flat:
            raise ValueError(f"a matrix has two axes or more, found\n{tree.list_some(flat)}\nchange `matrices`")
    found = {path: _by_rule(shapes[path], path) if path in chosen else "v" * len(shapes[path]) for path in paths}
    unknown = [f"{path}: {shapes[path]}" for path, axes in found.items() if axes is None]
    if unknown:
        raise ValueError(
            f"{len(unknown)} leaves have more than two axes, and nothing says which are stacked, inputs and outputs:\n"
            f"{tree.list_some(unknown)}\n{_WAYS_OUT}"
        )
    return {path: axes for path, axes in found.items() if axes is not None}


def matrix_views(function: Callable[..., Any], params: PyTree, *args: Any) -> dict[str, str]:
    """The letters of the axes of each leaf, as ``function(params, *args)`` uses it; for `matrices` of the merges.

    Read off the sites (`tvjax.capture.sites`), nothing is computed: a layer axis is what a scan runs over, side by side
    is what a contraction has as a batch (experts), inputs are what it sums over, outputs the rest; a kernel of a
    convolution is one matrix of its patches. Scales and biases are vectors. A table that is looked up, or whose rows
    are added to the tokens, is a matrix, as for published merges.

    Args:
      function: any JAX function. A `tvjax.Model`: ``lambda params, inputs: model.replace(params=params)(inputs)``.
      params: parameters or their shapes.
      *args: further arguments, arrays or shapes.

    Returns:
      Letters by path. A leaf of two axes or more of which the function does not say it is left out: a merge that needs
      it asks for it.

    >>> import jax
    >>> params = {"kernel": jnp.ones((6, 4, 4)), "scale": jnp.ones((6, 4))}
    >>> layer = lambda x, p: (x + jnp.tanh(x * p["scale"]) @ p["kernel"], None)
    >>> matrix_views(lambda p, x: jax.lax.scan(layer, x, p)[0], params, jnp.ones((2, 4)))
    {'kernel': 'lio', 'scale': 'lv'}
    """
    table = sites(function, params, *args)
    found: dict[str, str] = {}
    for path, leaf in tree.flatten(params).items():
        shape = tree.leaf_type(leaf).shape
        uses = sorted(
            (site for site in table.sites if site.path == path), key=lambda s: s.kind not in ("dense", "conv")
        )
        seen = list(filter(None, (_site_axes(site, shape) for site in uses)))
        looked_up = table.unclassified.get(path) == ("gather",) and len(shape) == 2
        if seen:
            found[path] = seen[0]
        elif "v" * len(shape) == _by_rule(shape) or (looked_up and not uses):
            found[path] = "io" if looked_up else "v" * len(shape)
    return found


def _by_rule(shape: Shape, path: str = "") -> str | None:
    """Letters of a leaf by its shape and its name, None where they do not say."""
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if len(shape) == 2:
        return "io"
    if len(wide) < 2:
        return "v" * len(shape)
    if len(wide) == 2:
        return "".join("o" if axis == wide[1] else "i" for axis in range(len(shape)))
    if len(shape) == 4 and shape[0] == shape[1] < shape[3]:
        return "iiio"
    *_, module, name = ("", *path.split("/"))
    if name != "weight":
        return None
    if len(shape) == 4 and shape[2] == shape[3] < shape[0]:
        return "oiii"
    return "oii" if len(shape) == 3 and "conv" in module and shape[2] < shape[0] else None


def _check_letters(shapes: Mapping[str, Shape], given: Mapping[str, str]) -> None:
    wrong = []
    for path, axes in given.items():
        if not isinstance(axes, str) or len(axes) != len(shapes[path]) or not set(axes) <= set("lsiov"):
            wrong.append(f"{path}: {axes!r} for {shapes[path]}")
        elif set(axes) & set("iov") not in ({"i", "o"}, {"v"}, set()):
            wrong.append(f"{path}: {axes!r}, which is neither a matrix (i and o) nor a vector (v)")
    if wrong:
        raise ValueError(
            f"`matrices` takes one letter an axis ({_LETTERS}), found {len(wrong)} that do not fit:\n"
            f"{tree.list_some(wrong)}"
        )


def _site_axes(site: Site, shape: Shape) -> str | None:
    """The letters that one use of a leaf gives its axes, None where an axis is split between two."""
    dims = _follow(site.view, shape)
    if dims is None:
        return None
    is_matrix, layers = site.kind not in VECTORS, sum(site.levels)
    own = "io" if is_matrix else "v"
    letters = ["l"] * layers + ["s"] * (len(dims) - layers - len(own)) + list(own)
    seen: list[set[str]] = [set() for _ in shape]
    for dim, letter in zip(dims, letters, strict=True):
        for axis, size in dim:
            if axis is not None and (size > 1 or letter == "l"):
                seen[axis].add(letter)
    if any(len(each) > 1 for each in seen):
        return None
    found = [next(iter(each), "") for each in seen]
    if site.kind == "shift" and "l" not in found and len(site.rows) < 2 and found.count("v") == 2:
        is_matrix, found = True, _as_table(found)
    if not is_matrix or not {"i", "o"} & set(found):  # a scale written as a contraction is no matrix
        return "".join("l" if letter == "l" else "v" for letter in found)
    units = [axis for axis, letter in enumerate(found) if not letter]
    for axis in units:
        found[axis] = "o" if "o" not in found and axis == units[-1] else "i"
    return (
        "".join(found) if {"i", "o"} <= set(found) else "".join("v" if letter in "io" else letter for letter in found)
    )


def _as_table(letters: list[str]) -> list[str]:
    """Rows that are added to tokens: the first axis of two counts them."""
    first = letters.index("v")
    return ["io"[axis > first] if letter == "v" else letter for axis, letter in enumerate(letters)]


Factors = list[tuple[int | None, int]]  # axes of the leaf, with sizes, that an axis of a view is made of


def _follow(view: View, shape: Shape) -> list[Factors] | None:
    """Of which axes of the leaf each axis of a view is made, None where a cut or a reshape leaves that open."""
    dims: list[Factors] = [[(axis, size)] for axis, size in enumerate(shape)]
    lead = 0
    for step in view:
        kind, now = step[0], dims[lead:]
        if kind == "each":
            lead += 1
            continue
        if kind == "transpose":
            now = [now[axis] for axis in step[1]]
        elif kind == "reshape":
            grouped = _regrouped([factor for dim in now for factor in dim], step[1])
            if grouped is None:
                return None
            now = grouped
        elif kind == "broadcast":
            now = [now[step[2].index(axis)] if axis in step[2] else [(None, size)] for axis, size in enumerate(step[1])]
        elif kind == "slice":
            sizes = [-(-(stop - start) // stride) for start, stop, stride in zip(*step[1:], strict=True)]
            cut = [_cut(dim, size) for dim, size in zip(now, sizes, strict=True)]
            if None in cut:
                return None
            now = [dim for dim in cut if dim is not None]
        dims = dims[:lead] + now
    return dims


def _cut(dim: Factors, size: int) -> Factors | None:
    if math.prod(n for _, n in dim) == size:
        return dim
    wide = [axis for axis, n in dim if n > 1]
    return [(wide[0], size)] if len(wide) == 1 else None


def _regrouped(factors: Factors, shape: Sequence[int]) -> list[Factors] | None:
    """The factors, in row-major order, shared out to the axes of a shape; those that are split keep their axis."""
    left = [factor for factor in factors if factor[1] != 1]
    grouped: list[Factors] = []
    for size in shape:
        dim: Factors = []
        while size > 1:
            axis, n = left.pop(0)
            taken = math.gcd(n, size)
            if taken not in (n, size):
                return None
            if taken < n:
                left.insert(0, (axis, n // taken))
            dim.append((axis, taken))
            size //= taken
        grouped.append(dim)
    return grouped
