"""How a job asks the models of a family: the examples that they take, what of a model reads these, and the task."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import tree
from tvjax.checkpoints.sentence_files import MODULES
from tvjax.checkpoints.tensor_dtypes import numpy_dtype
from tvjax.data.examples import Examples
from tvjax.data.images import Images
from tvjax.data.loader import Loader
from tvjax.data.texts import Texts
from tvjax.data.tokens import Encoder
from tvjax.jobs.matching import cut_alike, partnered
from tvjax.jobs.opened import Opened
from tvjax.kinds import kind_of
from tvjax.models.families import GENERIC
from tvjax.models.generic import no_code
from tvjax.on_disk import is_on_disk
from tvjax.stages import Batch, Model, PyTree, tower
from tvjax.tasks import Task, label_words, next_token, own_head, sequence_to_sequence, zero_shot
from tvjax.tasks.language import NEXT_TOKEN, SEQUENCE_TO_SEQUENCE
from tvjax.tasks.losses import OWN_HEAD
from tvjax.tasks.zero_shot import TEMPLATES, TEXT_TEMPLATES, ZERO_SHOT


class Prompts(NamedTuple):
    """How the models are asked.

    Attributes:
      class_names: names of the classes; None: those that the examples have.
      templates: prompts, of images with ``{}`` in place of the name, of texts one with columns in braces.
      length: tokens that are kept of a text.
    """

    class_names: tuple[str, ...] | None
    templates: tuple[str, ...]
    length: int = 512


class OwnHead:
    """Images, by the head that the model has; what other ways of asking differ from.

    Attributes:
      kind: of the examples.
      needs_labels: whether examples without labels have no loss and no score.
      labelling: how examples get labels.
      lacks: what a model is without that cannot score by itself, and the way out.
      templates: the prompts where nobody gives any.
      head_stays: whether outputs with a meaning of their own (classes) are of one task, and are not moved with others.
    """

    kind: type[Examples] = Images
    needs_labels = True
    labelling = "put the images of each class into a folder of its name"
    lacks = "has no head of classes: give a model that has one (...ForImageClassification)"
    templates: tuple[str, ...] = ()
    head_stays = True

    def config(self, opened: Opened) -> Any:
        """The config of what reads the examples.

        Raises:
          ValueError: for a model that has nothing to read them with.
        """
        return opened.config

    def tower(self, model: Model) -> Model:
        """What of a model reads the examples."""
        return model

    def labels(self, opened: Opened) -> tuple[str, ...] | None:
        """The names of the classes of the model's own head; empty where they are only numbered, None without a head."""
        if not self.can_score(opened):
            return None
        names = opened.checkpoint.settings.get("id2label") or {}
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
        return () if all(label == f"LABEL_{number}" for number, label in enumerate(labels)) else labels

    def can_score(self, opened: Opened) -> bool:
        """Whether the model makes a task of examples without another beside it."""
        return getattr(opened.config, "num_labels", 0) is not None

    def length(self, opened: Opened, asked: int) -> int:
        """Tokens that are kept of a text, where so many are asked for."""
        return asked

    def notes(self, opened: Opened) -> tuple[str, ...]:
        """What the user should know of how a model reads."""
        return ()

    def task(self, opened: Opened, found: Examples | None, prompts: Prompts) -> Task:
        """The task of examples.

        Args:
          opened: the model.
          found: the examples; None where they are not known.
          prompts: how to ask.
        """
        return own_head(opened.processor, () if found is None else found.class_names)

    def shapes(self, opened: Opened, found: Examples | None, prompts: Prompts) -> Model:
        """What reads the examples in float32, with the task, in shapes; no weight is read."""
        return _shapes(self, opened).with_loss(OWN_HEAD)

    def batches(self, opened: Opened, found: Examples | None, prompts: Prompts, sizes: Sequence[int]) -> list[Batch]:
        """Batches of these sizes, in shapes."""
        shape = _pixels(opened)
        sides = [(jax.ShapeDtypeStruct((size, *shape), jnp.float32), (size,)) for size in sizes]
        return [Batch({"pixels": x}, jax.ShapeDtypeStruct(labels, jnp.int32)) for x, labels in sides]

    def check_reader(self, opened: Opened, prompts: Prompts) -> None:
        """Raises a ValueError where a model has nothing to read the examples by, before any weight is read."""
        opened.check_images()

    def check(self, opened: Opened, found: Examples, prompts: Prompts) -> None:
        """Raises a ValueError where the task cannot be made of a model, before any weight is read."""
        self.check_reader(opened, prompts)

    def check_alike(self, models: Sequence[Opened], found: Examples, prompts: Prompts) -> None:
        """Raises a ValueError where models do not see the same in the examples, before any weight is read."""

    def partnered(self, source: Opened, target: Opened, found: Examples, prompts: Prompts) -> float | None:
        """The share of the target's tokens with a partner, where these are matched; None where they are the same."""


