"""One process keeps checkpoints by itself, and finds the newest whole one again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.elastic.saves import latest_state, open_alone, save_state

STATE = {"w": np.float32([1, -0.0, np.nan]), "n": np.int32(3), "b": np.asarray(jnp.bfloat16(2))}


def test_the_newest_comes_back_to_the_bit(tmp_path):
    with open_alone(tmp_path) as saves:
        assert latest_state(saves, STATE) == (0, STATE)
        for step in (1, 2, 3):
            save_state(saves, step, {**STATE, "n": np.int32(step)})
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()  # of a process that died
    with open_alone(tmp_path) as saves:
        assert sorted(saves.all_steps()) == [2, 3]
        step, got = latest_state(saves, STATE)
    want = {**STATE, "n": np.int32(3)}
    assert step == 3
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.tobytes() == b.tobytes() and a.dtype == b.dtype


def test_another_state_and_a_file_are_refused(tmp_path):
    with open_alone(tmp_path) as saves:
        save_state(saves, 1, {"w": np.zeros(3, np.float32)})
        saves.wait_until_finished()
        with pytest.raises(InputError, match=r"leaf w is float32\[3\], want float32\[4\]"):
            latest_state(saves, {"w": np.zeros(4, np.float32)})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        open_alone(tmp_path / "file")
