"""Losses and scores of tokens, and the tasks of language on hand-written models."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tvjax as tv
from tvjax import compose, tasks
from tvjax.data import Encoder, Images, Texts, open_examples
from tvjax.evaluate import accuracy, choose_scale, fine_tune, predict, predictions
from tvjax.models.chunked_loss import chunked
from tvjax.stages import Batch, Model, Stage, Stream, single_stage

WORDS = 128  # the tokens are letters


def letters(texts, pairs=None):
    """A tokenizer, any callable: 2, then a token a letter; 3 between the texts of a pair."""
    ids = [[2, *map(ord, text)] for text in texts]
    if pairs is not None:
        ids = [[*one, 3, *map(ord, other)] for one, other in zip(ids, pairs, strict=True)]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def embed(params, inputs):
    place = jnp.arange(inputs["tokens"].shape[1])
    hidden = params["words"][inputs["tokens"]] + params["places"][place]
    return {**inputs, "hidden": hidden}


def block(params, carry):
    x, mask = carry["hidden"], carry["mask"]
    normal = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"]
    q, k, v = (normal @ params[name] for name in ("query", "key", "value"))
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)) & mask[:, None, :]
    weights = jax.nn.softmax(jnp.where(causal, q @ k.swapaxes(1, 2), -1e9))
    x = x + weights @ v
    return {**carry, "hidden": x + jax.nn.gelu(x @ params["up"]) @ params["down"]}


def head(params, carry):
    return {"logits": carry["hidden"] @ params["kernel"], "mask": carry["mask"]}


def unmade(params, carry):
    return {"hidden": carry["hidden"], "unembedding": params["kernel"], "mask": carry["mask"]}


def weights(key, width):
    def normal(number, *shape):
        return jax.random.normal(jax.random.fold_in(key, number), shape) / shape[0] ** 0.5

    names = {name: (width, width) for name in ("query", "key", "value")} | {"up": (width, 2 * width)}
    names["down"] = (2 * width, width)
    blocks = {
        str(i): {"scale": jnp.ones(width)} | {n: normal(10 * i + j, *s) for j, (n, s) in enumerate(names.items())}
        for i in range(2)
    }
    embeddings = {"words": 3 * normal(91, WORDS, width), "places": normal(92, 64, width)}
    return {"embed": embeddings, "blocks": blocks, "head": {"kernel": normal(93, width, WORDS)}}


def causal_lm(width=8, seed=0, last=head):
    """As stages."""
    stream = Stream(mask="mask")
    stages = (
        Stage("embed", embed, (("", "embed"),), streams=stream),
        *(Stage(f"blocks/{i}", block, (("", f"blocks/{i}"),), "blocks", stream) for i in range(2)),
        Stage("head", last, (("", "head"),), streams=stream, fixed=("kernel",)),
    )
    return Model(weights(jax.random.key(seed), width), stages)


def whole(params, inputs):
    carry = embed(params["embed"], inputs)
    for i in range(2):
        carry = block(params["blocks"][str(i)], carry)
    return head(params["head"], carry)


def lossy(params, carry):
    losses, predicted, finite = chunked(carry["hidden"], params["kernel"], carry["wanted"], 5)
    return {"losses": losses, "predicted": predicted, "finite": finite, "mask": carry["mask"]}


@pytest.fixture(scope="module")
def lm():
    return causal_lm()


@pytest.fixture(scope="module")
def one_stage_lm(lm):
    return single_stage(whole, lm.params, streams=Stream(mask="mask"))


def translate(params, inputs):
    """An encoder and a decoder of one layer: the mean of the text is added to every token of the answer."""
    mask = inputs["mask"][..., None].astype(jnp.float32)
    text = (params["words"][inputs["tokens"]] * mask).sum(1) / mask.sum(1)
    hidden = params["words"][inputs["decoder_tokens"]] + text[:, None]
    return {"logits": hidden @ params["kernel"]}


@pytest.fixture(scope="module")
def translator():
    params = {"words": jax.random.normal(jax.random.key(1), (WORDS, 8))}
    return single_stage(translate, params | {"kernel": jax.random.normal(jax.random.key(2), (8, WORDS))})


ENCODER = Encoder(letters, length=16, shortest=4)
LINES = ("abc", "the cat sat", "ab", "to be or not to be")
ROWS = [row[:16] for row in letters(LINES)["input_ids"]]
QUESTIONS = [("is a", " yes"), ("is b c", " no")]


def lines(texts=LINES):
    return Texts("lines", range(len(texts)), lambda key: (texts[key],), columns=("text",))


def questions(rows=QUESTIONS):
    columns = ("prompt", "completion")
    return Texts("asked", range(len(rows)), rows.__getitem__, columns=columns, completion="completion")


def pairs():
    rows = [("a", "b"), ("c c", "d"), ("e", "ff")]
    return Texts("pairs", range(3), rows.__getitem__, np.array([0, 1, 0]), ("yes", "no"), columns=("one", "two"))


def logits_of(model, rows):
    """Of each row alone, without padding."""
    return [model({"tokens": jnp.array([row]), "mask": jnp.ones((1, len(row)), bool)})["logits"][0] for row in rows]


@pytest.fixture
def scored(key):
    logits = 3 * jax.random.normal(key, (3, 5, 7))
    tokens = jax.random.randint(jax.random.fold_in(key, 1), (3, 5), 0, 7)
    return logits, tokens, jnp.arange(5) < jnp.array([[5], [2], [3]])


def test_token_losses_accuracy_perplexity_and_exact_match(scored):
    logits, tokens, mask = scored
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    np.testing.assert_allclose(tasks.token_losses(*scored), np.where(mask, expected, 0), rtol=1e-5)
    np.testing.assert_allclose(tasks.perplexity(*scored), np.exp(np.mean(expected[mask])), rtol=1e-5)
    best = logits.argmax(-1)
    np.testing.assert_allclose(tasks.token_accuracy(*scored), np.mean((best == tokens)[mask]))
    right = best.at[1, 3].add(1)  # where nothing is asked
    assert tasks.exact_match(logits, right, mask).tolist() == [True, True, True]
    assert tasks.exact_match(logits, right.at[1, 1].add(1) % 7, mask).tolist() == [True, False, True]


@pytest.mark.parametrize("chunk", [1, 4, 15, 100])
def test_the_loss_in_chunks_is_the_plain_loss_with_its_gradient(key, scored, chunk):
    _, tokens, mask = scored
    hidden, kernel = jax.random.normal(key, (3, 5, 4)), jax.random.normal(jax.random.fold_in(key, 2), (4, 7))
    labels = {"tokens": tokens, "mask": mask}
    loss = tasks.TokenLoss("some", chunk)

    def whole(hidden, kernel):
        return loss(None, {"logits": hidden @ kernel}, labels)

    def in_chunks(hidden, kernel):
        return loss(None, {"hidden": hidden, "unembedding": kernel}, labels)

    chex.assert_trees_all_close(in_chunks(hidden, kernel), whole(hidden, kernel), rtol=1e-5)
    factors = jnp.array([1.0, -2.0, 3.0])
    plain, made = (
        jax.grad(lambda *given, one=one: factors @ one(*given), (0, 1))(hidden, kernel) for one in (whole, in_chunks)
    )
    chex.assert_trees_all_close(made, plain, atol=1e-5)
    judged = loss.judge(None, {"hidden": hidden, "unembedding": kernel}, labels)
    np.testing.assert_array_equal(judged.predicted, (hidden @ kernel).argmax(-1))


def test_the_loss_in_chunks_needs_no_memory_for_the_vocabulary():
    hidden, kernel = jnp.zeros((4, 256, 8)), jnp.zeros((8, 4096))
    labels = {"tokens": jnp.zeros((4, 256), jnp.int32), "mask": jnp.ones((4, 256), bool)}

    def bytes_of(outputs):
        grad = jax.jit(
            jax.grad(lambda h, k: tasks.TokenLoss("some", 32)(None, outputs(h, k), labels).sum(), argnums=(0, 1))
        )
        return grad.lower(hidden, kernel).compile().memory_analysis().temp_size_in_bytes

    whole = bytes_of(lambda h, k: {"logits": h @ k})
    assert bytes_of(lambda h, k: {"hidden": h, "unembedding": k}) < whole / 6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_causal_model_as_one_stage_as_stages_and_with_its_head_unmade(lm, one_stage_lm, size):
    task = tasks.next_token(ENCODER)
    models = [task.model(model) for model in (lm, one_stage_lm, causal_lm(last=unmade), causal_lm(last=lossy))]
    found = [task.score(model, task.batches(lines(), size)) for model in models]
    alone = logits_of(one_stage_lm, ROWS)
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(logits[:-1], jnp.array(row[1:]))
        for logits, row in zip(alone, ROWS, strict=True)
    ]
    for score in found:  # whatever the batch and its padding
        assert score.examples == 4 and score.answers == sum(len(row) - 1 for row in ROWS)
        np.testing.assert_allclose(score.loss, float(sum(map(jnp.sum, losses))), rtol=1e-5)
        assert score[:4] == found[0][:4]
    np.testing.assert_allclose(found[0].perplexity, np.exp(found[0].loss / found[0].answers))
    assert accuracy(models[0], task.batches(lines(), size)).fraction == found[0].accuracy


def test_texts_that_are_cut_are_counted_and_said(lm):
    batches = tasks.next_token(ENCODER).batches(lines(), 2)
    assert batches.notes == ()
    for _ in range(2):
        assert {batch.inputs["tokens"].shape[1] for batch in batches} == {16}
    assert batches.notes == ("1 of 4 texts are longer than the model takes, and were cut",)
    assert len(batches.whole().inputs["tokens"]) == 4
    uneven = tasks.next_token(ENCODER).batches(lines(), 1)
    assert {batch.inputs["tokens"].shape[1] for batch in uneven} == {4, 16}
    for one, other in zip(uneven.whole().inputs.values(), batches.whole().inputs.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_the_answer_is_scored():
    (batch,) = tasks.next_token(ENCODER).batches(questions(), 2)
    for row, (prompt, answer) in enumerate(QUESTIONS):
        mask, tokens = batch.labels["mask"][row], batch.labels["tokens"][row]
        assert "".join(map(chr, tokens[mask])) == answer
        places = np.flatnonzero(mask)
        assert places[0] == len(prompt)  # the last token of the prompt, behind the first of all
        np.testing.assert_array_equal(batch.inputs["tokens"][row, places[1:]], tokens[places[:-1]])


def test_answers_are_the_names_of_classes_where_there_is_no_other():
    template = "{one}+{two}: "
    (batch,) = tasks.next_token(ENCODER, template).batches(pairs(), 3)
    found = ["".join(map(chr, t[m])) for t, m in zip(batch.labels["tokens"], batch.labels["mask"], strict=True)]
    assert found == ["yes", "no", "yes"]


def test_label_words(lm, one_stage_lm):
    task = tasks.label_words(ENCODER, ["y", "n"], "{one}+{two}: ")
    batches = list(task.batches(pairs(), 2))
    model = task.model(lm)
    assert model.stages == lm.stages and batches[0].inputs["tokens"].ndim == 2
    rows = letters(["a+b: ", "c c+d: ", "e+ff: "])["input_ids"]
    alone = [logits[-1] for logits in logits_of(one_stage_lm, rows)]
    expected = [int(scores[ord("n")] > scores[ord("y")]) for scores in alone]
    for one in (model, task.model(causal_lm(last=unmade))):
        assert predictions(one, batches).predicted.tolist() == expected
        assert np.concatenate([predict(one, batch.inputs) for batch in batches]).tolist() == expected
    loss = model.loss(model.loss_params, model(batches[1].inputs), batches[1].labels)
    two = jnp.array([alone[2][ord("y")], alone[2][ord("n")]])
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(two)[:1], rtol=1e-4)


def said(logits, word, first):
    """The log-probability of a word whose first token is said at a place."""
    rows = jax.nn.log_softmax(logits[first : first + len(word)])
    return float(sum(row[ord(letter)] for row, letter in zip(rows, word, strict=True)))


SHARED = ["yes", "yet", "no"]  # words of several tokens, of which two begin alike


def named(count, rows=(("a", "b"), ("c c", "d"), ("e", "ff"))):
    labels = np.arange(len(rows)) % count
    names = tuple("abcd"[:count])
    return Texts("named", range(len(rows)), rows.__getitem__, labels, names, columns=("one", "two"))


def test_words_of_several_tokens_are_scored_as_a_whole(lm):
    task = tasks.label_words(ENCODER, SHARED, "{one}+{two}: ")
    batch = task.batches(named(3), 3).whole()
    prompts = ["a+b: ", "c c+d: ", "e+ff: "]
    tokens = ENCODER([prompt + word for prompt in prompts for word in SHARED])
    logits = iter(lm({"tokens": tokens.ids, "mask": tokens.mask})["logits"])
    expected = [[said(next(logits), word, len(prompt)) for word in SHARED] for prompt in prompts]
    losses = -jax.nn.log_softmax(jnp.array(expected))[jnp.arange(3), batch.labels]
    for last in (head, unmade, lossy):
        model = task.model(causal_lm(last=last))
        outputs = model(batch.inputs)
        np.testing.assert_allclose(model.loss.scores(model.loss_params, outputs), expected, rtol=1e-4)
        np.testing.assert_allclose(model.loss(model.loss_params, outputs, batch.labels), losses, rtol=1e-3)
    assert task.score(task.model(lm), batch).examples == 3


def test_words_of_several_tokens_said_by_a_decoder(translator):
    task = tasks.label_words(ENCODER, SHARED, "{one} {two}", start=1)
    (batch,) = task.batches(named(3), 3)
    model = task.model(translator)
    texts = letters(["a b", "c c d", "e ff"])["input_ids"]
    for found, text in zip(model.loss.scores(model.loss_params, model(batch.inputs)), texts, strict=True):
        for score, word in zip(found, SHARED, strict=True):
            given = {"tokens": [text], "mask": [[1] * len(text)], "decoder_tokens": [[1, *map(ord, word[:-1])]]}
            logits = translator(jax.tree.map(jnp.array, given, is_leaf=lambda x: isinstance(x, list)))["logits"][0]
            np.testing.assert_allclose(score, said(logits, word, 0), rtol=1e-4)


def test_what_closes_every_text_is_no_part_of_a_word():
    def closed(texts):
        rows = [[*map(ord, text), 4] for text in texts]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    for start in (None, 1):
        task = tasks.label_words(Encoder(closed), ["y", "no"], start=start)
        assert task.model(Model({}, ())).loss_params["words"].tolist() == [[ord("y"), 0], [ord("n"), ord("o")]]
        assert (
            tasks.label_words(Encoder(closed), ["y", "n"], start=start).model(Model({}, ())).loss_params["words"].ndim
            == 1
        )


def test_a_text_is_cut_so_that_a_word_fits_behind_it(lm):
    encoder = Encoder(letters, length=8, shortest=4)
    task = tasks.label_words(encoder, SHARED, "{one}{two}")
    batches = task.batches(named(3, [("abcdefgh", "i"), ("a", "b")]), 2)
    (batch,) = batches
    assert batch.inputs["tokens"].shape == (2, 3, 8) and len(batches.notes) == 1
    for row, (word, text) in enumerate((word, text) for text in ("abcde", "ab") for word in SHARED):
        one = {name: x.reshape(6, *x.shape[2:])[row] for name, x in batch.inputs.items()}
        assert [*one["tokens"][one["mask"]]] == [2, *map(ord, text + word[:-1])]
        assert one["wanted"][one["last"]] == ord(word[-1])
    assert task.score(task.model(lm), batch).examples == 2


def test_transport_with_gradients_of_words_of_several_tokens():
    task = tasks.label_words(ENCODER, SHARED, "{one}+{two}: ")
    model = task.model(causal_lm(8, 5, lossy))
    batch = next(iter(task.batches(named(3), 1)))
    tau = {"blocks": jax.tree.map(lambda leaf: jnp.ones_like(leaf), model.params["blocks"])}
    rebase = tv.chain(tv.bico(), tv.gradfix())
    moved = rebase.apply(tv.fit(rebase, model, model, [(batch, batch)]), tau)["blocks"]

    def loss(params):
        return model.loss(model.loss_params, model.replace(params=params)(batch.inputs), batch.labels).sum()

    gradient = jax.grad(loss)(model.params)["blocks"]
    for kept, slope in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        clear = jnp.abs(slope) > 1e-5 * jnp.abs(slope).max()
        assert jnp.abs(kept).max() > 0 and (kept * slope <= 0)[clear].all()  # masked by the votes of this loss


def test_label_words_have_the_tokens_that_they_have_within_a_text():
    """A tokenizer that begins every text with a space, as Llama's, joins it to that of a word at the beginning."""
    pieces: dict[str, int] = {}

    def tokenizer(texts):
        rows = [re.findall("__|_?[a-z]+|.", "_" + text.replace(" ", "_")) for text in texts]
        ids = [[pieces.setdefault(piece, len(pieces)) for piece in row] for row in rows]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    found = tasks.label_words(Encoder(tokenizer), [" yes", " no"]).model(Model({}, ())).loss_params["words"]
    assert found.tolist() == [pieces["_yes"], pieces["_no"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["yes", "no", "yesterday"], "'yesterday' begins with all tokens of 'yes'"),
        (["yes", "no", "yes"], "'yes' and 'yes' are the same tokens"),
        (["yes", ""], "'' has no token of its own"),
        (["yes"], "expected one for each of two classes or more"),
    ],
)
def test_words_that_tell_no_classes_apart(lm, words, message):
    with pytest.raises(ValueError, match=message):
        tasks.label_words(ENCODER, words).model(lm)


