"""``tvjax merge``: several task vectors of one model in one."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvjax.cli import config as recipes
from tvjax.cli.options import LARGEST_SEED, AnyBase, Json, Options, Quiet, finite

if TYPE_CHECKING:
    from tvjax.merge import MergedLeaf

METHODS = (
    *("average", "task_arithmetic", "slerp", "karcher_mean", "ties", "dare", "della", "breadcrumbs", "model_stock"),
    *("sce", "tsv_m", "iso_c", "iso_cts", "knots", "wudi"),
)
KINDS: dict[Any, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}  # by annotation
WITH_DATA = ("regmean", "fisher")
GIVEN = ("taus", "key", "base", "report")  # arguments that no option sets


def merge(
    context: typer.Context,
    task_vectors: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Task vectors of one model.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")],
    output: Annotated[
        Path, typer.Option(metavar="PATH", help="A task vector (.safetensors); or, with --model, a folder.")
    ],
    options: Options = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The pre-trained model, to add the merged task vector to.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor of the merged task vector.", callback=finite)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of methods that draw at random.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the task vector: float32, float16 or bfloat16.")] = "float32",
    any_base: AnyBase = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge task vectors of one model into one, and write it or the model with it.

    A leaf that only some of them cover, as with adapters of different target modules, counts as zero in the others.
    """
    from tvjax import arithmetic, tree
    from tvjax import merge as methods
    from tvjax.checkpoints import map_tree, save_tree, streaming
    from tvjax.checkpoints.folder import open_checkpoint
    from tvjax.cli import inputs
    from tvjax.cli.output import left, show
    from tvjax.cli.progress import progress

    chosen = recipes.parse_options(options or ())
    function = choose(method, chosen, seed)
    inputs.check_dtype(dtype)
    as_file = check_output(output, model, task_vectors)
    names = [str(file) for file in task_vectors]
    loaded, made = zip(*map(map_tree, task_vectors), strict=True)
    metadata = inputs.common_base(task_vectors, made, any_base)
    origin = streaming.Origin(names, made, any_base)
    taus, partly = methods.cover(loaded)
    rows: list[MergedLeaf] = []
    leaves = len(tree.flatten(taus[0]))
    kept: Mapping[str, str] = {}
    with contextlib.ExitStack() as stack:
        if model is not None and not as_file:
            base = stack.enter_context(open_checkpoint(model))
            origin.check(base, loaded)
        tell = stack.enter_context(progress(method, quiet))

        def report(row: MergedLeaf) -> None:
            covered = {"covered_by": partly[row.path]} if row.path in partly else {}
            rows.append(row._replace(measures=row.measures | covered))
            tell(len(rows), leaves, row.path)

        tau = function(taus, report=report)
        if as_file:
            save_tree(output, arithmetic.scale(tau, scale), metadata, dtype)
        else:
            action = f"{len(loaded)} task vectors, merged by {method}, were added to the weights of the base model."
            settings = {"method": method, **chosen}
            kept = streaming.apply_trees(
                base, [tau], output, origin, scale=scale, action=action, settings=settings
            ).left
    about = {"method": method, "scale": scale, "task_vectors": names}
    notes = [f"note: {note}" for note in left(kept)]
    if partly:
        notes.append(
            f"note: {len(partly)} leaves ({next(iter(partly))}, ...) are not covered by every task vector, and count "
            f"as zero in the others; which, says covered_by in {report_name(output).name}"
        )
    write_report(output, rows, about)
    recipes.write(context, output)
    norm = float(tree.norm(tau))
    name = metadata.get("base_model")
    show(
        {"output": output, **about, "base_model": name, "norm": norm, "leaf_report": report_name(output)}
        | {"left": kept},
        *notes,
        f"{output}: {len(loaded)} task vectors of {name or 'one model'} merged by {method}",
        f"scale {scale:g}, norm {norm:.4g}; by leaf: {report_name(output).name}",
        as_json=as_json,
        quiet=quiet,
    )


