# SPDX-License-Identifier: Apache-2.0
"""Products of matrices by cuBLASLt, NVIDIA's library of matrix products, called through ctypes.

The library's matrices are column-major and ours are row-major. A row-major matrix is a column-major one, transposed.
So d = a b is passed as d^T = b^T a^T: the library's A is b, its B is a, and no matrix is moved.

Constants and functions have the names that cublasLt.h gives them.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import weakref
from typing import Any, NamedTuple

import numpy as np

from gpu3d.cuda.plan import ALIGNMENT, EPILOGUES, GEMM_WORKSPACE, SMALL_GEMM_WORKSPACE, Gemm

# ---- the library ---------------------------------------------------------------------------------------------------

# cudaDataType_t, cublasComputeType_t
CUDA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
CUDA_R_32F = 0
CUBLAS_COMPUTE_32F = 68  # float32 sums; float32 inputs are not rounded to TF32

# cublasLtMatmulDescAttributes_t
CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, CUBLASLT_MATMUL_DESC_EPILOGUE = 3, 4, 7
CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8
CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 11, 12

# cublasLtEpilogue_t: CUBLASLT_EPILOGUE_<name>. GELU is its tanh form.
CUBLASLT_EPILOGUE = {
    "DEFAULT": 1,
    "BIAS": 4,
    "GELU_BIAS": 32 | 4,
    "GELU_AUX_BIAS": 32 | 128 | 4,
}

# cublasLtMatmulPreferenceAttributes_t
CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 1, 3
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_BYTES = 5, 6, 7, 8  # of A, B, C and D

# cublasLtReductionScheme_t: how the parts of a split sum are added. COMPUTE_TYPE keeps them in float32 in the
# workspace and adds them in a fixed order. INPLACE and OUTPUT_TYPE, which would round the parts, are not allowed.
CUBLASLT_REDUCTION_SCHEME_NONE, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 0, 2


class cublasLtMatmulAlgo_t(ctypes.Structure):
    """An algorithm and its configuration: tile, stages, cluster and so on."""

    _fields_ = [("data", ctypes.c_uint64 * 8)]


class cublasLtMatmulHeuristicResult_t(ctypes.Structure):
    """An algorithm that the library suggests."""

    _fields_ = [
        ("algo", cublasLtMatmulAlgo_t),
        ("workspaceSize", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("wavesCount", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


_P, _I, _SIZE, _I64, _U64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64, ctypes.c_uint64
_SIGNATURES = {
    "cublasLtCreate": [_P],
    "cublasLtMatmulDescCreate": [_P, _I, _I],
    "cublasLtMatmulDescDestroy": [_P],
    "cublasLtMatmulDescSetAttribute": [_P, _I, _P, _SIZE],
    "cublasLtMatrixLayoutCreate": [_P, _I, _U64, _U64, _I64],
    "cublasLtMatrixLayoutDestroy": [_P],
    "cublasLtMatmulPreferenceCreate": [_P],
    "cublasLtMatmulPreferenceDestroy": [_P],
    "cublasLtMatmulPreferenceSetAttribute": [_P, _I, _P, _SIZE],
    "cublasLtMatmulAlgoGetHeuristic": [_P, _P, _P, _P, _P, _P, _P, _I, _P, _P],
    "cublasLtMatmulAlgoCheck": [_P, _P, _P, _P, _P, _P, _P, _P],
    "cublasLtMatmul": [_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _SIZE, _P],
}


class Error(RuntimeError):
    """A function of cuBLASLt failed."""


@functools.cache
def library() -> Any:
    """The library cuBLASLt, from pip, conda or a CUDA toolkit. Its functions raise `Error` when they fail."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        path = load_nvidia_dynamic_lib("cublasLt").abs_path
    except (ImportError, RuntimeError) as error:  # pathfinder's DynamicLibNotFoundError is a RuntimeError
        path = ctypes.util.find_library("cublasLt")
        if path is None:
            raise ImportError(
                "linear layers need the library cuBLASLt, and it was not found: pip install nvidia-cublas, "
                "or nvidia-cublas-cu12 beside CuPy for CUDA 12."
            ) from error
    found = ctypes.CDLL(path)
    found.cublasLtGetVersion.restype = ctypes.c_size_t
    found.cublasLtGetStatusName.restype = ctypes.c_char_p
    for name, types in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype, function.errcheck = types, ctypes.c_int, _check
    return found


def _check(status: int, function: Any, arguments: Any) -> int:
    if status:
        raise Error(f"{function.__name__} failed: {library().cublasLtGetStatusName(status).decode()}")
    return status


