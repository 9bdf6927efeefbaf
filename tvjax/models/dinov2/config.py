"""The shape of a DINOv2, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from tvjax.models.settings import NoCode, Settings, architecture, fields, part
from tvjax.models.transformer import BlockConfig


@dataclasses.dataclass(frozen=True)
class Dinov2BlockConfig(BlockConfig):
    """The shape of one block.

    Attributes:
      gated: whether its MLP is gated (SwiGLU); `hidden_act` is then of no effect.
    """

    gated: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """What both kinds of DINOv2 have; the names are those of Hugging Face.

    Attributes:
      hidden_size: width of the residual stream.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of each block.
      mlp_ratio: width inside the MLPs, in widths of the residual stream; a gated one has two thirds of it.
      image_size: height and width in pixels of the images that the table of positions is for; for others it is resized.
      patch_size: height and width of a patch in pixels.
      hidden_act: activation of the MLPs.
      layer_norm_eps: epsilon of every norm.
      qkv_bias: whether queries, keys and values have biases.
      use_swiglu_ffn: whether the MLPs are gated.
      num_labels: number of classes; None for a backbone, which has no classifier.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int = 4
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_labels: int | None = None

    model_type: ClassVar[str]
    antialias: ClassVar[bool]
    _classes: ClassVar[tuple[str, str]]  # of transformers: the backbone, and that with a classifier

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLPs."""
        width = self.hidden_size * self.mlp_ratio
        return (width * 2 // 3 + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def block(self) -> Dinov2BlockConfig:
        """The shape of one block."""
        return Dinov2BlockConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            hidden_act=self.hidden_act,
            layer_norm_eps=self.layer_norm_eps,
            qkv_bias=self.qkv_bias,
            gated=self.use_swiglu_ffn,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of patches that the table of positions is for."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def registers(self) -> int:
        """How many register tokens there are."""
        return 0

    @property
    def has_mask_token(self) -> bool:
        """Whether there is a token that stood for hidden patches in pre-training."""
        return True

    @classmethod
    def from_dict(cls, settings: Settings) -> Self:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> settings = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "image_size": 518}
        >>> config = Dinov2Config.from_dict(settings)
        >>> config.grid, config.num_labels
        ((37, 37), None)
        """
        backbone, classifier = cls._classes
        name = architecture(settings, {cls.model_type: backbone})
        if name not in cls._classes:
            raise NoCode(f"architecture {name!r} is not supported, only {backbone} and {classifier}")
        values = fields(cls, {**settings, "num_labels": None})
        if name == classifier:
            values["num_labels"] = len(part(settings, "id2label")) or settings.get("num_labels", 2)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        values = dataclasses.asdict(self)
        count = values.pop("num_labels")
        found = {"architectures": [self._classes[count is not None]], "model_type": self.model_type, **values}
        if count is not None:
            names = [f"LABEL_{number}" for number in range(count)]
            found["id2label"] = {str(number): name for number, name in enumerate(names)}
            found["label2id"] = {name: number for number, name in enumerate(names)}
        return found


@dataclasses.dataclass(frozen=True)
class Dinov2Config(Shape):
    """A DINOv2.

    Attributes:
      use_mask_token: whether there is a token that stood for hidden patches in pre-training; nothing reads it.
    """

    use_mask_token: bool = True

    model_type: ClassVar[str] = "dinov2"
    antialias: ClassVar[bool] = False
    _classes: ClassVar[tuple[str, str]] = ("Dinov2Model", "Dinov2ForImageClassification")

    @property
    def has_mask_token(self) -> bool:
        """Whether there is a token that stood for hidden patches in pre-training."""
        return self.use_mask_token


@dataclasses.dataclass(frozen=True)
class Dinov2WithRegistersConfig(Shape):
    """A DINOv2 with registers.

    Attributes:
      num_register_tokens: how many tokens stand between the class token and the patches.
    """

    patch_size: int = 16
    num_register_tokens: int = 4

    model_type: ClassVar[str] = "dinov2_with_registers"
    antialias: ClassVar[bool] = True
    _classes: ClassVar[tuple[str, str]] = (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    )

    @property
    def registers(self) -> int:
        """How many register tokens there are."""
        return self.num_register_tokens
