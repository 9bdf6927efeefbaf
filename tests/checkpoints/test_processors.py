"""Tokenizers and image processors of transformers in tvjax's layout."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tvjax.checkpoints import Processor, load_processor
from tvjax.checkpoints.processors import _import_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = _import_transformers()
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, "a": 3, "digit": 4, "</s>": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("<s>", 2), ("</s>", 5)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    folder = tmp_path_factory.mktemp("model")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    size = {"height": 8, "width": 8}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size).save_pretrained(folder)
    text = {"max_position_embeddings": 6, "vocab_size": 6, "eos_token_id": 5}
    settings = {"model_type": "clip", "text_config": text}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_tokens(folder):
    inputs = load_processor(folder).tokens(["a digit", "a digit a digit a digit", "b"])
    assert inputs["tokens"].dtype == np.int32 and inputs["mask"].dtype == bool
    assert inputs["tokens"].tolist() == [[2, 3, 4, 5, 0, 0], [2, 3, 4, 3, 4, 5], [2, 1, 5, 0, 0, 0]]
    assert inputs["mask"].sum(1).tolist() == [4, 6, 3]


def with_text_config(folder, target, **text):
    shutil.copytree(folder, target)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] = text
    (target / "config.json").write_text(json.dumps(settings))
    return load_processor(target)


def test_a_tokenizer_of_more_tokens_than_embeddings_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="knows 6 tokens, but the model has embeddings for 5"):
        with_text_config(folder, tmp_path / "fewer", vocab_size=5, eos_token_id=5, max_position_embeddings=6).tokens(
            ["a"]
        )  # none of which is out of the table
    assert with_text_config(folder, tmp_path / "more", vocab_size=8, eos_token_id=5, max_position_embeddings=6).tokens(
        ["a"]
    )["tokens"].shape == (1, 6)


def test_texts_without_the_end_token_of_the_config_are_refused(folder, tmp_path):
    absent = with_text_config(folder, tmp_path / "absent", max_position_embeddings=6)  # CLIP's own are meant
    message = r"2 of 2 texts \('a digit', ...\) lack the token 49407 .*'s is 5 \('</s>'\)"
    with pytest.raises(ValueError, match=message):
        absent.tokens(["a digit", "a"])
    padding = with_text_config(folder, tmp_path / "padding", eos_token_id=0, max_position_embeddings=6)
    with pytest.raises(ValueError, match=r"1 of 2 texts \('digit a digit a'"):
        padding.tokens(["a", "digit a digit a"])
    legacy = with_text_config(folder, tmp_path / "legacy", eos_token_id=2, max_position_embeddings=6)
    assert legacy.tokens(["a"])["tokens"].tolist() == [[2, 3, 5, 0, 0, 0]]


def test_pixels_are_channels_last(folder):
    processor = load_processor(folder)
    image = np.zeros((8, 8, 3), np.uint8)
    image[2, 5] = (255, 0, 51)
    pixels = processor.pixels([image, Image.fromarray(image), Image.fromarray(image).convert("RGBA")])
    mean, std = np.float32(processor.image_processor.image_mean), np.float32(processor.image_processor.image_std)
    assert pixels.shape == (3, 8, 8, 3) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    np.testing.assert_allclose(pixels[0], (image / np.float32(255) - mean) / std, atol=1e-6)
    np.testing.assert_array_equal(pixels[0], pixels[1])
    np.testing.assert_array_equal(pixels[0], pixels[2])


def test_larger_images_are_resized_and_cropped(folder):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8))
    assert load_processor(folder).pixels([image]).shape == (1, 8, 8, 3)


def test_parts_that_a_folder_lacks(tmp_path):
    processor = load_processor(tmp_path)
    assert processor == Processor()
    with pytest.raises(ValueError, match="no preprocessor_config.json: copy"):
        processor.pixels([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(ValueError, match="neither tokenizer.json nor vocab.json: copy"):
        processor.tokens(["a"])


def test_a_text_that_has_no_tokens_is_named(folder):
    with pytest.raises(ValueError, match="the tokenizer makes no token of ' ': give a name or text of letters"):
        load_processor(folder).tokens(["a digit", " "])