class ZeroShot(OwnHead):
    """Images, by a dual encoder: the classes are the embeddings of prompts."""

    lacks = "has no text tower to make a zero-shot head from: give the full model"
    templates = TEMPLATES

    def config(self, opened: Opened) -> Any:
        """The config of the vision tower."""
        if opened.config.vision is None:
            found = kind_of(opened.config)
            raise ValueError(f"{opened.name!r} is {found} without a vision tower: give a model that has one")
        return opened.config.vision

    def tower(self, model: Model) -> Model:
        """The vision tower."""
        return tower(model, "vision")

    def labels(self, opened: Opened) -> None:
        """None: there is no head."""

    def can_score(self, opened: Opened) -> bool:
        """Whether there is a text tower too."""
        return opened.config.text is not None

    def task(self, opened: Opened, found: Examples | None, prompts: Prompts) -> Task:
        """Zero-shot classification."""
        return zero_shot(opened.processor, () if found is None else found.class_names, prompts.templates)

    def shapes(self, opened: Opened, found: Examples | None, prompts: Prompts) -> Model:
        """The vision tower with a head of so many classes."""
        width = self.width(opened)
        classes = len(found.class_names) if found is not None and found.labels is not None else 10
        classifier, scale = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((width, classes), ()))
        return _shapes(self, opened).with_loss(ZERO_SHOT, {"classifier": classifier, "logit_scale": scale})

    def width(self, opened: Opened) -> int:
        """Of an embedding."""
        return int(self.config(opened).projection_dim)

    def check(self, opened: Opened, found: Examples, prompts: Prompts) -> None:
        """A tokenizer that does not fit the model is refused."""
        self.check_reader(opened, prompts)
        if self.can_score(opened):
            opened.processor.tokens(found.class_names)


class OfTexts(OwnHead):
    """What all ways of asking by texts have in common; each says the task of an encoder of texts to tokens."""

    kind = Texts
    labelling = "name the column of the classes with label=COLUMN"

    def length(self, opened: Opened, asked: int) -> int:
        """At most what the model takes."""
        return min(asked, opened.checkpoint.family.inputs(opened.config, 1)["tokens"].shape[1])

    def task(self, opened: Opened, found: Examples | None, prompts: Prompts) -> Task:
        """The task of texts, tokenised as the model does."""
        return self.tokenised(opened, opened.encoder(prompts.length), found, prompts)

    def tokenised(self, opened: Opened, encoder: Encoder, found: Examples | None, prompts: Prompts) -> Task:
        """The task of texts."""
        return own_head(encoder, () if found is None else found.class_names)

    def batches(self, opened: Opened, found: Examples | None, prompts: Prompts, sizes: Sequence[int]) -> list[Batch]:
        """Those of the examples; without any, texts of the greatest length."""
        if found is not None:
            made = self.task(opened, found, prompts).batches(found, sizes[0])
            return [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch) for batch in made]
        shapes = [(size, prompts.length) for size in sizes]
        return [
            self.shaped(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)) for shape in shapes
        ]

    def shaped(self, ids: jax.ShapeDtypeStruct, mask: jax.ShapeDtypeStruct) -> Batch:
        """A batch of texts of these shapes, with classes."""
        return Batch({"tokens": ids, "mask": mask}, jax.ShapeDtypeStruct(ids.shape[:1], jnp.int32))

    def check_reader(self, opened: Opened, prompts: Prompts) -> None:
        """A model without a tokenizer, or with another's, is refused."""
        opened.encoder(prompts.length)

    def spans(self, opened: Opened, found: Examples, prompts: Prompts, size: int) -> Loader:
        """The batches of the task with codes of spans in the place of token ids."""
        return self.tokenised(opened, opened.encoder(prompts.length).of_spans, found, prompts).batches(found, size)

    def check_alike(self, models: Sequence[Opened], found: Examples, prompts: Prompts) -> None:
        """All models cut the texts into the same pieces, whatever ids they give them."""
        for other in models[1:]:
            if not all(itertools.starmap(cut_alike, self._both(models[0], other, found, prompts))):
                raise ValueError(
                    f"{_differ(models[0], other, found)}, whose accuracies are not comparable: give models whose "
                    "tokens stand for the same characters, as those of BERT and MPNet do, or evaluate one at a time"
                )

    def partnered(self, source: Opened, target: Opened, found: Examples, prompts: Prompts) -> float | None:
        """By characters, where the texts are cut differently."""
        if all(itertools.starmap(cut_alike, self._both(source, target, found, prompts))):
            return None
        for one in (source, target):
            if not one.encoder(prompts.length).knows_spans:
                raise ValueError(
                    f"{_differ(source, target, found)}, and that of {one.name!r} does not say which characters its "
                    "tokens cover, by which they would be matched: add the tokenizer.json of a fast one"
                )
        return partnered(self._both(source, target, found, prompts))

    def _both(self, one: Opened, other: Opened, found: Examples, prompts: Prompts) -> Iterator[tuple[Batch, Batch]]:
        """The spans of both models' tokens."""
        size = min(len(found), 64)
        return zip(*(self.spans(model, found, prompts, size) for model in (one, other)), strict=True)


