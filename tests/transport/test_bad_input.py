"""Bad input: one clear ValueError that names the thing, before heavy work."""

import jax
import jax.numpy as jnp
import pytest

from tvjax import (
    Batch,
    bico,
    chain,
    fit,
    gradfix,
    identity,
    orthogonal_shift,
    scale_by,
    theseus,
    tree,
)
from tvjax.checkpoints import load_state
from tvjax.stages import single_stage
from tvjax.walk import Walk


@pytest.fixture
def idle(monkeypatch):
    """Fails where a stage is run: the message must come before."""

    def run(*args, **kwargs):
        raise AssertionError("a stage was run")

    for name in ("carries", "observe", "cotangents", "table"):
        monkeypatch.setattr(Walk, name, run)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: theseus(complete="x"), "complete must be one of .*found 'x'"),
        (lambda: theseus(method="x"), "method must be one of .*found 'x'"),
        (lambda: theseus(method="randomised"), "needs rank"),
        (lambda: theseus(rank=0), "rank must be .*found 0"),
        (lambda: theseus(rank=1.5), "rank must be .*found 1.5"),
        (lambda: theseus(whiten=0.7), "whiten must lie in .*found 0.7"),
        (lambda: theseus(whiten_floor=1.0), "whiten_floor must lie in .*found 1"),
        (lambda: theseus(dtype="bfloat16"), "dtype must be .*found 'bfloat16'"),
        (lambda: theseus(method="gram"), "gram.*withdrawn.*polar"),
        (lambda: bico(method="polar", rank=0.25), "polar.*no rank.*rank=0.25"),
        (lambda: theseus(rank_tolerance=-1.0), "rank_tolerance must lie in .*found -1"),
        (lambda: theseus(scale_rule="x"), "scale_rule must be .*found 'x'"),
        (lambda: bico(input="x"), "input must be .*found 'x'"),
        (lambda: gradfix(vote="x"), "vote must be .*found 'x'"),
        (lambda: gradfix(mode="x"), "mode must be .*found 'x'"),
        (lambda: gradfix(soft_vote="x"), "soft_vote must be .*found 'x'"),
        (lambda: gradfix(chunk=0), "chunk must be .*found 0"),
        (lambda: gradfix(noise_floor=-1.0), "noise_floor must lie in .*found -1"),
        (lambda: theseus(rank="many"), "theseus: rank is 'many', expected a number"),
        (lambda: theseus(whiten=float("nan")), "theseus: whiten is nan, expected a finite number"),
        (lambda: bico(center=1), "bico: center is 1, expected true or false"),
        (lambda: gradfix(vote=2), "gradfix: vote is 2, expected text"),
        (lambda: gradfix(beta=None), "gradfix: beta is None, expected a number"),
        (lambda: chain(), "at least one transport"),
        (lambda: chain(gradfix(), bico()), "bico takes task vectors of the source.*after gradfix.*put bico first"),
        (lambda: chain(theseus(), bico()), "bico takes task vectors of the source model.*after theseus"),
        (lambda: chain(bico(), gradfix(), gradfix()), "gradfix stands twice"),
    ],
)
def test_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_option_is_named():
    with pytest.raises(ValueError, match="theseus has no option 'centre'; the nearest of .* is 'center'"):
        theseus(centre=True)
    with pytest.raises(ValueError, match="gradfix has no option 'votes'; .* 'vote'"):
        gradfix(votes="mean")


# -- calibration batches ---------------------------------------------------------------------------------------------


def test_gradients_need_labels_and_a_loss(tiny, idle):
    bare = [batch._replace(labels=None) for batch in tiny.batches]
    lossless = tiny.a.replace(loss=single_stage(lambda p, x: x, {}).loss)
    for transport in (bico(), chain(theseus(), gradfix())):
        with pytest.raises(ValueError, match="reads gradients.*need labels"):
            fit(transport, tiny.a, tiny.b, bare)
        with pytest.raises(ValueError, match="the target model has no loss.*with_loss"):
            fit(transport, tiny.a, lossless, tiny.batches)
    with pytest.raises(ValueError, match="the source model has no loss"):
        fit(bico(), lossless, tiny.b, tiny.batches)


