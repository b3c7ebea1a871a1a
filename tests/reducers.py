"""What reducers are, from their definitions, in NumPy and fp64; and any of them at work on the members of a pool."""

import math
import zlib

import numpy as np
import torch

from paceline.comm import link
from paceline.comm.replica import Shard
from paceline.config import choose
from paceline.registry import REDUCERS
from paceline.sync.base import SyncContext

BLOCK, HALF = 256, 0.5 + 2.0**-12
SHAPES = {"table": (67, 16), "matrix": (24, 33), "vector": (300,), "scale": (5,), "number": ()}
"""None of them whole blocks; one of fewer values than there are members."""


def exchange(member, reducer, inputs, shares=None, unused=(), dtype=torch.float64):
    """Rounds of one reducer on a member: every sum, the residuals in units of the sum, and the bytes it sent.

    ``inputs[round][member]`` are tensors by name, of which ``unused`` are taken back after each round.
    """
    between = link.connect(
        member.store, index=member.index, size=member.size, coordinate=0, backend="gloo", timeout_s=30.0, loopback=True
    )
    own = [
        {name: torch.as_tensor(v).to(dtype, copy=True) for name, v in values[member.index].items()} for values in inputs
    ]
    shards = [Shard(name, torch.nn.Parameter(tensor.clone())) for name, tensor in own[0].items()]
    at_work = choose(REDUCERS, reducer).build(SyncContext(link=between, steps=len(inputs), seed=3))
    at_work.start(shards)
    before, sums = between.sent_bytes, []
    for step, values in enumerate(own, 1):
        wait = at_work.start_sum(values, 1.0 if shares is None else shares[member.index], step)
        for tensor in values.values():
            tensor.fill_(torch.nan)  # it may change as soon as the sum is on its way
        summed = wait()
        sums.append({name: tensor.clone() for name, tensor in summed.items()})
        at_work.settle(unused)
    left = {key: state.tensor / member.size for key, state in at_work.state().items() if key.endswith("/residual")}
    return {
        "sums": sums,
        "left": {key.removesuffix("/residual"): tensor for key, tensor in left.items()},
        "state": {key: state.tensor.clone() for key, state in at_work.state().items()},
        "sent_bytes": between.sent_bytes - before,
    }


def random_inputs(rounds, members, shapes=SHAPES, seed=0):
    """Values of several sizes, some of them zero."""
    rng = np.random.default_rng(seed)
    return [
        [
            {
                name: (rng.normal(size=shape) * np.exp(rng.normal(size=shape)) * (rng.random(shape) < 0.9))
                for name, shape in shapes.items()
            }
            for _ in range(members)
        ]
        for _ in range(rounds)
    ]


def by_blocks(values, encode):
    """``encode`` of each 256 neighbours of a tensor in row-major order; the last may be shorter."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    return np.concatenate([encode(flat[i : i + BLOCK]) for i in range(0, len(flat), BLOCK)]).reshape(np.shape(values))


def bf16(x):
    bits = x.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even
    return (rounded & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def fp16(x):
    scale = 2.0 ** (math.floor(math.log2(np.abs(x).max())) + 1) if x.any() else 1.0
    return (x / scale).astype(np.float16).astype(np.float64) * scale


def int8(x):
    scale = np.abs(x).max() / 127
    return np.floor(x / scale + 1 - HALF) * scale if scale > 0 else x


def to_nearest(levels):
    def encode(x):
        scale = np.abs(x).max()
        if scale == 0:
            return x
        steps = np.diff(levels)
        code = (np.abs(x)[:, None] / scale > np.array(levels)[:-1] + HALF * steps).sum(1)
        return np.sign(x) * np.array(levels)[code] * scale

    return encode


def sign(x):
    return np.where(x >= 0, 1.0, -1.0) * np.abs(x).mean()


CODES = {
    "bf16": bf16,
    "fp16": fp16,
    "int8": int8,
    "int4": to_nearest([k / 7 for k in range(8)]),
    "e3m0": to_nearest([0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
    "sign": sign,
}
"""What becomes of a block where values are rounded to the nearest."""


def nothing_left(inputs):
    """Before the first round, by member and name."""
    return [{name: np.zeros(np.shape(v)) for name, v in own.items()} for own in inputs[0]]


def coded_sums(code, inputs, shares):
    """Sums by owners with error feedback at both ends: round by round what all get, and what each has left out.

    Of two members' codes each decodes both, and the sum is not encoded.
    """
    members, left, told = len(shares), nothing_left(inputs), []
    for values in inputs:
        sums = {}
        for name in left[0]:
            sent = [share * own[name] + kept[name] for share, own, kept in zip(shares, values, left, strict=True)]
            coded = [by_blocks(p, code) for p in sent]
            total = sum(coded)
            sums[name] = by_blocks(total, code) if members > 2 else total
            blocks = np.arange(total.size) // BLOCK  # one after the other; where they begin is a checksum of the name
            owner = ((zlib.crc32(name.encode()) + blocks) % members).reshape(total.shape)
            for member in range(members):
                left[member][name] = sent[member] - coded[member] + (owner == member) * (total - sums[name])
        told.append(sums)
    return told, left


def topk_sums(share, inputs, shares):
    """The first of the greatest of each 4096 neighbours, the last block filled up with zeros, with error feedback."""
    number, left, told = math.ceil(share * 4096), nothing_left(inputs), []
    for values in inputs:
        sums = {}
        for name in left[0]:
            sums[name] = np.zeros_like(left[0][name])
            for part, own, kept in zip(shares, values, left, strict=True):
                sent = part * own[name] + kept[name]
                flat, taken = sent.ravel(), np.zeros(sent.size)
                for start in range(0, sent.size, 4096):
                    block = flat[start : start + 4096]
                    order = np.argsort(-np.abs(block), kind="stable")[:number]
                    taken[start + order] = block[order]
                sums[name] = sums[name] + taken.reshape(sent.shape)
                kept[name] = sent - taken.reshape(sent.shape)
        told.append(sums)
    return told, left


def powersgd_sums(rank, first_factors, inputs, shares):
    """Power iteration with the last time's factor, by NumPy's own decomposition; vectors as they are."""
    factors, left, told = dict(first_factors), nothing_left(inputs), []
    for values in inputs:
        sums = {}
        for name in left[0]:
            sent = [part * own[name] + kept[name] for part, own, kept in zip(shares, values, left, strict=True)]
            if name not in factors:
                sums[name] = sum(sent)
                continue
            basis, _, _ = np.linalg.svd(sum(m @ factors[name] for m in sent), full_matrices=False)
            sums[name] = basis @ basis.T @ sum(sent)
            # Any basis spans the same, and the next factor is told up to its rotation: so is all that follows.
            factors[name] = sum(sent).T @ basis
            for m, kept in zip(sent, left, strict=True):
                kept[name] = m - basis @ basis.T @ m
        told.append(sums)
    return told, left
