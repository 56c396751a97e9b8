# SPDX-License-Identifier: Apache-2.0
"""The Flash3D backbone in NumPy float64: each layer and its backward, then the whole network and its backward.

A backward takes the gradient of the layer's result first, then what the forward read, and returns the gradient of the
input before those of the parameters. Gradients of parameters are dicts with the keys of the parameters. Rows are slots
of the bucket layout. Rows in padding hold finite numbers, and their gradients are exactly 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpu3d.reference import attention as bucket
from gpu3d.reference import pooling

if TYPE_CHECKING:
    from gpu3d.buckets import Buckets, Scopes
    from gpu3d.flash3d.config import Config
    from gpu3d.flash3d.geometry import Level

Params = dict[str, Any]

# ---- layers --------------------------------------------------------------------------------------------------------


def linear(x: np.ndarray, params: Params) -> np.ndarray:
    """Return x W^T + b."""
    return x @ params["weight"].T + params["bias"]


def linear_backward(dy: np.ndarray, x: np.ndarray, params: Params) -> tuple[np.ndarray, Params]:
    """The gradients of `linear`."""
    return dy @ params["weight"], {"weight": dy.T @ x, "bias": dy.sum(axis=0)}


GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu(x: np.ndarray) -> np.ndarray:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3)))


def gelu_backward(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The gradient of `gelu`."""
    t = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3))
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x))


