"""Texts of files and datasets: columns, classes, what is broken; and batches of their tokens."""

import json

import jax
import numpy as np
import pytest

from tvjax.data import Encoder, Images, Texts, open_examples, read_text_file
from tvjax.data.batches import few_shot

ROWS = [("it rains, a lot", "it is wet", "yes"), ('he said "no"', "he\nspoke", "yes"), ("a", "b", "no")]


def letters(texts, pairs=None):
    ids = [[ord(letter) for letter in text] for text in texts]
    if pairs is not None:
        ids = [one + [1] + [ord(letter) for letter in other] for one, other in zip(ids, pairs, strict=True)]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


@pytest.fixture
def places(tmp_path):
    """The same three pairs in every kind of file, and as a dataset of texts and one of numbers."""
    import csv

    import datasets

    names = ("premise", "hypothesis", "gold")
    for ending, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"rows.{ending}", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([names, *ROWS])
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = {name: [row[place] for row in ROWS] for place, name in enumerate(names)}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "names")
    columns["gold"] = [1, 1, 0]
    numbered = datasets.Dataset.from_dict(columns).cast_column("gold", datasets.ClassLabel(names=["no", "yes"]))
    numbered.save_to_disk(tmp_path / "numbers")
    files = [f"{tmp_path}/rows.{ending}" for ending in ("csv", "tsv", "jsonl")]
    return [*files, f"hf:{tmp_path}/names", f"hf:{tmp_path}/numbers"]


def test_every_place_gives_the_same_texts(places):
    found = [open_examples(f"{place}?text=premise,hypothesis&label=gold", ["no", "yes"]) for place in places]
    for texts in found:
        assert isinstance(texts, Texts) and list(texts) == [{"premise": a, "hypothesis": b} for a, b, _ in ROWS]
        assert texts.labels.tolist() == [1, 1, 0] and texts.class_names == ("no", "yes")
        assert texts.sha256() == found[0].sha256()
    half, rest = (open_examples(f"{places[0]}?text=premise&label=gold&part={part}") for part in ("0:0.5", "0.5:1"))
    assert sorted([*half, *rest], key=str) == sorted(({"premise": row[0]} for row in ROWS), key=str)


def test_texts_are_drawn_by_labels_before_any_is_read():
    read = []

    def read_one(key):
        read.append(key)
        return (f"text {key}",)

    texts = Texts("many", range(1000), read_one, np.arange(1000) % 2, ("even", "odd"), columns=("text",))

    few = texts.take(few_shot(texts.labels, 2, jax.random.key(0)))
    assert not read and len(few) == 4 and few.labels.tolist() == [0, 0, 1, 1]
    assert few[3] == {"text": f"text {few.keys[3]}"} and read == [few.keys[3]]


def test_the_identity_of_texts_is_that_of_their_columns():
    def of(*values):
        return Texts("x", [0], lambda _: values, columns=tuple("ab"[: len(values)])).sha256()

    assert len({of("one", "two"), of("onet", "wo"), of("two", "one"), of("onetwo")}) == 4


def test_lines_are_texts_and_signs_in_them_stay(tmp_path):
    (tmp_path / "lines.txt").write_bytes("\ufeffone\u2028still one\r\ntwo\x0b\n".encode())
    assert [one["text"] for one in open_examples(f"{tmp_path}/lines.txt")] == ["one\u2028still one", "two\x0b"]


