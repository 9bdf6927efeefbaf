"""Time and memory of merges at real size: four random task vectors of CLIP ViT-B/32's vision tower, 88 M entries each.

The vectors lie on host in float32 or bfloat16. Each case runs in a process of its own, so that its peak memory is its
own: once to compile, then three times, of which the median counts. The same process copies the vectors with `np.copy`,
leaf by leaf, for the ratio to a plain memory copy of the same bytes. Figures of published PyTorch code, measured on
a machine like ours with two cores, stand beside.

    python scripts/bench_merge.py                     # every case
    python scripts/bench_merge.py ties dare           # some
    python scripts/bench_merge.py --output results/bench_merge.json
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Our goal and what published code takes: seconds and GiB.
FIGURES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"goal": [0.8, 2.5], "published": [[3.2, 4.0]]},
    "ties": {"goal": [5.0, 2.5], "published": [[23.0, 10.8], [120.0, 3.0]]},
    "dare": {"goal": [1.2, 2.5], "published": [[10.1, 9.0], [3.0, 2.7]]},
    "tsv_m": {"goal": [25.0, 3.0], "published": [[67.6, 3.1]]},
    "iso_c": {"goal": [5.0, 2.5], "published": [[15.0, 4.2]]},
}
OTHERS = ("average", "slerp", "karcher_mean", "model_stock", "breadcrumbs", "sce", "della")
CASES = [f"{name}{dtype}" for name in (*FIGURES, *OTHERS) for dtype in ("", "-bfloat16")]
VECTORS = 4
GIB = 2.0**30


def task_vectors(dtype: str) -> list[Any]:
    """Random task vectors of the vision tower, as NumPy arrays."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tvjax.models.clip.config import CLIPConfig, CLIPVisionConfig
    from tvjax.models.clip.modeling import init

    vision = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
        patch_size=32, projection_dim=512,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda key: init(CLIPConfig(vision=vision, text=None), key), jax.random.key(0))
    random = np.random.default_rng(0)
    scale = np.float32(1e-3)

    def leaf(like: Any) -> Any:
        return (scale * random.standard_normal(like.shape, np.float32)).astype(jnp.dtype(dtype))

    return [jax.tree.map(leaf, shapes) for _ in range(VECTORS)]


def run_case(case: str) -> dict[str, Any]:
    """One case in this process."""
    import jax
    import numpy as np

    import tvjax.merge

    name, _, dtype = case.partition("-")
    merge = getattr(tvjax.merge, name)
    options = {"key": jax.random.key(0)} if name in ("dare", "della") else {}
    taus = task_vectors(dtype or "float32")
    taus = taus[:2] if name == "slerp" else taus
    leaves = [leaf for tau in taus for leaf in jax.tree.leaves(tau)]
    start = peak_memory_gib()

    def once() -> float:
        started = time.perf_counter()
        jax.block_until_ready(merge(taus, **options))
        return time.perf_counter() - started

    first = once()
    runs = []
    for _ in range(3):
        gc.collect()
        runs.append(once())
    peak = peak_memory_gib()
    copies = []
    for _ in range(3):
        started = time.perf_counter()
        for leaf in leaves:
            np.copy(leaf)
        copies.append(time.perf_counter() - started)
    seconds, copy = sorted(runs)[1], sorted(copies)[1]
    return {
        "case": case,
        "entries": sum(leaf.size for leaf in leaves),
        "gib_of_vectors": sum(leaf.nbytes for leaf in leaves) / GIB,
        "compile_seconds": first - seconds,
        "run_seconds": seconds,
        "copy_seconds": copy,
        "ratio_to_copy": seconds / copy,
        "memory_before_gib": start,
        "peak_memory_gib": peak,
        **FIGURES.get(name, {}),
    }


def peak_memory_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def line(result: dict[str, Any]) -> str:
    """A result as one line of text."""

    def pair(figures: list[float]) -> str:
        return f"{figures[0]:g} s {figures[1]:g} GiB"

    text = (
        f"{result['case']:<25} {result['run_seconds']:7.2f} s {result['peak_memory_gib']:5.2f} GiB   "
        f"{result['ratio_to_copy']:7.1f} x copy   compile {result['compile_seconds']:5.1f} s"
    )
    if "goal" in result:
        text += f"   goal {pair(result['goal'])}   published {' or '.join(map(pair, result['published']))}"
    return text


def main() -> None:
    """Runs the cases in processes of their own and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="cases to run; all by default")
    parser.add_argument("--output", type=Path, default=Path("results/bench_merge.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_case(arguments.one)))
        return
    results = {}
    if arguments.output.exists():
        results = {result["case"]: result for result in json.loads(arguments.output.read_text())["results"]}
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "numpy")}
    processor = platform.processor() or platform.machine()
    machine = {"cores": os.cpu_count(), "processor": processor, "python": platform.python_version()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases or CASES:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(line(results[name]), flush=True)
        report = {"versions": versions, "machine": machine, "results": [results[n] for n in CASES if n in results]}
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(arguments.output)


if __name__ == "__main__":
    main()