def test_labels_as_many_as_examples(tiny, idle):
    short = [batch._replace(labels=batch.labels[:-1]) for batch in tiny.batches]
    with pytest.raises(ValueError, match="calibration batch 0.*labels.*7.*8"):
        fit(bico(), tiny.a, tiny.b, short)


@pytest.mark.parametrize("transport", [theseus(), bico(), gradfix()], ids=lambda t: t.name)
def test_batches(tiny, idle, transport):
    with pytest.raises(ValueError, match=f"{transport.name} needs calibration batches, found none"):
        fit(transport, tiny.a, tiny.b, [])
    one = tiny.batches[0]
    empty = jax.tree.map(lambda leaf: leaf[:0], one)
    with pytest.raises(ValueError, match="calibration batch 1.*no examples"):
        fit(transport, tiny.a, tiny.b, [one, empty])
    half = jax.tree.map(lambda leaf: leaf[:4], one)
    with pytest.raises(ValueError, match="calibration batch 1.*8 examples for the source.*4 for the target"):
        fit(transport, tiny.a, tiny.b, [(one, one), (one, half)])
    with pytest.raises(ValueError, match="a calibration batch is a Batch.*found a dict"):
        fit(transport, tiny.a, tiny.b, [one.inputs])
    for bad in (jnp.nan, jnp.inf):
        spoilt = Batch({"pixels": one.inputs["pixels"].at[3, 0, 0, 0].set(bad)}, one.labels)
        with pytest.raises(ValueError, match="calibration batch 1 .*NaN or infinite"):
            fit(transport, tiny.a, tiny.b, [one, spoilt])


def test_values_that_are_not_finite(tiny, idle):
    path = "vision/blocks/1/attention/query/kernel"
    for bad in (jnp.nan, -jnp.inf):
        spoilt = tree.map_with_path(
            lambda own, leaf, bad=bad: leaf.at[(0,) * leaf.ndim].set(bad) if own == path else leaf, tiny.a.params
        )
        for transport in (theseus(), bico(), gradfix(), identity()):
            with pytest.raises(ValueError, match=f"(?s)the source model has .*NaN or infinite.*{path}: 1 of"):
                fit(transport, tiny.a.replace(params=spoilt), tiny.b, tiny.batches)
            with pytest.raises(ValueError, match=f"(?s)the target model has .*NaN or infinite.*{path}: 1 of"):
                fit(transport, tiny.a, tiny.a.replace(params=spoilt), tiny.batches)
        state = fit(identity(), tiny.a, tiny.b)
        with pytest.raises(ValueError, match=f"(?s)the task vector has .*NaN or infinite.*{path}: 1 of"):
            identity().apply(state, spoilt)
        with pytest.raises(ValueError, match=f"(?s)task vector 1 has .*NaN or infinite.*{path}: 1 of"):
            fit(theseus(), tiny.a, tiny.b, tiny.batches, stream=[tiny.a.params, spoilt])


def test_a_loss_that_is_not_a_number_is_no_vote_of_zero(tiny):
    head = tiny.b.loss_params.at[:, 2].set(jnp.nan)
    broken = tiny.b.with_loss(tiny.b.loss, head)
    for transport in (gradfix(), bico()):
        with pytest.raises(ValueError, match="(?s)the gradient of the loss has .*NaN or infinite.*batch 0"):
            fit(transport, tiny.a, broken, tiny.batches)