def _differ(one: Opened, other: Opened, found: Examples) -> str:
    return f"the tokenizers of {one.name!r} and {other.name!r} cut the texts of {found.name!r} into other tokens"


class Sentences(OfTexts, ZeroShot):
    """Texts, by a sentence encoder: the classes are the embeddings of their names, or of prompts with these."""

    templates = TEXT_TEMPLATES

    def config(self, opened: Opened) -> Any:
        """The config of the whole."""
        return opened.config

    def tower(self, model: Model) -> Model:
        """The whole."""
        return model

    def can_score(self, opened: Opened) -> bool:
        """Whether there are texts to read class names with: always."""
        return True

    def notes(self, opened: Opened) -> tuple[str, ...]:
        """How texts become embeddings, where the folder does not say it."""
        if opened.config.pooling is not None:
            return ()
        return (
            f"{opened.name!r} has no {MODULES} that says how tokens become one embedding: taken is the normalised mean "
            "of the tokens",
        )

    def tokenised(self, opened: Opened, encoder: Encoder, found: Examples | None, prompts: Prompts) -> Task:
        """Zero-shot classification."""
        return zero_shot(encoder, () if found is None else found.class_names, prompts.templates)

    def width(self, opened: Opened) -> int:
        """That of the residual stream."""
        return int(opened.config.hidden_size)

    def check(self, opened: Opened, found: Examples, prompts: Prompts) -> None:
        """Class names that are no tokens, or the same tokens, are refused."""
        tokenizer = opened.encoder(prompts.length).tokenizer
        seen: dict[tuple[int, ...], str] = {}
        for name in dict.fromkeys(found.class_names):
            row = tuple(tokenizer([name], add_special_tokens=False)["input_ids"][0])
            if not row:
                raise ValueError(f"the class name {name!r} is no token for {opened.name!r}: rename the class")
            if row in seen:
                raise ValueError(
                    f"the class names {seen[row]!r} and {name!r} are the same tokens for {opened.name!r}, so that none "
                    "could be told from the other: rename one"
                )
            seen[row] = name


class Language(OfTexts):
    """Texts, by a decoder: labelled ones by the words of their classes, others by the next token.

    Where an encoder reads the texts (a ``decoder_start_token_id`` of the config), the decoder says the answer alone.
    """

    needs_labels = False
    head_stays = False  # every task has the same vocabulary

    def labels(self, opened: Opened) -> None:
        """None: the words are those of the examples."""

    def length(self, opened: Opened, asked: int) -> int:
        """At most what the model has positions for; relative ones have no end."""
        longest = getattr(
            opened.config, "longest", None
        )  # of rotary positions whose frequencies change with the length
        return min(asked, longest or asked, getattr(opened.config, "max_position_embeddings", asked))

    def tokenised(self, opened: Opened, encoder: Encoder, found: Examples | None, prompts: Prompts) -> Task:
        """The words of the classes where there are labels, else the next token, or that of the answer.

        A word, and the answer to a prompt of a template, are set off by a space where they follow the text.
        """
        assert isinstance(found, Texts)
        template = _template(found, prompts.templates)
        start = _start(opened)
        if start is not None:
            if found.labels is not None:
                return label_words(encoder, found.class_names, template, start)
            return sequence_to_sequence(encoder, start, template)
        space = "" if template[-1:].isspace() else " "
        if found.labels is not None:
            return label_words(encoder, [space + word for word in found.class_names], template)
        return next_token(encoder, template + space if template and found.completion else template)

    def shapes(self, opened: Opened, found: Examples | None, prompts: Prompts) -> Model:
        """The model with the task of the examples."""
        model = _shapes(self, opened)
        if found is None:
            return model.with_loss(NEXT_TOKEN if _start(opened) is None else SEQUENCE_TO_SEQUENCE)
        return self.task(opened, found, prompts).model(model)

    def batches(self, opened: Opened, found: Examples | None, prompts: Prompts, sizes: Sequence[int]) -> list[Batch]:
        """Those of the examples; without any, texts of the greatest length."""
        made = super().batches(opened, found, prompts, sizes)
        if found is not None or _start(opened) is None:
            return made
        both = [{name: one.inputs[name] for name in ("tokens", "mask")} for one in made]
        return [
            Batch({**one.inputs, **{f"decoder_{name}": x for name, x in sides.items()}}, one.labels)
            for one, sides in zip(made, both, strict=True)
        ]

    def shaped(self, ids: jax.ShapeDtypeStruct, mask: jax.ShapeDtypeStruct) -> Batch:
        """A batch of texts of these shapes, with the tokens that follow."""
        return Batch({"tokens": ids, "mask": mask, "wanted": ids}, {"tokens": ids, "mask": mask})

    def check(self, opened: Opened, found: Examples, prompts: Prompts) -> None:
        """A model without a tokenizer, words that are not told apart, and texts without answers, are refused."""
        task = self.task(opened, found, prompts)
        task.model(Model({}, ()))
        task.batches(found, 1)