def choose(method: str, options: Mapping[str, Any], seed: int) -> Callable[..., Any]:
    """The merge of a name with its hyperparameters.

    Raises:
      ValueError: an unknown name or hyperparameter.
    """
    import jax

    from tvjax import merge as methods

    if method in WITH_DATA:
        raise ValueError(
            f"{method} needs data of every task, and a model that can be run (CLIP, ViT, or your own function): call "
            f"tvjax.merge.{method} from Python"
        )
    if method not in METHODS:
        raise ValueError(f"there is no merge {method!r}: choose among {', '.join(METHODS)}")
    function = getattr(methods, method)
    check_options(method, function, options, GIVEN)
    arguments = read_settings(options)
    if "key" in inspect.signature(function).parameters:
        arguments["key"] = jax.random.key(seed)
    return functools.partial(function, **arguments)


def check_output(output: Path, model: str | None, task_vectors: Sequence[Path]) -> bool:
    """Whether the output is a file and not the folder of a model.

    Raises:
      ValueError: an output that cannot be written.
    """
    from tvjax.checkpoints.huggingface import check_new
    from tvjax.cli import inputs

    as_file = output.suffix == ".safetensors"
    if not as_file and model is None:
        raise ValueError(f"the output {str(output)!r} is a folder of a model: give --model, or a name in .safetensors")
    if output.resolve() in [file.resolve() for file in task_vectors]:
        raise ValueError(
            f"the output {str(output)!r} is one of the task vectors, which would be lost: give another file"
        )
    if as_file:
        inputs.check_file(output)
    else:
        check_new(output)
    return as_file


def check_options(name: str, method: Callable[..., Any], options: Mapping[str, Any], given: Collection[str]) -> None:
    """Raises a ValueError for a hyperparameter that a method lacks or is not given, or a value of another kind.

    Args:
      name: of the method.
      method: a function whose keyword arguments are its hyperparameters.
      options: hyperparameters by name.
      given: arguments that the command gives itself.

    >>> def ties(taus, *, density=0.2): ...
    >>> check_options("ties", ties, {"densty": 0.5}, given=["taus"])
    Traceback (most recent call last):
    ValueError: ties has no option 'densty'; the nearest of density is 'density'
    """
    parameters = inspect.signature(method).parameters
    known = [key for key in parameters if key not in given]
    missing = [key for key in known if parameters[key].default is inspect.Parameter.empty and key not in options]
    if missing:
        raise ValueError(f"{name} needs the option {missing[0]} (--options {missing[0]}=...)")
    for option, value in options.items():
        if option not in known:
            if not known:
                raise ValueError(f"{name} has no options, found {option!r}")
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} has no option {option!r}; the nearest of {', '.join(known)} is {near!r}")
        kind = parameters[option].annotation
        if kind in KINDS and (not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "bool")):
            raise ValueError(f"{name}: {option} is {value!r}, expected {kind}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {option} is {value}, expected a finite number")


def read_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what YAML cannot say: ``{by_depth: [0.2, 0.8], other: 0.5}``, and merges by their names.

    >>> read_settings({"density": {"by_depth": [0.2, 0.8], "other": 0.5}})
    {'density': ByDepth(values=(0.2, 0.8), other=0.5)}
    """
    from tvjax import merge as methods

    def read(value: Any) -> Any:
        if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
            raise ValueError(f"the keys of a setting are patterns of paths, found {sorted(map(str, value))}")
        if isinstance(value, Mapping) and "by_depth" in value:
            if set(value) != {"by_depth", "other"}:
                raise ValueError(f"a setting by depth has by_depth and other, found {sorted(value)}")
            return methods.ByDepth(tuple(value["by_depth"]), value["other"])
        return [read(item) for item in value] if isinstance(value, list) else value

    settings = {name: read(value) for name, value in options.items()}
    if "merge" in settings:  # the merge inside KnOTS
        inner = settings["merge"]
        if inner not in METHODS or inner == "knots":
            raise ValueError(f"merge: found {inner!r}, expected one of {', '.join(METHODS)}")
        settings["merge"] = getattr(methods, inner)
    return settings


def report_name(output: Path) -> Path:
    """The report by leaf of an output: in its folder, or beside its file."""
    return output / "leaf_report.json" if output.is_dir() else output.with_name(f"{output.stem}.leaf_report.json")


def write_report(output: Path, rows: Sequence[MergedLeaf], about: Mapping[str, Any]) -> None:
    """Writes the report by leaf."""
    from tvjax.checkpoints.atomic import replacing

    with replacing(report_name(output)) as temporary:
        content = {**about, "leaves": [row._asdict() for row in rows]}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
