"""Decoding a model whose experts live in host memory: every policy, beside resident and the bound.

    python -m experiments.offload_bench --shape=olmoe-400m --device_budget=25% --batch=1,8 \\
        --json=results/offload_bench.json
    python -m experiments.offload_bench --model=FOLDER --prompt_file=TEXT --autotune=plan.json
    python -m experiments.offload_bench --model=FOLDER --plan=plan.json
    python -m experiments.offload_bench --model=FOLDER --fitted=PREDICTOR --policy=lru,next_gate

All policies decode the same sequences, step by step in turns, with the same budget. The bound of a
step: where one processor computes and copies (CPU), the resident step plus the copies of what the
policy moved, at the best rate measured in this run; elsewhere the resident step, or its misses
divided between link and host, whichever is longer. Tokens of every policy that keeps experts whole
must be the resident ones on CPU, or the run fails. Columns round differently, and it says so.
Lossy policies run only where they are named, and are chosen only where no other is.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from configs.shapes import get_shape
from experiments import cli, plot_file
from experiments.bench.shape_flags import BATCH, BUDGET, SHAPE
from experiments.generate_steps.model_folder import find_folder
from experiments.generate_steps.text import read_text
from experiments.measure import host_fetch_bytes_per_s
from experiments.offload_steps import arms as steps
from experiments.offload_steps.miss_costs import measure_costs
from experiments.offload_steps.plot import plot
from experiments.offload_steps.policies import (
    POLICIES,
    Policy,
    get_policies,
    plan_json,
    read_plan,
)
from experiments.offload_steps.predict import (
    PLANS,
    predict,
    predicted_figures,
    record_routing,
    this_machine,
)
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.costmodel.miss import MissCosts
from moejax.interop.load import load
from moejax.kernels.grouped_ffn import GatedWeights
from moejax.models.config import DecoderConfig
from moejax.models.decoder import init_decoder
from moejax.models.experts import split_experts
from moejax.models.footprint import footprint
from moejax.offload.budget import parse_budget, solve_slots
from moejax.offload.store import expert_bytes, to_host
from moejax.predictors.store import Predictor, restore_predictor
from moejax.serving import prediction
from moejax.serving.prediction import Prediction

MODEL = flags.DEFINE_string("model", None, "folder of a model; None for random weights of --shape")
POLICY = flags.DEFINE_list(
    "policy", [one.name for one in POLICIES.values() if not one.is_lossy], "which ones to run"
)
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "text that the sequences begin with")
PROMPT = flags.DEFINE_integer("prompt_tokens", 32, "tokens of each prompt", lower_bound=1)
STEPS = flags.DEFINE_integer("timed_steps", 24, "timed steps of each policy", lower_bound=3)
AUTOTUNE = flags.DEFINE_string("autotune", None, "where to save the fastest policy as a plan")
FITTED = flags.DEFINE_string(
    "fitted", None, "folder of a fitted predictor; None for the next layer's own gate"
)
PLAN = flags.DEFINE_string("plan", None, "run the plan that --autotune saved, and its costs")
WARMUP = 2  # untimed steps of `interleave`


def main() -> None:
    picture = plot_file.path_of("plot", None)
    cli.check_writable(AUTOTUNE.value)
    sizes = cli.read_counts(BATCH)
    budget = parse_budget(BUDGET.value)
    check(budget is not None, "--device_budget=none offloads nothing")
    planned = None if PLAN.value is None else read_plan(PLAN.value)
    policies = get_policies(POLICY.value) if planned is None else [planned[0]]
    learned = None if FITTED.value is None else restore_predictor(FITTED.value)
    model = read_model(max(sizes))
    ahead = make_prediction(model, learned)
    link = host_fetch_bytes_per_s(to_host(model.experts, model.mesh))
    costs = planned[1] if planned else measure_costs(model.experts, model.cfg.moe.router.top_k)
    figures: dict[str, Any] = {
        "link_gb_per_s": link / 1e9,
        "costs": dataclasses.asdict(costs),
        "batch": {},
        "chosen_policy": {},
    }
    for size in sizes:
        cut = dataclasses.replace(model, prompts=model.prompts[:size])
        found = compare(cut, policies, budget, costs, link, ahead)
        figures["batch"][str(size)] = found
        kept = [one for one in policies if not one.is_lossy] or policies
        fastest = min(kept, key=lambda p: found["policies"][p.name]["ms_per_step"])
        figures["chosen_policy"][str(size)] = fastest.name
        if AUTOTUNE.value and size == sizes[-1]:
            about = {"batch": size, "device_budget": BUDGET.value, "model": name_of_model()}
            cli.write_text(AUTOTUNE.value, plan_json(fastest, costs, about) + "\n")
    show(figures)
    if picture:
        plot(figures, picture)
    record = {"model": name_of_model(), "device_budget": BUDGET.value} | figures
    record["predictor"] = FITTED.value or "next_gate"
    cli.write_report("offload_bench", "time", record)
    plot_file.print_written(Console(), picture)


def name_of_model() -> str:
    return MODEL.value or SHAPE.value


def read_model(batch: int) -> steps.Model:
    """The weights, all on the device, and `batch` prompts."""
    mesh = make_mesh(expert=1, devices=jax.devices()[:1])
    if MODEL.value is None:
        check(PROMPT_FILE.value is None, "--prompt_file wants a --model: random weights read none")
        cfg = get_shape(SHAPE.value)
        params, experts = split_experts(
            jax.jit(init_decoder, static_argnums=1)(jax.random.key(0), cfg), cfg
        )
        tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, PROMPT.value))
    else:
        loaded = load(find_folder(MODEL.value), mesh=mesh)
        cfg, params, experts = loaded.cfg, loaded.params, loaded.experts
        assert isinstance(experts, GatedWeights), "nothing was asked to be on disk"
        tokens = read_prompts(cfg, batch)
    return steps.Model(
        cfg=cfg,
        params=params,
        experts=experts,
        mesh=mesh,
        prompts=jnp.asarray(tokens, jnp.int32),
        capacity=PROMPT.value + STEPS.value + WARMUP + 1,
    )


def make_prediction(model: steps.Model, learned: Predictor | None) -> Prediction:
    """What policies with lanes fetch by, whatever their name says: `learned`, or next gate."""
    if learned is None:
        return prediction.next_gate(model.params, model.cfg)
    return prediction.fitted(learned, model.params, model.cfg)


def read_prompts(cfg: DecoderConfig, batch: int) -> np.ndarray:
    """int32 [batch, --prompt_tokens]: equally spaced pieces of the text of `--prompt_file`."""
    check(PROMPT_FILE.value is not None, "--model wants a --prompt_file to begin with")
    path = pathlib.Path(str(PROMPT_FILE.value))
    text = read_text(find_folder(str(MODEL.value)), cfg.vocab_size)
    tokens = text.encode(path.read_text(errors="replace"))
    need = batch * PROMPT.value
    check(len(tokens) >= need, f"{path} has {len(tokens)} tokens, {batch} prompts want {need}")
    starts = np.linspace(0, len(tokens) - PROMPT.value, batch).astype(int)
    return np.array([tokens[start : start + PROMPT.value] for start in starts])


def compare(
    model: steps.Model,
    policies: list[Policy],
    budget: float | int | None,
    costs: MissCosts,
    link: float,
    ahead: Prediction,
) -> dict[str, Any]:
    """All policies and resident at one batch size, in turns."""
    resident = steps.resident_arm(model)
    for _ in range(8):  # what is used most, for a static cache
        resident.step()
    wants = footprint(
        model.cfg, model.params, model.experts, ranks=1,
        batch=len(model.prompts), capacity=model.capacity, prompt=PROMPT.value,
    )  # fmt: skip
    slots = solve_slots(budget, wants, min_slots=model.cfg.num_moe_layers)
    hot = steps.hot_granules(resident, slots)
    stores = steps.make_stores(model, policies)
    arms = {steps.RESIDENT: steps.resident_arm(model)}
    for policy in track(policies, f"batch {len(model.prompts)}: compiling", transient=True):
        arms[policy.name] = steps.offloaded_arm(
            model, policy, stores[policy.column_parts, policy.is_lossy], slots, costs, hot, ahead
        )
    seconds = steps.time_arms(arms, steps=STEPS.value)
    same = steps.check_tokens(arms, {one.name: one for one in policies})
    resident_s, copy_s = seconds[steps.RESIDENT], expert_bytes(model.experts) / link
    predicted = simulated(model, arms[steps.RESIDENT], policies, seconds, costs, copy_s, slots)
    return {
        "num_slots": slots,
        "resident_ms": 1e3 * resident_s,
        "resident_tokens_per_s": len(model.prompts) / resident_s,
        "policies": {
            one.name: steps.arm_figures(
                arms[one.name], seconds[one.name], resident_s, copy_s, costs, skip=WARMUP
            )
            | {"same_tokens_as_resident": same[one.name], "lossy": one.is_lossy}
            | predicted.get(one.name, {})
            for one in policies
        },
    }


def simulated(
    model: steps.Model,
    resident: steps.Arm,
    policies: list[Policy],
    seconds: dict[str, float],
    costs: MissCosts,
    copy_s: float,
    slots: int,
) -> dict[str, dict[str, float]]:
    """What the simulator says of the policies that it knows, on the routing of this run."""
    trace = record_routing(model, resident)
    machine = this_machine(costs, expert_bytes(model.experts), copy_s)
    known = [one.name for one in policies if one.name in PLANS]
    return {
        name: predicted_figures(
            predict(model, trace, PLANS[name], machine, slots=slots),
            seconds[steps.RESIDENT],
            seconds[name],
            skip=WARMUP,
        )
        for name in known
    }


def describe_tokens(policy: dict[str, Any]) -> str:
    """Whether a policy decoded the resident tokens, and why not, or why that says little."""
    same = "yes" if policy["same_tokens_as_resident"] else "no"
    if policy["lossy"]:
        return f"{same} (lossy: {policy['low_precision_fetches']:.1f} misses in few bits)"
    return same if policy["same_tokens_as_resident"] else f"{same} (rounding)"


def show(figures: dict[str, Any]) -> None:
    """One table per batch size."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for size, found in figures["batch"].items():
        title = f"batch {size}, {found['num_slots']} slots, resident {found['resident_ms']:.1f} ms"
        columns = ("policy", "ms", "tokens/s", "of the bound", "hits", "MB moved / token",
                   "wasted", "simulated / ms", "on host", "tokens as resident")  # fmt: skip
        table = Table(*columns, title=title)
        for name, one in found["policies"].items():
            table.add_row(
                name,
                f"{one['ms_per_step']:.1f}",
                f"{one['tokens_per_s']:.1f}",
                f"{one['fraction_of_bound']:.2f}",
                f"{one['hit_rate']:.2f}",
                f"{one['moved_bytes_per_token'] / 1e6:.1f}",
                f"{one['wasted_bytes_per_token'] / 1e6:.1f}",
                f"{one['predicted_over_measured']:.2f}" if name in PLANS else "",
                f"{one['host_computed_experts']:.1f}",
                describe_tokens(one),
            )
        console.print(table)
        console.print(f"fastest: {figures['chosen_policy'][size]}")


if __name__ == "__main__":
    cli.run(main)
