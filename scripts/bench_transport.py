"""Time and memory of transports at real size, with random weights: CLIP ViT-B/16's vision tower onto ViT-L/14's.

Each case runs in a process of its own, so that its peak memory is its own. Everything is compiled first, on towers of
two blocks (what is compiled does not depend on the depth), and the full towers are then timed. `gradfix` is set against
one plain batched forward and backward pass of the same images in the same process.

    python scripts/bench_transport.py                     # every case
    python scripts/bench_transport.py theseus bico        # some
    python scripts/bench_transport.py --output results/bench_transport.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = {
    "theseus": {"method": "theseus", "options": {}},
    "theseus-polar": {"method": "theseus", "options": {"method": "polar"}},
    "theseus-randomised": {"method": "theseus", "options": {"method": "randomised", "rank": 0.25}},
    "bico": {"method": "bico", "options": {}},
    "bico-polar": {"method": "bico", "options": {"method": "polar"}},
    "bico-randomised": {"method": "bico", "options": {"method": "randomised", "rank": 0.25}},
    "gradfix-4": {"method": "gradfix", "images": 4},
    "gradfix-8": {"method": "gradfix", "images": 8},
    "gradfix-16": {"method": "gradfix", "images": 16},
}
GIB = 2.0**30


def vision_tower(size: str, seed: int, depth: int | None = None) -> Any:
    """A CLIP vision tower of real size with random weights and a classification loss over ten random classes."""
    import jax

    from tvjax.models.clip.config import CLIPConfig, CLIPVisionConfig
    from tvjax.models.clip.modeling import clip, init
    from tvjax.tasks.zero_shot import with_head

    shapes = {
        "B/16": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "image_size": 224, "patch_size": 16, "projection_dim": 512},
        "L/14": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                 "image_size": 224, "patch_size": 14, "projection_dim": 768},
    }  # fmt: skip
    shape = shapes[size] | ({} if depth is None else {"num_hidden_layers": depth})
    config = CLIPConfig(vision=CLIPVisionConfig(**shape), text=None)
    model = clip(config, init(config, jax.random.key(seed)))
    classifier = jax.random.normal(jax.random.key(7), (shape["projection_dim"], 10))
    return with_head(model, classifier, jax.numpy.float32(4.6))


def images(count: int) -> Any:
    """Random images with labels."""
    import jax

    from tvjax import Batch

    pixels = jax.random.normal(jax.random.key(1), (count, 224, 224, 3))
    return Batch({"pixels": pixels}, jax.random.randint(jax.random.key(2), (count,), 0, 10))


class Clock:
    """Seconds by phase, waiting for the device at the end of each call of the functions that it watches."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Replaces a function by one that adds its time to a phase."""
        import jax

        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = jax.block_until_ready(inner(*args, **kwargs))
            self.seconds[phase] += time.perf_counter() - started
            return result

        setattr(owner, name, timed)


def run_transport(case: dict[str, Any]) -> dict[str, Any]:
    """Fits and applies a transport onto all 24 blocks, stage by stage."""
    import jax

    import tvjax
    from tvjax.transport import rotation
    from tvjax.transport.base import Transport
    from tvjax.transport.statistics import Statistics
    from tvjax.walk import Walk

    transport = {"theseus": tvjax.theseus, "bico": tvjax.bico}[case["method"]](**case["options"])
    batches = [images(8)]

    def once(depths: tuple[int | None, int | None]) -> float:
        source, target = vision_tower("B/16", 0, depths[0]), vision_tower("L/14", 1, depths[1])
        tau = jax.tree.map(lambda x: 1e-3 * jax.random.normal(jax.random.key(3), x.shape), source.params)
        jax.block_until_ready((source, target, tau))
        started = time.perf_counter()
        jax.block_until_ready(tvjax.fit(transport, source, target, batches, stream=[tau]))
        return time.perf_counter() - started

    cold, warm = once((2, 2)), once((2, 2))
    clock = Clock()
    clock.watch(Walk, "observe", "forward and backward")
    clock.watch(Walk, "carries", "forward and backward")
    clock.watch(rotation, "_aligned_rows", "token alignment")
    clock.watch(Statistics, "add", "moments")
    clock.watch(Statistics, "solve", "decomposition")
    clock.watch(Statistics, "solve_outputs", "decomposition")
    clock.watch(Statistics, "residual", "residual")
    clock.watch(Transport, "apply", "apply")
    total = once((None, None))
    phases = dict(clock.seconds)
    return {
        "compile_seconds": cold - warm,
        "run_seconds": total,
        "phases": {**phases, "rest": total - sum(phases.values())},
    }


def run_gradfix(case: dict[str, Any]) -> dict[str, Any]:
    """Votes of some images on ViT-B/16, beside one plain forward and backward pass of the same batch, in turn.

    The peak memory is that of the votes alone, read before the first plain pass.
    """
    import jax
    import jax.numpy as jnp

    import tvjax
    from tvjax.stages import local_params

    model = vision_tower("B/16", 0)
    batch = images(case["images"])

    @jax.jit
    def plain(params: Any, inputs: Any, labels: Any) -> Any:
        carry = inputs
        for stage in model.stages:
            carry = stage.function(local_params(stage, params), carry)
        return jnp.sum(model.loss(model.loss_params, carry, labels))

    gradient = jax.jit(jax.grad(plain))
    transport = tvjax.gradfix()
    timings: dict[str, list[float]] = {"plain": [], "gradfix": []}
    peak = 0.0
    for _ in range(4):
        started = time.perf_counter()
        jax.block_until_ready(tvjax.fit(transport, model, model, [batch]))
        timings["gradfix"].append(time.perf_counter() - started)
        peak = peak or peak_memory_gib()
        started = time.perf_counter()
        jax.block_until_ready(gradient(model.params, batch.inputs, batch.labels))
        timings["plain"].append(time.perf_counter() - started)
    plain_seconds, votes_seconds = (sorted(timings[name][1:])[1] for name in ("plain", "gradfix"))
    return {
        "images": case["images"],
        "compile_seconds": timings["gradfix"][0] - votes_seconds,
        "run_seconds": votes_seconds,
        "plain_forward_backward_seconds": plain_seconds,
        "ratio": votes_seconds / plain_seconds,
        "peak_memory_gib": peak,
    }


def run_case(name: str) -> dict[str, Any]:
    """One case in this process."""
    case = CASES[name]
    result = run_gradfix(case) if case["method"] == "gradfix" else run_transport(case)
    return {"case": name, "peak_memory_gib": peak_memory_gib(), **result}


def peak_memory_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    """Runs the cases in processes of their own and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="cases to run; all by default")
    parser.add_argument("--output", type=Path, default=Path("results/bench_transport.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_case(arguments.one)))
        return
    results = {}
    if arguments.output.exists():
        results = {result["case"]: result for result in json.loads(arguments.output.read_text())["results"]}
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "numpy")}
    processor = platform.processor() or platform.machine()
    machine = {"cores": os.cpu_count(), "processor": processor, "python": platform.python_version()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases or CASES:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(results[name]), flush=True)
        report = {"versions": versions, "machine": machine, "results": [results[n] for n in CASES if n in results]}
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(arguments.output)


if __name__ == "__main__":
    main()
