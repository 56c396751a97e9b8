# SPDX-License-Identifier: Apache-2.0
"""Results have the hashes in tests/result_hashes.json, for every op and library, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import result_hashes

STORED = result_hashes.load()


def runs(on_gpu):
    return [(name, op) for op in result_hashes.OPS for name in result_hashes.libraries(op, on_gpu)]


def check(name, op, on_gpu, where):
    reason = result_hashes.why_not(name, on_gpu)
    if reason:
        pytest.skip(f"{name}: {reason}")
    hashes = result_hashes.computed(name, on_gpu, op)
    assert hashes
    differ = result_hashes.differing(STORED[where]["hashes"], name, hashes)
    assert not differ, "\n".join([f"{len(differ)} of {len(hashes)}; stored by {STORED[where]['made_by']}", *differ])


@pytest.mark.parametrize(("name", "op"), runs(False))
def test_the_bits_on_a_cpu_are_those_stored(name, op):
    check(name, op, False, "numpy")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "op"), runs(True))
def test_the_bits_on_a_gpu_are_those_stored(cp, name, op):
    where = result_hashes.architecture()
    if where not in STORED:
        pytest.skip(f"result_hashes.json holds hashes of {', '.join(STORED)}, and none of {where}")
    check(name, op, True, where)


@pytest.mark.parametrize("where", STORED)
def test_every_case_has_a_hash(where):
    expected = {
        name
        for name, case in result_hashes.CASES.items()
        if ("numpy" in case.libraries if where == "numpy" else set(case.libraries) - {"numpy"})
    }
    assert set(STORED[where]["hashes"]) == expected


def test_a_changed_bit_is_reported():
    hashes = result_hashes.computed("numpy", False, "scopes")
    first = next(iter(hashes))
    stored = STORED["numpy"]["hashes"]
    assert result_hashes.differing(stored, "numpy", hashes) == []
    assert result_hashes.differing(stored | {first: "0" * 16}, "numpy", hashes)[0].startswith(first)
    assert result_hashes.differing(stored | {first: {"numpy": hashes[first], "torch": "0"}}, "numpy", hashes) == []
