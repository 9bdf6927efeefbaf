"""GradFix: gradient-sign masking (Rinaldi et al., ICLR 2026, arXiv 2510.09658)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from tvjax.per_example import ExampleGradients
from tvjax.transport.base import Flat, Link, LinkState, Needs, Rule, Transport, make_options

if TYPE_CHECKING:
    from tvjax.transport.pair import Pair

Mode = Literal["agree", "force", "sigmoid", "tanh", "ratio"]


class Masking(NamedTuple):
    """Hyperparameters of `gradfix`."""

    vote: Literal["majority", "mean"] = "majority"
    mode: Mode = "agree"
    soft_vote: Literal["sign", "share"] = "sign"
    beta: float = 5.0
    gamma: float = 1.0
    c: float = 1.0
    noise_floor: float = 1e-6
    chunk: int = 1


def gradfix(**options: Any) -> Transport:
    """Keeps the coordinates of a task vector whose sign is that of the target's descent direction.

    ``s = sign(sum_n sign(-dL(theta_B; x_n, y_n)/dtheta))`` by majority vote of the samples, or the sign of minus the
    mean gradient; ``m = 1[sign(tau) = s]``; ``delta = m * tau``. A coordinate with s = 0 (a tie) is masked out. With
    ``vote="mean"`` every kept coordinate lowers the first-order loss: ``<grad, delta> <= 0``.

    Args:
      **options:
        vote: ``"majority"`` (one vote a sample) or ``"mean"``.
        mode: ``"agree"`` (the method); ``"force"``: ``|tau| s``; or a soft mask on the vote v: ``"sigmoid"``:
          ``sigmoid(beta cos(tau, v))`` by output unit; ``"tanh"``: ``max(0, tanh(gamma tau v))``; ``"ratio"``:
          ``|v| / (|v| + c)`` where the signs agree.
        soft_vote: v of the soft modes: the ``"sign"`` s, or the ``"share"`` of the votes in [-1, 1].
        beta: of ``"sigmoid"``, 5.
        gamma: of ``"tanh"``, 1.
        c: of ``"ratio"``, 1.
        noise_floor: a gradient entry smaller than this share of the sample's largest entry in the stage is rounding,
          and no vote (the bias of a key projection has no gradient but rounding). The paper has no floor.
        chunk: samples whose gradients are taken at once.

    Returns:
      The transport. It works within the target's parameters, so it follows a `theseus` or `bico` in a chain; alone it
      takes task vectors of a source of the same shape.

    Raises:
      ValueError: an option that is unknown or out of range.

    >>> gradfix(vote="mean", mode="force").name
    'gradfix'
    """
    masking = make_options("gradfix", Masking, options)
    if masking.vote not in ("majority", "mean"):
        raise ValueError(f"vote must be 'majority' or 'mean', found {masking.vote!r}")
    if masking.mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, found {masking.mode!r}")
    if masking.soft_vote not in ("sign", "share"):
        raise ValueError(f"soft_vote must be 'sign' or 'share', found {masking.soft_vote!r}")
    if not 0 <= masking.noise_floor < 1:
        raise ValueError(f"noise_floor must lie in [0, 1), found {masking.noise_floor}")
    if masking.chunk < 1:
        raise ValueError(f"chunk must be 1 or more, found {masking.chunk}")
    reads = Needs(gradients=True, source=False)
    transform = partial(_transform, masking)
    return Transport((Link("gradfix", "target", reads, partial(_fit, masking), transform, same_shapes=True),))


def sign_votes(gradients: Flat, noise_floor: float) -> Flat:
    """The vote of one sample on every coordinate: the sign of minus its gradient, 0 under the noise floor.

    >>> sign_votes({"w": jnp.array([2.0, -1e-9, -3.0])}, 1e-6)["w"].tolist()
    [-1, 0, 1]
    """
    largest = _largest(gradients)
    return {
        path: jnp.where(jnp.abs(g) > noise_floor * largest, -jnp.sign(g), 0).astype(jnp.int32)
        for path, g in gradients.items()
    }


def _mean_votes(gradients: Flat, noise_floor: float) -> Flat:
    largest = _largest(gradients)
    return {
        path: jnp.where(jnp.abs(g) > noise_floor * largest, -g, 0).astype(jnp.float32) for path, g in gradients.items()
    }


def _largest(gradients: Flat) -> jax.Array:
    sizes = [jnp.max(jnp.abs(g), initial=0.0).astype(jnp.float32) for g in gradients.values()]
    return jnp.max(jnp.stack(sizes), initial=0.0) if sizes else jnp.float32(0)


_VOTES = {"majority": sign_votes, "mean": _mean_votes}


class _Vote:
    """The vote function of some options; equal for equal options, so that XLA compiles once."""

    def __init__(self, vote: str, noise_floor: float):
        self.settings = vote, noise_floor

    def __call__(self, gradients: Flat) -> Flat:
        return _VOTES[self.settings[0]](gradients, self.settings[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Vote) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(self.settings)


def _fit(masking: Masking, pair: Pair) -> LinkState:
    if "votes" not in pair.board:
        vote = _Vote(masking.vote, masking.noise_floor)
        pair.board["votes"] = ExampleGradients(pair.target, vote, masking.chunk)
    gradients: ExampleGradients = pair.board["votes"]
    total = gradients.stage(pair.target_index)
    voters = gradients.examples
    arrays: dict[str, Any] = {}
    measures: dict[str, dict[str, jax.Array]] = {}
    rules = []
    dtype = jnp.int8 if masking.vote == "majority" and voters < 128 else jnp.float32
    for leaf in pair.leaves:
        rule = Rule(leaf.target, leaf.target, "masked", leaf.shape, leaf.shape)
        if leaf.target not in pair.target.reached:
            rules.append(rule._replace(action="passed through", why="the loss does not reach it"))
            continue
        rules.append(rule)
        arrays[leaf.target], ties = _counted(dtype, total[leaf.target])
        measures[leaf.target] = {"ties": ties, "voters": jnp.float32(voters)}
    return LinkState("gradfix", arrays, measures, tuple(rules))


@partial(jax.jit, static_argnums=0)
def _counted(dtype: Any, votes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The votes as they are kept, and the share of ties."""
    return votes.astype(dtype), jnp.mean(votes == 0, dtype=jnp.float32)


