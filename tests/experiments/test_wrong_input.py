"""Wrong input of every program ends in one line that names the value and what was expected.

Every case goes through the program's own entry point and must exit with status 2, print one line
that starts with `error:`, and leave its output folder byte for byte as it was. The programs start
once each (`wrong_input_child`) and run all their cases.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs.quickstart import get_config
from experiments.quickstart_steps.train import run_training
from moejax.core.overlay import overlay

ROOT = pathlib.Path(__file__).parents[2]
TRACE = ROOT / "tests" / "data" / "traces" / "gptoss.route.csv"
NEW_TOKENS = get_config().decode.new_tokens
TINY = (
    "model.num_layers=2 model.d_model=16 model.d_ff=8 model.num_heads=1 model.num_kv_heads=1 "
    "model.router.num_experts=16 model.router.top_k=2 model.head_dim=8 "
    "train.horizon_steps=2 train.batch_size=1 train.seq_len=4 "
    "eval_bytes=40 eval_batch_size=1 decode.prefetch_lanes=1"
).split()


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line and words of its error, in order; `{}` paths are of the `files` fixture."""

    name: str
    args: str
    words: tuple[str, ...]
    fault: str | None = None
    start: str | None = None  # folder that is copied to {out} first


def case(name, args, *words, fault=None, start=None):
    return Case(name, args, words, fault, start)


def tiny(name, args, *words, fault=None, start=None):
    """With the config of the folder `trained`."""
    sets = " ".join(f"--set={item}" for item in TINY)
    args = f"--data={{files}}/text --workdir={{out}} {sets} {args}"
    return case(name, args, *words, fault=fault, start=start)


def sets(assignments, *words):
    args = " ".join(f"--set={item}" for item in assignments.split())
    return case(assignments, f"--data={{files}}/text --workdir={{out}} {args}", *words)


def data(path, *words):
    return case(f"data {path}", f"--data={path} --workdir={{out}}", *words)


QUICKSTART = [
    case("unknown flag", "--dtaa=x", "Unknown command line flag 'dtaa'", "Did you mean: data"),
    case("argument that is no flag", "train", "unexpected argument 'train'", "--flag"),
    case("flag without value", "--data", "Missing value", "--data"),
    sets("model.router.num_experts", "'model.router.num_experts' has no '='"),
    sets("model.router.num_expert=64", "router.num_expert", "no field 'num_expert'", "num_experts"),
    sets("model=3", "--set model wants ModelConfig, got 3", "model.router"),
    sets("model.router.num_experts=many", "model.router.num_experts wants int, got 'many'"),
    sets("model.router.num_experts=0", "num_experts=0 must be at least 1"),
    sets("model.router.top_k=33", "top_k=33 must be between 1 and num_experts=32"),
    sets("model.head_dim=7", "head_dim=7 must be positive and even"),
    sets("model.num_layers=1", "num_layers >= 2, got 1"),
    sets("train.learning_rate=-1", "learning_rate=-1.0 must be positive"),
    sets("train.horizon_secs=1e999", "train.horizon_secs wants float, got inf"),
    sets("train.seed=-1", "seed=-1 must be at least 0"),
    sets("train.seq_len=100000", "corpus too small", "seq_len=100000 wants 800008"),
    sets("eval_bytes=0", "eval_bytes=0 must be at least 1"),
    sets("data.heldout_fraction=2", "heldout_fraction=2.0 must be between 0 and 1"),
    sets("predict.window=9999 predict.heldout_tokens=9999", "window=9999 bytes; the longest has"),
    sets("predict.fit.hidden=0", "hidden=0 must be at least 1"),
    sets("decode.policy=fifo", "decode.policy wants Literal['lru', 'lfu', 'random', 'average']"),
    sets("decode.batch_sizes=(4,)", f"batch_sizes=(4,) and new_tokens={NEW_TOKENS} want one entry"),
    sets("decode.prompt_bytes=99999", "no held-out file is longer than prompt_bytes=99999"),
    sets("decode.prefetch_lanes=40", "prefetch_lanes=40 exceeds num_experts=32"),
    sets("decode.device_budget=plenty", "'plenty' is not like 8GiB"),
    sets("decode.device_budget=2%", "budget 2% of 192 experts", "the minimum is 6 slots", "5.8%"),
    sets("decode.device_budget=1MiB", "1048576 bytes is too small; the minimum is"),
    data("{files}/nothing", "{files}/nothing does not exist"),
    data("", "the data path is empty"),
    data("/dev/null", "/dev/null is neither a regular file nor a folder"),
    data("{files}/empty.txt", "{files}/empty.txt is empty"),
    data("{files}/bare", "{files}/bare has no files"),
    data("{files}/binaries", "{files}/binaries/a.out is not text: NUL byte at offset 4"),
    data("{files}/latin1.txt", "latin1.txt is not UTF-8 text: byte 0xe9 at offset 3"),
    case("workdir is a file", "--workdir={files}/empty.txt", "{files}/empty.txt is not a writable"),
    case("workdir below a file", "--workdir={files}/empty.txt/a/b", "empty.txt is not a writable"),
    case("workdir empty", "--workdir=", "--workdir is empty; name a folder"),
    case("json is a folder", "--json={out} --workdir={out}", "cannot write {out}: it is a folder"),
    case("json is a device", "--json=/dev/null", "/dev/null: it is not a regular file"),
    case(
        "no room for checkpoints",
        "--data={files}/text --workdir={out}",
        "no free disk: 3 checkpoints in {out}/checkpoints want",
        "found 3 MiB",
        fault="no_free_disk",
    ),
    tiny(
        "other model", "--set=model.d_ff=16", "another run, model: ", "8, not 16", start="trained"
    ),
    tiny("other run", "--set=train.seed=5", "another run, train: seed=0, not 5", start="trained"),
    tiny("other text", "--data={files}/other", "trained on other data (crc32", start="trained"),
    tiny("truncated weights", "", "checkpoints/2: 'params' is truncated", start="truncated"),
    tiny("damaged extra", "", "checkpoints/2: 'extra' is truncated", start="damaged"),
    tiny("wrong log", "", "checkpoints/2: its log does not hold", start="wronglog"),
    tiny("foreign checkpoint", "", "checkpoints/2 is not a checkpoint of moejax", start="foreign"),
    tiny("checkpoints are a file", "", "checkpoints is not a folder", start="notafolder"),
]


