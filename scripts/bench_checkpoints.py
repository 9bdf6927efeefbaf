"""Time and memory of checkpoints at real size: a random CLIP ViT-L/14, 1.7 GB, and a fine-tuned vision tower, 1.2 GB.

Loading stands beside `safetensors.numpy.load_file` of the same files; extracting and applying a task vector beside a
plain copy of the same input files, in blocks of 16 MiB into files that are synced and renamed as ours are. Each case
runs in a process of its own, the cases of a round one after another, so that all of them meet the same machine; the
median of the rounds counts. All files lie in the page cache. Memory is the peak of the resident set, less what it was
when everything was imported and JAX had started.

    python scripts/bench_checkpoints.py                     # every case
    python scripts/bench_checkpoints.py load --rounds 5     # some
    python scripts/bench_checkpoints.py --dtype bfloat16    # of 16-bit checkpoints
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Each case with the one that it is held against: (case, files that both read).
CASES = {
    "load": ("load_file", ("base",)),
    "load_tower": ("load_file", ("tuned",)),
    "extract": ("copy", ("base", "tuned")),
    "apply": ("copy", ("base", "tau")),
}
BLOCK = 2**24


def files_of(folder: Path, name: str) -> list[Path]:
    return [folder / "tau.safetensors"] if name == "tau" else sorted((folder / name).glob("*.safetensors"))


def make_models(folder: Path, dtype: str) -> None:
    """The base, the fine-tuned tower, and the task vector between them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tvjax import tree
    from tvjax.checkpoints import Pretrained, save_pretrained, streaming
    from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, clip, init

    vision = CLIPVisionConfig(1024, 4096, 24, 16, image_size=224, patch_size=14, projection_dim=768)
    text = CLIPTextConfig(49408, 768, 3072, 12, 12, projection_dim=768)
    random = np.random.default_rng(0)
    for name, config in (("base", CLIPConfig(vision, text)), ("tuned", CLIPConfig(vision, None))):
        shapes = jax.eval_shape(lambda config=config: init(config, jax.random.key(0)))
        leaves = {
            path: (0.02 * random.standard_normal(leaf.shape, np.float32)).astype(jnp.dtype(dtype))
            for path, leaf in tree.flatten(shapes).items()
        }
        params = tree.nest(leaves)
        save_pretrained(Pretrained(clip(config, params), config), folder / name)
    streaming.extract(folder / "base", folder / "tuned", folder / "tau.safetensors", subtree="vision")


def run(case: str, folder: Path) -> dict[str, Any]:
    """One case in this process: seconds, and memory in bytes."""
    import jax
    import safetensors.numpy

    import tvjax.checkpoints.streaming as streaming
    from tvjax.checkpoints import from_pretrained
    from tvjax.checkpoints.atomic import replacing

    name, _, names = case.partition(":")
    files = [file for part in names.split(",") if part for file in files_of(folder, part)]
    jax.block_until_ready(jax.numpy.zeros(1))
    before, start = resident("VmRSS"), time.perf_counter()
    kept: Any = None
    with tempfile.TemporaryDirectory(dir=folder) as output:
        if name == "load":
            kept = jax.block_until_ready(from_pretrained(folder / "base").params)
        elif name == "load_tower":
            kept = jax.block_until_ready(from_pretrained(folder / "tuned").params)
        elif name == "load_file":
            kept = [safetensors.numpy.load_file(file) for file in files]
        elif name == "extract":
            streaming.extract(folder / "base", folder / "tuned", Path(output) / "tau", subtree="vision")
        elif name == "apply":
            streaming.apply(folder / "base", [folder / "tau.safetensors"], Path(output) / "edited", scale=0.5)
        else:
            block = memoryview(bytearray(BLOCK))
            for number, file in enumerate(files):
                with replacing(Path(output) / str(number)) as target:
                    with open(file, "rb", buffering=0) as source, open(target, "wb", buffering=0) as sink:
                        while count := source.readinto(block):
                            sink.write(block[:count])
        seconds = time.perf_counter() - start
        peak = resident("VmHWM")
    del kept
    return {"seconds": seconds, "peak": peak - before}


def resident(field: str) -> int:
    """Bytes of the resident set, now (VmRSS) or at most so far (VmHWM)."""
    with open("/proc/self/status", encoding="utf-8") as status:
        (line,) = [line for line in status if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure(case: str, folder: Path, rounds: int) -> dict[str, Any]:
    """A case beside the one that it is held against, round by round."""
    against, names = CASES[case]
    words = {case: case, against: f"{against}:{','.join(names)}"}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in words}
    for _ in range(rounds):
        for name, word in words.items():
            command = [sys.executable, __file__, "--one", word, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {name: statistics.median(item["seconds"] for item in items) for name, items in found.items()}
    peaks = {name: max(item["peak"] for item in items) for name, items in found.items()}
    sizes = {part: sum(file.stat().st_size for file in files_of(folder, part)) for part in names}
    return {
        "case": case,
        "against": against,
        "bytes_of_inputs": sizes,
        "seconds": seconds[case],
        "seconds_against": seconds[against],
        "ratio_of_times": seconds[case] / seconds[against],
        "all_seconds": {name: [item["seconds"] for item in items] for name, items in found.items()},
        "peak_bytes": peaks[case],
        "peak_bytes_against": peaks[against],
        "peak_of_inputs": peaks[case] / sum(sizes.values()),
    }


def main() -> None:
    """Runs the cases in processes of their own and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="cases to run; all by default")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/bench_checkpoints.json"))
    parser.add_argument("--folder", type=Path, help="models that are there already, or a place for them to stay")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one, arguments.folder)))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp())
    try:
        if not (folder / "tau.safetensors").exists():
            folder.mkdir(exist_ok=True)
            make_models(folder, arguments.dtype)
        results = {}
        if arguments.output.exists():
            results = {(r["case"], r["dtype"]): r for r in json.loads(arguments.output.read_text())["results"]}
        versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy", "safetensors")}
        processor = platform.processor() or platform.machine()
        machine = {"cores": os.cpu_count(), "processor": processor, "python": platform.python_version()}
        for case in arguments.cases or CASES:
            result = {"dtype": arguments.dtype, **measure(case, folder, arguments.rounds)}
            results[case, arguments.dtype] = result
            print(
                f"{case:<12} {arguments.dtype:<9} {result['seconds']:6.2f} s, {result['ratio_of_times']:.2f} times "
                f"{result['against']}; peak {result['peak_bytes'] / 1e6:.0f} MB, "
                f"{result['peak_of_inputs']:.2f} times the inputs",
                flush=True,
            )
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            report = {"versions": versions, "machine": machine, "results": list(results.values())}
            temporary = arguments.output.with_suffix(".tmp")
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            temporary.replace(arguments.output)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