def test_sequence_to_sequence(translator):
    task = tasks.sequence_to_sequence(ENCODER, start=1)
    (batch,) = task.batches(questions(), 2)
    assert batch.inputs["decoder_tokens"][:, 0].tolist() == [1, 1]
    np.testing.assert_array_equal(batch.inputs["decoder_tokens"][:, 1:], batch.labels["tokens"][:, :-1])
    model = task.model(translator)
    score = task.score(model, batch)
    logits = translator(batch.inputs)["logits"]
    given = (logits, batch.labels["tokens"], batch.labels["mask"])
    np.testing.assert_allclose(score.perplexity, tasks.perplexity(*given), rtol=1e-5)
    np.testing.assert_allclose(score.accuracy, tasks.token_accuracy(*given), rtol=1e-6)
    tuned = fine_tune(model, batch, steps=200, key=jax.random.key(0), learning_rates=(3e-2,))
    after = task.score(model.replace(params=tuned.params), batch)
    assert after.exact_match == 1.0 > score.exact_match and after.perplexity < 1.5 < score.perplexity
    words = tasks.label_words(ENCODER, ["yes", "no"], "{one} {two}", start=1)
    assert words.score(words.model(translator), words.batches(pairs(), 2)).examples == 3
    with pytest.raises(ValueError, match="'lines' has no answers"):
        task.batches(lines(), 2)