def replay(name, args, *words, fault=None):
    args = f"--json={{out}}/replay.json {args}"
    return case(name, args, *words, fault=fault)


def trace(name, *words):
    return replay(f"trace {name}", f"--budget_mib=3000 --trace={{files}}/{name}", *words)


GPTOSS = f"--trace={TRACE}"
REPLAY = [
    replay("no config here", "--set=a=1", "Unknown command line flag 'set'"),
    replay("no trace", "--budget_mib=9", "--trace is missing"),
    replay("no budget", GPTOSS, "--budget_mib is missing"),
    replay(
        "budget is no number", f"{GPTOSS} --budget_mib=9,x", "'x' is not a positive number of MiB"
    ),
    replay("budget beyond integers", f"{GPTOSS} --budget_mib=1e300", "'1e300' is not a positive"),
    replay(
        "budget too small",
        f"{GPTOSS} --budget_mib=99,9",
        "9 MiB cannot hold",
        "the minimum is 25.21",
    ),
    replay("unknown policy", f"{GPTOSS} --budget_mib=99 --policies=mru", "'mru' is unknown; there"),
    replay("one file twice", f"{GPTOSS} --budget_mib=99 --plot={{out}}/replay.json", "same file"),
    trace("nothing.csv", "--trace={files}/nothing.csv: No such file or directory"),
    trace("bare", "{files}/bare: Is a directory"),
    trace("empty.txt", "the file is empty"),
    trace("text/0.py", "0.py:1: expected '# route_trace v1', got 'def f0(x):'"),
    trace("binaries/a.out", "a.out:1: expected '# route_trace v1'"),
    trace("corrupt.csv", "corrupt.csv:50: expert='x9' is not a non-negative integer"),
    trace("cut.csv", "cut.csv:", "no newline at the end: the file is truncated"),
    trace("range.csv", "range.csv:50: expert=128 >= n_expert=128"),
    trace("foreign.npz", "foreign.npz: an npz file, but not a moejax.routing_trace"),
    trace("cut.npz", "cut.npz: not a readable npz file"),
    replay("disk fills up", f"{GPTOSS} --budget_mib=3000 --policies=lru", fault="file_limit"),
]
AOT = [
    case("unknown program", "--program=decode", "--program=decode is not one of offloaded_decode"),
    case("unknown target", "--target=h100", "target='h100' is not one of v5e:1x1"),
    case("unknown field", "--set=layers=3", "OffloadedDecode has no field 'layers'"),
    case("wrong type", "--set=batch=1.5", "--set batch wants int, got 1.5"),
    case(
        "experts not divisible",
        "--set=num_experts=6 --set=top_k=2 --set=expert_axis=4",
        "num_experts=6",
        "4",
    ),
    case("no TPU tile", "--set=d_ff=192", "d_ff=192 is not a multiple of 128, the width of a TPU"),
    case("budget too small", "--set=device_budget=1MiB", "1048576 bytes", "the minimum is"),
    case("json below a file", "--json={files}/empty.txt/r.json", "not a writable folder"),
]
OFFLOADED_STEP = [
    case("unknown shape", "--shape=huge", "shape 'huge' is not one of", "olmoe-400m"),
    case("batch is no number", "--batch=1,two", "--batch=1,two is not a list of positive numbers"),
    case("too few rounds", "--rounds=1", "--rounds=1: 1 is not integer >= 3"),
    case("rounds is no number", "--rounds=ten", "--rounds=ten", "invalid literal for int"),
    case("no config here", "--set=a=1", "Unknown command line flag 'set'"),
    case("json is a folder", "--json={out}", "cannot write {out}: it is a folder"),
]
MOE_LAYER = [
    case("too few calls", "--calls=1", "--calls=1: 1 is not integer >= 5"),
    case("unknown side", "--worker=torch", "--worker=torch", "moejax"),
    case("json is a device", "--json=/dev/full", "/dev/full: it is not a regular file"),
]
DISPATCH = [
    case("tokens do not divide", "--tokens=1001", "1001"),
    case("too few tokens", "--tokens=4", "--tokens=4: 4 is not integer >= 8"),
    case("too few rounds", "--rounds=1", "--rounds=1: 1 is not integer >= 3"),
    case("json is a folder", "--json={out}", "cannot write {out}: it is a folder"),
]
CALIBRATE = [
    case("one rank", "", "--data_ranks=1 --expert_ranks=1 is one rank: nothing to calibrate"),
    case("sizes", "--kib=64,x,1", "--kib=64,x,1 is not three positive whole numbers or more"),
    case("experts", "--expert_ranks=3", "--num_experts=64 is not divisible by 3 ranks"),
]
AOT_DISPATCH = [
    case("chunks", "--chunks=0", "--chunks=['0'] are not positive numbers"),
    case("devices", "--targets=v5e:2x2", "--targets=v5e:2x2 has 4 devices, want 8"),
    case("target", "--targets=v9", "target='v9' is not one of"),
]
DECODE = [
    case("batch", "--batch=0", "--batch=0 is not a list of positive numbers"),
    case("shape", "--shape=big", "shape 'big' is not one of"),
]
TRAIN = [
    case("no calibration", "--calibration={files}/no", "cannot read calibration {files}/no"),
    case("foreign calibration", "--calibration={files}/text/0.py", "is not the output of scripts"),
    sets("model.d_ff=0", "d_ff=0 must be at least 1"),
    sets("mesh.expert=0", "--set mesh.expert: mesh axis expert=0 must be at least 1"),
    sets("eval_batches=99999", "eval_batches=99999 of batch_size=8 want 799992"),
    sets(
        "train.seq_len=16 eval_batches=1 mesh.expert=3",
        "num_experts=16 is not divisible by expert axis size 3",
    ),
    sets(
        "train.seq_len=16 eval_batches=1 mesh.data=16",
        "batch_size=8 is not divisible by data * expert = 16 ranks",
    ),
    sets("train.seq_len=99999", "are 0 windows of seq_len=99999, one batch wants batch_size=8"),
    case("no config", "--config=configs/no.py", "--config=configs/no.py is not a Python file"),
    case("config of another", "--config=configs/quickstart.py", "QuickstartConfig, no RunConfig"),
    case("config that fails", "--config={files}/text/0.py", "has no attribute 'get_config'"),
    case("workdir is a file", "--workdir={files}/empty.txt", "{files}/empty.txt is not a writable"),
    case("count alone", "--num_processes=2", "--num_processes=2 wants --coordinator=host:port"),
    case(
        "auto with an id", "--coordinator=auto --process_id=0", "--process_id=0 wants", "got auto"
    ),
    case("no port", "--coordinator=a", "--coordinator=a is neither auto nor host:port"),
    case("no id", "--coordinator=a:1 --num_processes=1", "wants --num_processes and --process_id"),
    case(
        "id too large",
        "--coordinator=a:1 --num_processes=1 --process_id=1",
        "--process_id=1 is not below --num_processes=1",
    ),
    case(
        "devices do not divide",
        "--coordinator=a:1 --num_processes=3 --process_id=1 --set=mesh.data=4",
        "a mesh of 4 devices is not divisible by --num_processes=3",
    ),
    case(
        "no cluster",
        "--coordinator=auto --data={files}/text --set=train.seq_len=16 --set=eval_batches=1",
        "--coordinator=auto: ",
    ),
]
PROGRAMS = {
    "experiments.quickstart": QUICKSTART,
    "experiments.replay_trace": REPLAY,
    "experiments.aot_report": AOT,
    "experiments.bench.offloaded_step": OFFLOADED_STEP,
    "experiments.bench.moe_layer": MOE_LAYER,
    "experiments.bench.dispatch": DISPATCH,
    "experiments.bench.decode": DECODE,
    "experiments.aot_dispatch": AOT_DISPATCH,
    "experiments.train": TRAIN,
    "scripts.calibrate": CALIBRATE,
}


