# SPDX-License-Identifier: Apache-2.0
"""The pictures of ``docs/benchmarks.md``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

__all__ = ("draw",)

COLOURS = {
    "batch": "#1f6feb", "scalar": "#8b949e", "library": "#d29922", "lean": "#2da44e",
    "copy": "#57606a", "ours": "#1f6feb", "C": "#2da44e",
}  # fmt: skip
LABELS = {
    "batch": "our batch engine", "scalar": "our scalar engine", "library": "C, like a library",
    "lean": "C, leanest", "copy": "copying the bytes",
}  # fmt: skip


def draw(whole: dict[str, Any], out: Path) -> dict[str, list[str]]:
    """Draw what there are samples for; file names, relative to *out*, by part."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    folder = out / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, list[str]] = {}
    for name, part in whole["parts"].items():
        picture = DRAWN.get(name)
        if picture is not None:
            figure = picture(part)
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
            made[name] = [f"benchmarks/{name}.png"]
    return made


def _figure(columns: int, rows: int = 1) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )


def _rings(part: dict[str, Any]) -> Any:
    roles = ["hint", "report", "inflate", "walk"]
    figure, axes = _figure(4, 2)
    for line, packed in enumerate((False, True)):
        for column, role in enumerate(roles):
            axis = axes[line][column]
            for name in ("scalar", "library", "batch", "lean", "copy"):
                points = sorted(
                    (s["params"]["size"], statistics.median(s["values"]))
                    for s in part["samples"]
                    if s["name"] == name and s["params"].get("role") == role
                    and s["params"]["packed"] == packed and not s["params"]["indirect"]
                    and s["params"]["guest"] == "128 GiB" and "table" not in s["params"]
                )  # fmt: skip
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        "o-",
                        ms=3,
                        color=COLOURS[name],
                        label=LABELS[name],
                    )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(f"{role}, {'packed' if packed else 'split'}")
            axis.set_xlabel("queue size")
        axes[line][0].set_ylabel("ns a buffer")
    axes[0][0].legend(fontsize=7)
    return figure


DRAWN = {"rings": _rings}
