"""The shape of a BERT or a relative of it, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from tvjax.models.settings import NoCode, Settings, architecture, fields, part
from tvjax.models.transformer import ACTIVATIONS

_CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "mpnet": "MPNet"}
_ENCODERS = ("Model", "ForMaskedLM", "ForPreTraining")  # heads of pre-training are kept, and not computed
_CLASSIFIER = "ForSequenceClassification"
POOLINGS = ("mean", "cls")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """An encoder of texts: one embedding a text, or with `num_labels` the scores of classes.

    The names are those of Hugging Face, but for the three that sentence-transformers keeps in files of its own.

    Attributes:
      vocab_size: number of tokens of the vocabulary.
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of each block.
      hidden_act: activation of the MLPs.
      layer_norm_eps: epsilon of every norm.
      max_position_embeddings: rows of the table of positions.
      type_vocab_size: rows of the table of token types (first and second text of a pair); 0 for no table.
      pad_token_id: the token of the padding.
      relative_attention_num_buckets: distances that the shared position bias of the attention tells apart; 0 for none.
      num_labels: number of classes; None: an encoder without a head.
      pooling: what a text's embedding is: the ``mean`` of its tokens, or the first of them, ``cls``; None: nobody said
        it, and it is the mean.
      normalise: whether embeddings have unit length; None: nobody said it, and they have.
      max_seq_length: tokens that are kept of a text; None: all that have positions.
      model_type: the family's name in ``config.json``.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int = 0
    relative_attention_num_buckets: int = 0
    num_labels: int | None = None
    pooling: str | None = None
    normalise: bool | None = None
    max_seq_length: int | None = None
    model_type: str = "bert"

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: use one of {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.pooling not in (None, *POOLINGS):
            raise NoCode(f"pooling {self.pooling!r} is not supported, only {' and '.join(POOLINGS)}")
        if self.relative_attention_num_buckets % 4:
            raise ValueError(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}, expected a multiple of 4"
            )
        if self.positions < 1:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}, which leaves no position after that of "
                f"the padding ({self.pad_token_id})"
            )

    @property
    def positions_after_padding(self) -> bool:
        """Whether the first token has the position after the padding's id."""
        return self.model_type != "bert"

    @property
    def positions(self) -> int:
        """Tokens of a text that have positions."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.positions_after_padding else 0)

    @property
    def length(self) -> int:
        """Tokens that are kept of a text."""
        return self.positions if self.max_seq_length is None else min(self.positions, self.max_seq_length)

    @classmethod
    def from_dict(cls, settings: Settings) -> Self:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> BertConfig.from_dict({"model_type": "bert", "hidden_size": 384, "pooling": "cls"}).pooling
        'cls'
        """
        model_type = settings["model_type"]
        name = architecture(settings, {known: f"{prefix}Model" for known, prefix in _CLASSES.items()})
        kind = name.removeprefix(_CLASSES[model_type])
        if kind == name or kind not in (*_ENCODERS, _CLASSIFIER):
            known = [_CLASSES[model_type] + kind for kind in (*_ENCODERS, _CLASSIFIER)]
            raise NoCode(f"architecture {name!r} is not supported, only {', '.join(known)}")
        if settings.get("position_embedding_type", "absolute") != "absolute":
            raise NoCode(f"position_embedding_type {settings['position_embedding_type']!r} is not supported")
        for switch in ("is_decoder", "add_cross_attention"):
            if settings.get(switch):
                raise NoCode(f"{switch} is true: decoders are not supported")
        values = fields(cls, {**settings, "num_labels": None})
        if kind == _CLASSIFIER:
            values["num_labels"] = _labels(settings)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        count = values.pop("num_labels", None)
        if not self.relative_attention_num_buckets:
            values.pop("relative_attention_num_buckets")
        if not self.type_vocab_size:
            values.pop("type_vocab_size")
        kind = "Model" if count is None else _CLASSIFIER
        if count is not None:
            labels = {str(i): f"LABEL_{i}" for i in range(count)}
            values |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
        return {"architectures": [_CLASSES[self.model_type] + kind], **values}


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """A RoBERTa or XLM-RoBERTa: positions are counted from the padding's on, and the classifier has a layer of its own.

    >>> RobertaConfig.from_dict({"model_type": "xlm-roberta", "max_position_embeddings": 514}).positions
    512
    """

    vocab_size: int = 50265
    pad_token_id: int = 1
    model_type: str = "roberta"

    @classmethod
    def from_dict(cls, settings: Settings) -> Self:
        """As `BertConfig.from_dict`."""
        vocabulary = {"vocab_size": 30522} if settings["model_type"] == "xlm-roberta" else {}
        return super().from_dict({**vocabulary, **settings})


@dataclasses.dataclass(frozen=True)
class MPNetConfig(BertConfig):
    """An MPNet: a RoBERTa without token types, whose blocks share a bias of the attention by distance.

    >>> MPNetConfig().relative_attention_num_buckets
    32
    """

    vocab_size: int = 30527
    type_vocab_size: int = 0
    pad_token_id: int = 1
    relative_attention_num_buckets: int = 32
    model_type: str = "mpnet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative_attention_num_buckets != 32:
            raise NoCode(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}: the model that transformers "
                "computes has 32, whatever its config says"
            )


def _labels(settings: Settings) -> int:
    """The number of classes of a sequence classifier."""
    problem = settings.get("problem_type")
    names = part(settings, "id2label")
    count = len(names) if names else settings.get("num_labels", 2)
    if problem not in (None, "single_label_classification") or count == 1:
        raise NoCode(f"problem_type {problem or 'regression'!r} is not supported: a text has one class of several")
    return int(count)
