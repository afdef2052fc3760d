# SPDX-License-Identifier: Apache-2.0
"""The pictures of ``docs/benchmarks.md``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

__all__ = ("draw",)

COLOURS = {
    "batch": "#1f6feb",
    "scalar": "#8b949e",
    "library": "#d29922",
    "lean": "#2da44e",
    "copy": "#57606a",
    "numpy": "#a371f7",
}
LABELS = {
    "batch": "our batch engine",
    "numpy": "the same in NumPy alone",
    "scalar": "our scalar engine",
    "library": "C, like a library",
    "lean": "C, leanest",
    "copy": "copying the bytes",
}


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
            for name in ("scalar", "numpy", "library", "batch", "lean", "copy"):
                points = sorted(
                    (s["params"]["size"], statistics.median(s["values"]))
                    for s in part["samples"]
                    if s["name"] == name
                    and s["params"].get("role") == role
                    and s["params"]["packed"] == packed
                    and not s["params"]["indirect"]
                    and s["params"]["guest"] == "128 GiB"
                    and "table" not in s["params"]
                )
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
    # below all of them: inside, it would cover a line
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _bitmap(part: dict[str, Any]) -> Any:
    figure, axes = _figure(2)
    kinds = ["0", "3", "5", "6", "8", "9", "10", "mixed", "sorted", "ragged"]
    for axis, least, title in ((axes[0][0], 1024, "batches of 1024"), (axes[0][1], 4096, "4096")):
        for number, (name, label, colour) in enumerate(
            (
                ("C", "plain C", "#2da44e"),
                ("ours", "ours", "#1f6feb"),
                ("numpy", "NumPy", "#8b949e"),
            )
        ):
            rates = [
                statistics.median(s["values"])
                for kind in kinds
                for s in part["samples"]
                if s["params"].get("table") == "ranges"
                and s["name"] == name
                and s["params"]["kind"] == kind
                and s["params"]["batch"] == least
            ]
            places = [i + 0.27 * (number - 1) for i in range(len(rates))]
            axis.bar(places, rates, 0.27, label=label, color=colour)
        axis.axhline(40, color="#cf222e", lw=0.8)
        axis.set_xticks(range(len(kinds)), [k if len(k) > 2 else f"order {k}" for k in kinds])
        axis.tick_params("x", rotation=60)
        axis.set_yscale("log")
        axis.set_ylim(top=3000)  # room for the legend
        axis.set_title(title)
    axes[0][0].set_ylabel("million ranges a second (goal: 40)")
    axes[0][0].legend(fontsize=7)
    return figure


def _latency(part: dict[str, Any]) -> Any:
    figure, axes = _figure(2)
    for axis, load in zip(axes[0], ("idle", "storm"), strict=True):
        for sample in part["samples"]:
            if sample["params"].get("load") == load:
                values = sorted(sample["values"])
                shares = [100 * (i + 1) / len(values) for i in range(len(values))]
                axis.plot(values, shares, label=sample["name"])
        axis.set_xscale("log")
        axis.set_xlabel("microseconds")
        axis.set_title(f"kick to used buffer, {load}")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("% of trips within")
    return figure


def _qemu(part: dict[str, Any]) -> Any:
    figure, axes = _figure(3)
    devices = ["in-process", "vhost-user", "vfio-user", "nothing freed"]
    colours = ["#8b949e", "#1f6feb", "#d29922", "#d0d7de"]
    pictures = (
        ("inflate", "deflate", "report", "hint, each GiB"),
        ("inflate, device CPU", "deflate, device CPU", "report, device CPU"),
        ("resident after inflate", "resident after report"),
    )
    for axis, works in zip(axes[0], pictures, strict=True):
        for number, device in enumerate(devices):
            found = {
                s["name"]: statistics.median(s["values"])
                for s in part["samples"]
                if s["params"].get("device") == device and "beside" not in s["params"]
            }
            places = [i + 0.2 * (number - 1.5) for i in range(len(works))]
            heights = [found.get(what, 0) for what in works]
            axis.bar(places, heights, 0.2, label=device, color=colours[number])
        names = [
            what.replace(", device CPU", "").replace("resident ", "").replace(", each", ",\neach")
            for what in works
        ]
        axis.set_xticks(range(len(works)), names)
    for axis, title in zip(
        axes[0], ("seconds", "CPU seconds of the device", "MiB resident"), strict=True
    ):
        axis.set_title(title)
    axes[0][0].set_ylim(top=1.3 * axes[0][0].get_ylim()[1])  # room for the legend
    axes[0][0].legend(fontsize=7, ncols=2)
    return figure


DRAWN = {"rings": _rings, "bitmap": _bitmap, "latency": _latency, "qemu": _qemu}
