"""BERT, and the encoders that differ from it by a switch: RoBERTa, XLM-RoBERTa, MPNet; MiniLM, bge and e5 are BERTs."""

from tvjax.models.bert.config import BertConfig, MPNetConfig, RobertaConfig
from tvjax.models.bert.modeling import Bert, bert, init

__all__ = ["Bert", "BertConfig", "MPNetConfig", "RobertaConfig", "bert", "init"]
