"""TransFusion: a task vector follows the units of the source to their places in the target, without data."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from jaxtyping import Array

from tvjax import tree
from tvjax.align.permutations import Symmetry, axes, permutation_names, permute, sign_name
from tvjax.align.weight_matching import Match, Progress, match_weights
from tvjax.on_disk import read
from tvjax.transport.base import Flat, Link, LinkState, Needs, Rule, Transport

if TYPE_CHECKING:
    from tvjax.transport.pair import Pair


def transfusion(symmetry: Symmetry, *, key: Array, progress: Progress | None = None) -> Transport:
    """Permutes a task vector as the weights of the source must be permuted to lie nearest the target's.

    ``P`` maximises ``<P(theta_A), theta_B>`` over the permutations under which the source computes what it did
    (`tvjax.align.weight_matching.match_weights`); ``tau`` becomes ``P(tau)``. No data are needed; the models must have
    one shape, and layers are paired as they stand. Where every norm that reads a residual stream is an RMS norm, its
    units may change their signs as well; grouped queries move with their key head, and no unit that positions rotate
    leaves its place in a head.

    Args:
      symmetry: the table of the models' family (`tvjax.models.symmetry.symmetry_of_config`), or of your own model; it
        must cover every leaf.
      key: a random key, for the order of the descent.
      progress: called with (groups solved in this pass, groups of it, what is being solved).

    Returns:
      The transport. Its report gives the cosine of each leaf with the target's, permuted (``cosine``) and not
      (``cosine_before``).

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from tvjax import fit, single_stage
    >>> from tvjax.align.permutations import Row
    >>> table = Symmetry((Row("up", (None, "hidden")), Row("down", ("hidden", None))))
    >>> def mlp(params, x):
    ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
    >>> a = single_stage(mlp, {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[3.0], [4.0]])})
    >>> b = single_stage(mlp, {"up": jnp.array([[2.1, 1.0]]), "down": jnp.array([[4.0], [3.1]])})
    >>> rebase = transfusion(table, key=jax.random.key(0))
    >>> rebase.apply(fit(rebase, a, b), {"up": jnp.array([[5.0, 6.0]]), "down": None})
    {'up': Array([[6., 5.]], dtype=float32)}

    Source: Rinaldi et al., ICML 2025, arXiv 2505.22697; `match_weights` says where we deviate.
    """
    fit = partial(_fit, symmetry, key, progress)
    link = Link("transfusion", "source_to_target", Needs(), fit, partial(_transform, symmetry), same_shapes=True)
    return Transport((link,))


def _fit(symmetry: Symmetry, key: Array, progress: Progress | None, pair: Pair) -> LinkState:
    for leaf in pair.leaves:
        if leaf.source != leaf.target:
            raise ValueError(
                f"transfusion pairs every leaf with its own, found {leaf.source or 'nothing'} for {leaf.target}: leave "
                "the depth pairing alone, and give both models the same stages"
            )
    models = pair.source.model, pair.target.model
    if tree.is_traced(models):
        raise ValueError("transfusion compares the weights themselves: it cannot be planned or traced from shapes")
    if "match" not in pair.board:  # one match of the whole models serves all their stages
        whole = [read(model.params) for model in models]  # in memory, those on disk too
        pair.board["match"] = match_weights(symmetry, *whole, key=key, progress=progress)
    match: Match = pair.board["match"]
    arrays: dict[str, Array] = {}
    measures: dict[str, dict[str, Array]] = {}
    rules = []
    for leaf in pair.leaves:
        before, target = pair.source_leaves[leaf.local], pair.target_leaves[leaf.local]
        names = permutation_names(axes(symmetry, leaf.target, len(leaf.shape)))
        arrays |= {name: match.permutations[name] for name in names}
        signs = [sign_name(name) for name in names if sign_name(name) in match.permutations]
        arrays |= {name: match.permutations[name] for name in signs}
        rule = Rule(leaf.target, leaf.target, "permuted", leaf.shape, leaf.source_shape)
        if not names:
            rule = rule._replace(action="passed through", why="the symmetry table permutes none of its axes")
        rules.append(rule)
        after = permute(symmetry, match.permutations, {leaf.target: before})[leaf.target]
        measures[leaf.target] = {"cosine": tree.cosine(after, target), "cosine_before": tree.cosine(before, target)}
    return LinkState("transfusion", arrays, measures, tuple(rules))


def _transform(symmetry: Symmetry, part: LinkState, flat: Flat) -> Flat:
    covered = {rule.target: flat[rule.source] for rule in part.rules if rule.source in flat}
    return permute(symmetry, part.arrays, covered)
