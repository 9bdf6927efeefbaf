"""Several task vectors of one model in one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tvjax import arithmetic, tree
from tvjax import merge as methods
from tvjax.checkpoints import load_tree, map_tree, model_card, save_adapter, save_tree, streaming
from tvjax.checkpoints.adapters import open_adapter
from tvjax.checkpoints.atomic import becomes, folder_beside, new_folder
from tvjax.checkpoints.folder import Checkpoint, open_checkpoint
from tvjax.checkpoints.huggingface import check_new
from tvjax.checkpoints.json_files import write_json
from tvjax.checkpoints.memory import Scratch
from tvjax.checkpoints.provenance import check_same_base
from tvjax.factors import is_low_rank
from tvjax.jobs import inputs
from tvjax.jobs.configs import MergeConfig
from tvjax.jobs.merges import acts_by_leaf, find_merge
from tvjax.jobs.recipes import recipe_of, write_recipe
from tvjax.jobs.rehearsal import rehearse
from tvjax.jobs.task_vectors import is_adapter, is_model, read_adapter
from tvjax.merge import MergedLeaf
from tvjax.on_disk import DiskArray, is_on_disk
from tvjax.progress import Progress, begin
from tvjax.stages import PyTree
from tvjax.truncate import Truncated, low_rank, not_smaller

_LINEAR = ("average", "task_arithmetic")


class Merged(NamedTuple):
    """What `merge` wrote.

    Attributes:
      output: the task vector, or the folder of the model or the adapter.
      form: ``task vector``, ``model`` or ``adapter``.
      method: the merge.
      scale: factor of the merged task vector.
      task_vectors: their files.
      base_model: the model that they say they were made for.
      norm: of the merged task vector, not scaled.
      leaf_report: the file of the report by leaf.
      left: why tensors of the model take no part, by key.
      notes: what the user should know.
    """

    output: Path
    form: str
    method: str
    scale: float
    task_vectors: tuple[str, ...]
    base_model: str | None
    norm: float
    leaf_report: Path
    left: Mapping[str, str]
    notes: tuple[str, ...]


def merge(config: MergeConfig, progress: Progress | None = None) -> Merged:
    """Merges task vectors of one model into one, and writes it, the model with it, or an adapter of it.

    A leaf that only some of them cover, as with adapters of different target modules, counts as zero in the others.
    Task vectors from files are read, merged and written leaf by leaf where the method makes each leaf of that leaf
    alone; where it looks at the whole vector, the merged one is in memory.

    Args:
      config: the task vectors, the method and the output.
      progress: called after every leaf.

    Raises:
      ValueError: what cannot be, before anything is written.
    """
    function = find_merge(config.method, config.options, config.seed)
    begin(progress, "reading the task vectors")
    _check_output(config)
    on_models = config.options.get("base") is True
    if on_models and config.model is None:
        raise ValueError("base=true merges the models that the task vectors were made of: give --model")
    files = [str(file) for file in config.task_vectors]
    adapters = [is_adapter(file) for file in files]
    if all(adapters) and not config.dense and config.method in _LINEAR:  # the same result, and it has factors
        function = functools.partial(methods.core_space, merge=function)
    with contextlib.ExitStack() as stack:
        base = None
        needed = on_models or any(adapters) or any(map(is_model, files)) or config.output.suffix != ".safetensors"
        if config.model is not None and needed:
            base = stack.enter_context(open_checkpoint(config.model))
        if base is None and (whole := next(filter(is_model, files), None)) is not None:
            raise ValueError(f"{whole!r} is a model: give --model, the one that it was fine-tuned from")
        lazily = not any(adapters) and not on_models and config.rank is None
        lazily = lazily and acts_by_leaf(config.method, config.options)
        if not any(adapters) and hasattr(methods, config.method):  # one's own may not take leaves without values
            shapes = {path: shape for file in files for path, shape in _shapes(file, base).items()}
            rehearse(function, [shapes] * len(files), **({"base": shapes} if on_models else {}))
        loaded, made, told = _loaded(config, base, stack, lazily, progress)
        metadata = check_same_base(files, made, config.any_base)
        if base is not None and "base_fingerprint" not in metadata:
            metadata = {name: value for name, value in base.identity("").items() if value}
        origin = streaming.Origin(files, made, config.any_base)
        if base is not None:
            origin.check(base, loaded)
        _check_shapes(files, loaded)
        taus, partly = methods.cover(loaded)
        if on_models and base is not None:
            params = {path: base.read(path, Scratch(), keep=True) for path in tree.flatten(taus[0])}
            function = functools.partial(function, base=tree.nest(params))
        work = _Work(function, taus, partly, progress)
        tau = work.leaf_by_leaf() if lazily else work.at_once()
        form = _form(config, all(adapters), tau)
        if form == "adapter":
            tau, lost = _shortened(config, tau)
            told += lost
        writing = None if lazily else progress  # lazily, leaves are merged while they are written
        begin(writing, f"writing {config.output}")
        is_file = form == "task vector"
        with contextlib.nullcontext(config.output) if is_file else new_folder(config.output) as output:
            left = _write(config.model_copy(update={"output": output}), form, tau, base, metadata, origin, writing)
            about = {"method": config.method, "scale": config.scale, "form": form, "task_vectors": files}
            rows = [row._asdict() for row in work.rows]
            write_json(report_name(output), {**about, "leaves": rows}, sort_keys=False)
            write_recipe(recipe_of(config), output)
    report = report_name(config.output)
    notes = [*told, *inputs.left(left)]
    if all(adapters) and form == "model" and not config.dense:
        notes.append(
            f"{config.method} makes arrays of adapters, so the edited model is written: say --method core_space "
            f"--options merge={config.method}, or --rank, for an adapter"
        )
    if partly:
        notes.append(
            f"{len(partly)} leaves ({next(iter(partly))}, ...) are not covered by every task vector, and count as "
            f"zero in the others; which, says covered_by in {report.name}"
        )
    return Merged(
        output=config.output,
        form=form,
        method=config.method,
        scale=config.scale,
        task_vectors=tuple(files),
        base_model=metadata.get("base_model"),
        norm=work.squares**0.5 if lazily else float(tree.norm(tau)),
        leaf_report=report,
        left=left,
        notes=tuple(notes),
    )


def _write(
    config: MergeConfig,
    form: str,
    tau: PyTree,
    base: Checkpoint | None,
    metadata: Mapping[str, str],
    origin: streaming.Origin,
    progress: Progress | None,
) -> Mapping[str, str]:
    """Writes what was merged; returns why tensors of the model take no part."""
    count = len(origin.names)
    settings = {"method": config.method, **{f"option {name}": value for name, value in config.options.items()}}
    if form == "task vector":
        save_tree(config.output, _scaled(tau, config.scale), metadata, config.dtype)
        return {}
    assert base is not None
    if form == "model":
        action = f"{count} task vectors, merged by {config.method}, were added to the weights of the base model."
        return streaming.apply_trees(
            base, [tau], config.output, origin, scale=config.scale, action=action, settings=settings, progress=progress
        ).left
    card = model_card(
        becomes(config.output).name,
        f"{count} task vectors, merged by {config.method}, as a LoRA adapter of the base model.",
        metadata,
        inputs=dict(zip(origin.names, origin.metadata, strict=True)),
        settings={"scale": config.scale, **settings},
        library="peft",
    )
    adapter = arithmetic.scale(tau, config.scale)
    save_adapter(adapter, config.output, base, metadata=metadata, dtype=config.dtype, card=card)
    return {}


def _scaled(tau: PyTree, factor: float) -> PyTree:
    """A task vector times a number; leaves on disk are multiplied when they are read."""

    def times(leaf: DiskArray) -> DiskArray:
        return DiskArray(leaf.shape, leaf.dtype, lambda: np.multiply(leaf, np.float32(factor)))

    return jax.tree.map(times, tau) if any(map(is_on_disk, jax.tree.leaves(tau))) else arithmetic.scale(tau, factor)


def _loaded(
    config: MergeConfig, base: Checkpoint | None, stack: contextlib.ExitStack, on_disk: bool, progress: Progress | None
) -> tuple[tuple[PyTree, ...], tuple[dict[str, str], ...], list[str]]:
    """The task vectors, what their files say of their model, and what the user should know."""
    loaded: list[PyTree] = []
    made: list[dict[str, str]] = []
    told: list[str] = []
    for file in map(str, config.task_vectors):
        if is_model(file):
            assert base is not None
            tau, metadata, notes = _differences(file, base, config.output, stack, progress)
            told += notes
            loaded.append(tau)
            made.append(metadata)
        elif is_adapter(file):
            if base is None:
                raise ValueError(f"{file!r} is an adapter, which names layers as its model does: give --model")
            with open_adapter(file, base, any_base=config.any_base) as opened:
                told += [f"{file}: {note}" for note in opened.notes]
            loaded.append(read_adapter(file, base, config.any_base))
            made.append({})
        else:
            tau, metadata = load_tree(file, on_disk=True) if on_disk else map_tree(file)
            loaded.append(tau)
            made.append(metadata)
    return tuple(loaded), tuple(made), told


def _shapes(file: str, base: Checkpoint | None) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a task vector's leaves, by path; of a file, its header is read."""
    if is_model(file):
        assert base is not None
        return base.shapes
    return {path: tuple(np.shape(leaf)) for path, leaf in tree.flatten(load_tree(file, on_disk=True)[0]).items()}