_ASKING = {
    "own_head": OwnHead(),
    "own_head_of_texts": OfTexts(),
    "zero_shot": ZeroShot(),
    "sentences": Sentences(),
    "language": Language(),
}


def asking(opened: Opened) -> OwnHead:
    """How a model is asked, by its family.

    Raises:
      ValueError: for a model without modelling code, or with nothing to read examples with.
    """
    family = opened.checkpoint.family
    if family is GENERIC:
        why = opened.checkpoint.no_code
        raise ValueError(f"{opened.name!r}: {no_code(opened.checkpoint.settings.get('model_type'), why)}")
    asked = family.asked if isinstance(family.asked, str) else family.asked(opened.config)
    if asked not in _ASKING:
        name = kind_of(opened.config)
        raise ValueError(f"{opened.name!r} is {name}, whose family is asked {asked!r}, none of {[*_ASKING]}")
    found = _ASKING[asked]
    found.config(opened)
    return found


def parameters(opened: Opened) -> PyTree:
    """The parameters of a model, in shapes."""
    checkpoint = opened.checkpoint
    keys = {path: source.key for path, source in checkpoint.sources.items()}
    headers = checkpoint.tensors.headers
    leaves = {
        path: jax.ShapeDtypeStruct(shape, numpy_dtype(keys[path], headers[keys[path]]))
        for path, shape in checkpoint.shapes.items()
    }
    return tree.nest(leaves)


def with_task(opened: Opened, task: Task) -> Model:
    """What reads the examples in float32, with the loss of a task."""
    return task.model(opened.pretrained.model.replace(params=float32(opened.pretrained.params)))


def float32(params: PyTree) -> PyTree:
    """The parameters in float32: gradients of 16-bit ones would vanish below their range; those on disk stay there."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_on_disk(x) else jnp.asarray(x, jnp.float32), params)


def _pixels(opened: Opened) -> tuple[int, ...]:
    """The shape of an image as the model's processor makes it; without one, that which its config names."""
    expected = opened.checkpoint.family.inputs(opened.config, 1)["pixels"].shape[1:]
    if opened.processor.image_processor is None:
        return expected
    return opened.processor.pixels([np.zeros(expected, np.uint8)]).shape[1:]


def _shapes(way: OwnHead, opened: Opened) -> Model:
    """What reads the examples, in shapes; parameters are computed with in float32."""
    model = way.tower(opened.checkpoint.family.build(opened.config, parameters(opened)))
    return model.replace(params=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), model.params))


def _start(opened: Opened) -> int | None:
    """The token that the decoder begins with; None for a model without an encoder."""
    return getattr(opened.config, "decoder_start_token_id", None)


def _template(found: Texts, templates: Sequence[str]) -> str:
    """The one prompt of texts, ``{}`` being the one column.

    Raises:
      ValueError: for several.
    """
    if len(templates) > 1:
        raise ValueError(f"found {len(templates)} templates ({templates[0]!r}, ...), and texts are asked by one")
    template = templates[0] if templates else ""
    return template.replace("{}", f"{{{found.prompts[0]}}}") if len(found.prompts) == 1 else template
