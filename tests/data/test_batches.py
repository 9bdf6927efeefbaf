import jax
import numpy as np
import pytest

from tvjax.data.batches import as_batch, few_shot, herding, k_medoids, split, take


@pytest.fixture
def labelled():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], 20))
    return rng.normal(size=(60, 5)) + labels[:, None], labels


def test_split_keeps_order_and_remainder():
    batch = as_batch({"pixels": np.arange(7.0)[:, None]}, np.arange(7))
    parts = split(batch, 3)
    assert [part.inputs["pixels"].shape[0] for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), np.arange(7))


def test_unlabelled_batches_stay_unlabelled():
    assert [part.labels for part in split(as_batch(np.zeros((4, 2))), 2)] == [None, None]


def test_take_selects_inputs_and_labels():
    batch = take(as_batch({"a": np.arange(5) * 10}, np.arange(5)), [4, 1])
    assert batch.inputs["a"].tolist() == [40, 10] and batch.labels.tolist() == [4, 1]


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (np.zeros((0, 2)), [], "there are no examples"),
        (np.zeros((2, 2)), [0, 3], "found values from 0 to 3, expected 0 to 2"),
        (np.zeros((2, 2)), [-1, 0], "found values from -1 to 0"),
        (np.zeros((2, 2)), [0.0, 1.0], "found dtype float64, expected integers"),
        (np.zeros((2, 2)), [0], r"found shape \(1,\), expected \(2,\)"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, [0, 1], "one number of examples"),
    ],
)
def test_bad_examples_are_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        as_batch(inputs, labels, classes=3)


def test_batches_of_nothing_are_refused():
    with pytest.raises(ValueError, match="size: found 0"):
        split(as_batch(np.zeros((2, 1))), 0)


@pytest.mark.parametrize("choose", ["few_shot", "herding", "k_medoids"])
def test_choices_are_distinct_balanced_and_deterministic(labelled, choose, key):
    features, labels = labelled
    chosen, again = (
        {
            "few_shot": lambda: few_shot(labels, 4, key),
            "herding": lambda: herding(features, labels, 4),
            "k_medoids": lambda: k_medoids(features, labels, 4, key),
        }[choose]()
        for _ in range(2)
    )
    np.testing.assert_array_equal(chosen, again)
    assert len(set(chosen.tolist())) == 12
    assert labels[chosen].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_few_shot_depends_on_the_key(labelled):
    _, labels = labelled
    draws = {tuple(few_shot(labels, 4, jax.random.key(seed)).tolist()) for seed in range(5)}
    assert len(draws) == 5


def test_herding_follows_the_mean_closer_than_chance(labelled, key):
    features, labels = labelled
    own = features[labels == 1]

    def error(chosen):
        return np.linalg.norm(features[chosen][labels[chosen] == 1].mean(0) - own.mean(0))

    assert error(herding(features, labels, 5)) < error(few_shot(labels, 5, key)) / 2


def test_k_medoids_finds_the_clusters(key):
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = np.concatenate([centre + 0.1 * np.random.default_rng(0).normal(size=(8, 2)) for centre in centres])
    chosen = k_medoids(points, np.zeros(24, int), 3, key)
    assert sorted(chosen // 8) == [0, 1, 2]


def test_all_examples_may_be_asked_for(labelled, key):
    features, labels = labelled
    for chosen in (few_shot(labels, 20, key), herding(features, labels, 20), k_medoids(features, labels, 20, key)):
        assert sorted(chosen.tolist()) == list(range(60))


def test_equal_features_still_give_distinct_examples(key):
    assert len(set(k_medoids(np.zeros((4, 2)), np.zeros(4, int), 3, key).tolist())) == 3


@pytest.mark.parametrize(
    ("labels", "per_class", "message"),
    [
        ([0, 0, 1], 2, "class 1 has 1 examples: ask for at most 1"),
        ([0, 1], 0, "per_class: found 0"),
        ([], 1, "at least one example"),
        ([-1, 0], 1, "found values from -1 to 0"),
    ],
)
def test_bad_choices_are_refused(labels, per_class, message, key):
    with pytest.raises(ValueError, match=message):
        few_shot(np.array(labels, int), per_class, key)


def test_features_must_belong_to_the_labels():
    with pytest.raises(ValueError, match=r"features: found shape \(3, 2\), expected \[2, d\]"):
        herding(np.zeros((3, 2)), np.zeros(2, int), 1)