@functools.cache
def handle(ordinal: int) -> ctypes.c_void_p:
    """The library's handle for the current device, which is `ordinal`. All threads may use it at once."""
    found = ctypes.c_void_p()
    library().cublasLtCreate(ctypes.byref(found))
    return found


class _Object:
    """A descriptor of the library, to be passed to its functions. It is destroyed with this object."""

    def __init__(self, kind: str, *args: int) -> None:
        self._kind, self._as_parameter_ = kind, ctypes.c_void_p()
        getattr(library(), f"cublasLt{kind}Create")(ctypes.byref(self._as_parameter_), *args)
        destroy = getattr(library(), f"cublasLt{kind}Destroy")
        weakref.finalize(self, destroy, self._as_parameter_).atexit = False

    def set(self, attribute: int, value: Any) -> None:
        """Set an attribute to a value of ctypes."""
        set_attribute = getattr(library(), f"cublasLt{self._kind}SetAttribute")
        set_attribute(self, attribute, ctypes.byref(value), ctypes.sizeof(value))


# ---- products ------------------------------------------------------------------------------------------------------

WORDS = 8  # of a product: `Gemm.pointers` and the stream

_ADDRESSES = CUBLASLT_MATMUL_DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER  # as EPILOGUES has them
_ZERO, _ONE = ctypes.byref(ctypes.c_float(0)), ctypes.byref(ctypes.c_float(1))


class Problem(NamedTuple):
    """A product wherever its matrices lie: what its algorithm depends on.

    A backbone has hundreds of products and some twenty problems, so this is what is looked up: a small key.
    """

    matrices: tuple[tuple[Any, ...], ...]  # (rows, columns, dtype, stride) of the library's A, B, C and D
    operation: tuple[bool, bool, str, int]  # transpose_a, transpose_b, epilogue, stride of aux or 0
    added: bool  # whether there is a c
    pinned: bool


def _problem(gemm: Gemm) -> Problem:
    a, b, d, transpose_a, transpose_b, c, epilogue, _, aux, pinned, _ = gemm
    matrices = b[1:], a[1:], (d if c is None else c)[1:], d[1:]
    operation = transpose_a, transpose_b, epilogue, 0 if aux is None else aux.stride
    return Problem(matrices, operation, c is not None, pinned)


class Product(NamedTuple):
    """A problem that is prepared for a device: what `calls` passes to the library beside addresses."""

    handle: ctypes.c_void_p
    operation: tuple[bool, bool, str, int]
    layouts: list[_Object]
    beta: Any
    algorithm: cublasLtMatmulAlgo_t
    workspace: int  # bytes


def product(gemm: Gemm, ordinal: int) -> Product:
    """What computes a product on the current device, which is `ordinal`."""
    try:
        return _product(_problem(gemm), ordinal)
    except Error as error:
        raise Error(f"{error}: {gemm}") from error


@functools.lru_cache(maxsize=4096)
def _product(problem: Problem, ordinal: int) -> Product:
    beta, find = _ONE if problem.added else _ZERO, _pinned if problem.pinned else _best
    algorithm = find(problem, ordinal)
    return Product(handle(ordinal), problem.operation, _layouts(problem), beta, algorithm, _workspace_size(problem))