def _differences(
    model: str, base: Checkpoint, output: Path, stack: contextlib.ExitStack, progress: Progress | None
) -> tuple[PyTree, dict[str, str], tuple[str, ...]]:
    """A fine-tuned model as a task vector, made leaf by leaf into a file that lasts as long as the stack."""
    if Path(model).resolve() == base.folder.resolve():  # a single zero, seen as all entries
        return tree.nest({path: np.broadcast_to(np.float32(0), shape) for path, shape in base.shapes.items()}), {}, ()
    near = next(folder for folder in output.resolve().parents if folder.is_dir())
    file = stack.enter_context(folder_beside(near / output.name)) / "differences.safetensors"
    notes = streaming.extract(base, model, file, subtree="", progress=progress).notes
    return *map_tree(file), notes


def _form(config: MergeConfig, adapters: bool, tau: PyTree) -> str:
    """What is written: a ``task vector``, an ``adapter`` or a ``model``."""
    if config.output.suffix == ".safetensors":
        return "task vector"
    kept = adapters and not config.dense and all(map(is_low_rank, tree.flatten(tau).values()))
    return "adapter" if kept or config.rank is not None else "model"


def _shortened(config: MergeConfig, tau: PyTree) -> tuple[PyTree, list[str]]:
    """The merged task vector in the rank that was asked for, and what that costs."""
    if config.rank is None:
        return tau, []
    rows: list[Truncated] = []
    short = low_rank(tau, config.rank, key=jax.random.key(config.seed), report=rows.append)
    lost = sum(row.error**2 * row.share for row in rows)
    told = f"rank {config.rank} holds {1 - lost:.2%} of the merged task vector's squared norm"
    return short, [told, *not_smaller(rows)]


