# SPDX-License-Identifier: Apache-2.0
"""Checks that every plan must pass, for any op. Plans are data, so no GPU is needed."""

from __future__ import annotations

import functools
import itertools
import re
import struct

from gpu3d import _arrays
from gpu3d.cuda import clouds, compiler, cublaslt
from gpu3d.cuda.plan import (
    Branch,
    Clear,
    Gemm,
    Launch,
    Number,
    Packed,
    Pointer,
    Table,
    TensorMap,
    Wait,
    fields,
    parameters,
)

MAX_PARAMETERS = 4096  # bytes of a kernel's arguments that CUDA allows


@functools.cache
def starts_early(source, function):
    """Whether a kernel keeps the rules of early.cuh that its text shows."""
    kernel = re.search(rf"void {function}\((.*?)\) {{\n    (.*?)\n", compiler.source_text(source), re.DOTALL)
    if not kernel or kernel[2] != "start_early();":
        return False
    assert not re.search(r"\bconst\b.*__restrict__", kernel[1]), f"{function} may read its inputs before it waits"
    return True


def check(call, inputs, results, device, *, shared=False):
    """Assert that a plan addresses only memory that it has, and that its arguments fit the kernels' signatures.

    `inputs` and `results` are specs; an input that is left out is None. `shared`: pieces of the workspace may share
    memory, if no step comes between the first and the last use of both. Returns the names of numbers that are not used.
    """
    plan, numbers = call
    assert plan.inputs == len(inputs) and plan.results == len(results)
    sizes = {("input", i): 0 if spec is None else _arrays.span(spec) for i, spec in enumerate(inputs)}
    sizes |= {("result", i): spec.nbytes for i, spec in enumerate(results)}
    sizes |= {("workspace", name): piece.size for name, piece in plan.pieces.items()}
    used, spans, number_of_step = set(), {}, 0
    branch, fork, beside = 0, None, set()  # since which step branch 1 may run, and the pieces it uses

    ends = sorted((piece.offset, piece.offset + piece.size) for piece in plan.pieces.values() if piece.size)
    for (_, end), (begin, _) in itertools.pairwise(ends):
        assert shared or end <= begin, "pieces of the workspace overlap"
    assert plan.workspace >= max([end for _, end in ends], default=0)
    assert all(piece.offset % 512 == 0 for piece in plan.pieces.values())

    def point(pointer, size=0):
        known, offset = sizes[pointer.memory, pointer.index], pointer.offset
        if pointer.number is not None:
            offset += numbers[pointer.number]
            used.add(("number", pointer.number))
        assert offset >= 0 and offset + size <= known, (pointer, size, known)
        assert known == 0 or size or offset < known, (pointer, known)  # not one past the end
        used.add((pointer.memory, pointer.index))
        if pointer.memory == "workspace":
            start = fork if branch else number_of_step
            first, _ = spans.get(pointer.index, (start, None))
            spans[pointer.index] = min(first, start), number_of_step
            if branch:
                beside.add(pointer.index)

    def fit(value, packer, at):
        """Assert that `value` fits a parameter or field of this format, `at` bytes from the start of the arguments."""
        text = packer.format.lstrip("<")
        if isinstance(value, Pointer):
            assert text == "Q" and at % 8 == 0
            point(value)
        elif isinstance(value, Packed):
            assert text.endswith("s") and struct.calcsize(value.format) == packer.size
            for field, place in zip(value.fields, fields(value.format)[0], strict=True):
                fit(field, place.format, at + place.offset)
        elif isinstance(value, TensorMap):
            assert text == "128s" and at % 64 == 0
            assert value.pointer.offset % 16 == value.row % 16 == value.slice % 16 == 0
            assert 0 < value.row < 2**40 and 0 < value.slice < 2**40 and value.slices > 0 and value.columns > 0
            assert value.width in (16, 32, 64) and 0 < value.box <= 256
            point(value.pointer, (value.slices - 1) * value.slice + 2 * value.columns)
        elif isinstance(value, Number):
            number = numbers[value.name]
            used.add(("number", value.name))
            if packer.format == clouds.STRUCT:
                assert isinstance(number, clouds.Table) and 0 < len(number.inlined) <= packer.size
            else:
                packer.pack(number)
        else:
            packer.pack(0 if value is None else value)

    for number_of_step, step in enumerate(plan.steps):
        if isinstance(step, Launch):
            places, packer = parameters(step.kernel.signature)
            assert packer.size <= MAX_PARAMETERS and len(step.args) == len(places), step.kernel
            for value, place in zip(step.args, places, strict=True):
                fit(value, place.format, place.offset)
            assert 0 < step.grid < 2**31 and 0 < step.block <= 1024 and step.block % 32 == 0
            assert step.kernel.shared_mem <= device.shared_mem and step.grid % step.cluster == 0
            assert step.kernel.early == starts_early(step.kernel.source, step.kernel.function)
            assert not (step.kernel.early and step.kernel.cooperative)
            if step.kernel.cooperative:
                assert step.grid <= 2 * device.multiprocessors
        elif isinstance(step, Clear):
            point(step.pointer, step.size)
        elif isinstance(step, Gemm):
            for matrix in filter(None, (step.a, step.b, step.c, step.d, step.aux)):
                elements = (matrix.rows - 1) * matrix.stride + matrix.columns
                point(matrix.pointer, elements * matrix.dtype.itemsize)
            if step.bias is not None:
                point(step.bias, step.d.columns * step.d.dtype.itemsize)
            point(step.workspace, cublaslt._workspace_size(step))
        elif isinstance(step, Branch):
            assert step.number == 1 - branch
            branch = step.number
        elif isinstance(step, Wait):
            if branch:
                fork = number_of_step
            else:  # what branch 1 has used is free from here on
                spans |= {name: (first, number_of_step) for name, (first, _) in spans.items() if name in beside}
                beside.clear()
        else:
            assert isinstance(step, Table)
            table = numbers[step.name]
            used.add(("number", step.name))
            point(step.pointer, 16 * step.rows)
            assert len(table.rows) == clouds.ROW_BYTES * step.rows
    assert branch == 0 and not beside, "a plan must join what runs beside it"
    for (name, span), (other, others) in itertools.combinations(spans.items(), 2):
        if span[0] <= others[1] and others[0] <= span[1]:
            a, b = plan.pieces[name], plan.pieces[other]
            apart = a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
            assert apart or not a.size or not b.size, f"{name} and {other} share memory that both need"
    for i, spec in enumerate(results):
        assert ("result", i) in used or spec.nbytes == 0, f"nothing writes result {i}"
    unused = {name for name in numbers if ("number", name) not in used}
    return unused
