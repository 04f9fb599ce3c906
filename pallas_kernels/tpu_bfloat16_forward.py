"""The forward kernel in bfloat16: outputs and states, and what the backward kernel will want.

Per chunk and head, with D the decays between rows, S the state before the chunk, dashes left out where sizes tell::

    M = strict_tril(K K^T D) diag(beta)          T = (I + M)^-1
    Z = T (V - decay K S)                        P = scale tril(Q K^T D) diag(beta)
    O = scale decay Q S + P Z                    S <- decay S + K^T (decay beta Z)

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
    columns,
    dot,
    either,
    half_turn,
    kept,
    lanes_of,
    left,
    operand,
    operands,
    rows_of,
    run,
    split,
    spread_column,
    stacked,
    transpose,
)
from pallas_kernels.tpu_bfloat16_inverse import inverses, spread_columns

PARTS_AT_ONCE = 7  # heads of a stage of the scan beside a stage of what is ahead
KEPT = ("inverses", "z", "states")  # for the backward


def forward(q, k, v, beta, g, state, scale, keep):
    """[o, last state], and for the backward with `keep` T, Z and S of every chunk; arguments as `tpu_bfloat16.scan`."""
    n = sizes(q, k, *v.shape[2:])

    def kernel(store, refs, outs, s_ref):
        following = _Ahead(n, refs, scale)
        block = _Block(n, refs, [outs[name] for name in KEPT] if keep else [], s_ref, scale)
        scan = block.run(functools.partial(store, "o"))
        run(following.run(), scan, PARTS_AT_ONCE)
        run(scan)
        following.keep()

    inputs = {"q": q, "k": k, "v": v, **beta_and_gates(n, beta, g), "spread": spread_columns(), "state": state}
    outputs = {"o": ((n.batch, n.length, n.heads, n.value_dim), v.dtype), "state": (state.shape, F32)}
    if keep:
        rows = (
            (n.heads // 2, ROWS // 2, 2 * LANES),
            (n.heads, ROWS // 2, n.value_dim),
            (n.heads, n.key_dim // 2, n.value_dim),
        )
        outputs |= {name: ((n.batch, n.chunks, *size), jnp.int32) for name, size in zip(KEPT, rows, strict=True)}
    return call(
        n, kernel, "forward", inputs, outputs, ahead=("q", "k", "beta", "g"), carried=_carried(n, g is not None)
    )


def _carried(n, gated):
    """What `_Ahead` leaves for `_Block` of the next chunk: q and k as `bits`, K^T, T in two parts, P, decay of the chunk, and by
    head over all lanes what rows are multiplied by (`_weights`), in two places used in turn.
    """
    half = n.nh // 2
    found = {
        "now_q": ((n.kh, n.tokens // 2, n.key_dim), jnp.int32),
        "now_k": ((n.kh, ROWS // 2, n.key_dim), jnp.int32),
        "k_turned": operands(half, rows=n.key_dim, lanes=LANES),
        "t": operands(half, rows=ROWS, lanes=2 * LANES),
        "p": operands(half, rows=n.tokens, lanes=LANES),
    }
    found |= {name: ((2, n.nh, rows, n.value_dim), F32) for name, rows in _weights(n, gated).items()}
    return found | ({"total": ((1, n.nh), F32)} if gated else {})


def _weights(n, gated):
    """What rows are multiplied by, and how many: those written to the state, and what keys and queries read from it."""
    return {"weight": ROWS} | ({"from_start": ROWS, "from_start_q": n.tokens} if gated else {})


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
        self.found["p"] = [operand(self.scale * qk * row) for (_, qk), row in zip(scores, rows, strict=True)]
        self.found["k_turned"] = [transpose(rows_of(k[p], k[p + half])) for p in pairs]
        weights = [gates.beta]
        if gates.total is not None:
            self.found["total"] = gates.total
            weights = [gates.to_end * gates.beta, gates.from_start, self.scale * gates.from_start_q]
        weights = columns(rows_of(*weights))
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

    def keep(self):
        """Leaves the rest for the next call, once `_Block` is done with what the last one left."""
        for name, x in self.found.items():
            if isinstance(x, list):
                for p, of_pair in enumerate(x):
                    self.refs[name][p] = of_pair
            else:
                self.refs[name][...] = x
        for name in "qk":
            self.refs[f"now_{name}"][...] = self.refs[name][...]


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

    def _weight(self, name, h):
        return self.refs[name][1 - pl.program_id(2) % 2, h]

    def run(self, store):
        """A generator: stage by stage, yielding after each head."""
        half = self.half
        heads = [h for p in range(half) for h in (p, p + half)]
        read, z = {}, {}
        for h in heads:
            kq = rows_of(self.k[h], self.q[h])
            read[h] = dot(lanes_of(kq, kq), rows_of(*split(self.s_ref[h])))
            yield
        for h in heads:
            z[h] = self._solve(h, read[h][:ROWS])
            yield
        for h in heads:
            parts = (operand(z[h]), self.nothing) if h < half else (self.nothing, operand(z[h]))
            decay = self._weight("from_start_q", h) if self.gated else self.scale
            self.outs[h] = decay * read[h][ROWS:] + dot(self.refs["p"][h % half], rows_of(*parts))
            yield
        for h in heads:
            if self.kept:
                self._keep(h, z[h])
            there = self.refs["k_turned"][h % half]
            turned = jnp.where(left(there) == (h < half), there, half_turn(there))
            written = dot(turned, rows_of(*split(self._weight("weight", h) * z[h])))
            decay = self.refs["total"][:, h : h + 1] if self.gated else 1.0
            self.s_ref[h] = decay * self.s_ref[h] + written
            yield
        yield from store(self.outs)

    def _solve(self, h, read):
        """Z of a head, from two parts of its pair's T and what K reads from the state: (first + second) big + first small."""
        x = self.v[h] - (self._weight("from_start", h) if self.gated else 1.0) * read
        (big, small), t, here = split(x), self.refs["t"][h % self.half], h < self.half
        first, second = t[:, :LANES], t[:, LANES:]
        first_and_second = jnp.where(left(first) == here, first, half_turn(second))
        smalls = (small, self.nothing) if here else (self.nothing, small)
        return dot(lanes_of(first_and_second, first), rows_of(big, big, *smalls))

    def _keep(self, h, z):
        inverses_ref, z_ref, states_ref = self.kept
        z_ref[h], states_ref[h] = kept(z), kept(self.s_ref[h])
        if h < self.half:
            t = self.refs["t"][h]
            inverses_ref[h] = kept(lanes_of(*(either(transpose(stacked(x))) for x in (t[:, :LANES], t[:, LANES:]))))
