"""Partners of tokens by the characters that they cover."""

import numpy as np
import pytest

from tests.data.test_texts import words
from tvjax.data import Encoder, Spans, token_overlap
from tvjax.data.spans import decoded


def cut(lengths, width):
    """A text of tokens of these lengths, between an opening and a closing token, padded to a width."""
    ends = np.cumsum(lengths)
    start, end = (np.zeros((1, width), int) for _ in range(2))
    start[0, 1 : len(lengths) + 1], end[0, 1 : len(lengths) + 1] = ends - lengths, ends
    role, mask = np.zeros((1, width), int), np.arange(width)[None] < len(lengths) + 2
    role[0, [0, len(lengths) + 1]] = 1, 2
    return Spans(start, end, mask, role)


def drawn(seed, characters=12):
    """Two cuts of one text."""
    rng = np.random.default_rng(seed)
    places = [np.sort(rng.choice(np.arange(1, characters), size, replace=False)) for size in rng.integers(1, 9, 2)]
    return [np.diff([0, *some, characters]) for some in places]


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_means_of_what_overlaps(seed):
    one, other = drawn(seed)
    (operator,) = token_overlap(cut(one, 14), cut(other, 13))
    np.testing.assert_allclose(operator.sum(1), np.arange(13) < len(other) + 2, atol=1e-6)
    letters = [np.repeat(np.arange(len(lengths)), lengths) for lengths in (one, other)]
    shared = np.zeros((len(other), len(one)))
    np.add.at(shared, (letters[1], letters[0]), 1)
    expected = shared / shared.sum(1, keepdims=True)
    np.testing.assert_allclose(operator[1 : len(other) + 1, 1 : len(one) + 1], expected, atol=1e-6)
    assert operator[0, 0] == operator[len(other) + 1, len(one) + 1] == 1


@pytest.mark.parametrize("seed", range(4))
def test_padding_never_matters(seed):
    one, other = drawn(seed)
    (short,), (long,) = (token_overlap(cut(one, 14 + more), cut(other, 14 + more)) for more in (0, 5))
    np.testing.assert_array_equal(long[:14, :14], short)
    assert not long[14:].any() and not long[:, 14:].any()


def test_the_order_of_texts_is_theirs():
    sides = [[cut(lengths, 14) for lengths in pair] for pair in zip(*(drawn(seed) for seed in range(3)), strict=True)]
    joined = [Spans(*(np.concatenate(x) for x in zip(*(s[:4] for s in side), strict=True))) for side in sides]
    turned = [Spans(*(x[::-1] for x in side[:4])) for side in joined]
    np.testing.assert_array_equal(token_overlap(*turned), token_overlap(*joined)[::-1])


def test_tokenizers_that_cut_alike_give_the_identity():
    # " é" of two tokens, the letter of two bytes; two closing tokens in a row; a token that covers nothing
    start, end = np.array([[0, 0, 4, 5, 6, 6, 0, 0, 0]]), np.array([[0, 4, 6, 6, 9, 9, 0, 0, 0]])
    role, mask = np.array([[1, 0, 0, 0, 0, 0, 2, 2, 3]]), np.ones((1, 9), bool)
    spans = Spans(start, end, mask, role)
    np.testing.assert_array_equal(token_overlap(spans, spans)[0], np.eye(9))


def test_tokens_of_the_same_characters_share_them():
    letter = Spans(np.array([[0]]), np.array([[1]]), np.ones((1, 1), bool))
    three = Spans(np.zeros((1, 3), int), np.ones((1, 3), int), np.ones((1, 3), bool))
    np.testing.assert_allclose(token_overlap(three, letter)[0], [[1 / 3] * 3])
    np.testing.assert_allclose(token_overlap(letter, three)[0], [[1]] * 3)


def test_a_token_without_a_partner_has_a_row_of_zeros():
    (operator,) = token_overlap(cut([2], 3), Spans(*(x[:, 1:] for x in cut([2, 3], 4)[:4])))
    np.testing.assert_array_equal(operator, [[0, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_the_special_tokens_of_pairs_have_places():
    bert = Encoder(words(("?", "[C]", "[S]", "a", "bc"), cls_token="[C]", sep_token="[S]"), shortest=7)
    letters = Encoder(words(("?", "<s>", "</s>"), letters=True, cls_token="<s>", sep_token="</s>"), shortest=8)
    mine, theirs = (encoder.spans(["a bc"], ["bc"]) for encoder in (bert, letters))
    assert mine.role[0].tolist() == [1, 0, 0, 2, 0, 2, 0] and mine.part[0].tolist() == [0, 0, 0, 1, 1, 2, 0]
    (operator,) = token_overlap(theirs, mine)  # <s> a _ b c </s> b c </s>
    found = [np.flatnonzero(row).tolist() for row in operator]
    assert found == [[0], [1], [3, 4], [5], [6, 7], [8], []]
    (back,) = token_overlap(mine, theirs)
    assert not back[2].any()  # the space is no token of the other
    assert np.flatnonzero(back.any(1)).tolist() == [0, 1, 3, 4, 5, 6, 7, 8]


def test_spans_are_those_of_the_tokens():
    encoder = Encoder(words(("?", "[C]", "[S]", "a", "bc"), cls_token="[C]", sep_token="[S]"), length=4, shortest=2)
    texts = ["a  bc", "a a a a a"]
    spans, tokens = encoder.spans(texts), encoder(texts)
    np.testing.assert_array_equal(spans.mask, tokens.mask)
    assert spans.start.tolist() == [[0, 0, 3, 0], [0, 0, 2, 0]] and spans.end.tolist() == [[0, 1, 5, 0], [0, 1, 3, 0]]
    far = decoded(np.array([[(2**20 - 1) << 10 | 1023, 1 << 30 | 5 << 10 | 2]]), np.ones((1, 2), bool))
    assert far.start.tolist() == [[2**20 - 1, 5]] and far.end.tolist() == [[2**20 + 1022, 7]]
    assert far.part.tolist() == [[0, 1]]


def test_bad_spans_are_named():
    fine = cut([2, 1], 5)
    with pytest.raises(ValueError, match=r"spans of B: found arrays of shapes .*expected one \[texts, tokens\]"):
        token_overlap(fine, fine._replace(role=np.zeros(5, int)))
    with pytest.raises(ValueError, match="found spans of 1 texts for A and 2 for B"):
        token_overlap(fine, Spans(*(np.concatenate([x, x]) for x in fine[:4])))
    with pytest.raises(ValueError, match="does not say which characters its tokens cover: give a fast one"):
        Encoder(lambda texts: {}).spans(["a"])
