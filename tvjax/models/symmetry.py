"""Which units of a CLIP and of a ViT may be permuted: one table per family.

Permuted together are the features of a tower's residual stream, through all its layers; the hidden units of each MLP;
the heads of each attention layer; and inside a head the units of queries and keys, and those of values and the output
projection. The embedding that two towers share, classes, pixels, positions and tokens have a meaning of their own, and
so has the residual stream of a tower without projection, which ends in what the tower returns.
"""

from __future__ import annotations

from tvjax.align.permutations import Row, Symmetry
from tvjax.models.clip.config import CLIPConfig
from tvjax.models.vit.config import ViTConfig

Axis = str | None

RESIDUAL = "{tower}/residual"
HIDDEN = "{tower}/blocks/{i}/hidden"
HEADS = "{tower}/blocks/{i}/heads"
QK, VO = f"{HEADS}:query_key", f"{HEADS}:value_out"


def _norm(path: str, features: Axis) -> tuple[Row, ...]:
    return Row(f"{path}/scale", (features,)), Row(f"{path}/bias", (features,))


def _linear(path: str, inputs: Axis, outputs: Axis) -> tuple[Row, ...]:
    return Row(f"{path}/kernel", (inputs, outputs)), Row(f"{path}/bias", (outputs,))


# fmt: off
_BLOCK = (
    *_norm("{tower}/blocks/{i}/norm1",             RESIDUAL),
    *_linear("{tower}/blocks/{i}/attention/query", RESIDUAL, QK),
    *_linear("{tower}/blocks/{i}/attention/key",   RESIDUAL, QK),
    *_linear("{tower}/blocks/{i}/attention/value", RESIDUAL, VO),
    *_linear("{tower}/blocks/{i}/attention/out",   VO,       RESIDUAL),
    *_norm("{tower}/blocks/{i}/norm2",             RESIDUAL),
    *_linear("{tower}/blocks/{i}/mlp/up",          RESIDUAL, HIDDEN),
    *_linear("{tower}/blocks/{i}/mlp/down",        HIDDEN,   RESIDUAL),
)
CLIP = (
    Row("logit_scale",                             ()),
    Row("{tower}/embeddings/class_token",          (RESIDUAL,)),
    Row("{tower}/embeddings/patch/kernel",         (None, None, None, RESIDUAL)),
    Row("{tower}/embeddings/tokens",               (None, RESIDUAL)),
    Row("{tower}/embeddings/positions",            (None, RESIDUAL)),
    *_norm("{tower}/pre_norm",                     RESIDUAL),
    *_BLOCK,
    *_norm("{tower}/post_norm",                    RESIDUAL),
    *_norm("{tower}/final_norm",                   RESIDUAL),
    Row("{tower}/projection/kernel",               (RESIDUAL, None)),
)
VIT = (
    Row("{tower}/embeddings/class_token",          (RESIDUAL,)),
    Row("{tower}/embeddings/patch/kernel",         (None, None, None, RESIDUAL)),
    Row("{tower}/embeddings/patch/bias",           (RESIDUAL,)),
    Row("{tower}/embeddings/positions",            (None, RESIDUAL)),
    *_BLOCK,
    *_norm("{tower}/post_norm",                    RESIDUAL),
    *_linear("head",                               RESIDUAL.format(tower="vision"), None),
)
# fmt: on


def symmetry_of_config(config: CLIPConfig | ViTConfig) -> Symmetry:
    """The permutation symmetry of a model.

    Args:
      config: shape of the model.

    Returns:
      The table of its family, with the heads of this model.

    Raises:
      ValueError: for an object that is no config of a family.

    >>> symmetry_of_config(ViTConfig(num_attention_heads=6)).heads
    {'vision/blocks/{i}/heads': 6}
    """
    if isinstance(config, ViTConfig):
        return Symmetry(VIT, {HEADS.replace("{tower}", "vision"): config.num_attention_heads})
    if isinstance(config, CLIPConfig):
        towers = [(name, tower) for name, tower in (("vision", config.vision), ("text", config.text)) if tower]
        heads = {HEADS.replace("{tower}", name): tower.num_attention_heads for name, tower in towers}
        outputs = tuple(RESIDUAL.replace("{tower}", name) for name, tower in towers if tower.projection_dim is None)
        return Symmetry(CLIP, heads, fixed=outputs)
    raise ValueError(f"no symmetry table for configs of type {type(config).__name__}: expected CLIPConfig or ViTConfig")
