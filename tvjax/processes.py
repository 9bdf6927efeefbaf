"""Several processes that run one program on arrays that none of them sees whole (`jax.distributed`).

Every process makes the same calls, in the same order, with the same arguments. What one of them must know of all is
fetched here: small results as whole arrays, a name that all use, and whether all are well. With one process nothing is
sent, and arrays are fetched as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any

_STOP = "every process stops here"
_MOST = 32  # facts that are told apart
_FEW = 256  # entries of an array whose values are compared, such as a random key


def several() -> bool:
    """Whether the program runs in several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that prints, and writes what belongs to no other."""
    return not several() or jax.process_index() == 0


def fetch(values: PyTree) -> PyTree:
    """Small arrays as NumPy arrays, whole, in every process.

    An array that one process does not see whole is first replicated on the devices that hold it, so it must be small;
    large arrays are written or summed shard by shard.

    >>> fetch({"a": jax.numpy.ones(2), "b": 3})
    {'a': array([1., 1.], dtype=float32), 'b': 3}
    """
    return jax.device_get(jax.tree.map(_whole, values))


def _whole(value: Any) -> Any:
    seen = not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated
    return value if seen else multihost_utils.process_allgather(value, tiled=True)


def from_first(text: str) -> str:
    """A text of the first process, in every process; of fewer than 128 bytes.

    >>> from_first("a name")
    'a name'
    """
    if not several():
        return text
    padded = np.frombuffer(text.encode().ljust(128, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode()


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raises in every process where processes were given different inputs, before they wait for one another for ever.

    Args:
      what: is done with the inputs, for the message.
      facts: what is to be the same in all processes, by name; only the hash of their texts is sent. Of arrays on the
        host, and of small ones on devices of one process, the values count, of other JAX arrays what lies where.

    Raises:
      ValueError: naming the facts that differ, and the processes; inside `jit` nothing is compared.

    >>> check_same("load a model", {"config.json": "{}"})
    """
    if not several() or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(facts)):
        return
    digests = [_digest(f"{name}={_told(fact)}") for name, fact in facts.items()]
    overall = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(b"".join(digests)).digest(), np.uint8))
    others = np.flatnonzero((overall != overall[0]).any(1))
    if not len(others):
        return
    known = np.zeros((_MOST, 32), np.uint8)  # as many in every process, whatever its facts are
    for row, digest in zip(known, digests, strict=False):
        row[:] = np.frombuffer(digest, np.uint8)
    gathered = multihost_utils.process_allgather(known)
    differ = [name for number, name in enumerate(facts) if (gathered[:, number] != gathered[0, number]).any()]
    raise _known(
        ValueError(
            f"processes disagree about what they {what}: {', '.join(differ)} in process "
            f"{', '.join(map(str, others))} is not that of process 0, found in process {jax.process_index()}: give "
            "every process the same"
        )
    )


class together:  # noqa: N801 - a context manager, named as one reads it
    """A block that all processes leave well, or all by an error: none waits for one that failed, none goes on alone.

    Inside, processes need not wait for one another; the end of the block is a barrier.

    >>> with together("write a file"):
    ...     pass
    """

    def __init__(self, what: str):
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not several() or (error is not None and _STOP in getattr(error, "__notes__", ())):
            return
        well = multihost_utils.process_allgather(np.array(error is None))
        if error is not None:
            error.add_note(_STOP)
        elif not well.all():
            failed = ", ".join(str(number) for number in np.flatnonzero(~well))
            raise _known(ValueError(f"process {failed} could not {self._what}, and says why: start all again"))


def _known(error: ValueError) -> ValueError:
    """The error as one that every process knows of."""
    error.add_note(_STOP)
    return error


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _told(fact: Any) -> str:
    """What a fact is, as a text that is the same in processes that agree."""
    found = jax.tree_util.tree_leaves_with_path(fact, is_leaf=lambda node: node is None)
    return "\n".join(f"{jax.tree_util.keystr(path)} {_told_leaf(leaf)}" for path, leaf in found)


def _told_leaf(leaf: Any) -> str:
    if isinstance(leaf, jax.Array):
        told = f"{leaf.dtype} {leaf.shape} {told_sharding(leaf.sharding, leaf.shape)}"
        if not leaf.is_fully_addressable or leaf.size > _FEW:
            return told
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return f"{told} {_told_values(jax.random.key_data(leaf) if is_key else leaf)}"
    if isinstance(leaf, np.ndarray):
        return f"{leaf.dtype} {leaf.shape} {_told_values(leaf)}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(leaf))  # where a function lies in memory


def _told_values(array: Any) -> str:
    return hashlib.sha256(np.asarray(array, order="C").tobytes()).hexdigest()


def told_sharding(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> str:
    """Which device has which part of an array, in a text; of an array of one process alone that it is so."""
    if sharding.is_fully_addressable:
        return "of one process"
    parts: dict[Any, Any] = dict(sharding.devices_indices_map(shape))
    return " ".join(f"{device.id}:{[(part.start, part.stop) for part in index]}" for device, index in parts.items())
