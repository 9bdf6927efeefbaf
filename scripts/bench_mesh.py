"""Bytes on each of eight emulated devices while a transport is fitted over a mesh, and seconds beside one device.

A vision tower is moved onto a wider and deeper one, both spread over the mesh, the moved task vector stage by stage
(``fit(stream=...)``). Live arrays are counted by device wherever maps are about to be solved, while each device holds
the problem that it solves, and after each stage; the most is set against an eighth of what there is in all.

    python scripts/bench_mesh.py
    python scripts/bench_mesh.py --output results/bench_mesh.json
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # a meeting of eight devices needs eight threads, whatever the cores

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tvjax
from tvjax import Batch, tree
from tvjax.align import solving
from tvjax.models.clip.config import CLIPConfig, CLIPVisionConfig
from tvjax.models.clip.modeling import clip, init
from tvjax.tasks.zero_shot import with_head
from tvjax.transport import rotation
from tvjax.transport.plan import plan

jax.config.update("jax_cpu_enable_async_dispatch", False)  # the devices share a CPU

DEVICES = 8
EXAMPLES = 16
MESHES = {"fsdp": {"fsdp": 8}, "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2}}
METHODS: dict[str, Callable[..., Any]] = {"theseus": tvjax.theseus, "bico": tvjax.bico}


def tower(width: int, depth: int, seed: int) -> Any:
    """A CLIP vision tower with random weights and a loss over eight random classes."""
    vision = CLIPVisionConfig(width, 4 * width, depth, 4, image_size=32, patch_size=8, projection_dim=64)
    config = CLIPConfig(vision, None)
    classifier = jax.random.normal(jax.random.key(7), (64, 8))
    return with_head(clip(config, init(config, jax.random.key(seed))), classifier, jax.numpy.float32(4.6))


def spread_over(mesh: Any, params: Any) -> Any:
    """Each leaf over all axes of the mesh, along its largest axis that they divide."""

    def place(leaf: Any) -> Any:
        spec: list[Any] = [None] * leaf.ndim
        axes = [i for i, n in enumerate(leaf.shape) if n % DEVICES == 0]
        if axes:
            spec[max(axes, key=lambda i: leaf.shape[i])] = mesh.axis_names
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, params)


class Watch:
    """The most bytes of live arrays on a device at the moments that it is asked, and what they were of."""

    def __init__(self) -> None:
        self.most, self.where, self.moments = 0, "", 0

    def look(self, where: str) -> None:
        """Counts what is alive."""
        held: Counter[Any] = Counter()
        gc.collect()
        seen = set()  # looking at a shard makes one more array of the same bytes
        for array in jax.live_arrays():
            for shard in array.addressable_shards:
                own = shard.device, shard.data.unsafe_buffer_pointer()
                if own not in seen:
                    held[shard.device] += shard.data.nbytes
                seen.add(own)
        if max(held.values()) > self.most:
            self.most, self.where = max(held.values()), where


def run(method: str, sizes: dict[str, int] | None) -> dict[str, Any]:
    """One fit with its task vector moved; over a mesh of these sizes, or on one device."""
    source, target = tower(256, 2, 0), tower(384, 3, 1)
    pixels = jax.random.normal(jax.random.key(1), (EXAMPLES, 32, 32, 3))
    batch = Batch({"pixels": pixels}, jax.random.randint(jax.random.key(2), (EXAMPLES,), 0, 8))
    tau = jax.tree.map(lambda x: 1e-3 * jax.random.normal(jax.random.key(3), x.shape), source.params)
    if sizes is not None:
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        source, target = (model.replace(params=spread_over(mesh, model.params)) for model in (source, target))
        tau = spread_over(mesh, tau)
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    del pixels
    gc.collect()  # what was made on one device
    transport = METHODS[method](rank_tolerance=1e-3)
    watch = Watch()
    inner, inner_own = rotation.solve, solving._solve_own

    def solve(problems: Any, mesh: Any) -> Any:
        whole = {id(x): x.nbytes for problem in problems for x in jax.tree.leaves(problem.arrays)}
        watch.moments = max(watch.moments, sum(whole.values()))
        watch.look("moments before they are solved")
        return inner(problems, mesh)

    def own(*arguments: Any) -> Any:
        found = inner_own(*arguments)
        watch.look("a problem and its solution on each device")
        return found

    rotation.solve, solving._solve_own = solve, own  # type: ignore[assignment]
    try:
        started = time.perf_counter()
        tvjax.fit(transport, source, target, [batch], stream=[tau], progress=lambda done, total, name: watch.look(name))
        seconds = time.perf_counter() - started
    finally:
        rotation.solve, solving._solve_own = inner, inner_own
    found = plan(transport, source, target, [batch])
    parameters = tree.nbytes((source.params, target.params))
    decomposition = found.on_device.get("decomposition", 0)
    devices = 1 if sizes is None else DEVICES
    eighth = (parameters + watch.moments) / devices
    return {
        "method": method,
        "mesh": sizes or "one device",
        "seconds with compilation": round(seconds, 1),
        "largest bytes on a device": watch.most,
        "held then": watch.where,
        "parameters": parameters,
        "moments, rows and kernels that the largest stage solves": watch.moments,
        "an eighth of both": round(eighth),
        "one decomposition": decomposition,
        "ratio, task vectors and residual streams included": round((watch.most - decomposition) / eighth, 3),
        "planned on a device": found.on_device,
    }


def main() -> None:
    """Runs every case in turn and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/bench_mesh.json"))
    arguments = parser.parse_args()
    results = []
    for method in METHODS:
        for sizes in MESHES.values():
            results.append(run(method, sizes))
            print(json.dumps(results[-1]), flush=True)
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "numpy")}
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine(), "devices": DEVICES}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(json.dumps({"versions": versions, "machine": machine, "results": results}, indent=1) + "\n")
    temporary.replace(arguments.output)


if __name__ == "__main__":
    main()
