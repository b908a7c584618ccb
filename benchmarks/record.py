"""Writes and reads files of measurements (``benchmarks/results``; its README describes them)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
FIELDS: dict[str, type | tuple[type, ...]] = {
    "what": str,
    "command": str,
    "commit": str,
    "date": str,
    "machine": dict,
    "software": dict,
    "threads": int,
    "beside": str,
    "tables": dict,
}
MACHINE = ("processor", "cores", "memory_gib", "level", "gpu")

Cell = str | int | float | None


def write(
    name: str,
    *,
    what: str,
    command: str,
    beside: str,
    tables: Mapping[str, Mapping[str, Mapping[str, Cell]]],
    texts: Mapping[str, Sequence[str]] | None = None,
    packages: Sequence[str] = ("torch",),
    software: Mapping[str, str] | None = None,
    threads: int | None = None,
    folder: Path = FOLDER,
) -> Path:
    """Write a measurement of this machine, this commit and today; return its file.

    `packages` are those whose versions belong to it, `software` versions of packages in other environments, `threads`
    torch's number unless given.
    """
    import torch

    data = {
        "what": what,
        "command": command,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "software": {
            "python": platform.python_version(),
            **{one: metadata.version(one) for one in packages},
            **(software or {}),
        },
        "threads": torch.get_num_threads() if threads is None else threads,
        "beside": beside,
        "tables": tables,
        **({"texts": texts} if texts else {}),
    }
    check(data, name)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Read a measurement.

    Raises
    ------
    ValueError
        If there is none of this name, or its file is not as the README says.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"{name}: no such measurement in {folder}")
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check(data, name)
    return data


def check(data: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError that names what a measurement lacks."""
    for field, kind in FIELDS.items():
        if not isinstance(data.get(field), kind) or data[field] in ("", {}):
            raise ValueError(f"{name}: expected {field}, got {data.get(field)!r}")
    missing = [field for field in MACHINE if field not in data["machine"]]
    if missing:
        raise ValueError(f"{name}: machine: expected {', '.join(missing)}")
    for table, rows in data["tables"].items():
        for row, cells in rows.items():
            if "/" in f"{name}{table}{row}{''.join(cells)}":
                raise ValueError(f"{name}: {table}: {row}: expected names without /")
            bad = {column: cell for column, cell in cells.items() if not isinstance(cell, Cell)}
            if bad:
                raise ValueError(f"{name}: {table}: {row}: expected numbers and texts, got {bad}")


def machine() -> dict[str, Cell]:
    """What ran: the processor by the operating system's name for it, cores, memory, our level, the GPU."""
    import torch

    import tts_kernels as tk

    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "level": tk.backend_info().cpu_isa,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The name of the processor, with the numbers of its family and model: a virtual machine's name says little."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def hidden(argument: str) -> str:
    """An argument of a command, with PATH for where a file lies on this machine."""
    name, equals, path = argument.rpartition("=")
    return f"{name}{equals}PATH" if Path(path).is_absolute() else argument


def commit() -> str:
    """The commit of the code that ran: the last one that changed more than measurements, ``-dirty`` where files differ.

    So it is one that others have, too, when several measurements were written one after the other.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", ".", ":(exclude)benchmarks/results"]
        return subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("log", "-1", "--format=%h", "--abbrev=7") + ("-dirty" if changed else "")