def calls(product: Product, descriptor: _Object, words: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls that compute a product with the addresses and the stream in these words, as (function, arguments).

    `descriptor` is one of `product.operation`. Bias and aux are attributes of it, which each product sets anew. So all
    products of a run can share it.
    """
    a, b, c, d, workspace, bias, aux, stream = words
    found: list[tuple[Any, tuple[Any, ...]]] = []
    for attribute, word, given in zip(_ADDRESSES, (bias, aux), EPILOGUES[product.operation[2]], strict=True):
        if given:
            value = ctypes.byref(word), ctypes.sizeof(word)
            found.append((library().cublasLtMatmulDescSetAttribute, (descriptor, attribute, *value)))
    a_layout, b_layout, c_layout, d_layout = product.layouts
    args = (
        *(product.handle, descriptor, _ONE, a, a_layout, b, b_layout, product.beta, c, c_layout, d, d_layout),
        *(ctypes.byref(product.algorithm), workspace, product.workspace, stream),
    )
    found.append((library().cublasLtMatmul, args))
    return found


def _workspace_size(product: Gemm | Problem) -> int:
    return SMALL_GEMM_WORKSPACE if product.pinned else GEMM_WORKSPACE


def _layouts(problem: Problem) -> list[_Object]:
    """The layouts of A, B, C and D."""
    return [_layout(*matrix) for matrix in problem.matrices]


@functools.lru_cache(maxsize=4096)
def _layout(rows: int, columns: int, dtype: np.dtype, stride: int) -> _Object:
    """The layout of a matrix. Problems share it: most matrices of a network are as large as some others."""
    return _Object("MatrixLayout", CUDA_TYPES[dtype.name], columns, rows, stride)


def descriptor(operation: tuple[bool, bool, str, int]) -> _Object:
    """A new descriptor. One run at a time can use it, because of the addresses that are set in it."""
    transpose_a, transpose_b, epilogue, aux_stride = operation
    found = _Object("MatmulDesc", CUBLAS_COMPUTE_32F, CUDA_R_32F)
    found.set(CUBLASLT_MATMUL_DESC_TRANSA, ctypes.c_int32(transpose_b))
    found.set(CUBLASLT_MATMUL_DESC_TRANSB, ctypes.c_int32(transpose_a))
    found.set(CUBLASLT_MATMUL_DESC_EPILOGUE, ctypes.c_uint32(CUBLASLT_EPILOGUE[epilogue]))
    # An algorithm is chosen for the alignment of these addresses; they are not read before a product runs.
    for attribute, given in zip(_ADDRESSES, EPILOGUES[epilogue], strict=True):
        if given:
            found.set(attribute, ctypes.c_void_p(ALIGNMENT))
    if aux_stride:
        found.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, ctypes.c_int64(aux_stride))
    return found


# ---- algorithms ----------------------------------------------------------------------------------------------------


def canonical_rows(columns: int, inner: int) -> int:
    """The number of rows that a pinned algorithm is chosen for, with `inner` products a sum.

    In a backbone there are half as many points where there are twice as many channels. This is what a sweep of nuScenes
    has: 34,688 points fill 68 buckets of 512 at 64 channels, 34 at 128, and so on.

    Tiles that just fill the GPU at one number of rows need another round for a few more. What is best for 4096 rows of
    512 columns, with 2048 products a sum, takes 22 us for 4608 rows on an H200; what is best for 4608 takes 16.
    """
    return 512 * min(68, -(-68 * 64 // min(columns, inner)))


# The descriptors of questions about algorithms: nothing is set in them any more.
_asked = functools.cache(descriptor)


def _pinned(problem: Problem, ordinal: int) -> cublasLtMatmulAlgo_t:
    """The best algorithm for `canonical_rows`, if it takes the number of rows of this problem."""
    weight, (_, inner, *_), _, (_, columns, *_) = problem.matrices
    rows = canonical_rows(columns, inner)
    canonical = weight, *[(rows, *matrix[1:]) for matrix in problem.matrices[1:]]
    found, result = _best(problem._replace(matrices=canonical), ordinal), cublasLtMatmulHeuristicResult_t()
    objects = (handle(ordinal), _asked(problem.operation), *_layouts(problem))
    try:
        library().cublasLtMatmulAlgoCheck(*objects, ctypes.byref(found), ctypes.byref(result))
    except Error as error:
        raise Error(f"the algorithm for {rows} rows does not take this number of rows") from error
    if result.workspaceSize > _workspace_size(problem):
        raise Error(f"the algorithm needs {result.workspaceSize} bytes of workspace")
    return found


@functools.lru_cache(maxsize=4096)
def _best(problem: Problem, ordinal: int) -> cublasLtMatmulAlgo_t:
    """The best algorithm that is allowed, by the library's own judgement."""
    preference = _Object("MatmulPreference")
    mask = CUBLASLT_REDUCTION_SCHEME_NONE if problem.pinned else CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
    # An algorithm without workspace has nowhere to keep parts of sums, so it does not split them. (For other numbers of
    # rows it may want some bytes all the same.)
    most = 0 if problem.pinned else GEMM_WORKSPACE
    preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, ctypes.c_uint64(most))
    preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, ctypes.c_uint32(mask))
    for attribute in CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_BYTES:
        preference.set(attribute, ctypes.c_uint32(ALIGNMENT))
    results, count = (cublasLtMatmulHeuristicResult_t * 16)(), ctypes.c_int()
    objects = (handle(ordinal), _asked(problem.operation), *_layouts(problem), preference)
    missing = f"cuBLASLt {library().cublasLtGetVersion()} has no algorithm for this product on this GPU"
    try:
        library().cublasLtMatmulAlgoGetHeuristic(*objects, len(results), results, ctypes.byref(count))
    except Error as error:
        raise Error(missing) from error
    for result in results[: count.value]:
        if result.state == 0:
            return cublasLtMatmulAlgo_t.from_buffer_copy(result.algo)
    raise Error(missing)
