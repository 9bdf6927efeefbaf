"""The bits behind the random masks: uniform, independent, and the same wherever they are made."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax import merge
from tvjax.merge.random_bits import entry_bits, words

SHAPE = (300, 512)
SIZE = 300 * 512


@pytest.fixture(scope="module")
def bits():
    """By key, leaf and vector."""
    make = jax.jit(entry_bits, static_argnums=0)
    found = {}
    for seed in range(2):
        for path, keyed in words(jax.random.key(seed), ["up/kernel", "down/kernel"], 3).items():
            for number, each in enumerate(make(SHAPE, keyed)):
                found[seed, path, number] = np.asarray(each)
    return found


def test_every_bit_is_a_fair_coin(bits):
    for name, each in bits.items():
        ones = np.array([(each >> bit & 1).mean() for bit in range(32)])
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / SIZE**0.5, name


def test_bytes_are_uniform(bits):
    for name, each in bits.items():
        for shift in (0, 8, 16, 24):
            counts = np.bincount((each >> shift & 255).reshape(-1), minlength=256)
            statistic = ((counts - SIZE / 256) ** 2).sum() / (SIZE / 256)
            assert 140 < statistic < 400, (name, shift)  # chi-square with 255 degrees of freedom


def test_nothing_is_correlated(bits):
    uniform = {name: each / 2.0**32 - 0.5 for name, each in bits.items()}
    limit = 5 / SIZE**0.5
    for one, other in itertools.combinations(uniform, 2):  # keys, leaves and vectors
        assert abs(np.mean(uniform[one] * uniform[other]) * 12) < limit, (one, other)
    for name, each in uniform.items():
        for shift in ((0, 1), (1, 0), (0, 256), (1, 1)):
            assert abs(np.mean(each * np.roll(each, shift, (0, 1))) * 12) < limit, (name, shift)
        assert abs(np.mean(each[::2] * each[1::2]) * 12) < 2 * limit, name


def test_streams_are_not_shifted_copies(bits):
    sets = [set(each.reshape(-1)[:20_000].tolist()) for each in bits.values()]
    for one, other in itertools.combinations(sets, 2):
        assert len(one & other) < 5  # of 4e8 / 2^32 expected by chance


def test_flipping_a_bit_of_the_key_flips_half_of_the_bits():
    keyed = words(jax.random.key(0), ["w"], 1)["w"]
    before = entry_bits((2**14,), jnp.asarray(keyed))[0]
    for word, bit in itertools.product(range(2), range(0, 32, 5)):
        flipped = np.array(keyed)
        flipped[word] ^= np.uint32(1 << bit)
        changed = np.asarray(before ^ entry_bits((2**14,), jnp.asarray(flipped))[0])
        assert np.bitwise_count(changed).mean() == pytest.approx(16, abs=0.1), (word, bit)


def test_an_entry_is_its_place_in_the_leaf():
    keyed = jnp.asarray(words(jax.random.key(3), ["w"], 2)["w"])
    flat = entry_bits((24 * 5,), keyed)
    for shape in ((24, 5), (2, 3, 4, 5)):
        for one, other in zip(entry_bits(shape, keyed), flat, strict=True):
            np.testing.assert_array_equal(one.reshape(-1), other)
    assert entry_bits((), keyed)[1] == flat[1][0]


def test_a_further_vector_changes_no_mask_of_the_others():
    few, many = (words(jax.random.key(0), ["a", "b"], count) for count in (2, 5))
    for path, keyed in few.items():
        np.testing.assert_array_equal(keyed, many[path][:3])


def test_new_and_old_keys_give_the_same_bits():
    new, old = (words(key, ["w"], 2)["w"] for key in (jax.random.key(5), jax.random.PRNGKey(5)))
    np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(None, "data")])
def test_the_mask_of_an_optimised_merge_is_that_of_one_device(spec):
    taus = [{"w": jax.random.normal(jax.random.key(i), (64, 96))} for i in range(4)]
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split = jax.device_put(taus, NamedSharding(mesh, spec))
    for rule in (
        lambda taus: merge.dare(taus, key=jax.random.key(1)),
        lambda taus: merge.della(taus, key=jax.random.key(1)),
        lambda taus: merge.ties(taus, weights=[0.3, 0.7, 1.1, 0.9]),
        lambda taus: merge.breadcrumbs(taus, combine="ties"),
        merge.sce,
    ):
        one, two = (np.asarray(rule(each)["w"]) for each in (taus, split))
        np.testing.assert_array_equal(one != 0, two != 0)
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
