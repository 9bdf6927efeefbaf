"""What `test_processes` runs: in this process on four devices, and in two processes with two devices each."""

import faulthandler
import os
import sys
from pathlib import Path

DEVICES = 4

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    os.environ |= {"JAX_PLATFORMS": "cpu", "NPROC": "16"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tvjax as tv
from tvjax import processes, sharding, tree
from tvjax.checkpoints import Pretrained, fingerprint, load_orbax, save_orbax
from tvjax.models import vit
from tvjax.models.vit import ViTConfig

CONFIGS = {
    "base": ViTConfig(16, 32, 2, 4, image_size=8, patch_size=4),
    "wide": ViTConfig(24, 48, 2, 4, image_size=8, patch_size=4),
}


def write_models(folder):
    """A base, two fine-tuned from it, and a wider one."""
    for number, (name, config) in enumerate(
        [("base", CONFIGS["base"]), ("one", CONFIGS["base"]), ("two", CONFIGS["base"]), ("wide", CONFIGS["wide"])]
    ):
        params = vit.modeling.init(config, jax.random.key(number % 3))
        tv.save(Pretrained(vit.vit(config, params), config), folder / name)


def the_mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("fsdp",))


def batches(mesh):
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(16, 8, 8, 3)).astype(np.float32), rng.integers(0, 2, 16).astype(np.int32)

    def spread(x):
        where = NamedSharding(mesh, PartitionSpec("fsdp"))
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return [tv.Batch({"pixels": spread(images)}, spread(labels))]


def work(models, output, mesh):
    """The pipeline of a task vector; what it finds is the same on one process and on several."""
    base, one, two, wide = (
        tv.load(models / name, sharding=sharding.fsdp(mesh)) for name in ("base", "one", "two", "wide")
    )
    if processes.several():
        assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(base.params))
    rows = batches(mesh)
    taus = [tv.task_vector(base.params, tuned.params) for tuned in (one, two)]
    edited = base.with_params(tv.apply(base.params, tv.merge.ties(taus)))
    transport = tv.theseus(rank_tolerance=1e-3)
    state = tv.fit(transport, base.model, wide.model, rows)
    moved = transport.apply(state, taus[0])
    tv.save(edited, output / "edited")
    tv.save_task_vector(output / "moved.safetensors", moved, base.identity(), jnp.bfloat16)
    save_orbax(edited, output / "orbax")
    again = load_orbax(output / "orbax", sharding=sharding.fsdp(mesh), param_dtype=jnp.bfloat16)
    return {
        "logits": processes.fetch(edited.model(rows[0].inputs)["logits"]).tolist(),
        "accuracy": tv.evaluate.accuracy(edited.model, rows),
        "norm": float(tv.tree.norm(taus[0])),
        "fingerprint": fingerprint(edited.params),
        "orbax": fingerprint(again.params),
        "devices": sorted({len(leaf.sharding.device_set) for leaf in tree.flatten(edited.params).values()}),
    }


if __name__ == "__main__":
    number, port, models, output, *what = sys.argv[1:]
    faulthandler.dump_traceback_later(120, exit=True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
    found = work(Path(models), Path(output), the_mesh())
    tv.checkpoints.json_files.write_json(Path(output) / "found.json", found)
