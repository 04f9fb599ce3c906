"""What the bfloat16 TPU kernels share: two heads side by side, products in parts, the inverse, gates, the call.

What is square in the 64 rows of a chunk fills half of the 128 lanes, so two heads share an array, [64, 2 x 64]: half the
vector work, and the products of both in one pass of the matrix unit. Of HV heads in a block, head p of the first half is
paired with head p + HV / 2. All pairs go in step, stage by stage: the compiler looks no further than neighbouring lines, and so
their products fill each other's latencies.

bfloat16 matrices [rows, lanes] are held as 32-bit pairs of rows, [rows / 2, lanes], which is what the registers hold:
then parts are put together, masked and stored as they are. (Of bfloat16 arrays Mosaic makes half-filled tiles in between.)
"""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.manual_axes import results

ROWS = 64  # of keys and values in a chunk; with R = 3 the last 16 are zeros
LANES = 2 * ROWS
BASE = 8  # rows of the diagonal blocks that are inverted by substitution: a tile of float32
HEADS = 16  # value heads of a block, at most
VMEM_LIMIT = 48 * 2**20  # bytes; tpu7x has 64 MiB
SEMANTICS: tuple | None = ("parallel", "parallel", "arbitrary")  # of the grid
F32, BF16 = jnp.float32, jnp.bfloat16