def _normalize(x: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows with mean 0 and variance 1, and 1 / their standard deviations [n, 1]."""
    centred = x - x.mean(axis=1, keepdims=True)
    inverse = 1 / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + epsilon)
    return centred * inverse, inverse


def layer_norm(x: np.ndarray, params: Params, epsilon: float) -> np.ndarray:
    """LayerNorm over the channels, with the biased variance."""
    return _normalize(x, epsilon)[0] * params["weight"] + params["bias"]


def layer_norm_backward(dy: np.ndarray, x: np.ndarray, params: Params, epsilon: float) -> tuple[np.ndarray, Params]:
    """The gradients of `layer_norm`."""
    normalized, inverse = _normalize(x, epsilon)
    d = dy * params["weight"]
    along = (d * normalized).mean(axis=1, keepdims=True)
    dx = inverse * (d - d.mean(axis=1, keepdims=True) - normalized * along)
    return dx, {"weight": (dy * normalized).sum(axis=0), "bias": dy.sum(axis=0)}


def half_turns(dim: int, wavelengths: tuple[float, float]) -> np.ndarray:
    """2 / wavelength of the pairs of a head of `dim` channels, float32 [3, pairs of an axis].

    The wavelengths of an axis are geometric, both ends included. Pairs that three axes cannot share stay as they are.
    """
    return np.tile(2 / np.geomspace(*wavelengths, dim // 6), (3, 1)).astype(np.float32)


def rotate(qkv: np.ndarray, positions: np.ndarray, heads: int, wavelengths: tuple[float, float]) -> np.ndarray:
    """Turn q and k by rotary position codes; the columns of qkv [n, 3 C] are q, k, v of all heads.

    Elements 2 p and 2 p + 1 of a head turn by pi * coordinate * half_turns: the first pairs with x, the next with y and
    z. So the product of q and k depends on the difference of their positions. Arguments are float32 products, as on a
    GPU. To turn gradients back, negate the positions.
    """
    parts = _split(qkv, heads)
    turns = half_turns(parts.shape[3], wavelengths)
    arguments = (positions[:, :, None] * turns).astype(np.float64).reshape(len(qkv), 1, turns.size)
    cosine, sine = np.cos(np.pi * arguments), np.sin(np.pi * arguments)
    out = parts.copy()
    even, odd = (parts[:2, :, :, first : 2 * turns.size : 2] for first in (0, 1))
    out[:2, :, :, 0 : 2 * turns.size : 2] = even * cosine - odd * sine
    out[:2, :, :, 1 : 2 * turns.size : 2] = even * sine + odd * cosine
    return out.swapaxes(0, 1).reshape(qkv.shape)


def attention(qkv: np.ndarray, buckets: Buckets, scopes: Scopes, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention [n, C] within scopes, and lse [n, heads]."""
    q, k, v = _split(qkv, heads)
    layout = scopes.table, buckets.bucket_size, buckets.bucket_offsets, buckets.lengths
    out, lse = bucket.bucket_attention(q, k, v, *layout, q.shape[2] ** -0.5)
    return out.reshape(len(qkv), qkv.shape[1] // 3), lse


def attention_backward(
    dout: np.ndarray, qkv: np.ndarray, out: np.ndarray, lse: np.ndarray, buckets: Buckets, scopes: Scopes, heads: int
) -> np.ndarray:
    """The gradient of qkv."""
    q, k, v = _split(qkv, heads)
    layout = scopes.table, buckets.bucket_size, buckets.bucket_offsets, buckets.lengths
    dout, out = dout.reshape(q.shape), out.reshape(q.shape)
    gradients = bucket.bucket_attention_backward(dout, q, k, v, out, lse, *layout, q.shape[2] ** -0.5)
    return np.stack(gradients, axis=1).reshape(qkv.shape)


def _split(qkv: np.ndarray, heads: int) -> np.ndarray:
    n, columns = qkv.shape
    return qkv.reshape(n, 3, heads, columns // (3 * heads)).swapaxes(0, 1)


def pool(x: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The mean over each child's members."""
    sums = pooling.bucket_unpool_backward(x, members)[0]
    return sums / np.maximum((members >= 0).sum(axis=1, keepdims=True), 1)


def pool_backward(dchild: np.ndarray, members: np.ndarray, num_slots: int) -> np.ndarray:
    """The gradient [num_slots, C] of `pool`."""
    return pooling.bucket_pool_backward(dchild, members, None, num_slots, "mean")


def unpool(child: np.ndarray, members: np.ndarray, num_slots: int) -> np.ndarray:
    """The rows of the children [num_slots, C] at their members."""
    return pooling.bucket_unpool(child, members, None, num_slots)


def unpool_backward(dout: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The gradient of `unpool`."""
    return pooling.bucket_unpool_backward(dout, members)[0]


# ---- drop path -----------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """What the random numbers of a training step depend on, beside layer and row."""

    seed: int  # 64 bits
    step: int  # 32 bits


def philox(counter: Sequence[Any], key: Sequence[int]) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al., 2011): four uint32 words of counter words, which may be arrays, and a key."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> high) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> high) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


def drop_path(rows: int, branch: int, rate: float, training: Training | None) -> Any:
    """The factor [rows, 1] of a branch's rows: 0 with probability `rate`, else 1 / (1 - rate). 1 without training.

    `branch` is 2 k for the attention of block k, and 2 k + 1 for its MLP.
    """
    if training is None:
        return 1.0
    key = training.seed & 0xFFFFFFFF, training.seed >> 32
    word = philox((np.arange(rows), branch, training.step, 0), key)[0]
    return np.where(word >= math.floor(rate * 2**32), 1 / (1 - rate), 0.0)[:, None]


def drop_rate(block: int, config: Config) -> float:
    """The rate of a block. Blocks count from the encoder's first to the decoder's last, the deepest decoder first."""
    blocks = sum(config.depths) + sum(config.decoder_depths)
    return config.drop_path * block / (blocks - 1) if blocks > 1 else 0.0


# ---- losses --------------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    """The probabilities of the classes of each row."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean over the rows, and its gradient. Every label is a class, and there is at least one row."""
    rows = np.arange(len(logits))
    shifted = logits - logits.max(axis=1, keepdims=True)
    loss = (np.log(np.exp(shifted).sum(axis=1)) - shifted[rows, labels]).mean()
    dlogits = softmax(logits)
    dlogits[rows, labels] -= 1
    return loss, dlogits / len(logits)


def lovasz_softmax(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The Lovasz-softmax loss (Berman et al., 2018) and its gradient: the mean over the classes among the labels.

    Every label is a class, and there is at least one row. Errors of a class are sorted from large to small, and ties by
    row.
    """
    probabilities = softmax(logits)
    dprobabilities = np.zeros_like(probabilities)
    present = np.unique(labels)
    loss = 0.0
    for c in present:
        foreground = labels == c
        errors = np.where(foreground, 1 - probabilities[:, c], probabilities[:, c])
        order = np.argsort(-errors, kind="stable")
        slopes = _jaccard_slopes(foreground[order])
        loss += errors[order] @ slopes / len(present)
        dprobabilities[order, c] = np.where(foreground[order], -slopes, slopes) / len(present)
    inner = (dprobabilities * probabilities).sum(axis=1, keepdims=True)
    return loss, probabilities * (dprobabilities - inner)


def _jaccard_slopes(foreground: np.ndarray) -> np.ndarray:
    """How much the Jaccard loss grows with each further error; Berman et al., algorithm 1."""
    total = foreground.sum()
    intersection = total - np.cumsum(foreground)
    union = total + np.cumsum(~foreground)
    return np.diff(1 - intersection / union, prepend=0)


def segmentation_loss(logits: np.ndarray, labels: np.ndarray, ignore: int) -> tuple[float, np.ndarray]:
    """Cross-entropy plus Lovasz-softmax over the points whose label is a class other than `ignore`; its gradient."""
    valid = (labels != ignore) & (labels >= 0) & (labels < logits.shape[1])
    dlogits = np.zeros_like(logits)
    if not valid.any():
        return 0.0, dlogits
    losses, gradients = zip(*(f(logits[valid], labels[valid]) for f in (cross_entropy, lovasz_softmax)), strict=True)
    dlogits[valid] = sum(gradients)
    return sum(losses), dlogits


# ---- parts of the network ------------------------------------------------------------------------------------------


class ProjectTape(NamedTuple):
    """What the backward of `project` reads."""

    x: np.ndarray
    projected: np.ndarray


def project(x: np.ndarray, params: Params, epsilon: float) -> tuple[np.ndarray, ProjectTape]:
    """GELU(LayerNorm(linear(x)))."""
    projected = linear(x, params)
    return gelu(layer_norm(projected, params["norm"], epsilon)), ProjectTape(x, projected)


def project_backward(dy: np.ndarray, tape: ProjectTape, params: Params, epsilon: float) -> tuple[np.ndarray, Params]:
    """The gradients of `project`."""
    dnormed = gelu_backward(dy, layer_norm(tape.projected, params["norm"], epsilon))
    dprojected, norm = layer_norm_backward(dnormed, tape.projected, params["norm"], epsilon)
    dx, gradients = linear_backward(dprojected, tape.x, params)
    return dx, gradients | {"norm": norm}


class Place(NamedTuple):
    """Where a block runs, and what it has beside its parameters."""

    level: Level
    scopes: Scopes
    heads: int
    config: Config
    keep: tuple[Any, Any]  # factors [n, 1] of the rows of both branches


class BlockTape(NamedTuple):
    """What the backward of `block` reads."""

    x: np.ndarray
    qkv: np.ndarray  # turned
    attended: np.ndarray
    lse: np.ndarray
    middle: np.ndarray  # between the branches
    hidden: np.ndarray  # before the GELU
    place: Place


def block(x: np.ndarray, params: Params, place: Place) -> tuple[np.ndarray, BlockTape]:
    """Attention and MLP, each behind a norm and beside the identity."""
    level, epsilon = place.level, place.config.epsilon
    qkv = linear(layer_norm(x, params["norm1"], epsilon), params["qkv"])
    qkv = rotate(qkv, level.positions, place.heads, place.config.wavelengths)
    attended, lse = attention(qkv, level.buckets, place.scopes, place.heads)
    middle = x + place.keep[0] * linear(attended, params["proj"])
    hidden = linear(layer_norm(middle, params["norm2"], epsilon), params["fc1"])
    y = middle + place.keep[1] * linear(gelu(hidden), params["fc2"])
    return y, BlockTape(x, qkv, attended, lse, middle, hidden, place)


def block_backward(dy: np.ndarray, tape: BlockTape, params: Params) -> tuple[np.ndarray, Params]:
    """The gradients of `block`."""
    place, grads = tape.place, {}
    level, epsilon = place.level, place.config.epsilon
    dactive, grads["fc2"] = linear_backward(place.keep[1] * dy, gelu(tape.hidden), params["fc2"])
    normed = layer_norm(tape.middle, params["norm2"], epsilon)
    dnormed, grads["fc1"] = linear_backward(gelu_backward(dactive, tape.hidden), normed, params["fc1"])
    dmiddle, grads["norm2"] = layer_norm_backward(dnormed, tape.middle, params["norm2"], epsilon)
    dmiddle += dy
    dattended, grads["proj"] = linear_backward(place.keep[0] * dmiddle, tape.attended, params["proj"])
    dqkv = attention_backward(dattended, tape.qkv, tape.attended, tape.lse, level.buckets, place.scopes, place.heads)
    dqkv = rotate(dqkv, -level.positions, place.heads, place.config.wavelengths)
    normed = layer_norm(tape.x, params["norm1"], epsilon)
    dnormed, grads["qkv"] = linear_backward(dqkv, normed, params["qkv"])
    dx, grads["norm1"] = layer_norm_backward(dnormed, tape.x, params["norm1"], epsilon)
    return dmiddle + dx, grads


def blocks_backward(dx: np.ndarray, tapes: Sequence[BlockTape], params: Params) -> tuple[np.ndarray, Params]:
    """The gradients of a stage's blocks, from the last to the first."""
    grads = {}
    for i, tape in reversed(list(enumerate(tapes))):
        dx, grads[str(i)] = block_backward(dx, tape, params[str(i)])
    return dx, grads


# ---- the network ---------------------------------------------------------------------------------------------------


class EncoderTape(NamedTuple):
    """What the backward of an encoder level reads."""

    down: ProjectTape | None  # None at level 0
    blocks: list[BlockTape]


class DecoderTape(NamedTuple):
    """What the backward of a decoder level reads."""

    up: ProjectTape
    skip: ProjectTape
    blocks: list[BlockTape]


class Tape(NamedTuple):
    """What `backward` reads, beside what `forward` was given."""

    stem: np.ndarray
    encoder: list[EncoderTape]
    decoder: list[DecoderTape]  # from the deepest level up
    last: np.ndarray  # the features before the head


def forward(
    params: Params, geometry: Sequence[Level], features: np.ndarray, config: Config, training: Training | None = None
) -> tuple[np.ndarray, Tape]:
    """Logits float64 [N, classes], and what the backward reads. Without `training` there is no drop path."""
    epsilon, top = config.epsilon, geometry[0]
    numbers = itertools.count()  # of the blocks, in the order in which they run

    def stage(x: np.ndarray, params: Params, level: Level, heads: int) -> tuple[np.ndarray, list]:
        tapes = []
        for i in range(len(params)):
            k = next(numbers)
            rate = drop_rate(k, config)
            keep = drop_path(len(x), 2 * k, rate, training), drop_path(len(x), 2 * k + 1, rate, training)
            x, tape = block(x, params[str(i)], Place(level, level.scopes[i % 2], heads, config, keep))
            tapes.append(tape)
        return x, tapes

    stem = top.buckets.scatter(features.astype(np.float64))
    x = linear(stem, params["stem"])
    skips, encoder, decoder = [], [], []
    for l, level in enumerate(geometry):
        part, down = params["encoder"][str(l)], None
        if l:
            x, down = project(pool(x, geometry[l - 1].members), part["down"], epsilon)
        x, tapes = stage(x, part["blocks"], level, config.heads[l])
        skips.append(x)
        encoder.append(EncoderTape(down, tapes))
    for l in reversed(range(len(geometry) - 1)):
        part, level = params["decoder"][str(l)], geometry[l]
        child, up = project(x, part["up"], epsilon)
        skipped, skip = project(skips[l], part["skip"], epsilon)
        x = unpool(child, level.members, len(skipped)) + skipped
        x, tapes = stage(x, part["blocks"], level, config.decoder_heads[l])
        decoder.append(DecoderTape(up, skip, tapes))
    logits = linear(layer_norm(x, params["head"]["norm"], epsilon), params["head"])
    return top.buckets.gather(logits), Tape(stem, encoder, decoder, x)


def backward(
    dlogits: np.ndarray, tape: Tape, params: Params, geometry: Sequence[Level], config: Config
) -> tuple[np.ndarray, Params]:
    """The gradients of the features [N, in_channels] and of the parameters."""
    epsilon, top, head = config.epsilon, geometry[0].buckets, params["head"]
    normed = layer_norm(tape.last, head["norm"], epsilon)
    dnormed, dhead = linear_backward(top.scatter(dlogits), normed, head)
    dx, dhead["norm"] = layer_norm_backward(dnormed, tape.last, head["norm"], epsilon)
    dskips: list[Any] = [0] * len(geometry)
    ddecoder, dencoder = {}, {}
    for l, saved in enumerate(reversed(tape.decoder)):
        part = params["decoder"][str(l)]
        dx, dblocks = blocks_backward(dx, saved.blocks, part["blocks"])
        dskips[l], dskip = project_backward(dx, saved.skip, part["skip"], epsilon)
        dx, dup = project_backward(unpool_backward(dx, geometry[l].members), saved.up, part["up"], epsilon)
        ddecoder[str(l)] = {"up": dup, "skip": dskip, "blocks": dblocks}
    for l in reversed(range(len(geometry))):
        part, saved_level = params["encoder"][str(l)], tape.encoder[l]
        dx, dblocks = blocks_backward(dx + dskips[l], saved_level.blocks, part["blocks"])
        grads = {"blocks": dblocks}
        if saved_level.down is not None:
            dpooled, grads["down"] = project_backward(dx, saved_level.down, part["down"], epsilon)
            dx = pool_backward(dpooled, geometry[l - 1].members, geometry[l - 1].buckets.num_slots)
        dencoder[str(l)] = grads
    dstem_rows, dstem = linear_backward(dx, tape.stem, params["stem"])
    return top.gather(dstem_rows), {"stem": dstem, "encoder": dencoder, "decoder": ddecoder, "head": dhead}
