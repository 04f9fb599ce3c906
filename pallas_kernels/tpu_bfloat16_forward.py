"""The forward kernel in bfloat16: outputs and states, and what the backward kernel will want.

Per chunk and head, with D the decays between rows, S the state before the chunk, dashes left out where sizes tell::

    M = strict_tril(K K^T D) diag(beta)          T = (I + M)^-1
    Z = T (V - decay K S)                        P = scale tril(Q K^T D) diag(beta)
    O = scale decay Q S + P Z                    S <- decay S + K^T (decay beta Z)

Everything that stays in the state is kept to 16 bits by products of two bfloat16 parts.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tpu_bfloat16_common import (
    F32,
    LANES,
    ROWS,
    Gates,
    PerHead,
    beta_and_gates,
    bits,
    call,
    column,
    dot,
    floats,
    half_turn,
    inverses,
    lanes_of,
    left,
    rows_of,
    sizes,
    split,
    spread_columns,
    transpose,
)


def forward(q, k, v, beta, g, state, scale, keep):
    """[o, last state], and for the backward with `keep` T, Z and S of every chunk; arguments as `tpu_bfloat16.scan`."""
    n = sizes(q, k, *v.shape[2:])

    def kernel(store, refs, o, last, *rest):
        *kept, s_ref = rest
        block = _Block(n, refs, kept, s_ref, scale)
        block.run()
        store(o, [block.outs[h] for h in range(n.nh)])

        @pl.when(pl.program_id(2) == n.chunks - 1)
        def _():
            last[...] = s_ref[...]

    inputs = {"q": q, "k": k, "v": v, **beta_and_gates(n, beta, g), "spread": spread_columns(), "state": state}
    outputs = [("o", (n.batch, n.length, n.heads, n.value_dim), v.dtype), ("state", state.shape, F32)]
    if keep:
        lead = (n.batch, n.chunks)
        outputs += [
            ("inverses", (*lead, n.heads // 2, ROWS // 2, 2 * LANES), jnp.int32),
            ("z", (*lead, n.heads, ROWS // 2, n.value_dim), jnp.int32),
            ("states", (*lead, n.heads, n.key_dim // 2, n.value_dim), jnp.int32),
        ]
    return call(n, kernel, "forward", inputs, outputs)


class _Block:
    """A chunk of a block of heads; `outs` are the outputs by head, [C, V]."""

    def __init__(self, n, refs, kept, s_ref, scale):
        self.half, self.scale, self.kept, self.s_ref = n.nh // 2, scale, kept, s_ref
        self.q, self.k, self.v = (PerHead(refs[name], n.nh // refs[name].shape[0]) for name in "qkv")
        self.gates, self.spread = Gates(refs["beta"], refs.get("g"), n.tokens), refs["spread"]
        self.nothing = jnp.zeros((ROWS // 2, n.value_dim), jnp.int32)
        self.outs: dict[int, jax.Array] = {}

    def run(self):
        """All heads in step."""
        q, k, gates, half = self.q, self.k, self.gates, self.half
        pairs, heads = range(half), [h for p in range(half) for h in (p, p + half)]
        k_turned = {p: transpose(rows_of(k[p], k[p + half])) for p in pairs}
        scores, _ = gates.scores(pairs, q, k, k_turned.values())
        rows = [gates.beta_rows[p : p + 1] for p in pairs]
        ms = [kk * row for (kk, _), row in zip(scores, rows, strict=True)]
        ps = {p: bits(self.scale * qk * row) for p, (_, qk), row in zip(pairs, scores, rows, strict=True)}
        found = inverses(ms, self.spread[...])
        read = {}
        for h in heads:
            kq = rows_of(k[h], q[h])
            read[h] = dot(lanes_of(kq, kq), rows_of(*split(self.s_ref[h])))
        ts = {p: split(x) for p, x in zip(pairs, found, strict=True)}
        z = {h: self._solve(ts[h % half], h, read[h][:ROWS]) for h in heads}
        for h in heads:
            parts = (bits(z[h]), self.nothing) if h < half else (self.nothing, bits(z[h]))
            from_state = self.scale * column(gates.from_start_q, h) * read[h][ROWS:]
            self.outs[h] = from_state + dot(ps[h % half], rows_of(*parts))
        if self.kept:
            self._keep(ts, z)
        weight = gates.beta if gates.total is None else gates.to_end * gates.beta
        for h in heads:
            turned = k_turned[h % half]
            turned = jnp.where(left(turned) == (h < half), turned, half_turn(turned))
            written = dot(turned, rows_of(*split(weight[:, h : h + 1] * z[h])))
            self.s_ref[h] = column(gates.total, h) * self.s_ref[h] + written

    def _solve(self, t, h, read):
        """Z of a head, from two parts of its pair's T and what K reads from the state: (first + second) big + first small."""
        x = floats(self.v[h]) - column(self.gates.from_start, h) * read
        (big, small), (first, second), here = split(x), t, h < self.half
        first_and_second = jnp.where(left(first) == here, first, half_turn(second))
        smalls = (small, self.nothing) if here else (self.nothing, small)
        return dot(lanes_of(first_and_second, first), rows_of(big, big, *smalls))

    def _keep(self, ts, z):
        inverses_ref, z_ref, states_ref = self.kept
        for p, parts in ts.items():
            inverses_ref[p] = lanes_of(*parts)
        for h, x in z.items():
            z_ref[h], states_ref[h] = bits(x), bits(self.s_ref[h])
