"""Train, restore, predict, decode past device memory: the whole of moejax on real text.

    python -m experiments.quickstart --workdir=workdir

Trains a byte-level mixture-of-experts model on the Python standard library's source (or `--data`),
restores it with the experts straight in host memory, fits routing predictors, and decodes under a
device budget that holds a quarter of the experts, five ways. Writes report.md, report.json and
plots into `--workdir`. Started again after an interruption, it resumes. Settings and what to
expect: `configs/quickstart.py`.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from configs.quickstart import QuickstartConfig, get_config
from experiments import cli
from experiments.quickstart_steps import decode, engines, report
from experiments.quickstart_steps.predict import print_prediction, run_prediction
from experiments.quickstart_steps.preflight import check_steps
from experiments.quickstart_steps.train import Trained, checkpoint_folder, run_training
from moejax.core.errors import check
from moejax.core.mesh import make_mesh
from moejax.core.overlay import overlay
from moejax.data.text import Corpus, load_corpus
from moejax.models.restore import restore_params
from moejax.serving.engine import split_experts

WORKDIR = flags.DEFINE_string("workdir", "workdir", "folder for checkpoints, report and plots")
DATA = flags.DEFINE_string("data", None, "text file or folder; default: the standard library")
SET = cli.define_set()
# A log file has no width; the tables want this much.
console = Console(width=None if sys.stdout.isatty() else 110)


def decode_all(
    cfg: QuickstartConfig, corpus: Corpus, workdir: pathlib.Path, learned
) -> tuple[dict, dict, decode.Bandwidths, tuple[str, str]]:
    """Step 4: restores the experts into host memory and decodes five ways at every batch size."""
    mesh = make_mesh()
    params, model = restore_params(checkpoint_folder(workdir), mesh=mesh)
    _, host = split_experts(params, model)
    bandwidths = decode.measure_bandwidths(host)
    modes, slots = engines.make_engines(params, model, learned, mesh, cfg.decode)
    results, identical = {}, {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        compiled = engines.compile_all(modes, corpus.heldout, cfg.decode, progress)
        for batch, new_tokens in zip(cfg.decode.batch_sizes, cfg.decode.new_tokens, strict=True):
            results[batch] = decode.compare(
                compiled[batch],
                slots,
                corpus.heldout,
                bandwidths,
                cfg.decode,
                batch=batch,
                new_tokens=new_tokens,
                progress=progress,
            )
            identical[batch] = decode.check_identical(results[batch])
    writer = compiled[min(compiled)]["resident"]
    sample = decode.sample_text(writer, corpus.heldout, cfg.decode)
    return results, identical, bandwidths, sample


def training_summary(training: Trained) -> str:
    """Two lines on step 1."""
    bits, result = training.bits, training.result
    resumed = f", resumed at step {result.resumed_step}" if result.resumed_step else ""
    return (
        f"{len(result.history['cross_entropy'])} steps{resumed}; "
        f"{len(training.corpus.train.data):,} training bytes\n"
        f"held-out bits per byte {bits['model']:.3f}: {bits['model'] / bits['bigram']:.2f} of a "
        f"bigram's {bits['bigram']:.3f}; trigram {bits['trigram']:.3f}"
    )


def forget_weights(training: Trained) -> Trained:
    """Drops the training state, so that no expert stays on the device before decoding."""
    nothing = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), training.result.state)
    return dataclasses.replace(training, result=dataclasses.replace(training.result, state=nothing))


def main() -> None:
    check(WORKDIR.value != "", "--workdir is empty; name a folder")
    workdir = pathlib.Path(WORKDIR.value)
    cli.check_writable(cli.JSON.value)
    cli.check_writable(str(workdir / "report.json"))
    cfg = overlay(get_config(), SET.value)
    if DATA.value is not None:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=DATA.value))
    cli.use_cpu_cores(2)
    model, corpus = cfg.model.decoder(), load_corpus(cfg.data)
    check_steps(model, corpus, cfg.predict, cfg.decode)
    laps = [time.perf_counter()]
    console.rule("1. train")
    training = run_training(cfg, workdir, corpus=corpus)
    console.print(training_summary(training))
    laps.append(time.perf_counter())
    console.rule("2. routing prediction")
    params, corpus = training.result.state.params, training.corpus
    prediction = run_prediction(params, training.model, corpus, cfg.predict, workdir)
    print_prediction(prediction, console)
    del params
    training = forget_weights(training)
    laps.append(time.perf_counter())
    console.rule(f"3. decode with {cfg.decode.device_budget} of the experts on the device")
    results, identical, bandwidths, sample = decode_all(cfg, corpus, workdir, prediction.residual)
    for batch, modes in results.items():
        console.print(decode.table_of(batch, modes))
        console.print(f"identical tokens in all modes: {identical[batch]}")
    laps.append(time.perf_counter())
    console.rule("4. report")
    curve = report.slot_curve(prediction)
    figures = report.figures_of(training, prediction, results, identical, bandwidths, curve)
    figures["secs"] = dict(zip(("train", "predict", "decode"), np.diff(laps).tolist(), strict=True))
    report.draw(workdir, training, prediction, results, curve)
    record = cli.write_report("quickstart", "time", figures)
    cli.write_text(workdir / "report.json", json.dumps(record, indent=1) + "\n")
    cli.write_text(workdir / "report.md", report.markdown(record, sample))
    console.print(Text(sample[0], style="dim") + Text(sample[1]))
    console.print(f"\nreport: {workdir / 'report.md'}")
    if not all(identical.values()):
        raise RuntimeError("the modes decoded different tokens; see report.json")


if __name__ == "__main__":
    cli.run(main)
