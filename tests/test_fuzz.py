# SPDX-License-Identifier: Apache-2.0
"""fuzz_readers.py, for as long as the other tests can wait."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz_readers.py")
SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
import fuzz_readers, numpy as np
from pathlib import Path
def read(path):
    first = Path(path).read_bytes()[0]
    if first == 1:
        time.sleep(60)
    if first == 2:
        import os; os.abort()
    if first == 3:
        np.empty(300 << 20, np.uint8)
    if first == 4:
        np.empty(3 << 30, np.uint8)
    if first == 5:
        raise KeyError(first)
    if first == 6:
        raise ValueError
fuzz_readers.read_cloud = read
for first in range(7):
    path = Path({file!r})
    path.write_bytes(bytes([first]))
    print(*fuzz_readers.run(path))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and limited as Linux does it")


def test_broken_files():
    result = subprocess.run([sys.executable, FUZZ, "--count", "300"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "300 mutants, 0 wrong" in result.stdout


def test_what_it_finds(tmp_path):
    script = SCRIPT.format(folder=str(FUZZ.parent), file=str(tmp_path / "a"))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("read ") and lines[6].startswith("refused "), result.stderr
    assert lines[1] == "hang of more than 2 s 0"
    assert lines[2] == "abort: SIGABRT 0"
    assert lines[3].startswith("read ") and int(lines[3].split()[1]) >= 300 << 20
    assert lines[4].startswith("MemoryError")
    assert lines[5].startswith("KeyError: 5")
