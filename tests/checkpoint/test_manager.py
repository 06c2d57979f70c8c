"""Checkpoints of plain trees: complete or absent, placed where asked, refused in one line."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import manager as checkpoints
from moejax.core.errors import InputError
from moejax.core.memory import device_sharding, host_sharding
from moejax.core.mesh import make_mesh


def trees(step):
    return dict(
        params={
            "w": jnp.arange(6.0).reshape(2, 3) + step,
            "n": {"b": jnp.ones((4,), jnp.bfloat16)},
        },
        optimizer={"mu": (jnp.zeros((2, 3)), jnp.int32(step))},
    )


def abstract(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def write(path, steps=(1,), **extra):
    with checkpoints.open_manager(path) as manager:
        for step in steps:
            checkpoints.save(manager, step, **trees(step), extra={"step": step, **extra})
        checkpoints.finish(manager)


def read(path, step=None, **wanted):
    sharding = device_sharding(make_mesh())
    with checkpoints.open_manager(path, read_only=True) as manager:
        step = checkpoints.latest_step(manager) if step is None else step
        extra = checkpoints.read_extra(manager, step)
        wanted = {k: abstract(t, sharding) for k, t in (wanted or trees(0)).items()}
        return checkpoints.restore(manager, step, wanted), extra


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_keeps_the_newest_two(tmp_path):
    write(tmp_path, steps=(1, 2, 5), numbers=[0.1, 1e-30])
    restored, extra = read(tmp_path)
    assert_equal(restored, trees(5))
    assert extra == {"step": 5, "numbers": [0.1, 1e-30]}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "5"]


def test_one_item_is_restored_alone(tmp_path):
    write(tmp_path)
    shutil.rmtree(tmp_path / "1" / "optimizer")
    restored, _ = read(tmp_path, params=trees(0)["params"])
    assert_equal(restored, {"params": trees(1)["params"]})


def test_leaves_land_in_the_memory_of_their_sharding(tmp_path):
    write(tmp_path)
    mesh = make_mesh()
    wanted = abstract(trees(0)["params"], device_sharding(mesh))
    wanted["w"] = jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=host_sharding(mesh))
    with checkpoints.open_manager(tmp_path, read_only=True) as manager:
        params = checkpoints.restore(manager, 1, {"params": wanted})["params"]
    assert params["w"].sharding.memory_kind == "pinned_host"
    assert params["n"]["b"].sharding.memory_kind == "device"


def test_arrays_may_be_donated_while_a_save_is_in_flight(tmp_path):
    add = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    tree = {"w": jnp.zeros((1 << 20,))}
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, 0, params=tree, optimizer=trees(0)["optimizer"], extra={})
        for _ in range(20):
            tree = add(tree)
        jax.block_until_ready(tree)
        checkpoints.finish(manager)
    restored, _ = read(tmp_path, params=tree)
    assert float(jnp.abs(restored["params"]["w"]).max()) == 0.0


def test_leftovers_of_a_killed_save_do_not_count(tmp_path):
    write(tmp_path, steps=(1,))
    leftover = tmp_path / "2.orbax-checkpoint-tmp-123"
    shutil.copytree(tmp_path / "1", leftover)
    assert read(tmp_path)[1] == {"step": 1}
    write(tmp_path, steps=(3,))
    assert not leftover.exists()


@pytest.mark.parametrize("lost", ["params", "extra", "_CHECKPOINT_METADATA", "commit_success.txt"])
def test_an_older_checkpoint_killed_while_it_was_removed_does_not_matter(tmp_path, lost):
    write(tmp_path, steps=(1, 2))
    item = tmp_path / "1" / lost
    shutil.rmtree(item) if item.is_dir() else item.unlink()
    assert_equal(read(tmp_path)[0], trees(2))
    write(tmp_path, steps=(3, 4))
    assert_equal(read(tmp_path)[0], trees(4))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["3", "4"]


def test_refuses_a_folder_inside_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write checkpoints in .*file/run: Not a directory"):
        checkpoints.open_manager(tmp_path / "file" / "run")


def refused(call, *args, **kwargs):
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_refuses_missing_empty_and_foreign_folders(tmp_path):
    assert "does not exist" in refused(read, tmp_path / "none")
    assert "holds no complete checkpoint" in refused(read, tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "model.safetensors").touch()
    assert "7 is not a checkpoint of moejax: it has no 'extra'" in refused(read, tmp_path)
    (tmp_path / "file").touch()
    assert "file is not a folder" in refused(read, tmp_path / "file")


def data_files(folder):
    return [p for p in folder.rglob("d/*") if p.is_file()]


@pytest.mark.parametrize("item", ["params", "optimizer"])
@pytest.mark.parametrize("damage", ["truncated", "deleted", "no_metadata"])
def test_refuses_damaged_items(tmp_path, item, damage):
    write(tmp_path)
    folder = tmp_path / "1" / item
    if damage == "no_metadata":
        (folder / "_METADATA").unlink()
    files = data_files(folder)
    assert files
    for path in files:
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "deleted":
            path.unlink()
    message = refused(read, tmp_path)
    assert f"1: {item!r} is truncated or damaged" in message


def test_refuses_damaged_extra(tmp_path):
    write(tmp_path)
    (path,) = (p for p in (tmp_path / "1" / "extra").iterdir() if p.name == "metadata")
    json.loads(path.read_text())
    path.write_text(path.read_text()[:-4])
    assert "1: 'extra' is truncated or damaged" in refused(read, tmp_path)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda p: p | {"w": jnp.zeros((2, 4))}, "leaf w is float32[2, 3], want float32[2, 4]"),
        (lambda p: p | {"w": jnp.zeros((2, 3), jnp.bfloat16)}, "want bfloat16[2, 3]"),
        (lambda p: p | {"v": jnp.zeros(1)}, "no leaf v, 2 others"),
        (lambda p: {"w": p["w"]}, "leaf n.b is not part of this model"),
    ],
)
def test_refuses_another_tree(tmp_path, change, message):
    write(tmp_path)
    assert message in refused(read, tmp_path, params=change(trees(0)["params"]))


def test_refuses_a_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2**20))
    tree = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    message = refused(checkpoints.check_free_disk, tmp_path / "new" / "folder", tree)
    assert "3 checkpoints" in message and "want 12 MiB, found 1 MiB" in message
    checkpoints.check_free_disk(tmp_path, jax.ShapeDtypeStruct((2**10,), jnp.float32))


def test_full_disk_while_saving_is_one_line(tmp_path, monkeypatch):
    with checkpoints.open_manager(tmp_path) as manager:

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(manager, "save", full)
        message = refused(checkpoints.save, manager, 1, **trees(1), extra={})
    assert message == f"no free disk space for checkpoints in {tmp_path}"
