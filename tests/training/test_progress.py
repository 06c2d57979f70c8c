"""The bar on a terminal, plain lines in a log, silence when asked."""

import sys

from moejax.training import progress


def test_bar_on_a_terminal_shows_loss_rate_and_load(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress_bar("training") as update:
        update(0.5, progress.training_text(2.0, 4500.0, 1.8))
    shown = capsys.readouterr().err
    assert "training" in shown and "50%" in shown and "eta" in shown
    assert "loss 2.885 bits  4,500 tokens/s  load 1.80x mean" in shown


def test_log_gets_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar("training") as update:
        for second in range(40):
            now[0] = float(second)
            update(second / 40, f"second {second}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training  38%  second 15", "training  75%  second 30"]


def test_silent_when_asked(capsys):
    with progress.progress_bar("training", show=False) as update:
        update(1.0, "nothing")
    assert capsys.readouterr().err == ""
