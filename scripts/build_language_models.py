"""Trains the embedded language models of the demo, and a task vector for each task.

    python scripts/build_language_models.py

Everything is drawn from fixed seeds. The texts come from `build_language_texts`, pinned packages. The folders of
``tvjax/demo_language`` are replaced; the table of accuracies on test texts goes to
``results/build_language_models.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import time
from fnmatch import fnmatchcase as fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from build_language_texts import (
    HALVES,
    PACKAGES,
    VOCABULARY,
    Extract,
    documents,
    extract,
    joined,
    train_tokenizer,
    write,
    write_tokenizer,
)
from rounding import on_grid
from tvjax import tree
from tvjax.arithmetic import apply, task_vector
from tvjax.checkpoints import Pretrained, fingerprint, from_pretrained, save_pretrained, save_tree
from tvjax.data.embedded import LANGUAGE_FOLDER, LANGUAGE_MODELS, model_folder
from tvjax.data.embedded_texts import FOLDER as TEXTS
from tvjax.data.embedded_texts import LENGTH, TASKS
from tvjax.data.texts import Texts
from tvjax.demo.base import float32
from tvjax.demo.language import QUICK, ask, by_length
from tvjax.evaluate.accuracy import accuracy
from tvjax.evaluate.fine_tune import fine_tune
from tvjax.models.families import family_of_config
from tvjax.models.llama import LlamaConfig
from tvjax.models.t5 import T5Config
from tvjax.stages import Batch, Model, PyTree
from tvjax.tasks.base import Task
from tvjax.tasks.language import NEXT_TOKEN, SEQUENCE_TO_SEQUENCE

PAD, END, START, GAP = range(4)  # the special tokens; further gaps follow the first
CUT, ANSWER = 48, 16  # tokens of a text, and of what is cut out of it


class Recipe(NamedTuple):
    """How a model is made.

    Attributes:
      config: its shape, which says the family.
      half: the half of the texts that it is trained on.
      steps: of pre-training.
      batch_size: rows of `LENGTH` tokens in a step of pre-training.
      learning_rate: the greatest.
      start: the model that it is trained further from; "" for a random start.
      tuning: steps and learning rate of fine-tuning.
    """

    config: LlamaConfig | T5Config
    half: str
    steps: int
    batch_size: int
    learning_rate: float
    start: str = ""
    tuning: tuple[int, float] = (300, 1e-3)


def shape(width: int, depth: int, heads: int, shared: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        VOCABULARY, width, hidden, depth, heads, shared, 16, tie_word_embeddings=True, max_position_embeddings=LENGTH
    )


def t5_shape(width: int, heads: int, encoder: int, decoder: int) -> T5Config:
    return T5Config(VOCABULARY, width, 16, 2 * width, encoder, decoder, heads)


SMALL = shape(64, 4, 4, 2, 128)
# Transformers wants the width of a model named Llama to be a multiple of its heads, and of a Mistral not.
LARGE = dataclasses.replace(shape(80, 6, 6, 3, 160), model_type="mistral")
RECIPES = {
    "llama-A": Recipe(SMALL, "source", 1500, 64, 3e-3),
    "llama-B": Recipe(LARGE, "target", 1500, 32, 2e-3),
    "llama-C": Recipe(SMALL, "target", 400, 32, 1e-3, start="llama-A"),
    "t5-A": Recipe(t5_shape(40, 2, 2, 1), "source", 1500, 64, 3e-3, tuning=(600, 3e-3)),
    "t5-B": Recipe(t5_shape(48, 3, 2, 2), "target", 1500, 64, 3e-3, tuning=(600, 3e-3)),
}
SEEDS = {name: number for number, name in enumerate(RECIPES, start=1)}


# --- Pre-training ---


def windows(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> Batch:
    """Texts one after the other, cut into rows of equal length, each token with the one that follows."""
    tokens = np.concatenate([text.ids for text in tokenizer.encode_batch(joined(texts))]).astype(np.int32)
    rows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    known = np.broadcast_to(np.arange(LENGTH) < LENGTH - 1, rows.shape)
    return Batch({"tokens": rows}, {"tokens": np.roll(rows, -1, 1), "mask": known})


def pretraining_rows(name: str, tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> Batch:
    """What a model is pre-trained on."""
    if isinstance(RECIPES[name].config, LlamaConfig):
        return windows(tokenizer, texts)
    return corrupted(tokenizer, texts, SEEDS[name])


def corrupted(tokenizer: Tokenizer, texts: list[tuple[str, str]], seed: int) -> Batch:
    """Texts with a seventh of their tokens cut out, which the decoder is to say (Raffel et al. 2020), or the answer."""
    numbers = np.random.default_rng(seed)
    rows = np.zeros((len(texts), CUT), np.int32)
    wanted = np.zeros((len(texts), ANSWER), np.int32)
    asked = tokenizer.encode_batch([text for text, _ in texts])
    answers = tokenizer.encode_batch([answer for _, answer in texts])
    for number, (text, answer) in enumerate(zip(asked, answers, strict=True)):
        ids, said = text.ids[:CUT], answer.ids[1:]
        if not said:
            ids, said = with_gaps(ids, numbers)
        rows[number, : len(ids)] = ids
        wanted[number, : len(said) + 1] = [*said, END]
    mask = wanted != PAD
    inputs = {"tokens": rows, "mask": rows != PAD, "decoder_mask": mask}
    inputs["decoder_tokens"] = np.concatenate([np.full_like(wanted[:, :1], PAD), wanted[:, :-1]], 1)
    return Batch(inputs, {"tokens": wanted, "mask": mask})


def with_gaps(ids: list[int], numbers: np.random.Generator) -> tuple[list[int], list[int]]:
    """Tokens with gaps of up to three in each twenty, and what was there, each after the mark of its gap."""
    left, said = [], []
    for gap, start in enumerate(range(0, len(ids), 20)):
        part = ids[start : start + 20]
        cut = int(numbers.integers(0, max(1, len(part) - 3)))
        left += [*part[:cut], GAP + gap, *part[cut + 3 :]]
        said += [GAP + gap, *part[cut : cut + 3]]
    return left, said


def warm_adamw(steps: int, learning_rate: jax.Array) -> optax.GradientTransformation:
    """AdamW whose rate rises over the first fifteenth of the steps, then falls as a cosine."""
    share = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 15, steps)
    rate = lambda step: learning_rate * share(step)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.05))


def build(name: str, tokenizer: Tokenizer, rows: Batch, folder: Path, steps: float) -> float:
    """Pre-trains a model and saves it as a Hugging Face folder, in place of what is there; returns its last loss."""
    recipe, seed = RECIPES[name], SEEDS[name]
    family = family_of_config(recipe.config)
    params = family.init(recipe.config, jax.random.key(seed))
    if recipe.start:
        params = float32(from_pretrained(folder.with_name(recipe.start)).params)
    count = max(15, int(recipe.steps * steps))
    loss = NEXT_TOKEN if isinstance(recipe.config, LlamaConfig) else SEQUENCE_TO_SEQUENCE
    model = family.build(recipe.config, params).with_loss(loss)
    trained = fine_tune(
        model, rows, steps=count, batch_size=recipe.batch_size, learning_rates=(recipe.learning_rate,),
        optimiser=partial(warm_adamw, count), key=jax.random.key(10 + seed),
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_tokenizer(tokenizer, folder, LENGTH)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), trained.params)
    settings = recipe.config.to_dict() | {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": START}
    save_pretrained(Pretrained(family.build(recipe.config, half), recipe.config, name, settings=settings), folder)
    return float(trained.losses[-50:].mean())


# --- Fine-tuning ---


def decaying_adam(steps: int, learning_rate: jax.Array) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


def batch_of(task: Task, name: str, texts: list[tuple[str, str]]) -> Batch:
    """All texts as one batch."""
    words, read = TASKS[name].words, [(text,) for text, _ in texts].__getitem__
    labels = np.array([words.index(word) for _, word in texts], np.int32)
    (batch,) = task.batches(Texts(name, range(len(texts)), read, labels, words, (), ("text",)), len(texts))
    return batch


def percent(model: Model, batch: Batch) -> float:
    return round(100 * accuracy(model, by_length(batch)).fraction, 2)


def tune(name: str, folder: Path, found: Extract) -> dict[str, dict[str, float]]:
    """Fine-tunes a model on every task and saves the task vectors; returns accuracies."""
    saved, (steps, learning_rate) = from_pretrained(folder), RECIPES[name].tuning
    shutil.rmtree(folder / "task_vectors", ignore_errors=True)
    (folder / "task_vectors").mkdir()
    table = {}
    for task in TASKS:
        model, asked = ask(name, task)
        test = batch_of(asked, task, found.parts[task]["test"])
        short, *_ = by_length(batch_of(asked, task, found.parts[task][RECIPES[name].half]))  # to save time
        tuned = fine_tune(
            model, short, steps=steps, batch_size=32,
            learning_rates=(learning_rate,), optimiser=partial(decaying_adam, steps), trainable=QUICK.trainable,
            key=jax.random.key(200 + SEEDS[name]),
        )  # fmt: skip
        tau = on_grid(task_vector(model.params, tuned.params))
        metadata = {**saved.identity(), "base_model": f"tvjax/demo_language/{name}", "task": task}
        save_tree(folder / "task_vectors" / f"{task}.safetensors", trained_leaves(tau), metadata, jnp.float16)
        after = percent(model.replace(params=apply(model.params, tau)), test)
        table[task] = {"zero_shot": percent(model, test), "fine_tuned": after}
        print(f"  {task}: {table[task]}", flush=True)
    return table


def trained_leaves(tau: PyTree) -> PyTree:
    """A task vector without what is not trained: token embeddings, which are the head too, and position biases."""
    leaves = tree.flatten(tau)
    patterns = QUICK.trainable
    return tree.nest({path: x for path, x in leaves.items() if any(fnmatch(path, pattern) for pattern in patterns)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=LANGUAGE_MODELS, default=LANGUAGE_MODELS)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/tvjax_texts"), help="where the packages are kept")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of pre-training")
    parser.add_argument("--fine-tune-only", action="store_true", help="keep the pre-trained models of the folder")
    parser.add_argument("--results", type=Path, default=Path("results/build_language_models.json"))
    options = parser.parse_args()

    began = time.time()
    found = extract(options.cache)
    write(found, options.cache, TEXTS)
    texts = {half: documents(found, half) for half in HALVES}
    tokenizer = train_tokenizer([text for half in HALVES for text in joined(texts[half])])
    record = json.loads(options.results.read_text()) if options.results.is_file() else {"models": {}}
    for name in options.models:
        folder, half = model_folder(name), RECIPES[name].half
        made: dict[str, object] = record["models"].get(name, {})
        if not options.fine_tune_only:
            rows = pretraining_rows(name, tokenizer, texts[half])
            made["loss"] = round(build(name, tokenizer, rows, folder, options.share), 4)
            print(f"{name}: loss {made['loss']} ({time.time() - began:.0f} s)", flush=True)
        made["accuracy"] = tune(name, folder, found)
        made["fingerprint"] = fingerprint(from_pretrained(folder).params)
        print(f"{name}: done ({time.time() - began:.0f} s)", flush=True)
        record["models"][name] = made
        record |= about(found, texts)
        options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def about(found: Extract, texts: dict[str, list[tuple[str, str]]]) -> dict[str, object]:
    """What the models are trained on, and what ships."""
    shipped = {file: file.read_bytes() for file in sorted(LANGUAGE_FOLDER.rglob("*")) if file.is_file()}
    return {
        "texts": {task: {part: len(texts) for part, texts in parts.items()} for task, parts in found.parts.items()},
        "told": {half: {task: len(texts) for task, texts in found.told[half].items()} for half in HALVES},
        "documents": {half: len(texts[half]) for half in HALVES},
        "files": {
            file.relative_to(TEXTS).as_posix(): hashlib.sha256(content).hexdigest()
            for file, content in shipped.items()
            if TEXTS in file.parents
        },
        "packages": {name: {"file": file, "sha256": digest} for name, (_, file, digest) in PACKAGES.items()},
        "megabytes": round(sum(map(len, shipped.values())) / 1e6, 2),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    main()
