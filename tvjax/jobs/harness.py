"""Language models on the benchmarks of lm-evaluation-harness, which runs as a program of its own, with torch.

It reads the folders that the other jobs write, so an edited model is measured as anybody else would measure it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tvjax.checkpoints.json_files import write_json
from tvjax.jobs import inputs
from tvjax.jobs.asking import Language, asking
from tvjax.jobs.configs import EvaluateConfig
from tvjax.jobs.opened import Models
from tvjax.progress import Progress

_OURS = {"model", "model_args", "tasks", "output_path", "batch_size"}


class Harnessed(NamedTuple):
    """What lm-evaluation-harness measured.

    Attributes:
      models: a record for each model, task and metric: ``model``, ``task``, ``metric``, ``filter``, ``value``,
        ``stderr`` (None where it gives none), ``examples`` and ``version`` of the task.
      harness: the version of lm-evaluation-harness.
    """

    models: list[dict[str, Any]]
    harness: str


def harness(config: EvaluateConfig, progress: Progress | None = None) -> Harnessed:
    """Runs lm-evaluation-harness on each model.

    Args:
      config: the models, ``harness``: its tasks, and ``options``: its own, such as ``limit``.
      progress: called after every model.

    Raises:
      ValueError: the harness is not installed, a model is no language model, or the harness fails; with its last words.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--harness needs lm-evaluation-harness, which is not installed: pip install 'tvjax[harness]'")
    if config.output is not None:
        inputs.check_file(config.output, ".json")
    own = sorted(_OURS & set(config.options))
    if own:
        raise ValueError(f"option {own[0]!r} of the harness is given by tvjax: leave it out")
    folders = {}
    with Models() as models:
        for name in config.models:
            if not isinstance(asking(models[name]), Language):
                raise ValueError(f"{name!r} is no language model: --harness has no tasks for it; give --data")
            models[name].processor.check_tokenizer()
            folders[name] = str(models[name].checkpoint.folder)
        found: list[dict[str, Any]] = []
        version = ""
        for number, (name, folder) in enumerate(folders.items()):
            report = _run(folder, config)
            version = str(report.get("lm_eval_version", ""))
            found += records_of(name, report)
            if progress is not None:
                progress(number + 1, len(folders), name)
    result = Harnessed(found, version)
    if config.output is not None:
        write_json(config.output, result._asdict(), sort_keys=False)
    return result


def _run(folder: str, config: EvaluateConfig) -> dict[str, Any]:
    """The report of the harness on one model."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}"]
        command += ["--tasks", ",".join(config.harness), "--batch_size", str(config.batch_size)]
        command += ["--output_path", place, *flags(config.options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reports = sorted(Path(place).rglob("results_*.json"))
        if done.returncode or not reports:
            said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            last = said[-1:] or [f"exit code {done.returncode}, and not a word"]
            reason = next((line for line in reversed(said) if "Error: " in line), last[0])
            raise ValueError(f"lm-evaluation-harness failed on {folder!r}: {reason}")
        return dict(json.loads(reports[-1].read_text(encoding="utf-8")))


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line; what is true is a flag.

    >>> flags({"limit": 10, "apply_chat_template": True, "log_samples": False})
    ['--limit', '10', '--apply_chat_template']
    """
    words = []
    for name, value in options.items():
        if value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def records_of(model: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measurements of a report, which names a metric and its filter in one: ``acc,none``.

    >>> report = {"results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1}}}
    >>> [(one["task"], one["metric"], one["value"], one["stderr"]) for one in records_of("a", report)]
    [('arc', 'acc', 0.5, 0.1)]
    """
    found = []
    for task, measured in report["results"].items():
        for key, value in measured.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = measured.get(f"{metric}_stderr,{kind}")
                found.append(
                    {
                        "model": model,
                        "task": task,
                        "metric": metric,
                        "filter": kind,
                        "value": value,
                        "stderr": stderr if isinstance(stderr, int | float) else None,  # "N/A" where there is none
                        "examples": report.get("n-samples", {}).get(task, {}).get("effective"),
                        "version": report.get("versions", {}).get(task),
                    }
                )
    return found
