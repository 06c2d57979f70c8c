"""Generates text with a model that may be larger than the device.

    python -m experiments.generate --model=folder --prompt="Once upon a time" --device_budget=8GiB
    python -m experiments.generate --model=org/name --chat --prompt="Why is the sky blue?"

`--model` is a Hugging Face folder or repository, or a folder of moejax's checkpoints. With a budget
the experts stay in host memory and travel to the device as they are wanted; with
`--experts_on_disk=folder` they stay in files there, which are written first where they are missing.
Several `--prompt` are one batch; each gives exactly what it gives alone. Text appears as it is
generated, and at the end what limited the run.

`--low_precision_misses=int4` moves less, and is lossy: missing experts whose router weight is small
come in few bits, so that the text depends on the cache and on the batch.
"""

import math
import pathlib
import sys
from typing import Any, cast

from absl import flags
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from experiments import cli
from experiments.generate_steps import decode, low_precision, predictor
from experiments.generate_steps.model_folder import find_folder
from experiments.generate_steps.text import Text, pad, read_text
from moejax.core.errors import InputError, check, check_seed
from moejax.interop.load import LoadedModel, Source, load, open_source
from moejax.kernels.quantized import FORMATS, Format
from moejax.offload.budget import parse_budget
from moejax.predictors.store import Predictor
from moejax.serving.engine import Engine, make_engine

MODEL = flags.DEFINE_string("model", None, "folder of a model, or a Hugging Face repository")
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to go on from; several are one batch")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "file whose text is one more prompt")
NEW = flags.DEFINE_integer("max_new_tokens", 128, "tokens after each prompt, at most")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token")
TOP_P = flags.DEFINE_float("top_p", 1.0, "sample from the likeliest tokens of this probability")
SEED = flags.DEFINE_integer("seed", 0, "of sampling")
BUDGET = flags.DEFINE_string("device_budget", "none", "device memory: 8GiB, 25% of experts, none")
PREDICTOR = flags.DEFINE_enum("predictor", "none", predictor.NAMES, "what to fetch ahead")
FITTED = flags.DEFINE_string("predictor_dir", None, "folder of a learned or history predictor")
LANES = flags.DEFINE_integer("prefetch_lanes", 4, "experts fetched ahead per layer by a predictor")
EXPERTS = flags.DEFINE_enum(
    "experts_dtype", None, FORMATS, "quantise the experts as they are read: smaller, not the same"
)
ON_DISK = flags.DEFINE_string(
    "experts_on_disk", None, "folder to serve the experts from: models larger than host memory"
)
LOW = flags.DEFINE_enum(
    "low_precision_misses", None, FORMATS, "lossy: move misses of small router weight in this form"
)
THRESHOLD = flags.DEFINE_float(
    "importance_threshold", None, "weight of a token's larger choices up to which one is moved in "
    f"full: 1 is all, below 0 none; default: {low_precision.THRESHOLD}",
)  # fmt: skip
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of weights; default: as stored")
CHAT = flags.DEFINE_bool("chat", False, "put each prompt into the checkpoint's chat template")


def main() -> None:
    check_flags()
    folder = find_folder(str(MODEL.value))
    cli.check_writable(cli.JSON.value)
    source = open_source(folder, dtype=DTYPE.value)
    text = read_text(folder, source.cfg.vocab_size)
    prompts = [text.encode(prompt, chat=CHAT.value) for prompt in read_prompts()]
    check_room(prompts, source.context)
    learned = predictor.read_fitted(PREDICTOR.value, FITTED.value, source.cfg)
    model = load_model(source, prompts, learned)
    model = low_precision.use(model, low_format(), THRESHOLD.value)
    tokens, mask = decode.as_arrays(*pad(prompts, vocab_size=model.cfg.vocab_size))
    engine = decode.compiled(make(model, learned), tokens, mask)
    printer = Printer(text, stream=len(prompts) == 1)
    result = decode.generate(
        engine,
        tokens,
        mask,
        max_new_tokens=NEW.value,
        stop=text.stop,
        seed=SEED.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        show=printer.show,
    )
    printer.finish(result.tokens)
    figures = decode.figures(engine, result) | about_experts()
    cli.write_report("generate", "time", figures)
    shown = {k: v for k, v in figures.items() if k != "tokens" and v is not None}
    spelled = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    print(", ".join(spelled), file=sys.stderr)


def low_format() -> Format | None:
    return cast(Format | None, LOW.value)


