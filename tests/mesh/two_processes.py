"""What `test_processes` runs: in this process on four devices, and in two processes with two devices each."""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

DEVICES = 4

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"  # beside those of the tests

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tvjax as tv
from tvjax import processes, sharding, tree
from tvjax.checkpoints import Pretrained, TrainingStore, TransportStore, fingerprint, load_orbax, save_orbax
from tvjax.checkpoints.json_files import write_json
from tvjax.checkpoints.writer import TensorWriter
from tvjax.compose import learn, of_loss
from tvjax.models import vit
from tvjax.models.families import shapes_of
from tvjax.models.vit import ViTConfig

BASE = ViTConfig(16, 32, 1, 4, image_size=8, patch_size=4)
WIDE = ViTConfig(24, 48, 1, 4, image_size=8, patch_size=4)


def write_models(folder):
    """A base, two fine-tuned from it, and a wider one."""
    rng = np.random.default_rng(0)
    for name, config in (("base", BASE), ("one", BASE), ("two", BASE), ("wide", WIDE)):
        leaves = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes_of(config).items()}
        tv.save(Pretrained(vit.vit(config, tree.nest(leaves)), config), folder / name)


def the_mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("fsdp",))


def batches(mesh):
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(16, 8, 8, 3)).astype(np.float32), rng.integers(0, 2, 16).astype(np.int32)

    def spread(x):
        where = NamedSharding(mesh, PartitionSpec("fsdp"))
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return [tv.Batch({"pixels": spread(images)}, spread(labels))]


def size_of_scores(params, pixels):
    """Something of the leaves and of the examples to make small, which is compiled at once."""
    hidden = pixels.reshape(len(pixels), -1)[:, : params["head"]["kernel"].shape[0]]
    return jnp.mean((hidden @ params["head"]["kernel"] - 1) ** 2, axis=-1)


def resumed(base, wide, taus, rows, output):
    """A fit and a training, each made twice with one store: the second goes on from what the first has kept."""
    transport, moved, trained = tv.theseus(rank_tolerance=1e-3), [], []
    goal = of_loss(size_of_scores, rows[0].inputs["pixels"])
    options = {"key": jax.random.key(0), "batch_size": 8, "epochs": 2, "batches_per_epoch": 1}
    for _ in range(2):
        epochs = []
        maps, training = TransportStore(output / "maps", {"models": "two"}), TrainingStore(output / "training")
        state = tv.fit(transport, base.model, wide.model, rows, cache=maps)
        moved.append(transport.apply(state, taus[0]))
        options |= {"store": training, "progress": lambda *at, to=epochs: to.append(at)}
        values = processes.fetch(learn(base.params, taus, goal, **options).trainable.values)
        trained.append((len(epochs), np.round(values, 4).tolist()))
    lie = [[leaf.sharding.spec for leaf in jax.tree.leaves(tau)] for tau in moved]
    apart = float(tv.tree.norm(tv.task_vector(*moved)) / tv.tree.norm(moved[0]))
    return {"stages": list(maps.stages), "apart": apart, "lie alike": lie[0] == lie[1], "trained": trained}


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
        "accuracy": list(tv.evaluate.accuracy(edited.model, rows)),
        "norm": float(tv.tree.norm(taus[0])),
        "fingerprint": fingerprint(edited.params),
        "orbax": fingerprint(again.params),
        "resumed": resumed(base, wide, taus, rows, output),
        "devices": sorted({len(leaf.sharding.device_set) for leaf in tree.flatten(edited.params).values()}),
    }


def refused(call):
    """The message of a ValueError."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def misuse(models, output, mesh):
    """What only several processes can do wrong; all of them are told, and go on."""
    first, where = processes.is_first(), sharding.fsdp(mesh)
    base = tv.load(models / "base", sharding=where)
    rows = tv.Batch({"pixels": np.full((4, 8, 8, 3), float(first), np.float32)}, np.zeros(4, np.int32))
    kernel = base.params["head"]["kernel"]
    last = jax.make_array_from_callback(
        kernel.shape,
        kernel.sharding,
        lambda index: (
            np.full(kernel.shape, np.nan, np.float32)[index]
            if index[0].stop == kernel.shape[0]
            else np.asarray(np.zeros(kernel.shape, np.float32)[index])
        ),
    )
    broken = tree.replace(base.params, {"head/kernel": last})
    spread, tau = batches(mesh), tv.task_vector(base.params, tv.load(models / "one", sharding=where).params)
    goal = of_loss(size_of_scores, spread[0].inputs["pixels"])
    theseus = tv.theseus(center=bool(first))
    return {
        "load": refused(lambda: tv.load(models / ("base" if first else "wide"), sharding=where)),
        "fit": refused(lambda: tv.fit(theseus, base.model, base.model, spread)),
        "merge": refused(lambda: tv.merge.ties([tau] * (3 if first else 2))),
        "compose": refused(lambda: learn(base.params, [tau] * (2 if first else 1), goal, key=jax.random.key(0))),
        "key": refused(lambda: learn(base.params, [tau], goal, key=jax.random.key(int(first)))),
        "store": refused(lambda: TransportStore(output / "other", {"models": "one" if first else "two"})),
        "accuracy": refused(lambda: tv.evaluate.accuracy(base.model, rows)),
        "save": refused(lambda: tv.save_task_vector(output / "moved.safetensors", broken)),
        "folder": refused(lambda: tv.save(base.with_params(broken), output / "broken")),
    }


def killed(models, output, mesh):
    """One process is killed while both write a model."""
    base = tv.load(models / "base", sharding=sharding.fsdp(mesh))
    write = TensorWriter.write

    def write_and_die(self, key, *rest):
        if key.endswith("classifier.weight"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, key, *rest)

    if not processes.is_first():
        TensorWriter.write = write_and_die
    tv.save(base, output / "killed")


def main(number, port, models, output):
    """One of two processes."""
    faulthandler.dump_traceback_later(280, exit=True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
    mesh = the_mesh()
    write_json(output / "found.json", work(models, output, mesh))
    told = misuse(models, output, mesh)
    (output / f"told{number}.json").write_text(json.dumps(told))
    try:
        killed(models, output, mesh)
    except jax.errors.JaxRuntimeError as error:
        (output / "survivor.txt").write_text(str(error))
        os._exit(0)  # the other process would be waited for


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
