"""Draws the logs of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .run_folder import EVAL_LOG, LOG, read_log

__all__ = ["plot_log"]


def plot_log(folder: str | os.PathLike[str]) -> Path:
    """Draws loss, held-out measures, learning rate and norm of the gradient over steps, into
    `train_log.png` of a run's folder.

    Raises:
        ValueError: no step has been logged, or matplotlib is not installed.
    """
    steps, evaluations = read_log(Path(folder) / LOG), read_log(Path(folder) / EVAL_LOG)
    if not steps:
        raise ValueError(f"{os.fspath(folder)}: got no logged step, expected {LOG} of a run")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot: matplotlib is not installed; pip install matplotlib") from None
    right = any("eval_right" in line for line in evaluations)
    figure = Figure(figsize=(8, 5), dpi=150)
    panels = figure.subplots(2, 2, sharex=True)
    _draw(
        panels[0, 0], "loss", [(steps, "loss", "training"), (evaluations, "eval_loss", "held out")]
    )
    _draw(panels[0, 1], "gradient, norm", [(steps, "grad_norm", "")])
    _draw(panels[1, 0], "learning rate", [(steps, "learning_rate", "")])
    if right:
        _draw(panels[1, 1], "right answers", [(evaluations, "eval_right", "")])
        panels[1, 1].set_ylim(-0.02, 1.02)
    else:
        seconds = [{**line, "seconds": line["seconds"]} for line in steps]
        _draw(panels[1, 1], "seconds a logged step", [(seconds, "seconds", "")])
    for panel in panels[1]:
        panel.set_xlabel("step")
    figure.tight_layout()
    target = Path(folder) / "train_log.png"
    figure.savefig(target)
    return target


def _draw(
    panel: Any, title: str, curves: Sequence[tuple[Sequence[dict[str, Any]], str, str]]
) -> None:
    for lines, key, label in curves:
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            panel.plot(
                *zip(*points, strict=True), marker="." if len(points) < 50 else "", label=label
            )
    panel.set_title(title, fontsize=9)
    if any(label for _, _, label in curves):
        panel.legend(fontsize=8)