def about_experts() -> dict[str, Any]:
    """What a report says of experts that are not in memory, or not those of the checkpoint."""
    where: dict[str, Any] = {} if ON_DISK.value is None else {"experts_on_disk": ON_DISK.value}
    if EXPERTS.value is None:
        return where | low_precision.about(low_format(), THRESHOLD.value)
    return where | {
        "experts_dtype": EXPERTS.value,
        "outputs": f"lossy: of experts in {EXPERTS.value}, not of the full weights",
    }


def check_flags() -> None:
    """Refuses what can be refused before anything is read."""
    check(bool(MODEL.value), "--model names a folder or a repository")
    check(NEW.value >= 1, f"--max_new_tokens={NEW.value} must be at least 1")
    check(
        0 <= TEMPERATURE.value < math.inf,
        f"--temperature={TEMPERATURE.value} must be finite and not negative",
    )
    check(0 < TOP_P.value <= 1, f"--top_p={TOP_P.value} must be above 0 and at most 1")
    least = 1 if ON_DISK.value is None else 0  # what is announced is read ahead without lanes
    check(LANES.value >= least, f"--prefetch_lanes={LANES.value} must be at least {least}")
    check_seed(SEED.value)
    predictor.check_flags(PREDICTOR.value, FITTED.value)
    budget = parse_budget(BUDGET.value)
    check(ON_DISK.value != "", "--experts_on_disk= names no folder")
    check(
        ON_DISK.value is None or budget is not None,
        f"--experts_on_disk={ON_DISK.value} wants a --device_budget: what the device may hold",
    )
    check(
        PREDICTOR.value == "none" or budget is not None,
        f"--predictor={PREDICTOR.value} wants a --device_budget: without one nothing is fetched",
    )
    low_precision.check_flags(
        low_format(),
        THRESHOLD.value,
        in_host=budget is not None and ON_DISK.value is None,
        experts_dtype=cast(Format | None, EXPERTS.value),
    )


def read_prompts() -> list[str]:
    """All of `--prompt`, and the text of `--prompt_file`."""
    prompts = list(PROMPT.value)
    if PROMPT_FILE.value is not None:
        try:
            prompts.append(pathlib.Path(PROMPT_FILE.value).read_text())
        except UnicodeDecodeError as error:
            raise InputError(f"--prompt_file={PROMPT_FILE.value} is not UTF-8 text") from error
    check(bool(prompts), "nothing to go on from: give --prompt or --prompt_file")
    return prompts


def check_room(prompts: list[list[int]], context: int) -> None:
    """The longest prompt and the new tokens must fit the model's context, where that is known."""
    longest = max(len(prompt) for prompt in prompts)
    check(
        not context or longest + NEW.value <= context,
        f"a prompt of {longest} tokens and --max_new_tokens={NEW.value} exceed the {context} "
        "positions of the model's context",
    )


def load_model(source: Source, prompts: list[list[int]], learned: Predictor | None) -> LoadedModel:
    """The weights, with a progress bar; the KV cache fits prompts and new tokens."""
    kept = predictor.device_bytes(PREDICTOR.value, learned, source.cfg, len(prompts))
    columns = TextColumn("load"), BarColumn(), DownloadColumn()
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("load", total=None)
        return load(
            source,
            budget=None if BUDGET.value.strip().lower() == "none" else BUDGET.value,
            experts_dtype=cast(Format | None, EXPERTS.value),
            batch=len(prompts),
            capacity=max(len(prompt) for prompt in prompts) + NEW.value,
            lanes=LANES.value if PREDICTOR.value != "none" else 0,
            predictor_bytes=kept,
            experts_on_disk=ON_DISK.value,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def make(model: LoadedModel, learned: Predictor | None) -> Engine:
    """The engine, with the prediction that was asked for."""
    return make_engine(
        model.params,
        model.experts,
        model.cfg,
        model.mesh,
        capacity=model.capacity,
        offload=model.offload,
        prediction=predictor.make_prediction(PREDICTOR.value, learned, model.params, model.cfg),
    )


class Printer:
    """Writes text as soon as its characters are whole; a batch is written at the end."""

    def __init__(self, text: Text, *, stream: bool):
        self.text, self.stream, self.shown = text, stream, ""

    def show(self, tokens: list[list[int]]) -> None:
        if not self.stream:
            return
        text = self.text.decode(tokens[0])
        if not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def finish(self, tokens: list[list[int]]) -> None:
        if self.stream:
            print(self.text.decode(tokens[0])[len(self.shown) :])
            return
        for i, row in enumerate(tokens):
            print(f"[{i}] {self.text.decode(row)}")


if __name__ == "__main__":
    cli.run(main)