def write_text_folders(files):
    for folder, word in (("text", "x"), ("other", "y")):
        (files / folder).mkdir()
        for i in range(40):
            (files / folder / f"{i}.py").write_text(f"def f{i}({word}):\n    return {word}\n" * 20)
    (files / "bare").mkdir()
    (files / "binaries").mkdir()
    (files / "binaries" / "a.out").write_bytes(b"\x7fELF\0\0\0")
    (files / "empty.txt").write_bytes(b"")
    (files / "latin1.txt").write_bytes("café au lait".encode("latin-1"))


def write_traces(files):
    lines = TRACE.read_text().splitlines(keepends=True)
    row = lines[49].split(",")
    for name, expert in (("corrupt", "x9"), ("range", "128")):
        changed = ",".join([*row[:5], expert, *row[6:]])
        (files / f"{name}.csv").write_text("".join([*lines[:49], changed, *lines[50:]]))
    (files / "cut.csv").write_bytes(TRACE.read_bytes()[:100_003])
    np.savez(files / "foreign.npz", weights=np.zeros(100))
    (files / "cut.npz").write_bytes((files / "foreign.npz").read_bytes()[:100])


def write_checkpoints(files):
    """Work folders of a finished tiny run, sound and damaged."""
    cfg = overlay(get_config(), [*TINY, f"data.path={files}/text"])
    run_training(cfg, files / "trained", show_progress=False)
    step = pathlib.Path("checkpoints", "2")
    for name in ("truncated", "damaged", "wronglog"):
        shutil.copytree(files / "trained", files / name)
    chunks = (files / "truncated" / step / "params").rglob("d/*")
    for path in sorted(path for path in chunks if path.is_file()):
        os.truncate(path, path.stat().st_size // 2)
    extra = files / "damaged" / step / "extra" / "metadata"
    extra.write_text(extra.read_text()[:100])
    other = files / "wronglog" / extra.relative_to(files / "damaged")
    stored = json.loads(other.read_text())
    other.write_text(json.dumps(stored | {"log": {"steps": 3}}))
    (files / "foreign" / step).mkdir(parents=True)
    (files / "foreign" / step / "model.bin").write_bytes(b"\0" * 64)
    (files / "notafolder").mkdir()
    (files / "notafolder" / "checkpoints").write_text("")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    write_text_folders(files)
    write_traces(files)
    write_checkpoints(files)
    return files


def contents(folder):
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


@pytest.fixture(scope="module")
def outcomes(files, tmp_path_factory):
    """program -> case name -> (result, words, folder before, folder after); on demand."""
    done = {}

    def run(program):
        if program in done:
            return done[program]
        cases, outs = PROGRAMS[program], tmp_path_factory.mktemp("out")
        folders = [outs / str(i) for i in range(len(cases))]
        for one, out in zip(cases, folders, strict=True):
            if one.start:
                shutil.copytree(files / one.start, out)
            else:
                out.mkdir()
        before = [contents(out) for out in folders]
        requests = [
            {
                "args": [arg.format(files=files, out=out) for arg in one.args.split()],
                "fault": one.fault,
            }
            for one, out in zip(cases, folders, strict=True)
        ]
        child = subprocess.run(
            [sys.executable, "-m", "tests.experiments.wrong_input_child", program],
            input=json.dumps(requests),
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16", "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        results = json.loads(child.stdout.splitlines()[-1])
        done[program] = {
            one.name: (result, old, contents(out), out)
            for one, result, old, out in zip(cases, results, before, folders, strict=True)
        }
        return done[program]

    return run


@pytest.mark.parametrize(
    ("program", "one"),
    [
        pytest.param(program, one, id=f"{program.split('.')[-1]}-{one.name}")
        for program, cases in PROGRAMS.items()
        for one in cases
    ],
)
def test_ends_in_one_line(outcomes, files, program, one):
    result, before, after, out = outcomes(program)[one.name]
    stderr = result["stderr"]
    assert result["status"] == 2, stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n")
    assert "Traceback" not in stderr
    at = 0
    for words in one.words:
        words = words.format(files=files, out=out)
        assert words in stderr[at:], stderr
        at = stderr.index(words, at) + len(words)
    assert after.keys() == before.keys()
    assert after == before


def test_there_are_many_cases_and_each_has_a_name_of_its_own():
    assert sum(len(cases) for cases in PROGRAMS.values()) >= 80
    for cases in PROGRAMS.values():
        assert len({one.name for one in cases}) == len(cases)
