"""Plots as files: where one goes, its bytes, and the line that says where it went."""

import io
import pathlib
from typing import Any

from experiments import cli
from moejax.core.errors import check


def path_of(flag: str, value: str | None) -> str | None:
    """Where the plot goes that `--flag` names: beside `--json` when it is not given, or nowhere.

    Raises `InputError` when either cannot be written, and when both are the same file.
    """
    report = cli.JSON.value
    path = str(pathlib.Path(report).with_suffix(".png")) if value is None and report else value
    check(path is None or path != report, f"--json and --{flag} are the same file")
    cli.check_writable(report)
    cli.check_writable(path)
    return path


def png_of(figure: Any, *, dpi: int = 120, tight: bool = False) -> bytes:
    """The picture of a matplotlib figure, which is closed; `tight` cuts it to what is drawn."""
    import matplotlib.pyplot as plt

    png = io.BytesIO()
    figure.savefig(png, dpi=dpi, format="png", bbox_inches="tight" if tight else None)
    plt.close(figure)
    return png.getvalue()


def print_written(console: Any, plot_path: str | None) -> None:
    """A line for the report and one for the plot, where there are any."""
    for path in filter(None, (cli.JSON.value, plot_path)):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
