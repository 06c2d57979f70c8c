"""Text from a model folder: a batch is what its prompts give alone, and what transformers gives."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from experiments.generate_steps.model_folder import find_folder
from experiments.generate_steps.text import Text, pad, read_text
from moejax.core.errors import InputError
from moejax.predictors.residual import init_residual
from moejax.predictors.store import save_predictor
from tests.interop.hf.cases import SHAPES
from tests.interop.hf.models import Case, reference

ROOT = pathlib.Path(__file__).parents[2]
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"}
NEW = 16


@pytest.fixture(scope="module")
def model():
    """OLMoE, with a tokenizer whose text is its token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    case = Case("olmoe", "plain", json.dumps(SHAPES["olmoe"]["plain"]))
    want = reference(case, NEW)
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(want.folder / "tokenizer.json"))
    return want


def run_here(rows):
    """Exit status and standard error of command lines that one process runs in turn."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.experiments.wrong_input_child", "experiments.generate"],
        input=json.dumps([{"args": row.split(), "fault": None} for row in rows]),
        cwd=ROOT, env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def words(tokens):
    return " ".join(map(str, tokens))


def test_a_batch_under_a_budget_gives_what_transformers_gives(model, tmp_path):
    """With a predictor from its folder, as it is before it is fitted: next-gate."""
    sizes = dict(num_layers=2, d_model=32, num_experts=8, hidden=4)
    save_predictor(tmp_path / "predictor", init_residual(jax.random.key(0), **sizes))
    args = [f"--prompt={words(model.prompts[0])}", f"--prompt_file={tmp_path}/prompt.txt"]
    (tmp_path / "prompt.txt").write_text(words(model.prompts[1]))
    done = subprocess.run(
        [sys.executable, "-m", "experiments.generate", f"--model={model.folder}", *args,
         f"--max_new_tokens={NEW}", "--device_budget=50%", "--predictor=learned",
         f"--predictor_dir={tmp_path}/predictor",
         "--prefetch_lanes=2", f"--json={tmp_path}/out.json"],
        cwd=ROOT, env=ENV, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    np.testing.assert_array_equal(figures["tokens"], model.tokens)
    assert done.stdout.splitlines() == [f"[{i}] {words(t)}" for i, t in enumerate(model.tokens)]
    assert 0 < figures["hit_rate"] < 1 and figures["bytes_per_token"] > 0
    assert figures["ttft_s"] > 0 and 0 < figures["fraction_of_bound"]


def test_lossy_modes_say_so(model, tmp_path):
    """Quantised experts, resident and from disk, give the same tokens; misses in few bits do not
    have to."""
    args = f"--model={model.folder} --prompt=1 --prompt=2 --max_new_tokens=8"
    cases = {
        "resident": "--experts_dtype=int8 --device_budget=none",
        "on_disk": f"--experts_dtype=int8 --device_budget=50% --experts_on_disk={tmp_path}/experts "
        "--predictor=next_gate --prefetch_lanes=0",
        "misses": "--low_precision_misses=int4 --device_budget=50%",
    }
    rows = [f"{args} {budget} --json={tmp_path}/{name}.json" for name, budget in cases.items()]
    results = run_here(rows)
    assert [result["status"] for result in results] == [None] * 3, results
    figures = [json.loads((tmp_path / f"{name}.json").read_text())["figures"] for name in cases]
    resident, on_disk, misses = figures
    assert resident["tokens"] == on_disk["tokens"] and on_disk["hit_rate"] < 1
    assert on_disk["experts_on_disk"] == f"{tmp_path}/experts" and on_disk["fraction_of_bound"] > 0
    for one in (resident, on_disk):
        assert one["outputs"] == "lossy: of experts in int8, not of the full weights"
    # A byte per weight, and a scale per column: 24 of w_gate and w_up, 32 of w_down.
    expert = 3 * 32 * 24 + 4 * (24 + 24 + 32)
    fetched = 2 * 7 * on_disk["bytes_per_token"] / expert  # by two sequences in 7 steps
    assert fetched > 0 and abs(fetched - round(fetched)) < 1e-6

    assert misses["outputs"].startswith("lossy: of misses in int4")
    assert misses["importance_threshold"] == 0.6
    fetches, low = misses["demand_fetches"], misses["low_fetches"]
    assert 0 < low < fetches
    in_full, in_int4 = 4 * 3 * 32 * 24, 3 * 32 * 24 // 2 + 4 * (24 + 24 + 32)
    moved = (fetches - low) * in_full + low * in_int4
    assert 2 * 7 * misses["bytes_per_token"] == pytest.approx(moved)


def test_repositories_are_downloaded_without_code(monkeypatch, tmp_path):
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(tmp_path)

    def fail(name, **kwargs):
        raise ValueError("no route to host\nmore lines")

    hub = types.ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    hub.snapshot_download = download
    assert find_folder("org/name") == tmp_path
    assert asked == {"name": "org/name", "allow_patterns": ["*.json", "*.safetensors", "*.jinja"]}
    hub.snapshot_download = fail
    with pytest.raises(
        InputError, match="org/name: no such folder, and not downloaded: no route"
    ) as e:
        find_folder("org/name")
    assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="name a folder, or pip install huggingface_hub"):
        find_folder("org/name")


def test_wrong_input_is_one_line(model, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    shutil.copytree(model.folder, broken)
    (broken / "tokenizer.json").unlink()
    cases = {
        "": "--model names a folder or a repository",
        f"--model={tmp_path}/none": "no such folder, and not like org/name",
        f"--model={empty}": "has neither a config.json nor checkpoints of moejax",
        f"--model={model.folder}": "nothing to go on from: give --prompt or --prompt_file",
        f"--model={broken} --prompt=1": "has no tokenizer.json, and its 64 tokens are not bytes",
        f"--model={model.folder} --prompt=1 --chat": "the checkpoint has no chat template",
        f"--model={model.folder} --prompt=1 --max_new_tokens=0": "=0 must be at least 1",
        f"--model={model.folder} --prompt=1 --top_p=0": "--top_p=0.0 must be above 0",
        f"--model={model.folder} --prompt=1 --temperature=-1": "must be finite and not",
        f"--model={model.folder} --prompt=1 --predictor=next_gate": "wants a --device_budget",
        f"--model={model.folder} --prompt=1 --predictor=learned": "want a folder, the others none",
        f"--model={model.folder} --prompt=1 --experts_dtype=int2": "one of <int8|int4|fp8>",
        f"--model={model.folder} --prompt=1 --experts_on_disk=x": "=x wants a --device_budget",
        f"--model={model.folder} --prompt=1 --low_precision_misses=int4": "wants a --device_budget",
        f"--model={model.folder} --prompt=1 --low_precision_misses=int4 --device_budget=50% "
        "--experts_dtype=int8": "wants full experts, not --experts_dtype=int8",
        f"--model={model.folder} --prompt=1 --importance_threshold=0.5": "wants --low_precision",
        f"--model={model.folder} --prompt=1 --device_budget=50% --max_new_tokens=8 "
        f"--experts_on_disk={model.folder}": "give them a folder of their own",
        f"--model={model.folder} --prompt=1 --device_budget=8XB": "'8XB' is not like 8GiB",
        f"--model={model.folder} --prompt=1 --max_new_tokens=8 --device_budget=9KiB": "minimum is",
        f"--model={model.folder} --prompt=1 --max_new_tokens=128": "exceed the 128 positions of",
        f"--model={model.folder} --prompt=": "a prompt without tokens: number 1 of 1",
        f"--model={model.folder} --prompt_file={tmp_path}/none": "No such file",
    }
    results = run_here(cases)
    for (args, message), result in zip(cases.items(), results, strict=True):
        assert result["status"] == 2, (args, result)
        lines = result["stderr"].strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result


def test_chat_templates_run_in_a_sandbox():
    text = Text(
        template="{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        special={"bos_token": "<s>"},
    )
    assert text.chat("Hi {{ 1 }}") == "<s><user>Hi {{ 1 }}<assistant>"
    refused = {
        "{{ ''.__class__.__mro__ }}": "the template does not render",
        "{% for %}": "the template does not render",
        "{{ messages.append(1) }}": "the template does not render",
        "{{ raise_exception('no users') }}": "the template refuses: no users",
    }
    for template, message in refused.items():
        with pytest.raises(InputError, match=message):
            Text(template=template).chat("Hi")


def test_folders_of_tokenizers(tmp_path):
    assert read_text(tmp_path, 256).decode(list("é!".encode())) == "é!"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<s>"},
                "eos_token": "</s>",
                "chat_template": [{"name": "default", "template": "{{ eos_token }}"}],
            }
        )
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    text = read_text(tmp_path, 256)
    assert text.chat("Hi") == "</s>" and text.stop == {1, 2}
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    assert read_text(tmp_path, 256).encode("Hi", chat=True) == list(b"<s>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is no tokenizer"):
        read_text(tmp_path, 256)


def test_padding_is_on_the_right():
    assert pad([[1, 2, 3], [4]], vocab_size=5) == (
        [[1, 2, 3], [4, 0, 0]],
        [[True, True, True], [True, False, False]],
    )
    with pytest.raises(InputError, match="a prompt without tokens"):
        pad([[1], []], vocab_size=5)
    with pytest.raises(InputError, match="token 7 of a prompt exceeds"):
        pad([[7]], vocab_size=5)


def test_damaged_folders_of_tokenizers(tmp_path):
    cases = [
        ("generation_config.json", {"eos_token_id": [1, "x"]}, "eos_token_id .* are no tokens"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, "eos_token_id .* are no tokens"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template 5 is no text"),
    ]
    for name, values, message in cases:
        (tmp_path / name).write_text(json.dumps(values))
        with pytest.raises(InputError, match=message):
            read_text(tmp_path, 256)
        (tmp_path / name).unlink()
    odd = {"chat_template": [{"name": "default"}, 7], "eos_token": {"id": 1}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
    assert read_text(tmp_path, 256).template is None
