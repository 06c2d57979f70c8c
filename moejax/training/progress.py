"""A live line on the terminal while a run goes on; a plain line now and then in a log."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[[float, str], None]
_LOG_EVERY_SECS = 15.0


@contextlib.contextmanager
def progress_bar(name: str, *, start: float = 0.0, show: bool = True) -> Iterator[Update]:
    """Yields `update(fraction done, text)`. Writes to standard error.

    `start` is the fraction that was done before, which the time that remains must not count.
    """
    console = Console(file=sys.stderr)
    if not show:
        yield lambda fraction, text: None
    elif not console.is_terminal:
        yield _log_lines(name)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:3.0f}%  {task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, refresh_per_second=4) as bar:
            task = bar.add_task(name, total=1.0, text="")
            bar.update(task, completed=start)
            yield lambda fraction, text: bar.update(task, completed=min(fraction, 1.0), text=text)


def training_text(cross_entropy: float, tokens_per_s: float, load_imbalance: float) -> str:
    """What the bar says beside itself."""
    bits = cross_entropy / math.log(2)
    return f"loss {bits:.3f} bits  {tokens_per_s:,.0f} tokens/s  load {load_imbalance:.2f}x mean"


def _log_lines(name: str) -> Update:
    last = time.monotonic()

    def update(fraction: float, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LOG_EVERY_SECS:
            last = now
            print(f"{name} {fraction:4.0%}  {text}", file=sys.stderr, flush=True)

    return update
