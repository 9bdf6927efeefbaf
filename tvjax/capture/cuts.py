"""Where the output of a kernel is taken apart, as that of a fused query-key-value kernel is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvjax.capture.layout import Layout
from tvjax.capture.views import View, follow_axes, split_step, step_of, unstack_step


def cuts_of_output(variable: Any, layout: Layout, uses: Mapping[Any, Sequence[Any]]) -> list[View]:
    """The views of an output that its readers take, where all they take are disjoint parts of it; else none.

    The parts are those along one feature axis. The innermost of several is not one: what halves a head, as rotary
    positions do, leaves it one head.

    Args:
      variable: the output.
      layout: of it.
      uses: the equations that read each variable, None for a result.
    """
    steps: View = ()
    shape = tuple(variable.aval.shape)
    while True:
        found = _parts(variable, uses)
        if found is not None:
            axis, parts = found
            break
        following = uses[variable]
        if len(following) != 1 or following[0] is None:
            return []
        step = step_of(following[0])
        if step is None or any(kind[0] not in ("transpose", "reshape") for kind in step):
            return []
        steps += step
        variable = following[0].outvars[0]
    features = follow_axes(steps, shape, layout.features)
    if features is None or axis not in features or (len(features) > 1 and axis == max(features)):
        return []
    return [(*steps, *part) for part in parts]


def _parts(variable: Any, uses: Mapping[Any, Sequence[Any]]) -> tuple[int, list[View]] | None:
    """The axis along which all readers of a variable cut it, and their disjoint parts in order."""
    shape = tuple(variable.aval.shape)
    found: list[tuple[int, int, int, View]] = []
    for eqn in dict.fromkeys(uses[variable]):
        if eqn is None:
            return None
        name = eqn.primitive.name
        for index, out in enumerate(eqn.outvars):
            if not uses[out]:
                continue
            if name == "split":
                view = split_step(eqn, index)
            elif name == "unstack":
                view = unstack_step(eqn, index)
            elif name == "slice":
                view = step_of(eqn) or ()
            else:
                return None
            _, start, limit, strides = view[0]
            cut = [i for i, n in enumerate(shape) if (start[i], limit[i]) != (0, n)]
            if len(cut) != 1 or strides[cut[0]] != 1:
                return None
            found.append((cut[0], start[cut[0]], limit[cut[0]], view))
    found.sort(key=lambda part: part[1:3])
    disjoint = all(a[2] <= b[1] for a, b in zip(found, found[1:], strict=False))
    if len(found) < 2 or len({axis for axis, *_ in found}) != 1 or not disjoint:
        return None
    return found[0][0], [view for *_, view in found]
