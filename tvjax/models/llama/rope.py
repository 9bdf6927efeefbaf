"""Rotary positions of every type that transformers knows for this family, read from a ``config.json`` and written back.

A token's position turns each pair of units of the queries and keys by an angle, position times the pair's frequency
(Su et al. 2021, https://arxiv.org/abs/2104.09864). The types differ in how they slow the frequencies down for texts
that are longer than those the model was first trained on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from tvjax.models.settings import NoCode, Settings, part

# The fields that each type reads, by the names of ``rope_parameters``.
_READS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}
_OF_PAIRS = ("short_factor", "long_factor")
_NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("linear", "dynamic"), ("factor",)),
    **{"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "longrope": _OF_PAIRS},
}
_OPTIONAL = ("attention_factor", "mscale", "mscale_all_dim")
_0_IS_ABSENT = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # so transformers reads them
_GREATEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary positions: the frequency of each pair of units of a head.

    Attributes:
      theta: base of the wavelengths.
      kind: ``default``; ``linear``, all frequencies divided by `factor`; ``dynamic``, as ``default`` for the lengths
        that are supported (`longest`); ``llama3`` and ``yarn``, the low ones divided; or ``longrope``, each divided by
        a number of its own.
      factor: see `kind`.
      low_freq_factor: of ``llama3``; wavelengths above the original context divided by it are scaled.
      high_freq_factor: of ``llama3``; wavelengths below the original context divided by it are not.
      original_max_position_embeddings: the length of texts that the model was first trained on.
      attention_factor: of ``yarn`` and ``longrope``; see `scale`; None for what `factor` suggests.
      beta_fast: of ``yarn``; pairs that turn more often than this in the original context are kept.
      beta_slow: of ``yarn``; pairs that turn less often are divided by `factor`; in between, a ramp.
      mscale: of ``yarn``; enters `scale` where `mscale_all_dim` is given too.
      mscale_all_dim: see `mscale`.
      truncate: of ``yarn``; whether the ends of the ramp are whole pairs.
      short_factor: of ``longrope``; what each pair's frequency is divided by in texts of the original length.
      long_factor: of ``longrope``; the same in longer texts, which are not supported: kept, and written back.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        for name, value in dataclasses.asdict(self).items():
            if name in _OF_PAIRS:
                if not (isinstance(value, tuple) and all(_is_positive(each) for each in value)):
                    raise ValueError(f"{name} of the rotary positions is {value!r}, expected positive numbers")
            elif name == "truncate":
                if not isinstance(value, bool):
                    raise ValueError(f"truncate of the rotary positions is {value!r}, expected true or false")
            elif name != "kind" and not (_is_positive(value) or (value is None and name in _OPTIONAL)):
                raise ValueError(f"{name} of the rotary positions is {value!r}, expected a positive number")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not greater than low_freq_factor {self.low_freq_factor}"
            )
        if self.kind == "yarn" and self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} is less than beta_slow {self.beta_slow}")
        above_1 = {"yarn": "theta", "longrope": "original_max_position_embeddings"}.get(self.kind)
        if above_1 and not getattr(self, above_1) > 1:
            raise ValueError(f"{above_1} of the rotary positions is {getattr(self, above_1)}, expected more than 1")

    def frequencies(self, size: int) -> np.ndarray:
        """By how many radians a token's position turns each pair of units of a head of `size` units, float32.

        ``theta^(-2 j / size)`` for pair j, scaled as `kind` says.

        >>> Rope(theta=100.0, kind="linear", factor=2.0).frequencies(4).round(3).tolist()
        [0.5, 0.05000000074505806]
        """
        found: np.ndarray = np.float32(self.theta) ** -(np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
        if self.kind == "linear":
            found = found / np.float32(self.factor)
        if self.kind == "llama3":
            turns = self.original_max_position_embeddings * found / (2 * math.pi)  # in the original context
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)
            found = (1 - kept) * found / self.factor + kept * found
        if self.kind == "yarn":
            divided = self._ramp(size)
            found = divided * found / self.factor + (1 - divided) * found
        if self.kind == "longrope":
            found = found / np.asarray(self.short_factor, np.float32)
        return found.astype(np.float32)

    @property
    def scale(self) -> float:
        """What the rotated queries and keys are multiplied by: it sharpens the attention of longer texts.

        >>> Rope(kind="yarn", factor=4.0).scale  # 1 + 0.1 log(4)
        1.138629436111989
        """
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        growth = math.log(max(self.factor, 1.0))
        if self.kind == "longrope":
            return math.sqrt(1 + growth / math.log(self.original_max_position_embeddings))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * growth + 1) / (0.1 * self.mscale_all_dim * growth + 1)
        return 0.1 * growth + 1

    def longest(self, max_position_embeddings: int) -> int | None:
        """The greatest length of texts whose frequencies `frequencies` gives; None where there is no end.

        Above it ``dynamic`` and ``longrope`` have other frequencies, which depend on the longest text of a batch.
        """
        ends = {"dynamic": max_position_embeddings, "longrope": self.original_max_position_embeddings}
        return ends.get(self.kind)

    @classmethod
    def from_settings(cls, settings: Settings, max_position_embeddings: int) -> Rope:
        """What a ``config.json`` of transformers 5 (``rope_parameters``) or 4 (``rope_scaling``) says.

        >>> rope = Rope.from_settings({"rope_scaling": {"type": "linear", "factor": 2.0}}, 2048)
        >>> rope.kind, rope.factor, rope.theta
        ('linear', 2.0, 10000.0)
        """
        given: Mapping[str, Any] = part(settings, "rope_parameters") or part(settings, "rope_scaling")
        nested = [name for name, value in given.items() if isinstance(value, Mapping)]
        if nested:
            raise NoCode(f"rotary positions of their own for {' and '.join(nested)} are not supported")
        # transformers passes over it, or fails: its code of this family rotates whole heads
        if given.get("partial_rotary_factor", settings.get("partial_rotary_factor")) not in (None, 1.0):
            raise NoCode("partial_rotary_factor is not 1: heads that positions rotate in part are not supported")
        found = {"original_max_position_embeddings": max_position_embeddings, **given}
        if settings.get("original_max_position_embeddings") is not None:  # beside them, it has the last word
            found["original_max_position_embeddings"] = settings["original_max_position_embeddings"]
        kind = given.get("rope_type", given.get("type", "default"))
        _check_kind(kind)
        values = {"theta": found.get("rope_theta", settings.get("rope_theta", cls.theta)), "kind": kind}
        for name in _READS[kind]:
            value = found.get(name)
            if value is not None and not (name in _0_IS_ABSENT and value == 0):
                values[name] = tuple(value) if name in _OF_PAIRS and isinstance(value, list) else value
        missing = [name for name in _NEEDS.get(kind, ()) if name not in values]
        if missing:
            raise ValueError(f"rotary positions of rope_type {kind!r} without {' and '.join(missing)}")
        original = values.get("original_max_position_embeddings")
        if "factor" in _READS[kind] and _is_positive(original):
            values.setdefault("factor", max_position_embeddings / original)
        return cls(**values)

    def to_settings(self) -> dict[str, Any]:
        """The content of ``rope_parameters``, but for the base, which transformers 4 keeps beside it.

        >>> Rope(kind="dynamic", factor=2.0).to_settings()
        {'rope_type': 'dynamic', 'factor': 2.0}
        """
        values = {name: getattr(self, name) for name in _READS[self.kind]}
        written = {name: list(value) if name in _OF_PAIRS else value for name, value in values.items()}
        return {"rope_type": self.kind, **{name: value for name, value in written.items() if value is not None}}

    def _ramp(self, size: int) -> np.ndarray:
        """How much of each pair's frequency YaRN divides: from 0 at the fast pairs to 1 at the slow ones."""
        low, high = (
            size * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        pairs = np.arange(size // 2, dtype=np.float32)
        return np.clip((pairs - low) / (high - low or 0.001), 0, 1)


def _check_kind(kind: Any) -> None:
    if kind not in tuple(_READS):
        raise NoCode(f"rope_type {kind!r} is not supported, only {', '.join(_READS)}")


def _is_positive(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _GREATEST