def iota(shape, axis):
    """Index along the axis, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def rows_of(*x):
    """Arrays one above the other."""
    return jnp.concatenate(x, axis=0)


def lanes_of(*x):
    """Arrays side by side."""
    return jnp.concatenate(x, axis=1)


def bits(x):
    """bfloat16 of float32 [rows, lanes] as int32 pairs of rows."""
    return pltpu.bitcast(x.astype(BF16), jnp.int32)


def floats(x):
    """float32 of `bits`."""
    return pltpu.bitcast(x, BF16).astype(F32)


def halves(x):
    """Two arrays of 8 bits that sum to x in 16 bits; cutting bits costs less than rounding and reading back."""
    head = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), F32)
    return head, x - head


def split(x):
    """Bits of the `halves` of x."""
    return tuple(map(bits, halves(x)))


def dot(x, y, axes=(1, 0)):
    """float32 product of two matrices of bits."""
    x, y = pltpu.bitcast(x, BF16), pltpu.bitcast(y, BF16)
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=F32)


def transpose(x):
    """Bits of the transpose of a matrix of bits."""
    return bits(pltpu.bitcast(x, BF16).T)


def one():
    """1.0, which the compiler does not know to be it.

    Products that are added may be summed in the matrix unit. Which unit takes which, tpu7x's compiler decides for all that hang
    together by such sums, and of some it does not come to an end (its pass "MXU-assigner"); times this they do not hang together.
    """
    return jnp.where(pl.program_id(2) < 0, 0.0, 1.0)


def half_turn(x):
    """Lanes turned by half: what is left goes right."""
    return pltpu.roll(x, ROWS, 1)


def left(x):
    """Mask of the lanes of the left head of a pair."""
    return iota(x.shape, 1) < ROWS


def stacked(x):
    """Bits of the pair's two heads, one above the other, in an array [2 rows, LANES] that is 0 in the other head's lanes."""
    mask = jnp.where(
        left(x), -1, 0
    )  # no choice: of that v5e's compiler makes a masked product, which its profiler does not know
    return rows_of(x & mask, x & ~mask)


def either(x):
    """Of [2 rows, LANES], products of each of two heads with both, what is its own: [rows, LANES]; also of bits."""
    size = x.shape[0] // 2
    return jnp.where(iota((size, LANES), 1) < ROWS, x[:size], x[size:])


def padded(x):
    """Bits of [C, ..] with rows of zeros up to 64."""
    rows = ROWS // 2 - x.shape[0]
    return x if not rows else rows_of(x, jnp.zeros((rows, x.shape[1]), x.dtype))


def column(x, h):
    """Column h of [rows, heads] as [rows, 1]; 1 without gates."""
    return 1.0 if x is None else x[:, h : h + 1]


def run(stages, beside=None, parts=0):
    """Runs a generator to its end, with so many parts of another after each of its own."""
    for _ in stages:
        for _ in zip(range(parts), beside or (), strict=False):
            pass


# The inverse.


def _block_diagonal(x, size):
    """Bits of a [LANES, LANES] matrix with the blocks of float32 x [size, LANES] on its diagonal."""
    if size < 16:  # half a tile of bfloat16
        block = iota((size, LANES), 1) // size
        return bits(rows_of(*(jnp.where(block == i, x, 0) for i in range(LANES // size))))
    x = bits(x)
    block = iota(x.shape, 1) // size
    return rows_of(*(jnp.where(block == i, x, 0) for i in range(LANES // size)))


def _whole_tile(x):
    """Bits of x, with rows of zeros up to the 16 that a tile has."""
    return bits(x if x.shape[0] >= 16 else rows_of(x, jnp.zeros_like(x)))


def spread_columns():
    """Bits of [2 LANES, (BASE - 1) LANES]: column j of each diagonal block over the lanes of the block, from two parts."""
    pair, lane = iota((LANES // 2, LANES), 0), iota((LANES // 2, LANES), 1)

    def ones(j):
        low, high = (jnp.where(2 * pair + i == lane // BASE * BASE + j, 0x3F80, 0) for i in range(2))
        return (low | high << 16).astype(jnp.int32)

    one = lanes_of(*map(ones, range(BASE - 1)))
    return rows_of(one, one)


def inverses(ms, spread):
    """(I + M)^-1 for an even number of arrays M [64, 2 x 64] of strictly lower triangles: a generator that returns them, and
    yields wherever what follows must wait for what came before.

    Diagonal blocks of 8 by substitution, then blocks of twice the size from those of a size. In bfloat16 this errs by 5e-2
    at beta 2 and cosine .95: one Newton step with an accurate residual squares that.
    """
    xs = yield from _substituted(ms, spread)
    size = BASE
    while size < ROWS:
        xs = yield from _doubled(xs, ms, size)
        size *= 2
    eye = (iota((ROWS, LANES), 0) == iota((ROWS, LANES), 1) % ROWS).astype(F32)
    residuals = []
    for x, m in zip(xs, ms, strict=True):
        (big, small), (first, second) = map(stacked, split(x)), halves(m)
        residuals.append(eye - x - dot(bits(lanes_of(first, second, first)), rows_of(big, big, small)))
    yield
    found = [x + dot(bits(x), _block_diagonal(r, ROWS)) for x, r in zip(xs, residuals, strict=True)]
    yield
    return found


def _diagonal_blocks(m, size, below=0):
    """Blocks of m [64, 2 x 64] side by side in `size` rows: those `below` blocks under each (1 + `below`)th on the diagonal."""
    lane = iota((size, LANES), 1) % ROWS
    step = 1 + below
    blocks = {b: m[(b + below) * size : (b + below + 1) * size] for b in range(0, ROWS // size, step)}
    x = jnp.where(lane // size == 0, blocks.pop(0), 0) if below else blocks.pop(0)
    for b, block in blocks.items():
        x = jnp.where(lane // size == b, block, x)
    return x


def _substituted(ms, spread):
    """Inverses of the diagonal blocks of 8 of I + M, side by side: [8, 2 x 64] each."""
    columns = dot(lanes_of(*split(rows_of(*(_diagonal_blocks(m, BASE) for m in ms)))), spread)
    xs = [(iota((BASE, LANES), 0) == iota((BASE, LANES), 1) % BASE).astype(F32)] * len(ms)
    yield
    for j in range(BASE - 1):
        c = columns[:, j * LANES : (j + 1) * LANES]
        xs = [x - c[p * BASE : (p + 1) * BASE] * x[j : j + 1] for p, x in enumerate(xs)]
    yield
    return xs


def _doubled(xs, ms, size):
    """Inverses of diagonal blocks of 2 `size` rows, side by side, from those of `size` rows.

    Of blocks [[X, 0], [Z, Y]] the inverse is [[X', 0], [-Y' Z X', Y']], for all blocks of a size at once. Of two arrays, what
    concerns the left upper blocks X of one takes the lanes of X, of the other the lanes of Y.
    """
    half, even = len(ms) // 2, (iota((size, LANES), 1) & size) == 0
    z = [_diagonal_blocks(m, size, below=1) for m in ms]
    z = [z[p] + pltpu.roll(z[p + half], size, 1) for p in range(half)]
    two = [(xs[p], xs[p + half]) for p in range(half)]
    upper = [jnp.where(even, x, pltpu.roll(y, size, 1)) for x, y in two]
    lower = [jnp.where(even, pltpu.roll(x, LANES - size, 1), y) for x, y in two]
    products = [dot(_whole_tile(x), _block_diagonal(y, size))[:size] for x, y in zip(z, upper, strict=True)]
    yield
    corners = [dot(_whole_tile(x), _block_diagonal(y, size))[:size] for x, y in zip(lower, products, strict=True)]
    yield
    corners = corners + [pltpu.roll(x, LANES - size, 1) for x in corners]
    # Times the mask, as in `Gates._decays`.
    return [rows_of(x * even.astype(F32), jnp.where(even, -y, x)) for x, y in zip(xs, corners, strict=True)]


# Gates and scores.


class Gates:
    """What depends on beta and gates alone, of all heads of a block; decays are None without gates.

    Per row and head: beta [64, nh], decays from the chunk's start and to its end; from the start per query [C, nh]; total
    [1, nh]. As rows of pairs: beta_rows, gate_rows [nh / 2, 2 x 64].
    """

    def __init__(self, beta, gates, tokens, steps):
        self.tokens, self.steps, self.half = tokens, steps, beta.shape[1] // 2
        self.beta, self.beta_rows = beta, self._by_pair(beta)
        self.from_start = self.to_end = self.from_start_q = self.total = None
        i, j = iota((ROWS, LANES), 0), iota((ROWS, LANES), 1) % ROWS
        last = iota((tokens, LANES), 0) * self.steps + self.steps - 1  # row of a token
        self.below, self.seen = i > j, last >= iota((tokens, LANES), 1) % ROWS
        meets = [i >= j] + [self.seen] * (self.steps > 1)  # gates up to a row, or a query
        self.meets = [x.astype(F32) for x in meets]
        if gates is None:
            return
        self.gate_rows = self._by_pair(gates)
        masks = bits(rows_of(*self.meets, (i < j).astype(F32)))
        decays = jnp.exp(dot(masks, rows_of(*split(gates))))
        self.from_start, self.to_end = decays[:ROWS], decays[-ROWS:]
        self.from_start_q = decays[ROWS : ROWS + tokens] if self.steps > 1 else self.from_start
        self.total = self.from_start[-1:]

    def _by_pair(self, x):
        """[64, nh] -> [nh / 2, 2 x 64]."""
        x = x.T
        return lanes_of(x[: self.half], x[self.half :])

    def _decays(self, pairs):
        """exp(sum of the gates after row j up to row i, or up to query t): [([64, 2 x 64], [C, 2 x 64]) of a pair]."""
        if self.total is None:
            return [(1.0, 1.0)] * len(pairs)
        gates = []
        for p in pairs:
            row = jnp.broadcast_to(self.gate_rows[p : p + 1], (ROWS, LANES))
            # Times the mask: of a choice v5e's compiler makes a masked product, which its profiler does not know.
            gates += [lanes_of(*split(mask * row[: mask.shape[0]])) for mask in self.meets]
        s, j = iota((LANES, LANES), 0), iota((LANES, LANES), 1)
        later = bits(((s // ROWS == j // ROWS) & (s > j)).astype(F32))
        decays = jnp.exp(dot(rows_of(*gates), rows_of(later, later)))
        size = decays.shape[0] // len(pairs)
        ends = range(size, decays.shape[0] + 1, size)
        return [(decays[end - size : end - size + ROWS], decays[end - self.tokens : end]) for end in ends]

    def scores(self, pairs, q, k):
        """[(K K^T D, Q K^T D) of a pair], masked, and the decays D."""
        products = []
        for p in pairs:
            other = p + self.half
            products.append(either(dot(rows_of(k[p], q[p], k[other], q[other]), rows_of(k[p], k[other]), (1, 1))))
        decays = self._decays(pairs)
        return [
            (jnp.where(self.below, x[:ROWS] * dk, 0), jnp.where(self.seen, x[ROWS:] * dq, 0))
            for x, (dk, dq) in zip(products, decays, strict=True)
        ], decays


# Heads and calls.


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
    """Columns of a block of heads together: [B, blocks, T R, nh]."""
    found = {"beta": beta} | ({} if g is None else {"g": g})
    return {
        name: jnp.moveaxis(x.astype(F32).reshape(n.batch, -1, n.heads // n.nh, n.nh), 2, 1) for name, x in found.items()
    }


def _layouts(n, chunk):
    """Blocks of the arrays on the grid (batch, block of heads, chunk)."""

    def sequence(size, heads, dim):
        return pl.BlockSpec((None, size, heads, dim), lambda b, h, c: (b, chunk(c), h, 0))

    def per_chunk(*size):
        return pl.BlockSpec((None, None, *size), lambda b, h, c: (b, chunk(c), h, 0, 0))

    columns = pl.BlockSpec((None, None, n.rows, n.nh), lambda b, h, c: (b, h, chunk(c), 0))
    return {
        "q": sequence(n.tokens, n.kh, n.key_dim),
        "k": sequence(n.rows, n.kh, n.key_dim),
        "v": sequence(n.rows, n.nh, n.value_dim),
        "o": sequence(n.tokens, n.nh, n.value_dim),
        "beta": columns,
        "g": columns,
        "spread": pl.BlockSpec((LANES, (BASE - 1) * LANES), lambda b, h, c: (0, 0)),
        "inverses": per_chunk(n.nh // 2, ROWS // 2, 2 * LANES),
        "z": per_chunk(n.nh, ROWS // 2, n.value_dim),
        "states": per_chunk(n.nh, n.key_dim // 2, n.value_dim),
        "state": pl.BlockSpec((None, n.nh, n.key_dim, n.value_dim), lambda b, h, c: (b, h, 0, 0)),
    }


def _strided(shape):
    """Whether two neighbouring heads of a block [rows, heads, channels] are the words of whole tiles."""
    return shape[1] % 16 == shape[2] % 128 == 0


def _out(name):
    return f"{name} out"


def _exchanged(x, y):
    """Words of the low halves of x and y, and of their high halves: from words of two heads in even rows and in odd rows to
    words of two rows of the one head and of the other, and back.
    """
    return x & 0xFFFF | y << 16, x >> 16 & 0xFFFF | y & -0x10000


def _lane_tiles(channels):
    return [slice(start, start + 128) for start in range(0, channels, 128)]


def call(n, kernel, name, inputs, outputs, *, reverse=False, ahead=(), carried=None):
    """`pallas_call` over (batch, blocks of heads, chunks), forwards or in reverse.

    inputs: layout -> array; outputs: layout -> (shape, dtype), "state" among both. The kernel is given
    store(layout, array of each head), a generator that yields in between, for outputs that are sequences, the inputs by
    layout, those of sequences as `bits` in VMEM with heads first, the refs of the outputs by layout, and a float32 scratch
    of a block's states, which holds the "state" of
    the inputs at the first chunk and is that of the outputs after the last. Of keys, values, beta, gates and their gradients
    it sees ROWS rows.

    ahead: inputs of which the kernel gets the chunk after that of all others, and with them scratch arrays carried from
    call to call, name -> (shape, dtype). There is one more call then: in the first, what is not ahead is anything, and so may
    be what the kernel makes of it.
    """

    def chunk(c, name=None):
        if not ahead:
            return n.chunks - 1 - c if reverse else c
        return jnp.minimum(c, n.chunks - 1) if name in ahead else jnp.maximum(c - 1, 0)

    layouts = {name: _layouts(n, functools.partial(chunk, name=name))[name] for name in (*inputs, *outputs)}
    turned, stored = ([name for name in names if name in ("q", "k", "v", "o")] for names in (inputs, outputs))
    carried = carried or {}

    def there(name, rows):
        """How many of a block's rows are not behind the last token: what is read there is anything."""
        return (n.length - chunk(pl.program_id(2), name) * n.tokens) * (rows // n.tokens)

    def load(name, ref):
        x = ref[...].astype(F32)
        return jnp.where(iota(x.shape, 0) < there(name, x.shape[0]), x, 0) if n.length % n.tokens else x

    def columns(name, ref):
        x = load(name, ref)
        return x if n.rows == ROWS else rows_of(x, jnp.zeros((ROWS - n.rows, x.shape[1]), F32))

    def store(ref, words, heads):
        if not _strided(ref.shape):
            x = jnp.stack([heads[h][: ref.shape[0]] for h in range(ref.shape[1])])
            ref[...] = jnp.swapaxes(x, 0, 1).astype(ref.dtype)
            return
        step = ref.shape[1] // 2
        for i in range(step):
            for lanes in _lane_tiles(ref.shape[2]):
                even_and_odd = _exchanged(*(bits(heads[h][: ref.shape[0], lanes]) for h in (2 * i, 2 * i + 1)))
                for odd, x in enumerate(even_and_odd):
                    words[pl.ds(i + odd * step, x.shape[0], stride=2 * step), lanes] = x
            yield
        ref[...] = pltpu.bitcast(words[...].reshape(ref.shape[0], step, -1), ref.dtype)

    def turn(name, ref, words, out):
        """A block [rows, heads, channels] as `bits` with heads first, and zeros where it has fewer rows than `out`."""
        rows, heads, channels = ref.shape
        here = slice(rows // 2)
        if rows < 2 * out.shape[1]:
            out[:, rows // 2 :] = jnp.zeros((heads, out.shape[1] - rows // 2, channels), jnp.int32)
        if not _strided(ref.shape):
            x = jnp.swapaxes(load(name, ref), 0, 1)
            for h in range(heads):
                out[h, here] = bits(x[h])
            return
        step = heads // 2
        words[...] = pltpu.bitcast(ref[...], jnp.int32).reshape(rows * step, channels)
        for i, lanes in itertools.product(range(step), _lane_tiles(channels)):
            even_and_odd = [words[pl.ds(i + odd * step, rows // 2, stride=2 * step), lanes] for odd in range(2)]
            if n.length % n.tokens:
                row = 2 * iota(even_and_odd[0].shape, 0)
                even_and_odd = [jnp.where(row + odd < there(name, rows), x, 0) for odd, x in enumerate(even_and_odd)]
            out[2 * i, here, lanes], out[2 * i + 1, here, lanes] = _exchanged(*even_and_odd)

    def body(*every_ref):
        refs = iter(every_ref)
        groups = (inputs, outputs, [*turned, *map(_out, stored)], turned, carried)
        found, outs, words, heads_first, between = ({name: next(refs) for name in names} for names in groups)
        (s_ref,) = refs
        for name in turned:
            turn(name, found[name], words[name], heads_first[name])
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
        return pltpu.VMEM((heads, held // 2, channels) if turned else (rows * heads // 2, channels), jnp.int32)

    return pl.pallas_call(
        body,
        grid=(n.batch, n.heads // n.nh, n.chunks + bool(ahead)),
        in_specs=[layouts[name] for name in inputs],
        out_specs=[layouts[name] for name in outputs],
        out_shape=results(inputs.values(), outputs.values()),
        scratch_shapes=[
            *(scratch(name, False) for name in (*turned, *stored)),
            *(scratch(name, True) for name in turned),
            *(pltpu.VMEM(shape, dtype) for shape, dtype in carried.values()),
            pltpu.VMEM((n.nh, n.key_dim, n.value_dim), F32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_LIMIT),
        name=f"delta_product_{name}",
    )(*inputs.values())
