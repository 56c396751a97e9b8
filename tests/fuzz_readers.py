# SPDX-License-Identifier: Apache-2.0
"""Reads broken files: python tests/fuzz_readers.py [--count N] [--seed S] [FILES...]

Without FILES it breaks a small file of each format. Each mutant is read in a process of its own. Reported are aborts,
hangs, memory of more than twice the intact file's + 64 MB, and exceptions other than ValueError and OSError. If there
are any, their files are kept and the exit code is 1. The same seed makes the same mutants. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # processes with threads should not fork
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from gpu3d.io import Cloud, read_cloud, write_cloud
from gpu3d.io.files import FORMATS, ending_of

SECONDS = 2  # for a file
SPARE = 64 << 20  # bytes
LIMIT = 1 << 30  # address space that a reader may take in any case
INTEGERS = 0, -1, 2**31 - 1, 2**32 - 1, 2**63
LARGE = b"0", b"99999999", b"2147483648", b"4294967297", b"99999999999999999999", b"-1"


# ---- mutants -------------------------------------------------------------------------------------------------------


def mutant(data: bytes, chance: random.Random) -> bytes:
    """A copy of a file with one to four things broken."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        if result:
            chance.choice(MUTATIONS)(result, chance)
    return bytes(result)


def place(data: bytearray, chance: random.Random) -> int:
    """A byte, most often of the first or last ones: numbers there have more consequences than points."""
    ends = min(len(data), 400)
    return chance.choice((chance.randrange(ends), len(data) - 1 - chance.randrange(ends), chance.randrange(len(data))))


def flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[place(data, chance)] ^= 1 << chance.randrange(8)


def replace_run(data: bytearray, chance: random.Random) -> None:
    start, length = place(data, chance), chance.choice((1, 2, 4, 8, 16, 64))
    length = min(length, len(data) - start)
    data[start : start + length] = chance.choice((b"\xff" * length, bytes(length), chance.randbytes(length)))


def truncate(data: bytearray, chance: random.Random) -> None:
    del data[place(data, chance) :]


def duplicate(data: bytearray, chance: random.Random) -> None:
    start = place(data, chance)
    block = data[start : start + chance.choice((1, 4, 16, 256, 4096))]
    position = chance.choice((start, place(data, chance)))
    data[position:position] = block


def write_integer(data: bytearray, chance: random.Random) -> None:
    start, size = place(data, chance), chance.choice((2, 4, 8))
    value = chance.choice(INTEGERS) % 256**size
    data[start : start + size] = value.to_bytes(size, chance.choice(("little", "big")))


def enlarge_number(data: bytearray, chance: random.Random) -> None:
    numbers = list(re.finditer(rb"\d+", data[:2000]))
    if numbers:
        start, end = chance.choice(numbers).span()
        data[start:end] = chance.choice(LARGE)


MUTATIONS = flip_bits, replace_run, truncate, duplicate, write_integer, enlarge_number


# ---- a reader in a process of its own ------------------------------------------------------------------------------


def address_space() -> int:
    """The most bytes of address space that this process has had since it began. Memory nobody touches counts too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0]) << 10


def outcome(path: Path) -> str:
    """What reading a file ends in: "read", "refused", or an exception that no reader should raise."""
    warnings.simplefilter("ignore")
    try:
        read_cloud(path)
    except (ValueError, OSError):
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def run(path: Path) -> tuple[str, int]:
    """Read a file in a process of its own: the outcome, and the bytes of memory that it took."""
    receive, send = os.pipe()
    process = os.fork()
    if not process:
        os.setsid()  # a group of its own, so that what it starts can be ended with it
        before = address_space()
        resource.setrlimit(resource.RLIMIT_AS, (before + LIMIT, before + LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # messages of libraries that abort
        what = outcome(path)
        os.write(send, f"{address_space() - before} {what}".encode(errors="replace")[:1000])
        signal.pause()  # the parent ends it
    os.close(send)
    ended = bool(select.select([receive], [], [], SECONDS)[0])
    answer = os.read(receive, 1000).decode(errors="replace") if ended else f"0 hang of more than {SECONDS} s"
    os.close(receive)
    # Without an answer the process is dead, and its group may be empty.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if not answer:
        return f"abort: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}", 0
    taken, what = answer.split(" ", 1)
    return what, int(taken)


def fuzz(path: Path, count: int, seed: int, folder: Path) -> int:
    """Read `count` mutants of a file. Those that go wrong stay in `folder`; returns how many."""
    what, taken = run(path)
    if what != "read":
        print(f"{path.name}: left out, intact it gives {what}")
        return 0
    data = path.read_bytes()
    # Of labels, only these are broken, and the points stay as they are.
    points = path.with_suffix(".bin")
    if ending_of(path) == ".label" and points.is_file():
        shutil.copy(points, folder)
    outcomes: Counter[str] = Counter()
    for i in range(count):
        chance = random.Random(f"{seed} {path.name} {i}")
        broken = folder / path.name
        broken.write_bytes(mutant(data, chance))
        what, memory = run(broken)
        if what in ("read", "refused") and memory > 2 * taken + SPARE:
            what = f"memory: {memory >> 20} MB, of the intact file {taken >> 20} MB"
        if what not in ("read", "refused"):
            kept = folder / f"{seed}_{i}_{path.name}"
            broken.rename(kept)
            print(f"{kept}: {what}", flush=True)
            what = "wrong"
        outcomes[what] += 1
    print(f"{path.name}: {', '.join(f'{number} {what}' for what, number in sorted(outcomes.items()))}", flush=True)
    return outcomes["wrong"]


# ---- intact files --------------------------------------------------------------------------------------------------


def small_files(folder: Path) -> list[Path]:
    """A file of each format that can be written here."""
    rng = np.random.default_rng(0)
    points = rng.integers(-30_000, 30_000, (200, 3)) / 1000
    small = points.astype(np.float32)
    intensity, label = rng.integers(0, 256, 200).astype(np.float32), rng.integers(0, 20, 200).astype(np.uint8)
    clouds = {
        ".pcd.bin": Cloud(small, {"intensity": intensity, "ring": (label % 32).astype(np.float32)}),
        ".bin": Cloud(small, {"intensity": intensity}),
        ".label": Cloud(small, {"label": label, "instance": label}),
        ".npy": Cloud(small, {"intensity": intensity}),
        ".las": Cloud(points, {"intensity": intensity.astype(np.uint16), "label": label}),
        ".e57": Cloud(points, {"intensity": intensity}),
    }
    clouds[".laz"] = clouds[".las"]
    colors = rng.integers(0, 256, (200, 3)).astype(np.uint8)
    other = Cloud(small, {"intensity": intensity, "label": label, "colors": colors})
    files = []
    for ending in FORMATS:
        path = folder / f"scan{ending}"
        try:
            write_cloud(path, clouds.get(ending, other))
        except (ImportError, AttributeError) as error:  # a package is missing, or the format is only read
            print(f"{ending}: left out, {error}")
        else:
            files.append(path)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILES")
    parser.add_argument("--count", type=int, default=1000, help="mutants of all files together")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpu3d_fuzz_"))
    (folder / "intact").mkdir()
    files = arguments.files or small_files(folder / "intact")
    start = time.perf_counter()
    wrong = 0
    for i, path in enumerate(files):
        count = arguments.count // len(files) + (i < arguments.count % len(files))
        wrong += fuzz(path, count, arguments.seed, folder)
    print(f"{arguments.count} mutants, {wrong} wrong, {time.perf_counter() - start:.0f} s")
    if not wrong:
        shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
