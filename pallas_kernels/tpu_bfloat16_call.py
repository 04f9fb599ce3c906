"""How the bfloat16 TPU kernels are called: blocks of arrays, heads turned first and back, what is carried from chunk to chunk."""

import functools
import itertools
import types

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.manual_axes import results
from pallas_kernels.tpu_bfloat16_common import (
    F32,
    LANES,
    LOWEST_GATE,
    ROWS,
    bits,
    compiled,
    floats,
    iota,
    lanes_of,
    low_or_high,
    padded,
    rows_of,
    unpacked,
    word,
)
from pallas_kernels.tpu_bfloat16_inverse import BASE

HEADS = 16  # value heads of a block, at most
VMEM_LIMIT = 48 * 2**20  # bytes; tpu7x has 64 MiB
SEMANTICS: tuple | None = ("parallel", "parallel", "arbitrary")  # of the grid
PITCH = 9  # of `_Words`


class PerHead:
    """A ref [key heads or value heads, rows / 2, channels] of `bits`, read by value head."""

    def __init__(self, ref, group=1):
        self.ref, self.group = ref, group

    def __getitem__(self, head):
        return self.ref[head // self.group]


def sizes(q, k, heads, value_dim):
    """Sizes of arrays, of a chunk and of a block of nh value heads and kh key heads."""
    batch, length, key_heads, key_dim = q.shape
    steps = k.shape[1] // length
    tokens = 1 << (ROWS // steps).bit_length() - 1
    nh = min(HEADS, heads)
    return types.SimpleNamespace(
        batch=batch, length=length, steps=steps, tokens=tokens, rows=tokens * steps, chunks=-(-length // tokens), heads=heads,
        nh=nh, kh=nh * key_heads // heads, key_dim=key_dim, value_dim=value_dim,
    )  # fmt: skip


def beta_and_gates(n, beta, g):
    """Columns of a block of heads together: [B, blocks, T R or T, nh]."""
    found = {"beta": beta} | ({} if g is None else {"g": g})
    return {
        name: jnp.moveaxis(x.astype(F32).reshape(n.batch, -1, n.heads // n.nh, n.nh), 2, 1) for name, x in found.items()
    }


def _layouts(n, chunk):
    """Blocks of the arrays on the grid (batch, block of heads, chunk)."""

    def sequence(size, heads, dim):
        return pl.BlockSpec((1, size, heads, dim), lambda b, h, c: (b, chunk(c), h, 0))

    def per_chunk(*size):
        return pl.BlockSpec((None, None, *size), lambda b, h, c: (b, chunk(c), h, 0, 0))

    def columns(rows):
        return pl.BlockSpec((None, None, rows, n.nh), lambda b, h, c: (b, h, chunk(c), 0))

    return {
        "q": sequence(n.tokens, n.kh, n.key_dim),
        "k": sequence(n.rows, n.kh, n.key_dim),
        "v": sequence(n.rows, n.nh, n.value_dim),
        "o": sequence(n.tokens, n.nh, n.value_dim),
        "beta": columns(n.rows),
        "g": columns(n.tokens),
        "spread": pl.BlockSpec((LANES, (BASE - 1) * LANES), lambda b, h, c: (0, 0)),
        "inverses": per_chunk(n.nh // 2, ROWS, LANES),
        "z": per_chunk(n.nh, ROWS // 2, n.value_dim),
        "states": per_chunk(n.nh, n.key_dim // 2, n.value_dim),
        "state": pl.BlockSpec((None, n.nh, n.key_dim, n.value_dim), lambda b, h, c: (b, h, 0, 0)),
    }


def _out(name):
    return f"{name} out"


class _Words:
    """A VMEM scratch of the 32-bit words of a bfloat16 block [rows, 16 heads, channels], by which heads come first or last.

    Word i of a row holds its heads 2 i and 2 i + 1, so a pair of heads is every PITCH-th word. A row has 8; the ninth keeps
    them out of one bank of the memory: of every 8th or 16th word no more than 4 or 2 can be had at once.
    """

    def __init__(self, ref):
        self.ref = ref

    @staticmethod
    def scratch(rows, channels):
        """What it is allocated as: a part for each 128 channels."""
        return pltpu.VMEM((channels // 128, rows * PITCH, 128), jnp.int32)

    @staticmethod
    def serve(rows, heads, channels):
        """Whether they do a block [rows, heads, channels]."""
        return heads == 16 and channels % 128 == 0

    def fill(self, ref):
        """From a block."""
        for part, row in itertools.product(range(self.ref.shape[0]), range(ref.shape[1])):
            lanes = slice(part * 128, (part + 1) * 128)
            words = (
                ref.bitcast(jnp.int32)[0, row, :, lanes]
                if compiled()
                else pltpu.bitcast(ref[0, row, :, lanes], jnp.int32)
            )
            self.ref[part, pl.ds(row * PITCH, 8), :] = words

    def empty(self, ref):
        """To a block."""
        for part, row in itertools.product(range(self.ref.shape[0]), range(ref.shape[1])):
            lanes, words = slice(part * 128, (part + 1) * 128), self.ref[part, pl.ds(row * PITCH, 8), :]
            if compiled():
                ref.bitcast(jnp.int32)[0, row, :, lanes] = words
            else:
                ref[0, row, :, lanes] = pltpu.bitcast(words, ref.dtype)

    def _every(self, pair, step, first):
        rows = self.ref.shape[1] // PITCH // step
        return pl.ds(pair + first * PITCH, rows, stride=step * PITCH)

    def read(self, pair, step=1, first=0):
        """Words [rows / step, channels] of two heads, of every step-th row from the first on."""
        here = self._every(pair, step, first)
        return lanes_of(*(self.ref[part, here, :] for part in range(self.ref.shape[0])))

    def write(self, pair, x):
        """Words [rows, channels] of two heads."""
        for part in range(self.ref.shape[0]):
            self.ref[part, self._every(pair, 1, 0), :] = x[:, part * 128 : (part + 1) * 128]


def _exchanged(x, y):
    """Words of the low halves of x and y, and of their high halves: from words of two heads in even rows and in odd rows to
    words of two rows of the one head and of the other.
    """
    return x & 0xFFFF | y << 16, x >> 16 & 0xFFFF | y & -0x10000


class Packed(PerHead):
    """The same ref of what `tpu_bfloat16_common.packed` made, read as operands."""

    def __getitem__(self, head):
        return unpacked(self.ref[head])


class _Values:
    """By head, float32 [ROWS, V] of a block of values: from its words, or from `bits` with heads first."""

    def __init__(self, ref, there):
        self.ref, self.there = ref, there

    def __getitem__(self, head):
        if not isinstance(self.ref, _Words):
            return floats(self.ref[head])
        x = low_or_high(self.ref.read(head // 2), head % 2)
        if self.there is not None:
            x = jnp.where(iota(x.shape, 0) < self.there, x, 0)
        return x if x.shape[0] == ROWS else rows_of(x, jnp.zeros((ROWS - x.shape[0], x.shape[1]), F32))


def call(n, kernel, name, inputs, outputs, *, reverse=False, ahead=(), carried=None):
    """`pallas_call` over (batch, blocks of heads, chunks), forwards or in reverse.

    inputs: layout -> array; outputs: layout -> (shape, dtype), "state" among both. The kernel is given
    store(layout, array of each head), a generator that yields in between, for outputs that are sequences, the inputs by
    layout, those of sequences as `bits` in VMEM with heads first (values as float32 by head), the refs of the outputs by layout,
    and a float32 scratch of a block's states, which holds the "state" of the inputs at the first chunk and is that of the
    outputs after the last. Of keys, values, beta and their gradients it sees ROWS rows.

    ahead: inputs of which the kernel gets the chunk after that of all others, and with them scratch arrays carried from
    call to call, name -> (shape, dtype). There is one more call then: in the first, what is not ahead is anything, and so may
    be what the kernel makes of it.
    """

    def chunk(c, name=None):
        if not ahead:
            return n.chunks - 1 - c if reverse else c
        return jnp.minimum(c, n.chunks - 1) if name in ahead else jnp.maximum(c - 1, 0)

    layouts = {name: _layouts(n, functools.partial(chunk, name=name))[name] for name in (*inputs, *outputs)}
    loaded, stored = ([name for name in names if name in ("q", "k", "v", "o")] for names in (inputs, outputs))
    turned = [name for name in loaded if name != "v" or not _Words.serve(*layouts[name].block_shape[1:])]
    carried = carried or {}

    def there(name, rows):
        """How many of a block's rows are not behind the last token: what is read there is anything."""
        return (n.length - chunk(pl.program_id(2), name) * n.tokens) * (rows // n.tokens)

    def load(name, x):
        x = x.astype(F32)
        return jnp.where(iota(x.shape, 0) < there(name, x.shape[0]), x, 0) if n.length % n.tokens else x

    def columns(name, ref):
        x = load(name, ref[...])
        return padded(x) if name == "beta" else jnp.maximum(x, LOWEST_GATE)

    def store(ref, words, heads):
        _, rows, count, channels = ref.shape
        if not _Words.serve(rows, count, channels):
            x = jnp.stack([heads[h][:rows] for h in range(count)])
            ref[0] = jnp.swapaxes(x, 0, 1).astype(ref.dtype)
            return
        for i in range(8):
            words.write(i, word(*(heads[h][:rows] for h in (2 * i, 2 * i + 1))))
            yield
        words.empty(ref)

    def turn(name, ref, words, out):
        """A block [rows, heads, channels] as `bits` with heads first, and zeros where it has fewer rows than `out`."""
        _, rows, heads, channels = ref.shape
        here = slice(rows // 2)
        if rows < 2 * out.shape[1]:
            out[:, rows // 2 :] = jnp.zeros((heads, out.shape[1] - rows // 2, channels), jnp.int32)
        if not _Words.serve(rows, heads, channels):
            x = jnp.swapaxes(load(name, ref[0]), 0, 1)
            for h in range(heads):
                out[h, here] = bits(x[h])
            return
        for i in range(8):
            even_and_odd = [words.read(i, 2, odd) for odd in range(2)]
            if n.length % n.tokens:
                row = 2 * iota(even_and_odd[0].shape, 0)
                even_and_odd = [jnp.where(row + odd < there(name, rows), x, 0) for odd, x in enumerate(even_and_odd)]
            out[2 * i, here], out[2 * i + 1, here] = _exchanged(*even_and_odd)

    def body(*every_ref):
        refs = iter(every_ref)
        groups = (inputs, outputs, [*loaded, *map(_out, stored)], turned, carried)
        found, outs, words, heads_first, between = ({name: next(refs) for name in names} for names in groups)
        (s_ref,) = refs
        words = {name: _Words(ref) for name, ref in words.items()}
        for name in loaded:
            if _Words.serve(*found[name].shape[1:]):
                words[name].fill(found[name])
        for name in turned:
            turn(name, found[name], words[name], heads_first[name])
        if "v" in loaded:
            rest = there("v", n.rows) if n.length % n.tokens else None
            heads_first["v"] = _Values(heads_first.get("v", words["v"]), rest)
        found |= heads_first | {name: columns(name, found[name]) for name in ("beta", "g") if name in found} | between

        def begin():
            @pl.when(pl.program_id(2) == 0)
            def _():
                s_ref[...] = found["state"][...]

        if not ahead:
            begin()
        kernel(lambda name, heads: store(outs[name], words[_out(name)], heads), found, outs, s_ref)
        if ahead:
            begin()

        @pl.when(pl.program_id(2) == n.chunks - 1 + bool(ahead))
        def _():
            outs["state"][...] = s_ref[...]

    def scratch(name, turned):
        _, rows, heads, channels = layouts[name].block_shape
        held = ROWS if rows == n.rows else rows
        if turned:
            return pltpu.VMEM((heads, held // 2, channels), jnp.int32)
        served = _Words.serve(rows, heads, channels)
        return _Words.scratch(rows, channels) if served else pltpu.VMEM((8, 128), jnp.int32)

    return pl.pallas_call(
        body,
        grid=(n.batch, n.heads // n.nh, n.chunks + bool(ahead)),
        in_specs=[layouts[name] for name in inputs],
        out_specs=[layouts[name] for name in outputs],
        out_shape=results(inputs.values(), outputs.values()),
        scratch_shapes=[
            *(scratch(name, False) for name in (*loaded, *stored)),
            *(scratch(name, True) for name in turned),
            *(pltpu.VMEM(shape, dtype) for shape, dtype in carried.values()),
            pltpu.VMEM((n.nh, n.key_dim, n.value_dim), F32),
        ],
        # Blocks are the pipeline's own and all other indices are static: nothing to check.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True
        ),
        name=f"delta_product_{name}",
    )(*inputs.values())
