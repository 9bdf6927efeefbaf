"""Trains the embedded models of the demo: tiny CLIPs on handwritten digits, and a task vector for each task.

    python scripts/build_demo_models.py

Everything is drawn from fixed seeds. The folders of ``tvjax/demo_models`` are replaced; the table of accuracies on test
images goes to ``results/build_demo_models.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rounding import on_grid
from tvjax.arithmetic import apply, task_vector
from tvjax.checkpoints import Pretrained, fingerprint, from_pretrained, load_processor, save_pretrained, save_tree
from tvjax.data import digits
from tvjax.data.batches import split
from tvjax.data.embedded import FOLDER, MODELS, TASKS
from tvjax.evaluate.accuracy import accuracy
from tvjax.evaluate.fine_tune import fine_tune
from tvjax.models.clip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.clip.modeling import clip, init, text_model, vision_model
from tvjax.stages import Batch, PyTree
from tvjax.tasks.zero_shot import normalise, zero_shot_model

CAPTIONS = [template.format(name) for name in digits.CLASS_NAMES for template in digits.TEMPLATES]
LENGTH = 12  # tokens of the longest caption, with its start and its end
SHAPES = {  # width, depth, heads of the vision tower; the half of the data
    "A": (48, 4, 4, "source"),
    "B": (48, 4, 4, "target"),
    "W": (72, 4, 6, "target"),
    "D": (48, 6, 4, "target"),
}
# What transport reaches: no class token, positions or patch kernel.
TRAINED = ("vision/blocks/*", "vision/*_norm/*", "vision/projection/*")


# --- Tokenizer: byte-level byte-pair encoding as CLIP's, its merges learned from the captions ---


def byte_characters() -> list[str]:
    """One printable character for each byte, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Merges of the most frequent pair, first in the alphabet where several are, until every word is one token."""
    words = Counter(word for text in texts for word in text.split())
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while pairs := Counter({p: 0 for s in spelled.values() for p in zip(s, s[1:], strict=False)}):
        for word, symbols in spelled.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += words[word]
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((first, second))
        for symbols in spelled.values():
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == (first, second):
                    symbols[i : i + 2] = [first + second]
                i += 1
    return merges


def write_processors(folder: Path) -> int:
    """Writes tokenizer and image processor files; returns the number of tokens."""
    characters, merges = byte_characters(), learn_merges(CAPTIONS)
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n", encoding="utf-8"
    )
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special},
    )
    size = digits.SIZE
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [digits.PIXEL_MEAN] * 3,
            "image_std": [digits.PIXEL_STD] * 3,
            "do_convert_rgb": True,
        },
    )
    return len(tokens)


# --- Pre-training ---


def shape(name: str, tokens: int) -> CLIPConfig:
    width, depth, heads, _ = SHAPES[name]
    return CLIPConfig(
        CLIPVisionConfig(width, 4 * width, depth, heads, image_size=digits.SIZE, patch_size=4, projection_dim=32),
        CLIPTextConfig(
            tokens, 32, 128, 2, 2, max_position_embeddings=LENGTH, eos_token_id=tokens - 1, projection_dim=32
        ),
        logit_scale_init_value=float(np.log(10.0)),
    )


def settings(config: CLIPConfig) -> dict[str, Any]:
    """The ``config.json``, with the ids of the special tokens."""
    content = config.to_dict()
    end = config.text.eos_token_id
    content["text_config"] |= {"bos_token_id": end - 1, "pad_token_id": end}
    return content


def contrastive_loss(params: PyTree, config: CLIPConfig, captions: PyTree, batch: Batch, key: jax.Array) -> jax.Array:
    """CLIP's loss on images with a random caption each; pairs of one digit are positive (UniCL, Yang et al. 2022)."""
    model = clip(config, params)
    image = normalise(vision_model(model)(batch.inputs)["image"])
    texts = normalise(text_model(model)(captions)["text"])
    template = jax.random.randint(key, batch.labels.shape, 0, len(digits.TEMPLATES))
    text = texts[batch.labels * len(digits.TEMPLATES) + template]
    logits = jnp.exp(params["logit_scale"]) * image @ text.T
    same = (batch.labels[:, None] == batch.labels).astype(jnp.float32)
    target = same / same.sum(1, keepdims=True)
    losses = [optax.softmax_cross_entropy(scores, target).mean() for scores in (logits, logits.T)]
    return (losses[0] + losses[1]) / 2


