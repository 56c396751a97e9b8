# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA kernel with NVRTC, on any machine, and prints the registers and spills that ptxas reports.

For sm_90a it compiles the configurations of each file that gpu3d can use, MOST of them evenly spread where there are
more. For the oldest and the newest of the other architectures it compiles the last configuration of each file, which is
the largest, and for all but the newest the first, which is the smallest. It also compiles every file by itself, headers
included, with default macros. It exits with 1 if a file does not compile, or if a kernel has more static shared memory
than CUDA allows. Results of unchanged files come from .cache/kernels.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from gpu3d import _kernels
from gpu3d.cuda import compiler

MAIN = "sm_90a"
MOST = 16  # configurations of a file; `gpu3d.precompile` compiles all
OTHERS = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120")
SHARED_LIMIT = 48 * 1024
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "kernels.json"


class Job(NamedTuple):
    configuration: compiler.Configuration
    arch: str

    def __str__(self) -> str:
        return f"{self.configuration} for {self.arch}"

    @property
    def options(self) -> list[str]:
        return [*compiler.compile_options(self.configuration, self.arch), "--ptxas-options=-v"]

    @property
    def key(self) -> str:
        parts = [compiler.source_text(self.configuration.source), *self.options, repr(compiler.nvrtc_version())]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Usage(NamedTuple):
    """The resources of one kernel; all but the registers in bytes."""

    registers: int
    stores: int
    loads: int
    shared: int
    stack: int


def jobs() -> Iterator[Job]:
    """Yield everything to compile."""
    files: dict[str, list[compiler.Configuration]] = {}
    for configuration in _kernels.configurations():
        files.setdefault(configuration.source, []).append(configuration)
    for everywhere in files.values():
        count = min(MOST, len(everywhere))
        yield from (Job(everywhere[i * (len(everywhere) - 1) // max(1, count - 1)], MAIN) for i in range(count))
        configurations = [configuration for configuration in everywhere if configuration.only is None]
        for arch in OTHERS:
            smallest = configurations[:1] if arch != OTHERS[-1] else []
            largest = configurations[-1:] if arch in (OTHERS[0], OTHERS[-1]) else []
            yield from (Job(configuration, arch) for configuration in dict.fromkeys(smallest + largest))
    for file in sorted(compiler.source_dir().glob("*.cu*")):
        yield Job(compiler.Configuration(file.name if file.suffix == ".cuh" else file.stem), MAIN)


def parse(log: str) -> dict[str, Usage]:
    """The usage of each kernel, from the output of `ptxas -v`."""
    kernels = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = [
            [int(number) for number in re.findall(pattern, part)]
            for pattern in (
                r"Used (\d+) registers",
                r"(\d+) bytes spill stores",
                r"(\d+) bytes spill loads",
                r"(\d+) bytes smem",
                r"(\d+) bytes stack frame",
            )
        ]
        kernels[part[: part.index("'")]] = Usage(*(max(found, default=0) for found in numbers))
    if not kernels or not all(usage.registers for usage in kernels.values()):
        raise RuntimeError(f"no registers reported in ptxas's log:\n{log}")
    return kernels


def compile_job(job: Job) -> dict[str, Usage] | str:
    """The usage of the job's kernels, or a text that says what failed."""
    try:
        name = job.configuration.source
        log = compiler.compile_source(compiler.source_text(name), f"{name}.cu", job.options)[1]
        return {} if name.endswith(".cuh") else parse(log)  # headers have no kernels
    except RuntimeError as error:
        return f"{job}: {error}"


def table(results: dict[Job, dict[str, Usage]]) -> Iterator[str]:
    """One line per kernel, with the largest numbers of all its configurations."""
    kernels: dict[str, dict[Job, Usage]] = {}
    asked_for = set(_kernels.configurations())
    for job, usages in results.items():
        for name, usage in usages.items():
            if job.configuration in asked_for:
                kernels.setdefault(name, {})[job] = usage
    yield f"{'':24}{MAIN:>14}{'':>11}{'spilled':>9}{'static':>9}{'':>7}{'spilled':>15}"
    yield f"{'kernel':24}{'configurations':>14}{'registers':>11}{'bytes':>9}{'shared':>9}{'stack':>7}{'elsewhere':>15}"
    for name, found in sorted(kernels.items()):
        main = [usage for job, usage in found.items() if job.arch == MAIN] or [Usage(0, 0, 0, 0, 0)]
        registers, stores, loads, shared, stack = map(max, zip(*main, strict=True))
        others = max((usage.stores + usage.loads for job, usage in found.items() if job.arch != MAIN), default=0)
        yield f"{name:24}{len(main):14}{registers:11}{stores + loads:9}{shared:9}{stack:7}{others:15}"


def main() -> int:
    start = time.perf_counter()
    keys = {job: job.key for job in jobs()}
    known = json.loads(CACHE.read_text()) if CACHE.is_file() else {}
    results = {
        job: {name: Usage(*usage) for name, usage in known[key].items()} for job, key in keys.items() if key in known
    }
    cached, failures = len(results), []
    todo = [job for job in keys if job not in results]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job, result in zip(todo, tqdm(pool.map(compile_job, todo), total=len(todo), disable=None), strict=True):
            if isinstance(result, str):
                failures.append(result)
            else:
                results[job] = result
    CACHE.parent.mkdir(exist_ok=True)
    CACHE.write_text(json.dumps({keys[job]: usages for job, usages in results.items()}))

    print(*table(results), sep="\n")
    for job, usages in results.items():
        for name, usage in usages.items():
            if usage.shared > SHARED_LIMIT:
                failures.append(f"{job}: {name} has {usage.shared} bytes of static shared memory, over {SHARED_LIMIT}.")
    seconds = time.perf_counter() - start
    print(
        f"\nNVRTC {'.'.join(map(str, compiler.nvrtc_version()))}: {len(todo)} compiled, {cached} from the cache, "
        f"{len(failures)} failed, in {seconds:.1f} s, for {', '.join((MAIN, *OTHERS))}."
    )
    print(*failures, sep="\n\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
