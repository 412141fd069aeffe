"""Measurements as files, so that what was measured once is not measured again, and the table that is made of them."""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from envs import run
from envs.evaluation import read_json


class Row(NamedTuple):
    """A line of the table."""

    what: str
    where: str
    figure: str
    beside: str
    ratio: str


def about() -> dict[str, str | None]:
    """Hardware, versions and commit of what is measured here and now."""
    hardware = f"{run.cpu_name()}, {os.cpu_count()} cores"
    with contextlib.suppress(AttributeError, ValueError):  # not every system tells
        hardware += f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB"
    versions = [f"Python {platform.python_version()}"]
    for name in (*run.PACKAGES, "stable-baselines3"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {"hardware": hardware, "versions": ", ".join(versions), "commit": run.git_commit()}


def place(out: str, kind: str, name: str, asked: dict) -> Path:
    """The file of a measurement in the folder `out`. Its name ends in a digest of all that was asked, so that
    measurements with other settings lie beside it and none is taken for another."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    readable = re.sub(r"[^\w.-]+", "_", name)
    return Path(out) / kind / f"{readable}__{digest}.json"


def measured(file: Path, asked: dict, measure: Callable[[], dict]) -> dict:
    """The measurement in this file, {**asked, "about", **figures}; it is made now if there is none."""
    if file.exists():
        print(f"{file}: measured before; delete it to measure again", file=sys.stderr)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        run.write_json(file, {**asked, "about": about(), **measure()})
        print(file, file=sys.stderr, flush=True)
    return read_json(file)


def finished(out: str, kind: str) -> list[dict]:
    """All measurements of a kind."""
    return [read_json(file) for file in sorted((Path(out) / kind).glob("*.json"))]


def grouped(results: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Results by their values of these names, in the order of their first ones."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in names), []).append(result)
    return groups


def number(x: float, sign: str = "") -> str:
    """With as many decimals as say something; sign "+" shows it."""
    decimals = 0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2 if abs(x) >= 2 else 3
    return f"{x:{sign},.{decimals}f}"


def spread(values: list[float], middle: Callable) -> str:
    """The middle (mean, median) of several values, and the lowest and highest."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(middle(values))} ({number(min(values))} to {number(max(values))})"


def student_t(p: float, freedom: float) -> float:
    """Quantile of Student's t distribution: where t = sqrt(freedom) tan(x), x has density ~ cos(x)^(freedom - 1)."""
    x = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(x) ** (freedom - 1)
    cumulative = np.cumsum(density) - density / 2
    return math.sqrt(freedom) * math.tan(np.interp(p, cumulative / cumulative[-1], x))


def table(rows: list[Row], results: list[dict]) -> str:
    """The Markdown table of these rows, and below it on what, with what and from which code the results are."""
    lines = ["| what | where | figure | beside it | ratio or difference |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    for name in ("hardware", "versions", "commit"):
        found = sorted({str(result["about"][name]) for result in results})
        lines.append(f"\n{name.capitalize()}: {'; '.join(found)}.")
    return "\n".join(lines)
