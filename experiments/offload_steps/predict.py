"""What the simulator says of the steps that an engine ran: the same routing, the same policy."""

import jax
import numpy as np

from experiments.offload_steps.arms import Arm, Model
from moejax.costmodel.hardware import REACHED, Chip, Machine
from moejax.costmodel.miss import MissCosts
from moejax.data.routing_trace import RoutingTrace, from_recorded
from moejax.experts.stage import stacked
from moejax.models.decoder import forward
from moejax.offload.store import expert_bytes
from moejax.simulator.plans import FIXED, Plan
from moejax.simulator.step_times import StepTimes, simulate
from moejax.simulator.workload import lanes_of_trace, make_workload

# What the simulator calls the policies of the benchmark. Those that predict want a recall, and it
# admits experts of all layers, not of the next one.
PLANS: dict[str, Plan] = {
    "on_demand": FIXED["on_demand"],
    "lru": FIXED["lru"],
    "lfu": FIXED["lfu"],
    "average": Plan(name="average", serve="fetch", keep="average"),
    "all_host": FIXED["all_host"],
    "static_hot": FIXED["static_hot"],
    "divide": FIXED["presched_blind"],
    "columns": Plan(name="columns", serve="columns", keep="lfu", parts=4),
}


def record_routing(model: Model, arm: Arm) -> RoutingTrace:
    """The choices of every token that `arm` has run, prompts first, sequence by sequence."""
    new = np.stack([np.asarray(one) for one in arm.tokens[:-1]], axis=1)
    tokens = np.concatenate([np.asarray(model.prompts), new], axis=1)
    run = jax.jit(
        lambda params, experts, tokens: (
            forward(params, tokens, model.cfg, stage=stacked(experts)).record.topk_idx
        )
    )
    return from_recorded(
        np.asarray(run(model.params, model.experts, tokens)),
        num_experts=model.cfg.moe.num_experts,
        expert_bytes=expert_bytes(model.experts),
        sequence_lengths=[tokens.shape[1]] * len(tokens),
        prompt_lengths=[model.prompts.shape[1]] * len(tokens),
    )


def this_machine(costs: MissCosts, bytes_of_expert: int, copy_s: float) -> Machine:
    """A hardware row whose planned rates are the measured ones. Its chip takes no time."""
    link, host = bytes_of_expert / copy_s, bytes_of_expert / costs.host_read_s
    bits = jax.numpy.dtype("float32").itemsize * 8
    params = 8 * bytes_of_expert / bits
    chip = Chip(
        name="measured", jax_kinds=(), bf16_flops=1e30, hbm_bytes=1e15, hbm_bytes_per_s=1e30,
        link_bytes_per_s=link / REACHED, link="assumed", interconnect_bytes_per_s=1e15,
        devices_per_chip=1,
    )  # fmt: skip
    return Machine(
        name="measured",
        chip=chip,
        link_bytes_per_s=link / REACHED,
        dram_bytes_per_s=max(host / REACHED, host + link),
        host_flops_per_s=2 * params / costs.host_row_s,
    )


def predict(
    model: Model, trace: RoutingTrace, plan: Plan, machine: Machine, *, slots: int
) -> StepTimes:
    """The steps behind the prompts, simulated; the cache begins with the prompts' most used."""
    lanes = lanes_of_trace(trace, len(model.prompts))
    prompt = model.prompts.shape[1]
    work = make_workload(
        lanes, slice(0, prompt), slice(prompt, None),
        dense_bytes=0.0, bits_per_weight=32.0, recall=1.0, seed=0,
    )  # fmt: skip
    return simulate(work, machine, plan, slots=slots)


def predicted_figures(
    times: StepTimes, resident_s: float, measured_s: float, *, skip: int
) -> dict[str, float]:
    """Predicted step, over the measured one, and the simulated hit rate.

    One processor computes and copies on CPU: a step is the resident one and its copies. Elsewhere
    link, host and device overlap as simulated, beside the resident step.
    """
    if jax.default_backend() == "cpu":
        seconds = resident_s + float(np.mean(times.link_s[skip:]))
    else:
        seconds = max(resident_s, float(np.mean(times.seconds[skip:])))
    hits = 1 - float(np.sum(times.misses[skip:]) / np.sum(times.lookups[skip:]))
    return {
        "predicted_ms": 1e3 * seconds,
        "predicted_over_measured": seconds / measured_s,
        "predicted_hit_rate": hits,
    }
