"""Partners of the tokens of two models, where each class of an example is a text of its own."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tvjax import tasks
from tvjax.data import Encoder, Texts
from tvjax.jobs.matching import cut_alike, overlap_shapes, overlaps_of


def encoder(by_letter):
    words = ["<unk>", "?", "good", "bad", "go", "so", *"?goodbads"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated") if by_letter else pre_tokenizers.Whitespace()
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), length=32, shortest=1)


def test_words_of_several_tokens_have_partners_of_their_own_class_behind_the_text():
    """A tokenizer of words cuts "go od" in two, one of letters in five with the space."""
    texts = Texts("t", range(2), [("so", "bad"), ("bad", "so")].__getitem__, columns=("one", "two"))
    batches = []
    for by_letter in (False, True):
        task = tasks.label_words(encoder(by_letter).of_spans, [" go od", " bad so"], "{one} {two}")
        batches += list(task.batches(texts, 2))
    a, b = batches
    assert not cut_alike(a, b) and a.inputs["tokens"].shape[:2] == b.inputs["tokens"].shape[:2] == (2, 2)
    found, (texts_a, texts_b) = overlaps_of(a, b)["mask"], (side.inputs["mask"].sum(-1) for side in (a, b))
    assert found.shape == overlap_shapes(a, b)["mask"]
    assert texts_a.tolist() == [[3, 3], [3, 3]] and texts_b.tolist() == [[6 + 5, 6 + 6]] * 2
    blocks = found.reshape(2, 2, -1, 2, a.inputs["tokens"].shape[2])
    for one in (0, 1):
        assert not blocks[:, one, :, 1 - one].any()  # none of the other class
        prompt, word = blocks[:, one, :6, one], blocks[:, one, 6 : 6 + 4, one]
        np.testing.assert_allclose(prompt[..., :2].sum(-1), prompt.sum(-1))
        np.testing.assert_allclose(word[..., 2:].sum(-1), word.sum(-1))
        assert word.any() and prompt.any()
