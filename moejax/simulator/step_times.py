"""Discrete-event simulation of offloaded steps: *simulated* seconds of a plan on a machine.

    router of l known ──► misses: link and host ──► device done ──► attention of l + 1 ──► router
                 link: rest of a started transfer, demand, then prefetches for l + 1, then swaps

One link, one host, one device. A layer ends when the device has computed cached and moved experts
and the host the rest. Times are those of `moejax.costmodel` at the rates that the machine's row
plans with; launches, synchronisation and the KV cache cost nothing.

Axis letters:
    N  steps      L  MoE layers      E  experts
"""

import dataclasses

import numpy as np

from moejax.core.errors import check
from moejax.costmodel.admission import best_swap, lanes_without_harm
from moejax.costmodel.hardware import Machine
from moejax.costmodel.miss import ExpertCost, expert_cost
from moejax.costmodel.presched import (
    LayerWork,
    Serving,
    device_path_s,
    plan_two_layers,
    serve_columns,
    serve_whole,
)
from moejax.simulator.link import Link, clear_queue, wanted_order
from moejax.simulator.plans import Plan
from moejax.simulator.slots import Slots, fill_slots, insert, swap_in, touch
from moejax.simulator.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StepTimes:
    """Per step, [N]; seconds are simulated."""

    seconds: np.ndarray
    integral_bound_s: np.ndarray  # whole experts, layer by layer, for the misses that it had
    fractional_bound_s: np.ndarray  # divisible experts, link and host busy all step
    link_s: np.ndarray  # the link is busy
    host_s: np.ndarray  # the host computes
    lookups: np.ndarray  # distinct experts wanted
    misses: np.ndarray  # of them neither cached nor fully prefetched
    on_host: np.ndarray  # of the misses, computed there; shares count as such
    wasted_bytes: np.ndarray  # prefetched and not wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the steps of a run share; cache and link change."""

    work: Workload
    plan: Plan
    costs: list[ExpertCost]  # of every layer
    cache: Slots
    link: Link
    attention_s: float  # of a layer


class _Step:
    """What a step adds up."""

    def __init__(self):
        self.count = dict.fromkeys(
            ("integral_bound_s", "host_s", "lookups", "misses", "on_host", "wasted_bytes"), 0.0
        )
        self.host_s: list[np.ndarray] = []  # of everything that was not cached
        self.fetch_s: list[np.ndarray] = []
        self.device_s = 0.0


def simulate(work: Workload, machine: Machine, plan: Plan, *, slots: int) -> StepTimes:
    """Runs every step of `work` under `plan` with `slots` expert slots on the device.

    `InputError` for fewer slots than layers. About 0.1 ms of CPU per layer and step.
    """
    steps, layers, e = work.tokens.shape
    check(slots >= layers, f"{slots} slots for {layers} layers; the minimum is one each")
    shapes = (work.predicted.shape, work.past.shape, work.expert_bytes.shape)
    check(
        shapes == ((steps, layers, e), (layers, e), (layers,)),
        f"a trace of another shape: tokens {work.tokens.shape}, predictions, past, bytes {shapes}",
    )
    costs = [
        expert_cost(machine, float(b), bits_per_weight=work.bits_per_weight, wire=plan.wire)
        for b in work.expert_bytes
    ]
    run = _Run(
        work=work,
        plan=plan,
        costs=costs,
        cache=fill_slots(work, plan, slots),
        link=Link(parts=plan.parts),
        attention_s=work.dense_bytes / machine.chip.hbm_bytes_per_s,
    )
    now, rows = 0.0, []
    for s in range(steps):
        step, start, link_busy = _Step(), now, run.link.busy_s
        for layer in range(layers):
            router_s = now + run.attention_s
            step.device_s += run.attention_s
            step.count["integral_bound_s"] += run.attention_s
            _send_in_gap(run, layer, router_s)
            now = router_s + _run_layer(run, s, layer, router_s, step)
        bound_s = _divisible_s(step)
        rows.append((now - start, bound_s, run.link.busy_s - link_busy, *step.count.values()))
    names = ("seconds", "fractional_bound_s", "link_s", *_Step().count)
    return StepTimes(**dict(zip(names, np.array(rows).T, strict=True)))


