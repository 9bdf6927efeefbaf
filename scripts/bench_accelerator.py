"""Time of arithmetic, moments, polar factors and whole transports on an accelerator, each beside the device's own rate.

The rates are measured in the same process: a copy of a large buffer (bytes read and written) and a product of two large
matrices in float32 at the precision that moments are formed with (`jax.lax.Precision.HIGHEST`).

- ``arithmetic``: `tvjax.task_vector` and `tvjax.apply` on a tree of matrices, as a share of the copy's bandwidth.
- ``moments``: `tvjax.align.moments.update` on rows of a 4096-wide model, as a share of the product's rate.
- ``polar``: the polar factor by ``"svd"`` and by ``"polar"`` (products alone) at several sizes, with the distance of
  either to a float64 reference on the host.
- ``transport``: CLIP ViT-B/16's vision tower onto ViT-L/14's with random weights, by either method.
- ``language``: one Llama of 1.1 B parameters onto another (`scripts/bench_language.py`'s, in bfloat16), Theseus.
- ``gradfix``: votes on ViT-B/16, beside one plain forward and backward pass of the same images.
- ``correction``: one pass of `tvjax.logit_correction` (three by default) on ViT-L/14 from the scores of ViT-B/16, 32
  images in batches of 8, 100 classes, beside three epochs of distillation by Adam in the same batches.

The last four compile with `UNTUNED`: else XLA tries many kernels for each of some hundred float32 products before it
runs them once (one method on an H200, two blocks a tower: 153 programs in 134 seconds).

    python scripts/bench_accelerator.py                    # every case, on the first device
    python scripts/bench_accelerator.py --small            # tiny sizes: does it run (any machine)
    python scripts/bench_accelerator.py polar transport    # some; the others stay in the results file as they are
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CASES = ("arithmetic", "moments", "polar", "gradfix", "language", "transport", "correction")
UNTUNED = "--xla_gpu_autotune_level=0"  # a flag of XLA: take its first choice of a kernel
NAMES = ("B/16", "L/14")
REPEATS = 7


def seconds(function: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median time of a call after one that compiles, waiting for the device."""
    import jax

    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def copy_rate(small: bool) -> float:
    """Bytes read and written in a second by a copy of a buffer of 4 GB."""
    import jax
    import jax.numpy as jnp

    buffer = jax.random.normal(jax.random.key(0), (2**20 if small else 2**30,))
    negated = jax.jit(jnp.negative)  # what XLA would elide as a plain copy
    return 2 * buffer.nbytes / seconds(lambda: negated(buffer), 15)


def product_rate(small: bool) -> float:
    """Floating-point operations in a second of a square product in float32, at the precision of moments."""
    import jax

    from tvjax.align.products import product

    size = 256 if small else 8192
    a, b = (jax.random.normal(jax.random.key(i), (size, size)) for i in range(2))
    compiled = jax.jit(product)
    return 2 * size**3 / seconds(lambda: compiled(a, b))


def arithmetic(small: bool) -> dict[str, Any]:
    """Bandwidth of extraction and application."""
    import jax
    import jax.numpy as jnp

    import tvjax as tv

    size, count = (64, 4) if small else (4096, 24)
    rate = copy_rate(small)
    result: dict[str, Any] = {"copy_bytes_per_second": rate, "matrices": [count, size, size]}
    for name in ("float32", "bfloat16"):
        dtype = jnp.dtype(name)

        def tree(seed: int, dtype: Any = dtype) -> Any:
            keys = jax.random.split(jax.random.key(seed), count)
            return {f"w{i}": jax.random.normal(key, (size, size), dtype) for i, key in enumerate(keys)}

        base, tuned = tree(0), tree(1)
        extract, edit = jax.jit(tv.task_vector), jax.jit(tv.apply)
        tau = jax.block_until_ready(extract(base, tuned))
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
        wide = sum(leaf.nbytes for leaf in jax.tree.leaves(tau))
        for job, run in (
            ("task_vector", partial(extract, base, tuned)),
            ("apply", partial(edit, base, tau, 0.5)),
        ):
            taken, moved = seconds(run), 2 * stored + wide
            result[f"{job} {name}"] = {"seconds": taken, "bytes": moved, "share_of_copy": moved / taken / rate}
    return result


def moments(small: bool) -> dict[str, Any]:
    """The rate of the update of cross-moments, with and without Gram matrices."""
    import jax

    from tvjax.align import moments as align_moments

    rows, width = (64, 32) if small else (16384, 4096)
    rate = product_rate(small)
    a, b = (jax.random.normal(jax.random.key(i), (rows, width)) for i in range(2))
    weights = jax.numpy.ones(rows)
    result: dict[str, Any] = {"product_flops_per_second": rate, "rows": rows, "width": width}
    for gram in (False, True):
        state = align_moments.init(width, width, gram=gram)
        taken = seconds(lambda state=state: align_moments.update(state, a, b, weights))
        flops = 2 * rows * width**2 * (3 if gram else 1)
        result["with Gram matrices" if gram else "cross-moments"] = {
            "seconds": taken,
            "share_of_product": flops / taken / rate,
        }
    return result