def test_batches_by_link(tiny, idle):
    transport = chain(theseus(), gradfix())
    with pytest.raises(ValueError, match=r"no calibration batches for gradfix: found batches for \['theseus'\]"):
        fit(transport, tiny.a, tiny.b, {"theseus": tiny.batches})
    with pytest.raises(ValueError, match=r"\['gradfx'\].*theseus\+gradfix"):
        fit(transport, tiny.a, tiny.b, {"theseus": tiny.batches, "gradfix": tiny.batches, "gradfx": tiny.batches})


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [gradfix(), identity(), orthogonal_shift(), scale_by(2.0)], ids=lambda t: t.name)
def test_other_widths_need_a_map(tiny, idle, transport):
    with pytest.raises(ValueError, match=f"{transport.name} needs models of one shape: vision/.*put theseus"):
        fit(transport, tiny.a, tiny.w, tiny.batches)


@pytest.mark.parametrize("transport", [gradfix(), identity()], ids=lambda t: t.name)
def test_other_depths_need_a_pairing(tiny, idle, transport):
    for source, target, where in ((tiny.a, tiny.d, "target"), (tiny.d, tiny.a, "source")):
        with pytest.raises(ValueError, match=f"{transport.name} needs models of one shape: vision/blocks/2.* {where}"):
            fit(transport, source, target, tiny.batches)


def test_models_that_do_not_match(tiny, idle):
    other = single_stage(lambda p, x: x, {"kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"the target's stages \['model'\] have no partner in the source"):
        fit(theseus(), tiny.a, other, tiny.batches)


def test_depth_and_tokens_options(tiny, idle):
    for depth, message in (
        ("x", "the rule must be \"uniform\".*found 'x'"),
        ([0, 1], "lists 2 source layers, the target has 3"),
        ([0, 1, 2], r"names source layers \[2\]"),
        ({"text/blocks": "uniform"}, r"depth names \['text/blocks'\].*vision/blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(theseus(), tiny.a, tiny.d, tiny.batches, depth=depth)
    with pytest.raises(ValueError, match="tokens must be one of .*found 'x'"):
        fit(theseus(), tiny.a, tiny.b, tiny.batches, tokens="x")
    with pytest.raises(ValueError, match="cka.*reads none"):
        fit(orthogonal_shift(), tiny.a, tiny.d, tiny.batches, depth="cka")


def test_tokens_that_cannot_be_aligned(tiny):
    fine = tiny.make_model(tiny.make_config(image=12), 2)
    bare = fine.replace(
        stages=tuple(stage.__class__(stage.name, stage.function, stage.paths, stage.group) for stage in fine.stages)
    )
    pairs = list(zip(tiny.make_batches(1), tiny.make_batches(1, image=12), strict=True))
    with pytest.raises(ValueError, match="tokens cannot be aligned: A has 5 tokens.*B has 10 tokens.*Stream"):
        fit(theseus(), tiny.a, bare, pairs)


# -- task vectors and states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["theseus", "gradfix", "orthogonal_shift", "identity", "scale_by+theseus"])
def test_task_vectors_of_another_model(tiny, fitted, name):
    transport, state = fitted(name)
    surplus = {"vision": {"blocks": {"7": {"norm1": {"scale": jnp.ones(16)}}}}}
    wider = tree.select(tiny.w.params, "vision/post_norm")
    for tau, message in (
        (surplus, "vision/blocks/7/norm1/scale: no such leaf in the source"),
        (wider, r"vision/post_norm/bias: shape \(24,\), the source has \(16,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            transport.apply(state, tau)
        with pytest.raises(ValueError, match=message):
            fit(transport, tiny.a, tiny.b, tiny.batches, stream=[tau])


def test_streaming_checks_task_vectors_first(tiny, idle):
    with pytest.raises(ValueError, match="other: no such leaf"):
        fit(theseus(), tiny.a, tiny.b, tiny.batches, stream=[{"other": jnp.ones(3)}])


def test_state_of_another_transport(tiny):
    state = fit(orthogonal_shift(), tiny.a, tiny.b)
    with pytest.raises(ValueError, match="fitted for orthogonal_shift, not for theseus"):
        theseus().apply(state, tiny.tau)


def test_files_that_hold_no_state(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(ValueError, match="absent"):
        load_state(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="text"):
        load_state(tmp_path / "text")
    save_file({}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no fitted transport"):
        load_state(tmp_path / "other")