def _run_layer(run: _Run, s: int, layer: int, router_s: float, step: _Step) -> float:
    """Seconds from the router of a layer to its end; leaves cache and link as they are then."""
    plan, cache, link = run.plan, run.cache, run.link
    cost, tokens = run.costs[layer], run.work.tokens[s, layer]
    wanted, resident = tokens > 0, cache.resident[layer].copy()
    there, half, left = _arrivals(link, cost, wanted, step)
    touch(cache, layer, tokens)
    hits = wanted & resident
    ready = hits.copy()
    ready[there] = True
    missing = wanted_order(tokens, cache.scores[layer], wanted & ~ready)
    host_s = np.asarray(cost.host_s(tokens[missing]), np.float64)
    delay_s = max(0.0, link.free_s - router_s)
    device_s = float(np.sum(cost.device_s(tokens[hits])))
    if there:  # the last of them lands when the link is free
        device_s = max(device_s, delay_s) + float(np.sum(cost.device_s(tokens[there])))
    _count_layer(step, cost, tokens, wanted & ~resident, hits, missing)
    if half is not None and plan.serve == "columns":  # the host computes the other columns
        host_s = np.where(missing == half, left * host_s, host_s)
        order = np.argsort(-host_s, kind="stable")
        missing, host_s = missing[order], host_s[order]
    layer_work = LayerWork(
        host_s=host_s,
        fetch_s=cost.fetch_s,
        expert_s=float(cost.device_s(1)),
        device_s=device_s,
        link_delay_s=delay_s,
    )
    served, lanes = _serve(run, s, layer, layer_work)
    if half is not None and plan.serve in ("fetch", "whole"):
        rest = _finish_first(layer_work, missing == half, left)
        finished, _ = _serve(run, s, layer, rest)
        if plan.serve == "fetch" or finished.seconds < served.seconds:
            link.occupy(router_s, left * cost.fetch_s)
            served, host_s, missing = finished, rest.host_s, missing[missing != half]
            there, lanes = [*there, half], 0
    link.occupy(router_s, (served.moved + served.share) * cost.fetch_s)
    step.count["on_host"] += len(missing) - served.moved - served.share
    split_s = served.share * host_s[served.moved] if served.share else 0.0
    step.count["host_s"] += float(host_s[served.moved :].sum() - split_s)
    insert(cache, layer, np.array([*there, *missing[: served.moved]], np.int64), wanted)
    _predict(run, s, layer, lanes)
    return served.seconds


def _finish_first(work: LayerWork, is_half: np.ndarray, left: float) -> LayerWork:
    """The layer when the link first sends what is `left` of a half-sent expert."""
    delay_s = work.link_delay_s + left * work.fetch_s
    return dataclasses.replace(
        work,
        host_s=work.host_s[~is_half],
        link_delay_s=delay_s,
        device_s=max(work.device_s, delay_s) + work.expert_s,
    )


def _arrivals(link: Link, cost: ExpertCost, wanted: np.ndarray, step: _Step):
    """Prefetched experts that are wanted: whole ones, a half-sent one, and what it lacks."""
    whole, parts = link.queue[: link.arrived], link.queue[link.arrived : link.arrived + 1]
    there = [x for x in whole if wanted[x]]
    sent = link.arrived_parts / link.parts
    wasted = float(len(whole) - len(there))
    half = None
    if link.arrived_parts:
        if wanted[parts[0]]:
            half = parts[0]
        else:
            wasted += sent
    step.count["wasted_bytes"] += wasted * cost.wire_bytes
    clear_queue(link)
    return there, half, 1.0 - sent


