"""Tests mirror the library: `moejax/PKG/NAME.py` is tested by `tests/PKG/test_NAME.py`."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent

# Modules without a test file of their own, and what tests them instead.
COVERED_ELSEWHERE = {
    "kernels/pick.py": "kernels/grouped_matmul/test_api.py: picking, forcing, refusing",
    "kernels/rows.py": "kernels/grouped_ffn/test_blocked.py: every row of the kernel passes here",
    "kernels/vma.py": "kernels/grouped_ffn/test_blocked.py: under shard_map",
    "kernels/grouped_ffn/reference.py": "the oracle of kernels/grouped_ffn/test_blocked.py",
    "kernels/grouped_ffn/tokamax.py": "kernels/grouped_ffn/test_api.py: its refusals on CPU",
    "kernels/grouped_ffn/weights.py": "kernels/grouped_ffn/test_api.py: shapes and activations",
    "kernels/grouped_matmul/reference.py": "the oracle of kernels/grouped_matmul/test_blocked.py",
    "kernels/grouped_matmul/operands.py": "kernels/grouped_matmul/test_api.py: wrong input",
    "kernels/grouped_matmul/ragged_dot.py": "kernels/grouped_matmul/test_api.py: a forced backend",
    "kernels/grouped_matmul/shapes.py": "kernels/grouped_matmul/test_api.py: names and sizes",
    "kernels/grouped_matmul/tokamax.py": "kernels/grouped_matmul/test_api.py: refusals on CPU",
    "kernels/permute/reference.py": "the oracle of kernels/permute/test_gather.py",
    "interop/convert.py": "interop/test_load.py: to a checkpoint and back",
    "interop/hf/architecture.py": "interop/hf/test_parity.py: what all architectures share",
    "interop/hf/deepseek_v2.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/deepseek_v3.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/ernie4_5_moe.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/export.py": "interop/hf/test_parity.py: round trips",
    "interop/hf/fields.py": "interop/hf/test_load.py: wrong values",
    "interop/hf/glm4_moe.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/gpt_oss.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/granitemoe.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/latent.py": "interop/hf/test_parity.py: DeepSeek and LongCat",
    "interop/hf/llama4_text.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/longcat_flash.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/minimax_m2.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/mixtral.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/olmoe.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/phimoe.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/plan.py": "interop/hf/test_load.py: tensors that are missing or too many",
    "interop/hf/qwen2_moe.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/qwen3_moe.py": "interop/hf/test_parity.py: against transformers",
    "interop/hf/registry.py": "interop/hf/test_load.py: an unknown architecture",
    "layers/gqa.py": "layers/test_attention.py: with and without what open models add",
    "models/params.py": "models/test_decoder.py: weights of every kind of layer",
    "offload/waves.py": "offload/test_stage.py: more wanted experts than slots",
    "offload/work.py": "offload/test_stage.py: counts of every kind of call",
    "predictors/mlp.py": "predictors/test_history.py and predictors/test_residual.py: their net",
    "serving/programs.py": "serving/test_engine.py: every program that an engine runs",
    "serving/prediction.py": "serving/test_engine.py: every kind of prediction",
    "simulator/recorded.py": "simulator/test_replay.py: recorded runs beside ours",
    "simulator/reference.py": "the oracle of simulator/test_replay.py",
    "training/config.py": "training/test_optimizer.py: refused values",
}
# Test files without a module of their own, and what they test.
NOT_A_MODULE = {
    "interop/hf/test_peak_memory.py": "interop/hf/load.py: host memory of a large model",
    "interop/hf/test_parity.py": "interop/hf: every architecture against transformers",
    "offload/test_whole_models.py": "offload/stage.py: several models by one slot table",
    "aot/test_aot_report.py": "experiments/aot_report.py: compile-only checks",
    "training/test_checkpoint_meshes.py": "training/sharding.py and checkpoint/manager.py together",
}


def modules() -> list[str]:
    """Every module that holds more than re-exports, relative to moejax/."""
    package = ROOT / "moejax"
    paths = (path.relative_to(package) for path in package.rglob("*.py"))
    return sorted(str(path) for path in paths if path.name != "__init__.py")


def test_of(module: str) -> pathlib.Path:
    path = pathlib.PurePath(module)
    return ROOT / "tests" / path.parent / f"test_{path.name}"


test_of.__test__ = False


def test_every_module_has_its_test_file():
    missing = [m for m in modules() if m not in COVERED_ELSEWHERE and not test_of(m).exists()]
    assert missing == []


def test_the_exceptions_are_still_exceptions():
    assert len(modules()) > 50
    for module, reason in COVERED_ELSEWHERE.items():
        assert module in modules(), f"{module} is gone"
        assert not test_of(module).exists(), f"{module} has a test file by now"
        named = [word.rstrip(":") for word in reason.split() if ".py" in word]
        assert named and all((ROOT / "tests" / name).exists() for name in named), reason


def test_every_test_file_tests_a_module():
    """A renamed module leaves no orphan behind."""
    packages = {path.name for path in (ROOT / "moejax").iterdir() if path.is_dir()}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = path.relative_to(ROOT / "tests")
        if relative.parts[0] in packages and str(relative) not in NOT_A_MODULE:
            module = ROOT / "moejax" / relative.parent / relative.name.removeprefix("test_")
            assert module.exists(), f"tests/{relative} tests no module"


def test_test_folders_are_packages():
    for folder in {path.parent for path in (ROOT / "tests").rglob("test_*.py")}:
        assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"


def test_programs_that_tests_import_share_no_flag_by_accident():
    """A worker imports many of them into one process, in any order."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    imported = set(re.findall(r"^from experiments(?:\.bench)?\.(\w+) import", text, re.MULTILINE))
    for names in re.findall(r"^from experiments(?:\.bench)? import (.+)$", text, re.MULTILINE):
        imported |= set(re.findall(r"\w+", names))
    assert {"offload_bench", "decode", "aot_report"} <= imported
    where: dict[str, list[str]] = {}
    for folder in ("experiments", "experiments/bench"):
        for name in sorted(imported):
            path = ROOT / folder / f"{name}.py"
            source = path.read_text() if path.exists() else ""
            for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source):
                where.setdefault(flag, []).append(f"{folder}/{name}.py")
    twice = {flag: paths for flag, paths in where.items() if len(paths) > 1}
    assert not twice, twice