def polar(small: bool) -> dict[str, Any]:
    """The polar factor of moments with a decaying spectrum of a third of the rank, by SVD and by products."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tvjax.align.procrustes import matrix
    from tvjax.align.procrustes import polar as polar_map

    sizes = ((32, 32), (32, 48)) if small else ((768, 768), (1024, 1024), (768, 1024), (2048, 2048), (3072, 4096))
    result = {}
    for shape in sizes:
        rank = max(2, min(shape) // 3)
        left, right = (jax.random.normal(jax.random.key(i), (n, rank)) for i, n in enumerate(shape))
        left, right = jnp.linalg.qr(left)[0], jnp.linalg.qr(right)[0]
        values = jnp.logspace(0, -3, rank)
        moment = jnp.matmul(left * values, right.T, precision="highest")
        exact = np.asarray(left, np.float64) @ np.asarray(right, np.float64).T
        row: dict[str, Any] = {"rank": rank}
        for method in ("svd", "polar"):
            run = jax.jit(lambda c, method=method: matrix(polar_map(c, rank_tolerance=1e-4, method=method)))
            row[method] = {
                "seconds": seconds(lambda run=run, moment=moment: run(moment), 3),
                "distance": float(np.linalg.norm(np.asarray(run(moment)) - exact) / np.linalg.norm(exact)),
            }
        row["svd_over_polar"] = row["svd"]["seconds"] / row["polar"]["seconds"]
        result["x".join(map(str, shape))] = row
    return result


def transport(small: bool) -> dict[str, Any]:
    """Fit and application onto all blocks of the target, after two blocks of either tower, which compile most of it."""
    import jax

    import tvjax as tv

    result: dict[str, Any] = {}
    for method in ("polar", "svd"):
        for name, make in (("theseus", tv.theseus), ("bico", tv.bico)):
            link = make(method=method)

            def once(depths: tuple[int | None, int | None], link: Any = link) -> tuple[float, float]:
                source, target = (tower(size, small, depth) for size, depth in zip(NAMES, depths, strict=True))
                tau = jax.tree.map(lambda x: 1e-3 * jax.random.normal(jax.random.key(3), x.shape), source.params)
                batches = [images(small, 32)]
                jax.block_until_ready((source.params, target.params, tau, batches))
                started = time.perf_counter()
                state = jax.block_until_ready(tv.fit(link, source, target, batches))
                fitted = time.perf_counter()
                # Leaf by leaf: under one `jit` XLA would compile every leaf of every block apart.
                jax.block_until_ready(link.apply(state, tau))
                return fitted - started, time.perf_counter() - fitted

            runs = {"two blocks": once((2, 2)), "first": once((None, None)), "again": once((None, None))}
            result[f"{name} {method}"] = {
                run: {"fit_seconds": fit, "apply_seconds": applied} for run, (fit, applied) in runs.items()
            }
            print(name, method, result[f"{name} {method}"], file=sys.stderr, flush=True)
    return result


def language(small: bool) -> dict[str, Any]:
    """Theseus with a quarter of the rank and whole, streamed; compiled before on two blocks of either model."""
    import jax

    import tvjax as tv
    from bench_language import llama, texts

    blocks, width = (2, 128) if small else (22, 2048)
    result: dict[str, Any] = {"blocks": blocks, "width": width, "texts": [8, 128]}
    source, target = (llama(seed, blocks, width, on_device=True) for seed in range(2))
    result["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(target.params))
    tau = jax.tree.map(lambda leaf: leaf * jax.numpy.asarray(0.01, leaf.dtype), source.params)
    batch = texts(source.params["embeddings"]["tokens"].shape[0])
    jax.block_until_ready((source.params, target.params, tau, batch))
    for name, link in (("polar", tv.theseus(method="polar")), ("quarter", tv.theseus(method="randomised", rank=0.25))):
        times = []
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            moved = tv.fit(link, source, target, [batch], stream=[tau])
            jax.block_until_ready(moved)
            times.append(time.perf_counter() - started)
            del moved
        result[name] = {"first_seconds": times[0], "run_seconds": times[1]}
        print(name, result[name], file=sys.stderr, flush=True)
    return result


def gradfix(small: bool) -> dict[str, Any]:
    """Votes of 16 images beside a plain pass."""
    import jax
    import jax.numpy as jnp

    import tvjax as tv
    from tvjax.stages import local_params

    model, batch = tower("B/16", small), images(small, 4 if small else 16)

    def total(params: Any) -> Any:
        carry = batch.inputs
        for stage in model.stages:
            carry = stage.function(local_params(stage, params), carry)
        return jnp.sum(model.loss(model.loss_params, carry, batch.labels))

    gradient = jax.jit(jax.grad(total))
    votes = seconds(lambda: tv.fit(tv.gradfix(), model, model, [batch]), 3)
    plain = seconds(lambda: gradient(model.params), 3)
    return {"votes_seconds": votes, "plain_seconds": plain, "ratio": votes / plain}


def correction(small: bool) -> dict[str, Any]:
    """A pass of the closed form and three epochs of Adam, each compiled before; the peak of the first is its own."""
    import jax
    import optax

    import tvjax as tv
    from tvjax import tree
    from tvjax.compose import class_scores, constant, distillation, distillation_losses, train
    from tvjax.data.batches import split

    count, size, classes, epochs = (8, 4, 70, 3) if small else (32, 8, 100, 3)
    batch, optimiser = images(small, count), lambda rate: optax.adam(rate)
    batches = split(tv.Batch(batch.inputs, None), size)
    result: dict[str, Any] = {"images": count, "batch": size, "classes": classes, "epochs": epochs}
    teacher = class_scores(tower("B/16", small, None, classes), batches)

    def timed(run: Callable[[Any], Any], name: str, *depths: int | None) -> None:
        """Compiled at the first depth; timed at the last."""
        times = []
        for depth in depths:
            model = jax.block_until_ready(tower("L/14", small, depth, classes))
            started = time.perf_counter()
            params = jax.block_until_ready(run(model))
            times.append(time.perf_counter() - started)
            print(f"{name}, {depth or 'all'} blocks: {times[-1]:.1f} s", file=sys.stderr, flush=True)
        before, after = (
            float(distillation_losses(class_scores(m, batches), teacher).mean())
            for m in (model, model.replace(params=params))
        )
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        result[name] = {"compile_seconds": times[0] - times[1], "run_seconds": times[-1], "peak_device_bytes": peak}
        result[name] |= {"loss_before": before, "loss_after": after}

    def adam(model: Any) -> Any:
        objective = distillation(model, batch.inputs, teacher)
        return train(
            tree.replace, model.params, tree.flatten(model.params), objective, key=jax.random.key(0), schedule=constant,
            learning_rates=(1e-5,), optimiser=optimiser, epochs=epochs, batch_size=size,
            batches_per_epoch=count // size,
        ).trainable  # fmt: skip

    def closed(model: Any) -> Any:
        return tv.apply(model.params, tv.logit_correction(model, teacher, batches, passes=1))

    timed(closed, "a pass of the closed form", 2, 2, None)  # whose programs are those of a stage
    timed(lambda model: tree.replace(model.params, adam(model)), "distillation", None, None)
    return result


def tower(size: str, small: bool, depth: int | None = None, classes: int = 10) -> Any:
    """A CLIP vision tower with random weights and a classification loss over some random classes."""
    import jax

    from tvjax.models.clip.config import CLIPConfig, CLIPVisionConfig
    from tvjax.models.clip.modeling import clip, init
    from tvjax.tasks.zero_shot import with_head

    width, depths, heads, patch, joint = {"B/16": (768, 12, 12, 16, 512), "L/14": (1024, 24, 16, 14, 768)}[size]
    if small:
        width, depths, heads, joint = width // 24, 2, 2, 16
    config = CLIPConfig(
        vision=CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth or depths,
            num_attention_heads=heads, image_size=224, patch_size=8 * patch if small else patch, projection_dim=joint,
        ),
        text=None,
    )  # fmt: skip
    model = clip(config, init(config, jax.random.key(0 if size == "B/16" else 1)))
    return with_head(model, jax.random.normal(jax.random.key(7), (joint, classes)), jax.numpy.float32(4.6))


def images(small: bool, count: int) -> Any:
    """Random images with labels."""
    import jax

    import tvjax as tv

    pixels = jax.random.normal(jax.random.key(1), (count, 224, 224, 3))
    return tv.Batch({"pixels": pixels}, jax.random.randint(jax.random.key(2), (count,), 0, 10))


def run_case(name: str, small: bool) -> dict[str, Any]:
    """One case in this process, with the peak of the device's memory where it tells."""
    import jax

    device = jax.devices()[0]
    measured = globals()[name](small)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"case": name, "device": device.device_kind, "peak_device_bytes": peak, **measured}


def main() -> None:
    """Runs the cases in processes of their own and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="cases to run; all by default")
    parser.add_argument("--small", action="store_true", help="tiny sizes; nothing is written unless --output is given")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_case(arguments.one, arguments.small)))
        return
    output = arguments.output or (None if arguments.small else Path("results/bench_accelerator.json"))
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "numpy")}
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    results: dict[str, Any] = {}
    if output is not None and output.exists():
        results = {result["case"]: result for result in json.loads(output.read_text())["results"]}
    for name in arguments.cases or CASES:
        command = [sys.executable, __file__, "--one", name, *(["--small"] if arguments.small else [])]
        flags = f"{os.environ.get('XLA_FLAGS', '')} {UNTUNED if name in CASES[3:] else ''}"
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "XLA_FLAGS": flags}
        )
        if done.returncode:
            raise SystemExit(f"{name} failed")
        results[name] = json.loads(done.stdout.splitlines()[-1]) | {"versions": versions, "machine": machine}
        print(json.dumps(results[name]), flush=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary = output.with_suffix(".tmp")
            temporary.write_text(
                json.dumps({"results": [results[case] for case in CASES if case in results]}, indent=1)
            )
            temporary.replace(output)


if __name__ == "__main__":
    main()