def _count_layer(step: _Step, cost: ExpertCost, tokens, absent, cached, missing) -> None:
    """Lookups, misses, and the bounds for what was not cached."""
    step.count["lookups"] += int(np.sum(tokens > 0))
    step.count["misses"] += len(missing)
    host_s = np.sort(np.asarray(cost.host_s(tokens[absent]), np.float64))[::-1]
    device_s = float(np.sum(cost.device_s(tokens[cached])))
    work = LayerWork(host_s=host_s, fetch_s=cost.fetch_s, device_s=device_s)
    step.count["integral_bound_s"] += serve_whole(work).seconds
    step.host_s.append(host_s)
    step.fetch_s.append(np.full(len(host_s), cost.fetch_s))
    step.device_s += device_s


def _serve(run: _Run, s: int, layer: int, layer_work: LayerWork) -> tuple[Serving, int | None]:
    """How the misses are served, and the prefetches that PreSched plans with them."""
    plan = run.plan
    n = len(layer_work.host_s)
    if plan.serve == "fetch":
        seconds = float(device_path_s(layer_work, np.array([n]))[0])
        return Serving(moved=n, share=0.0, seconds=seconds), None
    if plan.serve == "host":
        seconds = max(layer_work.device_s, float(layer_work.host_s.sum()))
        return Serving(moved=0, share=0.0, seconds=seconds), None
    if plan.serve == "columns":
        return serve_columns(layer_work), None
    if plan.prefetch != "slack" or layer + 1 == len(run.costs):
        return serve_whole(layer_work), None
    cost, predicted = run.costs[layer + 1], run.work.predicted[s, layer + 1]
    absent = (predicted > 0) & ~run.cache.resident[layer + 1]
    upcoming = LayerWork(
        host_s=np.sort(np.asarray(cost.host_s(predicted[absent]), np.float64))[::-1],
        fetch_s=cost.fetch_s,
        expert_s=float(cost.device_s(1)),
    )
    two = plan_two_layers(layer_work, upcoming, attention_s=run.attention_s)
    return Serving(moved=two.moved, share=0.0, seconds=two.now_s), two.prefetched


def _predict(run: _Run, s: int, layer: int, lanes: int | None) -> None:
    """Queues prefetches for the next layer of this step, at most `lanes`."""
    plan, link = run.plan, run.link
    if plan.prefetch == "none" or layer + 1 == len(run.costs):
        return
    absent = ~run.cache.resident[layer + 1]
    predicted = run.work.predicted[s, layer + 1]
    among = absent if plan.prefetch == "layer" else absent & (predicted > 0)
    queue = wanted_order(predicted, run.cache.scores[layer + 1], among)
    if plan.prefetch == "slack" and plan.serve == "fetch":
        tau_s = run.costs[layer + 1].fetch_s / plan.parts  # what a wrong start holds up
        hits = run.work.precision[: len(queue)]
        lanes = lanes_without_harm(hits, 0.0, tau_s=tau_s, window_s=run.attention_s)
    link.queue = tuple(queue[:lanes][: plan.lanes].tolist())
    link.is_firm = plan.prefetch in ("gate", "layer")


def _send_in_gap(run: _Run, layer: int, until_s: float) -> None:
    """Before the router of `layer`: what was queued for it, then admissions while none waits."""
    cache, link = run.cache, run.link
    link.send_prefetches(until_s, run.costs[layer].fetch_s)
    while run.plan.admission and link.free_s < until_s:
        if link.swap is None:
            link.swap, link.swap_parts = best_swap(cache.scores, cache.resident), 0
            if link.swap is None:
                return
        if not link.send_swap(until_s, run.costs[link.swap.layer].fetch_s):
            return
        swap_in(cache, link.swap)
        link.swap = None


def _divisible_s(step: _Step) -> float:
    """Least time of a step: link and host share what was not cached, to the column, all along."""
    host = np.concatenate(step.host_s)
    fetch = np.concatenate(step.fetch_s)
    order = np.argsort(-host / fetch, kind="stable")
    link = np.concatenate([[0.0], np.cumsum(fetch[order])])
    left = np.concatenate([np.cumsum(host[order][::-1])[::-1], [0.0]])
    x = int(np.argmax(link >= left))
    if x == 0:
        return step.device_s
    share = (left[x - 1] - link[x - 1]) / (fetch[order][x - 1] + host[order][x - 1])
    return max(step.device_s, float(link[x - 1] + share * fetch[order][x - 1]))
