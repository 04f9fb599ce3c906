"""The forward kernel in bfloat16: outputs and states, and what the backward kernel will want.

Per chunk and head, with D the decays between rows, S the state before the chunk, dashes left out where sizes tell::

    M = strict_tril(K K^T D) diag(beta)          T = (I + M)^-1
    Z = T (V - decay K S)                        P = tril(Q K^T D) diag(beta)
    O = scale (decay Q S + P Z)                   S <- decay S + K^T (decay beta Z)

Everything that stays in the state is kept to 16 bits by products of two bfloat16 parts.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu_bfloat16_call import PerHead, beta_and_gates, call, sizes
from pallas_kernels.tpu_bfloat16_common import (
    F32,
    LANES,
    ROWS,
    Gates,
    by_row,
    dot,
    half_turn,
    lanes_of,
    left,
    operand,
    operands,
    packed,
    rows_of,
    run,
    split,
    spread_column,
    spreadable,
    stacked,
    transpose,
)
from pallas_kernels.tpu_bfloat16_inverse import inverses, spread_columns

# Heads of a stage of the scan beside the first stages of what is ahead, and each later one; the first two set what `keep` leaves.
PARTS_AT_ONCE = (6, 6, 6, 8)
KEPT = ("inverses", "z", "states")  # for the backward


def forward(q, k, v, beta, g, state, scale, keep):
    """[o, last state], and for the backward with `keep` T, Z and S of every chunk; arguments as `tpu_bfloat16.scan`."""
    n = sizes(q, k, *v.shape[2:])

    def kernel(store, refs, outs, s_ref):
        following = _Ahead(n, refs, scale)
        block = _Block(n, refs, [outs[name] for name in KEPT] if keep else [], s_ref, scale)
        scan = block.run(functools.partial(store, "o"), following.keep)
        run(following.run(), scan, PARTS_AT_ONCE)
        while not block.solved:
            next(scan)
        following.keep("t")
        run(scan)

    inputs = {"q": q, "k": k, "v": v, **beta_and_gates(n, beta, g), "spread": spread_columns(), "state": state}
    outputs = {"o": ((n.batch, n.length, n.heads, n.value_dim), v.dtype), "state": (state.shape, F32)}
    if keep:
        rows = (
            (n.heads // 2, ROWS, LANES),
            (n.heads, ROWS // 2, n.value_dim),
            (n.heads, n.key_dim // 2, n.value_dim),
        )
        outputs |= {name: ((n.batch, n.chunks, *size), jnp.int32) for name, size in zip(KEPT, rows, strict=True)}
    return call(
        n, kernel, "forward", inputs, outputs, ahead=("q", "k", "beta", "g"), carried=_carried(n, g is not None)
    )


def _carried(n, gated):
    """What `_Ahead` leaves for `_Block` of the next chunk: q and k as `bits`, T in two parts, P, decay of the chunk, and by head
    over all lanes what rows are multiplied by (`_weights`), in two places used in turn.
    """
    half = n.nh // 2
    found = {
        "now_q": ((n.kh, n.tokens // 2, n.key_dim), jnp.int32),
        "now_k": ((n.kh, ROWS // 2, n.key_dim), jnp.int32),
        "t": operands(half, rows=ROWS, lanes=2 * LANES),
        "p": operands(half, rows=n.tokens, lanes=LANES),
    }
    found |= {name: ((2, n.nh, rows, n.value_dim), F32) for name, rows in _weights(n, gated).items()}
    return found | ({"total": ((1, n.nh), F32)} if gated else {})


def _weights(n, gated):
    """What rows are multiplied by, and how many: those written to the state, and what the keys and query of a token read."""
    return {"weight": ROWS} | ({"from_start": n.tokens} if gated else {})


class _Ahead:
    """What a chunk of a block of heads is by itself."""

    def __init__(self, n, refs, scale):
        self.n, self.refs, self.scale = n, refs, scale
        self.found: dict[str, list[jax.Array] | jax.Array] = {}

    def run(self):
        """All heads in step; yields wherever what follows must wait for what came before."""
        n, refs, half = self.n, self.refs, self.n.nh // 2
        pairs = range(half)
        q, k = (PerHead(refs[name], n.nh // n.kh) for name in "qk")
        gates = Gates(refs["beta"], refs.get("g"), n.tokens, n.steps)
        scores, _ = gates.scores(pairs, q, k)
        yield
        rows = [gates.beta_rows[p : p + 1] for p in pairs]
        ms = [kk * row for (kk, _), row in zip(scores, rows, strict=True)]
        self.found["p"] = [operand(qk * row) for (_, qk), row in zip(scores, rows, strict=True)]
        weights = [gates.beta]
        if gates.total is not None:
            self.found["total"] = gates.total
            weights = [gates.to_end * gates.beta, gates.from_start_q]
        weights = spreadable(rows_of(*weights))
        stages = inverses(ms, refs["spread"][...])
        # Of its eight stages after these the matrix unit has least to do; elsewhere the whole is up to a fifth slower.
        yield from itertools.islice(stages, 4)
        self._spread(weights, range(half))
        yield from itertools.islice(stages, 2)
        self._spread(weights, range(half, n.nh))
        found = yield from stages
        self.found["t"] = [lanes_of(*split(x)) for x in found]

    def _spread(self, weights, heads):
        for h in heads:
            x, first = spread_column(weights, h, self.n.nh, self.n.value_dim), 0
            for name, rows in _weights(self.n, "total" in self.found).items():
                self.refs[name][pl.program_id(2) % 2, h] = x[first : first + rows]
                first += rows

    def keep(self, *names):
        """Leaves these for the next call, once `_Block` is done with what the last one left."""
        for name in names:
            if name in ("q", "k"):
                self.refs[f"now_{name}"][...] = self.refs[name][...]
            elif name == "total":
                self.refs[name][...] = self.found[name]
            else:
                for p, of_pair in enumerate(self.found[name]):
                    self.refs[name][p] = of_pair


class _Block:
    """A chunk of a block of heads, from what `_Ahead` left of it and the states; `outs` are the outputs by head, [C, V]."""

    def __init__(self, n, refs, kept, s_ref, scale):
        self.n, self.half, self.scale, self.kept, self.s_ref = n, n.nh // 2, scale, kept, s_ref
        self.q, self.k = (PerHead(refs[f"now_{name}"], n.nh // n.kh) for name in "qk")
        self.v = refs["v"]
        self.refs = refs
        self.gated = "total" in refs
        self.nothing = jnp.zeros(*operands(rows=ROWS, lanes=n.value_dim))
        self.outs: dict[int, jax.Array] = {}
        self.solved = False  # then T is not read any more

    def _weight(self, name, h):
        return self.refs[name][1 - pl.program_id(2) % 2, h]

    def run(self, store, keep):
        """A generator: stage by stage, yielding after each head; `keep` is told what is not read any more."""
        half = self.half
        heads = [h for p in range(half) for h in (p, p + half)]
        read, z, turned = {}, {}, {}
        for h in heads:
            kq = rows_of(self.k[h], self.q[h])
            read[h] = dot(lanes_of(kq, kq), rows_of(*split(self.s_ref[h])))
            yield
        for h in heads:
            z[h] = self._solve(h, read[h][:ROWS])
            turned[h] = transpose(rows_of(self.k[h], self.k[h]))
            yield
        self.solved = True
        keep("q", "k")
        for p in range(half):
            of_z = dot(stacked(self.refs["p"][p]), rows_of(operand(z[p]), operand(z[p + half])))
            for h, x in ((p, of_z[: self.n.tokens]), (p + half, of_z[self.n.tokens :])):
                decay = self._weight("from_start", h) if self.gated else 1.0
                self.outs[h] = self.scale * (decay * read[h][ROWS:] + x)
            yield
            yield
        keep("p")
        for h in heads:
            if self.kept:
                _, z_ref, states_ref = self.kept
                z_ref[h], states_ref[h] = packed(z[h]), packed(self.s_ref[h])
            written = dot(turned[h], rows_of(*split(self._weight("weight", h) * z[h])))
            decay = self.refs["total"][:, h : h + 1] if self.gated else 1.0
            self.s_ref[h] = decay * self.s_ref[h] + written
            yield
        if self.gated:
            keep("total")
        yield from store(self.outs)

    def _solve(self, h, read):
        """Z of a head, from two parts of its pair's T and what K reads from the state: (first + second) big + first small."""
        x = self.v[h] - (by_row(self._weight("from_start", h), self.n.steps) if self.gated else 1.0) * read
        (big, small), t, here = split(x), self.refs["t"][h % self.half], h < self.half
        first, second = t[:, :LANES], t[:, LANES:]
        if self.kept and here:  # turned, one head above the other
            self.kept[0][h] = packed(transpose(rows_of(first, second)))
        first_and_second = jnp.where(left(first) == here, first, half_turn(second))
        smalls = (small, self.nothing) if here else (self.nothing, small)
        return dot(lanes_of(first_and_second, first), rows_of(big, big, *smalls))
