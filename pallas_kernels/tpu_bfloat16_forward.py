"""The forward kernel in bfloat16: outputs and states, and what the backward kernel will want.

Per chunk and head, with D the decays between rows, S the state before the chunk, dashes left out where sizes tell::

    M = strict_tril(K K^T D) diag(beta)          T = (I + M)^-1
    Z = T (V - decay K S)                        P = scale tril(Q K^T D) diag(beta)
    O = scale decay Q S + P Z                    S <- decay S + K^T (decay beta Z)

Everything that stays in the state is kept to 16 bits by products of two bfloat16 parts.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.tpu_bfloat16_call import PerHead, beta_and_gates, call, packs_in_memory, sizes
from pallas_kernels.tpu_bfloat16_common import (
    F32,
    LANES,
    ROWS,
    Gates,
    bits,
    dot,
    either,
    half_turn,
    lanes_of,
    left,
    rows_of,
    run,
    split,
    split_in_memory,
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
    """What `_Ahead` leaves for `_Block`: q and k as `bits`, K^T, T in two parts, P, weights of columns; all of the next chunk."""
    half = n.nh // 2
    found = {
        "now_q": ((n.kh, n.tokens // 2, n.key_dim), jnp.int32),
        "now_k": ((n.kh, ROWS // 2, n.key_dim), jnp.int32),
        "k_turned": ((half, n.key_dim // 2, LANES), jnp.int32),
        "t": ((half, ROWS // 2, 2 * LANES), jnp.int32),
        "p": ((half, n.tokens // 2, LANES), jnp.int32),
        "weight": ((ROWS, n.nh), F32),
    }
    if packs_in_memory():  # not carried: for `_Block._split`
        found["packed"] = ((n.nh, ROWS, n.value_dim), F32)
    if gated:
        rows = {"from_start": ROWS, "from_start_q": n.tokens, "total": 1}
        found |= {name: ((size, n.nh), F32) for name, size in rows.items()}
    return found


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
        self.found["p"] = [bits(self.scale * qk * row) for (_, qk), row in zip(scores, rows, strict=True)]
        self.found["k_turned"] = [transpose(rows_of(k[p], k[p + half])) for p in pairs]
        self.found["weight"] = gates.beta if gates.total is None else gates.to_end * gates.beta
        if gates.total is not None:
            self.found |= {name: getattr(gates, name) for name in ("from_start", "from_start_q", "total")}
        found = yield from inverses(ms, refs["spread"][...])
        self.found["t"] = [lanes_of(*split(x)) for x in found]

    def keep(self):
        """Leaves it for the next call, once `_Block` is done with what the last one left."""
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
        self.nothing = jnp.zeros((ROWS // 2, n.value_dim), jnp.int32)
        self.outs: dict[int, jax.Array] = {}

    def _column(self, name, h):
        return self.refs[name][:, h : h + 1] if self.gated else 1.0

    def _split(self, ref, h, x=None):
        """`split` of x, or of ref[h], in registers or by way of ref[h]."""
        if not packs_in_memory():
            return split(ref[h] if x is None else x)
        if x is not None:
            ref[h] = x
        return split_in_memory(ref, h)

    def run(self, store):
        """A generator: stage by stage, yielding after each head."""
        half = self.half
        heads = [h for p in range(half) for h in (p, p + half)]
        read, z = {}, {}
        for h in heads:
            kq = rows_of(self.k[h], self.q[h])
            read[h] = dot(lanes_of(kq, kq), rows_of(*self._split(self.s_ref, h)))
            yield
        for h in heads:
            z[h] = self._solve(h, read[h][:ROWS])
            yield
        for h in heads:
            parts = (bits(z[h]), self.nothing) if h < half else (self.nothing, bits(z[h]))
            from_state = self.scale * self._column("from_start_q", h) * read[h][ROWS:]
            self.outs[h] = from_state + dot(self.refs["p"][h % half], rows_of(*parts))
            yield
        for h in heads:
            if self.kept:
                self._keep(h, z[h])
            turned = self.refs["k_turned"][h % half]
            turned = jnp.where(left(turned) == (h < half), turned, half_turn(turned))
            written = dot(
                turned, rows_of(*self._split(self.refs.get("packed"), h, self.refs["weight"][:, h : h + 1] * z[h]))
            )
            self.s_ref[h] = self._column("total", h) * self.s_ref[h] + written
            yield
        yield from store(self.outs)

    def _solve(self, h, read):
        """Z of a head, from two parts of its pair's T and what K reads from the state: (first + second) big + first small."""
        x = self.v[h] - self._column("from_start", h) * read
        (big, small), t, here = self._split(self.refs.get("packed"), h, x), self.refs["t"][h % self.half], h < self.half
        first, second = t[:, :LANES], t[:, LANES:]
        first_and_second = jnp.where(left(first) == here, first, half_turn(second))
        smalls = (small, self.nothing) if here else (self.nothing, small)
        return dot(lanes_of(first_and_second, first), rows_of(big, big, *smalls))

    def _keep(self, h, z):
        inverses_ref, z_ref, states_ref = self.kept
        z_ref[h], states_ref[h] = bits(z), bits(self.s_ref[h])
        if h < self.half:
            t = self.refs["t"][h]
            inverses_ref[h] = lanes_of(*(either(transpose(stacked(x))) for x in (t[:, :LANES], t[:, LANES:])))