@partial(jax.jit, static_argnums=(0, 1))
def pretrain(config: CLIPConfig, steps: int, captions: PyTree, photos: Batch, key: jax.Array) -> PyTree:
    """Parameters after `steps` steps of AdamW on batches of 128."""
    start, order = jax.random.split(key)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 15, steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    params = init(config, start)

    def step(carry: PyTree, step_key: jax.Array) -> tuple[PyTree, None]:
        params, state = carry
        choice, caption = jax.random.split(step_key)
        chosen = jax.random.randint(choice, (128,), 0, photos.labels.shape[0])
        batch = jax.tree.map(lambda leaf: leaf[chosen], photos)
        gradient = jax.grad(contrastive_loss)(params, config, captions, batch, caption)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(order, steps))
    return params


def build(name: str, half: digits.Digits, folder: Path, steps: int) -> None:
    """Pre-trains a model and saves it as a Hugging Face folder, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = shape(name, write_processors(folder))
    captions = dataclasses.replace(load_processor(folder), length=LENGTH).tokens(CAPTIONS)
    index = MODELS.index(name)
    photos = digits.photograph(half, digits.BASE, jax.random.key(index), repeats=20)
    params = pretrain(config, steps, captions, photos, jax.random.key(10 + index))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    save_pretrained(Pretrained(clip(config, params), config, name, settings=settings(config)), folder)


# --- Fine-tuning ---


def decaying_adam(steps: int, learning_rate: jax.Array) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


def percent(model: object, batch: Batch) -> float:
    return round(100 * accuracy(model, split(batch, 500)).fraction, 2)


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tasks", nargs="+", choices=list(digits.STYLES), default=TASKS)
    parser.add_argument("--steps", type=int, default=1200, help="of pre-training")
    parser.add_argument("--fine-tuning-steps", type=int, default=400)
    parser.add_argument("--fine-tune-only", action="store_true", help="keep the pre-trained models of the folder")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--results", type=Path, default=Path("results/build_demo_models.json"))
    options = parser.parse_args()

    began = time.time()
    parts = digits.load_splits()
    styles = {"base": digits.BASE, **{task: digits.STYLES[task] for task in options.tasks}}
    test = {
        name: digits.photograph(parts["test"], style, jax.random.key(1000 + i), repeats=2)
        for i, (name, style) in enumerate(styles.items())
    }
    optimiser = partial(decaying_adam, options.fine_tuning_steps)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.models:
        index = MODELS.index(name)
        half = parts[SHAPES[name][3]]
        folder = options.folder / name
        if not options.fine_tune_only:
            build(name, half, folder, options.steps)
        tokenize = load_processor(folder).tokens
        saved = from_pretrained(folder)
        head = (tokenize, digits.CLASS_NAMES, digits.TEMPLATES)
        model = zero_shot_model(saved.model, *head)
        shutil.rmtree(folder / "task_vectors", ignore_errors=True)
        (folder / "task_vectors").mkdir()
        table[name] = {style: {"zero_shot": percent(model, batch)} for style, batch in test.items()}
        print(f"{name}: base {table[name]['base']['zero_shot']} % ({time.time() - began:.0f} s)", flush=True)
        for task in options.tasks:
            photos = digits.photograph(half, styles[task], jax.random.key(100 + index), repeats=12)
            tuned = fine_tune(
                model, photos, steps=options.fine_tuning_steps, batch_size=64, learning_rates=(1e-3,),
                optimiser=optimiser, trainable=TRAINED, key=jax.random.key(200 + index),
            )  # fmt: skip
            tau = on_grid(task_vector(model.params, tuned.params))
            metadata = {**saved.identity(), "base_model": f"tvjax/demo_models/{name}", "task": task}
            save_tree(folder / "task_vectors" / f"{task}.safetensors", tau, metadata, jnp.float16)
            table[name][task]["fine_tuned"] = percent(model.replace(params=apply(model.params, tau)), test[task])
            print(f"  {task}: {table[name][task]} ({time.time() - began:.0f} s)", flush=True)

    files = [file for file in options.folder.rglob("*") if file.suffix in (".safetensors", ".json", ".txt")]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.results,
        {
            "accuracy": table,
            "test_photographs": {name: len(batch.labels) for name, batch in test.items()},
            "splits": {name: digits.fingerprint(part) for name, part in parts.items()},
            "fingerprints": {
                name: fingerprint(from_pretrained(options.folder / name).params) for name in options.models
            },
            "settings": {
                "steps": options.steps,
                "fine_tuning_steps": options.fine_tuning_steps,
                "fine_tune_only": options.fine_tune_only,
            },
            "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 2),
            "seconds": round(time.time() - began),
            "jax": jax.__version__,
        },
    )


if __name__ == "__main__":
    main()