def test_prompts_and_completions(tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "2 + 2 =", "completion": 4, "label": 0}\n')
    texts = open_examples(f"{tmp_path}/asked.jsonl")
    assert texts[0] == {"prompt": "2 + 2 =", "completion": "4"}
    assert texts.prompts == ("prompt",) and texts.completion == "completion" and texts.labels is None


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"one\ntwo \xff\n", {}, r"a.txt', line 2: the byte 0xff is no UTF-8"),
        ("a.csv", "text\none\ntw\u00f6\n".encode("latin-1"), {}, r"line 3: the byte 0xf6"),
        ("a.txt", b"one\n\nthree\n", {}, r"line 2 is empty"),
        ("a.txt", b"", {}, "has no texts"),
        ("a.jsonl", b'{"text": "x"}\n  \n', {}, r"line 2 is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', {}, r"line 2 is no JSON"),
        ("a.jsonl", b'["x"]\n', {}, r"line 1 holds a list, expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', {}, r"line 2: there is no column 'text', only txt"),
        ("a.jsonl", b'{"text": null}\n', {}, r"line 1: the column 'text' has None"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, r"line 1: the column 'text' has half of a surrogate pair"),
        ("a.csv", b"text,label\nx,0\n,1\n", {"class_names": "ab"}, r"line 3 has no text"),
        ("a.csv", b"text,label\nx,0\n\ny,1\n", {"class_names": "ab"}, r"line 3 is empty"),
        ("a.csv", b'text,label\n"x\ny",0\nz\n', {"class_names": "ab"}, r"line 4 has 1 values for the 2 columns"),
        ("a.csv", b'text,label\n"x"y,0\n', {}, r"line 2 is no row of a table"),
        ("a.csv", b"text,text\nx,0\n", {}, r"line 1 names a column twice"),
        (
            "a.csv",
            b"text,label\nx,0\ny,2\n",
            {"class_names": "ab"},
            r"line 3: the label 2 is no class, expected 0 to 1",
        ),
        ("a.csv", b"text,label\nx,-1\ny,1\n", {"class_names": "ab"}, r"line 2: the label -1 is no class"),
        (
            "a.csv",
            b"text,label\nx,a\ny,c\n",
            {"class_names": "ab"},
            r"line 3: the label 'c' is none of the classes a, b",
        ),
        ("a.csv", b"text,label\nx,a\ny,\n", {}, r"line 3: the label '' is neither"),
        ("a.csv", b"text,label\nx,0\n", {}, "numbers without names"),
        ("a.jsonl", b'{"text": "x", "label": 0.5}\n', {}, r"line 1: the label 0.5 is neither"),
        ("a.csv", b"text,gold\nx,0\n", {"label": "truth"}, r"line 2: there is no column 'truth', only text, gold"),
        ("a.csv", b"q,a\nx, \n", {"text": "q", "completion": "a"}, r"line 2 has nothing in the column 'a', the answer"),
    ],
)
def test_what_is_broken_is_said_with_file_and_line(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text_file(tmp_path / name, **options)


def test_files_and_columns_that_are_not_there(places, tmp_path):
    with pytest.raises(ValueError, match="there is no file .*nowhere.csv' of texts"):
        open_examples(f"{tmp_path}/nowhere.csv")
    with pytest.raises(ValueError, match=r"no column 'premiss'; its columns are premise, .*text=COLUMN"):
        open_examples(f"{places[-1]}?text=premiss")
    with pytest.raises(ValueError, match=r"no columns of images; .*text=COLUMN for texts"):
        open_examples(places[-1])
    with pytest.raises(ValueError, match="found 'txt=a', expected each of text=..., label=..., completion="):
        open_examples(f"{places[0]}?txt=a")


def test_rows_of_no_class_are_left_out_and_said(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for name, labels in (("some", [0, -1, 1]), ("none", [-1, -1, -1])):
        rows = {"text": ["a", "b", "c"], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
    some = open_examples(f"hf:{tmp_path}/some?text=text")
    assert [one["text"] for one in some] == ["a", "c"] and some.labels.tolist() == [0, 1]
    assert some.notes == ("1 rows have no class (-1) and were left out",)
    none = open_examples(f"hf:{tmp_path}/none?text=text")
    assert len(none) == 3 and none.labels is None and none.notes == ("3 rows have no class (-1)",)


def test_lengths_are_few_and_masks_are_the_tokenizers():
    encoder = Encoder(letters, length=20, shortest=4)
    widths = {encoder(["x" * count]).ids.shape[1] for count in range(1, 40)}
    assert widths == {4, 8, 16, 20}
    tokens = Encoder(lambda texts: {"input_ids": [[5, 0, 6, 0]], "attention_mask": [[1, 1, 1, 0]]}, shortest=4)(["x"])
    assert tokens.mask.tolist() == [[True, True, True, False]]  # the second token is real, though its id is 0
    pair = encoder(["a"], ["b"])
    assert pair.ids[0, :3].tolist() == [97, 1, 98] and pair.mask.sum() == 3


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda texts: {"input_ids": [[1]]}, "expected attention_mask among them"),
        (lambda texts: {"input_ids": [[1, 2]], "attention_mask": [[1]]}, "2 ids and a mask of 1"),
        (lambda texts: {"input_ids": [[]], "attention_mask": [[]]}, "the text 'x' has no tokens"),
    ],
)
def test_tokenizers_that_do_not_fit(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        Encoder(tokenizer)(["x"])
    with pytest.raises(ValueError, match="expected 1 token or more"):
        Encoder(tokenizer, length=0)


def test_a_tokenizer_of_transformers_keeps_its_closing_token_where_it_cuts():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.models.WordLevel({"[PAD]": 0, "[SEP]": 1, "a": 2, "b": 3, "[UNK]": 4}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", sep_token="[SEP]")
    tokens = Encoder(fast, length=4, shortest=2)(["a b", "a b a b a b"])
    assert tokens.ids.tolist() == [[2, 3, 1, 0], [2, 3, 2, 1]] and tokens.cut.tolist() == [False, True]
    assert tokens.mask.sum(1).tolist() == [3, 4]
    assert Encoder(fast, shortest=2)(["a"], ["b"]).ids.tolist() == [[2, 1, 3, 1]]


def words(vocabulary, letters=False, **roles):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(vocabulary)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if letters:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    first, last = roles["cls_token"], roles["sep_token"]
    ends = [(one, ids[one]) for one in (first, last)]
    pair = f"{first} $A {last} $B:1 {last}:1"
    inner.post_processor = tokenizers.processors.TemplateProcessing(f"{first} $A {last}", pair, ends)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=names, unk_token="?", **roles)


def test_tokenizers_that_cut_texts_alike_have_equal_spans_whatever_their_ids():
    one = Encoder(words(("?", "[C]", "[S]", "a", "bc"), cls_token="[C]", sep_token="[S]"), length=6, shortest=2)
    other = Encoder(words(("<s>", "</s>", "bc", "?"), cls_token="<s>", sep_token="</s>"), length=6, shortest=2)
    letters = Encoder(words(("?", "<s>", "</s>"), letters=True, cls_token="<s>", sep_token="</s>"), shortest=2)
    texts = ["a bc", "bc  a a bc a a a"]
    assert not np.array_equal(one(texts).ids, other(texts).ids)
    spans = one.of_spans(texts)
    np.testing.assert_array_equal(spans.ids, other.of_spans(texts).ids)
    np.testing.assert_array_equal(spans.mask, one(texts).mask)
    np.testing.assert_array_equal(spans.cut, [False, True])
    assert len(set(spans.ids[0].tolist())) == 5  # "[C]", "a", "bc", "[S]" and the padding
    assert not np.array_equal(letters.of_spans(texts).ids[:, :6], spans.ids)
    plain = Encoder(letters_of_a_callable)
    assert plain.of_spans is plain


def letters_of_a_callable(texts):
    return {"input_ids": [[1] for _ in texts], "attention_mask": [[1] for _ in texts]}


def test_the_texts_of_a_pair_have_types():
    encoder = Encoder(words(("?", "[C]", "[S]", "a"), cls_token="[C]", sep_token="[S]"), shortest=8)
    assert encoder(["a"]).types is None
    pair = encoder(["a a"], ["a"])
    assert pair.types.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]] and pair.mask.sum() == 6


def test_images_and_texts_are_two_kinds_of_one_thing():
    images = Images("same", range(2), lambda key: np.full((2, 2), key, np.uint8), np.array([0, 1]), ("a_b", "c"))
    texts = Texts("same", range(2), lambda key: (str(key),), np.array([0, 1]), ("a_b", "c"), columns=("text",))
    assert images.class_names == texts.class_names and images.notes == texts.notes
    assert texts.take([1])[0] == {"text": "1"} and images.take([1])[0].max() == 1
    for kind in (Images, Texts):
        with pytest.raises(ValueError, match=f"has no {kind.kind}"):
            kind("none", (), str)