def _check_shapes(files: Sequence[str], taus: Sequence[PyTree]) -> None:
    """Raises a ValueError where the task vectors have leaves of one path and different shapes."""
    shapes = [{path: tuple(np.shape(leaf)) for path, leaf in tree.flatten(tau).items()} for tau in taus]
    for file, found in zip(files[1:], shapes[1:], strict=True):
        wrong = [
            f"{path}: {shapes[0][path]} and {found[path]}"
            for path in found
            if shapes[0].get(path, found[path]) != found[path]
        ]
        if wrong:
            raise ValueError(
                f"{files[0]!r} and {file!r} are of models of other shapes, {len(wrong)} leaves differ:\n"
                f"{tree.list_some(wrong)}\nmove one to the other's model first (tvjax transport)"
            )


def report_name(output: Path) -> Path:
    """The report by leaf of an output: in its folder, or beside its file."""
    return output / "leaf_report.json" if output.is_dir() else output.with_name(f"{output.stem}.leaf_report.json")


def _check_output(config: MergeConfig) -> None:
    output = config.output
    if output.suffix == ".safetensors" and config.rank is not None:
        raise ValueError(
            f"--rank writes the folder of an adapter, and the output {str(output)!r} is a file: change one"
        )
    if config.rank is not None and config.dense:
        raise ValueError("--rank writes an adapter, and --dense the edited model: give one of the two")
    if output.suffix != ".safetensors" and config.model is None:
        raise ValueError(f"the output {str(output)!r} is a folder of a model: give --model, or a name in .safetensors")
    if output.resolve() in [file.resolve() for file in config.task_vectors]:
        raise ValueError(
            f"the output {str(output)!r} is one of the task vectors, which would be lost: give another file"
        )
    if output.suffix == ".safetensors":
        inputs.check_file(output)
    else:
        check_new(output)


class _Work:
    """The merge of some task vectors, and its report by leaf.

    Attributes:
      rows: of the report, complete when all is merged.
      squares: sum of the squares of what was merged leaf by leaf.
    """

    def __init__(
        self,
        function: Callable[..., PyTree],
        taus: Sequence[PyTree],
        partly: Mapping[str, Any],
        progress: Progress | None,
    ):
        self._function, self._taus, self._partly, self._progress = function, taus, partly, progress
        self._leaves = len(tree.flatten(taus[0]))
        self.rows: list[MergedLeaf] = []
        self.squares = 0.0

    def at_once(self) -> PyTree:
        """The merged task vector."""
        return self._function(self._taus, report=self._report)

    def leaf_by_leaf(self) -> PyTree:
        """The merged task vector, a leaf of which is merged when it is read, once each."""
        flats = [tree.flatten(tau) for tau in self._taus]

        def read(path: str) -> np.ndarray:
            ones = [tree.nest({path: np.asarray(flat[path])}) for flat in flats]
            merged = np.asarray(tree.get(self._function(ones, report=self._report), path))
            self.squares += float(np.vdot(merged, merged))
            return merged

        shapes = {path: tuple(np.shape(leaf)) for path, leaf in flats[0].items()}
        return tree.nest(
            {path: DiskArray(shape, np.float32, functools.partial(read, path)) for path, shape in shapes.items()}
        )

    def _report(self, row: MergedLeaf) -> None:
        covered = {"covered_by": self._partly[row.path]} if row.path in self._partly else {}
        self.rows.append(row._replace(measures=row.measures | covered))
        if self._progress is not None:
            self._progress(len(self.rows), self._leaves, row.path)