def _transform(masking: Masking, part: LinkState, flat: Flat) -> Flat:
    rules = {rule.target: rule for rule in part.rules}
    moved = {}
    for path, leaf in flat.items():
        if path not in rules:
            raise ValueError(f"gradfix was not fitted on {path}: fit it on a target model that has this leaf")
        if rules[path].action == "passed through":
            moved[path] = leaf
        else:
            voters = part.measures[path]["voters"]
            moved[path] = mask(masking, jnp.asarray(leaf), part.arrays[path], voters)
    return moved


def mask(masking: Masking, tau: jax.Array, votes: jax.Array, voters: jax.Array | float = 1.0) -> jax.Array:
    """A leaf of a task vector, masked by summed votes.

    Args:
      masking: mode and its parameters.
      tau: ``[...]``, output units last.
      votes: ``[...]``, the sum of the samples' votes.
      voters: how many samples voted.

    >>> tau, votes = jnp.array([1.0, -1.0, 2.0]), jnp.array([3.0, 1.0, 0.0])
    >>> mask(Masking(), tau, votes).tolist(), mask(Masking(mode="force"), tau, votes).tolist()
    ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    """
    numbers = masking.beta, masking.gamma, masking.c
    return _masked(masking.vote, masking.mode, masking.soft_vote, numbers, tau, votes, voters)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _masked(vote: str, mode: Mode, soft_vote: str, numbers: Any, tau: jax.Array, votes: Any, voters: Any) -> jax.Array:
    beta, gamma, c = numbers
    votes = votes.astype(jnp.float32)
    sign = jnp.sign(votes)
    agree = (jnp.sign(tau) == sign) & (sign != 0)
    if mode == "agree":
        return jnp.where(agree, tau, 0)
    if mode == "force":
        return jnp.abs(tau) * sign
    value = sign if soft_vote == "sign" else _share(votes, voters, vote)
    if mode == "sigmoid":
        axes = tuple(range(tau.ndim - 1)) or None
        norms = jnp.sqrt(jnp.sum(tau**2, axes, keepdims=True) * jnp.sum(value**2, axes, keepdims=True))
        cosine = jnp.sum(tau * value, axes, keepdims=True) / jnp.where(norms > 0, norms, 1)
        return jax.nn.sigmoid(beta * cosine) * tau
    if mode == "tanh":
        return jnp.maximum(0, jnp.tanh(gamma * tau * value)) * tau
    return jnp.where(agree, jnp.abs(value) / (jnp.abs(value) + c), 0) * tau


def _share(votes: jax.Array, voters: jax.Array | float, vote: str) -> jax.Array:
    if vote == "majority":
        return votes / voters
    largest = jnp.max(jnp.abs(votes))
    return votes / jnp.where(largest > 0, largest, 1)