def test_task_vectors_of_a_language_model_are_scaled_and_learned(lm):
    task = tasks.next_token(ENCODER)
    batch = task.batches(lines(), 2).whole()
    model = task.model(lm)
    tuned = fine_tune(model, batch, steps=60, key=jax.random.key(0), learning_rates=(1e-2,), validation=batch)
    chosen = choose_scale(model, tv.task_vector(lm.params, tuned.params), (0.0, 0.5, 1.0), batch)
    assert chosen.scale == 1.0 and chosen.curve[-1] > chosen.curve[0] + 0.3


@pytest.mark.parametrize("last", [head, lossy])
def test_transport_of_a_language_model_with_gradients_of_its_task(last):
    task = tasks.next_token(ENCODER)
    source, target = task.model(causal_lm(8, 0, last)), task.model(causal_lm(12, 5, last))
    batches = list(task.batches(lines(), 2))
    tau = {"blocks": jax.tree.map(lambda leaf: 0.01 * jnp.ones_like(leaf), source.params["blocks"])}
    pairs = [(batch, batch) for batch in batches]
    rebase = tv.chain(tv.bico(), tv.gradfix())
    moved = rebase.apply(tv.fit(rebase, source, target, pairs), tau)["blocks"]["0"]["query"]
    assert moved.shape == (12, 12) and np.abs(moved).max() > 0
    plain, other = task.model(causal_lm(8, 0)), task.model(causal_lm(12, 5))
    expected = rebase.apply(tv.fit(rebase, plain, other, pairs), tau)["blocks"]["0"]["query"]
    # however the head makes the loss, up to the directions that rounding decides
    assert np.linalg.norm(moved - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", dict.fromkeys((*tasks.GLUE, *tasks.NLI)))
def test_every_named_task_of_texts_on_a_small_file_of_its_columns(lm, tmp_path, name):
    known = tasks.find_task(name)
    words = dict(word.split("=") for word in known.train.partition("?")[2].split("&"))
    columns, answer = words["text"].split(","), "completion" if "completion" in words else "label"
    file = tmp_path / "rows.jsonl"
    values = [3.8, 0] if answer == "completion" else [0, len(known.words) - 1]
    rows = [{**{column: f"a {{{column}}}" for column in columns}, "label": value} for value in values]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = open_examples(f"{file}?text={words['text']}&{answer}=label", known.class_names or None)
    encoder, (template,) = Encoder(letters, length=256), known.templates
    if answer == "completion":
        task = tasks.next_token(encoder, template + " ")
        (batch,) = task.batches(texts, 2)
        assert [int(mask.sum()) for mask in batch.labels["mask"]] == [len("3.8"), len("0")]
    else:
        task = tasks.label_words(encoder, known.words, template)
        assert texts.labels.tolist() == values
    (batch,) = task.batches(texts, 2)
    assert "a {" in "".join(map(chr, batch.inputs["tokens"][0].ravel()))  # braces of a text stay
    assert task.score(task.model(lm), batch).examples == 2


def test_models_that_a_task_cannot_score_are_named_with_it(lm):
    inputs = {"tokens": jnp.ones((2, 4), jnp.int32), "mask": jnp.ones((2, 4), bool)}
    labels = {"tokens": inputs["tokens"], "mask": inputs["mask"]}
    classifier = Model({}, (Stage("head", lambda params, carry: {"logits": jnp.zeros((2, 3))}),))
    own = tasks.own_head(ENCODER)
    next_token = tasks.next_token(ENCODER)
    words = tasks.label_words(ENCODER, ["a", "b"])
    bare = Model({}, (Stage("head", lambda params, carry: {"logits": jnp.zeros((2, 4, WORDS))}),))
    for task, model, batch, message in (
        (own, lm, Batch(inputs, jnp.zeros(2, int)), r"logits \[2, 4, 128\].* own head.*label_words"),
        (own, lm, Batch(inputs, labels), "classification with the model's own head"),
        (next_token, classifier, Batch(inputs, labels), r"logits \[2, 3\], which the task 'next token' cannot score"),
        (next_token, lm, Batch(inputs, jnp.zeros(2, int)), "'next token' has labels of tokens, .* and not classes"),
        (words, classifier, Batch(inputs, jnp.zeros(2, int)), r"logits \[2, 3\], .* 'label words of a causal"),
        (words, bare, Batch(inputs, jnp.zeros(2, int)), "'label words of a causal language model' .* 'mask'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            task.score(task.model(model), batch)
    with pytest.raises(ValueError, match="'next token' has no one class for each example"):
        predict(next_token.model(lm), inputs)


def test_the_entropy_of_classes_is_not_that_of_tokens_and_their_padding(lm):
    task, words = tasks.next_token(ENCODER), tasks.label_words(ENCODER, ["yes", "no"], "{one}+{two}: ")
    model, batch = task.model(lm), next(iter(task.batches(lines(), 2)))
    refused = r"logits of shape \[2, 16, 128\], expected \[batch, classes\]: .*label_words"
    with pytest.raises(ValueError, match=refused):
        compose.value(compose.entropy(model, batch.inputs), model.params, [batch.inputs], jax.random.key(0))
    model, batch = words.model(lm), next(iter(words.batches(pairs(), 3)))
    found = compose.value(compose.entropy(model, batch.inputs), model.params, [batch.inputs], jax.random.key(0))
    assert 0 < found < np.log(2)


def test_examples_that_a_task_does_not_take():
    grey = Images("grey", range(2), lambda key: np.zeros((2, 2), np.uint8))
    for task in (tasks.next_token(ENCODER), tasks.label_words(ENCODER, ["a", "b"]), tasks.own_head(ENCODER)):
        with pytest.raises(ValueError, match=f"'grey' is of images, and the task .*{task.name}.* takes texts"):
            task.batches(grey, 2)
    with pytest.raises(ValueError, match="has 2 classes, and the task .* has 3"):
        tasks.label_words(ENCODER, ["a", "b", "c"], "{one}").batches(pairs(), 2)
    with pytest.raises(ValueError, match="'{three}' names three; 'pairs' has the columns one, two"):
        tasks.label_words(ENCODER, ["a", "b"], "{three}").batches(pairs(), 2)
    with pytest.raises(ValueError, match="columns one, two: say with a template"):
        tasks.next_token(ENCODER).batches(pairs(), 2)
    with pytest.raises(ValueError, match="there is no tokenizer, which texts need"):
        Encoder(None)
