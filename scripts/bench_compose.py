"""Time and memory of learning coefficients at real size, with random weights: few-shot on CLIP ViT-B/32's tower.

Each case runs in a process of its own, so that its peak memory is its own. A step (gradient and optimiser) over eight
task vectors stored in bfloat16 is set against one plain forward and backward pass of the same batch, in turn, in the
same process. A first process compiles into a cache, so that the peak memory of the second is that of the steps; it is
read before the first plain pass. `bytes` are those of the compiled programs with arguments, results and temporaries.

    python scripts/bench_compose.py                     # every case
    python scripts/bench_compose.py leaf                # some
    python scripts/bench_compose.py --output results/bench_compose.json
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "leaf": {},
    "vector": {"blocks": "vector"},
    "leaf-x-10": {"partitions": 10},
    "linearised": {"linearised": True},
}
VECTORS, BATCH = 8, 8
ALONE, BESIDE = 2, 5  # steps before the first plain pass, and steps beside one
GIB = 2.0**30


def vision_tower() -> Any:
    """CLIP ViT-B/32's vision tower with random weights and a classification loss over ten random classes."""
    import jax

    from tvjax.models.clip import CLIPConfig, CLIPVisionConfig, clip, init
    from tvjax.tasks.zero_shot import with_head

    vision = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
        patch_size=32, projection_dim=512,
    )  # fmt: skip
    config = CLIPConfig(vision=vision, text=None)
    classifier = jax.random.normal(jax.random.key(7), (vision.projection_dim, 10))
    return with_head(clip(config, init(config, jax.random.key(0))), classifier, jax.numpy.float32(4.6))


def run_case(name: str) -> dict[str, Any]:
    """One case in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tvjax.compose import Edited, few_shot, init, learn, linearise, value
    from tvjax.stages import Batch

    options = dict(CASES[name])
    model = vision_tower()

    random = np.random.default_rng(0)

    def noise(leaf: Any) -> Any:
        return jnp.asarray((1e-3 * random.standard_normal(leaf.shape, np.float32)).astype(jnp.bfloat16))

    taus = [jax.tree.map(noise, model.params) for _ in range(VECTORS)]
    pixels = jax.random.normal(jax.random.key(1), (BATCH, 224, 224, 3))
    batch = Batch({"pixels": pixels}, jax.random.randint(jax.random.key(2), (BATCH,), 0, 10))
    objective = few_shot(linearise(model) if options.pop("linearised", False) else model, batch)
    start = init(taus, key=jax.random.key(3), **options)
    jax.block_until_ready((taus, batch))
    plain_objective = few_shot(model, batch)
    key = jax.random.key(4)

    @jax.jit
    def plain(params: Any, objective: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: value(objective, p, [batch], key))(params)

    steps: list[float] = []
    passes: list[float] = []
    peaks: list[float] = []
    ctypes.CDLL(None).malloc_trim(0)  # what making the arrays has left behind
    resident = resident_gib()
    stamp = [time.perf_counter()]

    def after_step(done: int, total: int, text: str) -> None:
        steps.append(time.perf_counter() - stamp[0])
        if done >= ALONE:
            peaks.append(peak_memory_gib())
            began = time.perf_counter()
            jax.block_until_ready(plain(model.params, plain_objective, batch))
            passes.append(time.perf_counter() - began)
        stamp[0] = time.perf_counter()

    learn(
        model.params, taus, objective, key=key, coefficients=start, batch_size=None, batches_per_epoch=1,
        epochs=ALONE + BESIDE, progress=after_step,
    )  # fmt: skip
    step_seconds, plain_seconds = sorted(steps[ALONE:])[BESIDE // 2], sorted(passes[1:])[BESIDE // 2]

    def gradient(coefficients: Any, params: Any, taus: Any, objective: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda c: value(objective, Edited(params, taus, c), [batch], key))(coefficients)

    compiled = {
        "step": jax.jit(gradient).lower(start, model.params, taus, objective, batch).compile().memory_analysis(),
        "plain": plain.lower(model.params, plain_objective, batch).compile().memory_analysis(),
    }
    sizes = {part: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for part, tree in
             {"model": model.params, "gradient": model.params, "vectors": taus, "batch": batch}.items()}  # fmt: skip
    programs = {
        program: m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
        for program, m in compiled.items()
    }
    allowed = sizes["model"] + sizes["gradient"] + sizes["vectors"]
    return {
        "case": name,
        "parameters": sizes["model"] // 4,
        "first_step_seconds": steps[0],
        "step_seconds": step_seconds,
        "plain_forward_backward_seconds": plain_seconds,
        "ratio": step_seconds / plain_seconds,
        "bytes": {**sizes, "step_program": programs["step"], "plain_program": programs["plain"]},
        "step_program_over_model_gradient_and_vectors": programs["step"] / allowed,
        "resident_memory_gib_before_the_first_step": resident,
        "peak_memory_gib": peaks[0],
    }


def peak_memory_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def resident_gib() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def run_process(name: str, cache: str) -> dict[str, Any]:
    """One case in a process of its own, which finds compiled programs in a folder or leaves them there."""
    settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the cases in processes of their own and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="cases to run; all by default")
    parser.add_argument("--output", type=Path, default=Path("results/bench_compose.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_case(arguments.one)))
        return
    results = {}
    if arguments.output.exists():
        results = {result["case"]: result for result in json.loads(arguments.output.read_text())["results"]}
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax", "numpy")}
    processor = platform.processor() or platform.machine()
    machine = {"cores": os.cpu_count(), "processor": processor, "python": platform.python_version()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases or CASES:
        with tempfile.TemporaryDirectory() as cache:
            cold, results[name] = (run_process(name, cache) for _ in range(2))
        results[name]["compile_seconds"] = cold["first_step_seconds"] - results[name]["step_seconds"]
        print(json.dumps(results[name]), flush=True)
        report = {"versions": versions, "machine": machine, "results": [results[n] for n in CASES if n in results]}
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(arguments.output)


if __name__ == "__main__":
    main()
