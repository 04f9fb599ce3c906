"""The backward kernel in bfloat16; names as in `tpu_bfloat16_forward`.

With Y = beta Z, S' the state after the chunk, and each product masked as its factors are::

    dY = P'^T dO + decay K dS'        P' = P without beta
    dX = T^T (beta dY) = dV           dM = -dX Z^T,  dP' = dO Y^T
    dS = decay dS' + (decay Q)^T dO - (decay K)^T dX
    dQ = decay dO S^T + (dP' D) K
    dK = -decay dX S^T + decay Y dS'^T + (dP' D)^T Q + (dM beta D + its transpose) K

The gradient of a gate sums what flows through the decays that hold it: for pairs of rows as row sums less column sums of
dM M + dP P without pairs of one token (whose decay is no gate's), for the ends of the chunk as sums of k dK and q dQ over
channels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.tpu_bfloat16_call import Kept, PerHead, beta_and_gates, call, sizes
from pallas_kernels.tpu_bfloat16_common import (
    BF16,
    F32,
    LANES,
    LOWEST_GATE,
    ROWS,
    Gates,
    column,
    dot,
    either,
    floats,
    halves,
    iota,
    lanes_of,
    left,
    one,
    operand,
    operands,
    padded,
    rows_of,
    run,
    split,
    stacked,
    transpose,
)


def backward(q, k, beta, g, kept, do, dlast, scale):
    """[dq, dk, dv, dbeta, dg if there are gates, dstate]; `kept` is what the forward kernel left for it."""
    inverses, z, states = kept
    n = sizes(q, k, *z.shape[2::2])

    def kernel(store, refs, outs, ds_ref):
        block = _Block(n, refs, ds_ref, scale)
        block.run()
        group = n.nh // n.kh
        for name, x in (("q", block.dq), ("k", block.dk)):
            run(store(name, [_sum_of_group(x, h * group, group) for h in range(n.kh)]))
        run(store("v", block.dv))
        outs["beta"][...] = block.gradient_of_beta()[: n.rows]
        if g is not None:
            passed = jnp.where(refs["g"] > LOWEST_GATE, block.gradient_of_gates(), 0)  # none where it was raised to it
            outs["g"][...] = passed[: n.rows]

    inputs = {"q": q, "k": k, **beta_and_gates(n, beta, g), "inverses": inverses, "z": z, "states": states}
    inputs |= {"o": do, "state": dlast}
    sequences = {"q": q.shape, "k": k.shape, "v": (*k.shape[:2], n.heads, n.value_dim)}
    outputs = {name: (shape, BF16) for name, shape in sequences.items()}
    columns = (n.batch, n.heads // n.nh, n.chunks * n.rows, n.nh)
    outputs |= {name: (columns, F32) for name in ("beta", "g")[: 1 if g is None else 2]} | {"state": (dlast.shape, F32)}
    dq, dk, dv, *of_columns, dstate = call(n, kernel, "backward", inputs, outputs, reverse=True)

    def by_row(x, like):
        return jnp.moveaxis(x, 1, 2).reshape(n.batch, -1, n.heads)[:, : k.shape[1]].astype(like.dtype)

    return [dq, dk, dv, *map(by_row, of_columns, (beta, g)), dstate]


def _sum_of_group(x, first, group):
    """Of the value heads that share a key head."""
    return x[first] if group == 1 else sum(one() * x[first + i] for i in range(group))


class _Block:
    """A chunk of a block of heads: gradients dq, dk, dv by value head, and sums for those of beta and gates."""

    def __init__(self, n, refs, ds_ref, scale):
        self.n, self.half, self.scale, self.ds_ref = n, n.nh // 2, scale, ds_ref
        self.q, self.k, self.do = (PerHead(refs[name], n.nh // refs[name].shape[0]) for name in "qko")
        self.t, self.z, self.s = (Kept(refs[name]) for name in ("inverses", "z", "states"))
        self.gates = Gates(refs["beta"], refs.get("g"), n.tokens, n.steps)
        self.gated = self.gates.total is not None
        self.dq: dict[int, jax.Array] = {}
        self.dk: dict[int, jax.Array] = {}
        self.dv: dict[int, jax.Array] = {}
        self.totals: dict[int, jax.Array] = {}
        names = {"beta": ROWS, "from_start": ROWS, "to_end": ROWS, "m": ROWS, "p": n.tokens, "query": n.tokens}
        self.columns = {name: jnp.zeros((rows, n.nh), F32) for name, rows in names.items()}  # sums over lanes, by head
        self.sums: dict[str, dict[int, jax.Array]] = {"beta": {}, "gates": {}}  # sums over rows, by pair

    def _sum(self, name, h, x):
        lane = iota(self.columns[name].shape, 1)
        self.columns[name] = jnp.where(lane == h, jnp.sum(x, axis=1, keepdims=True), self.columns[name])

    def run(self):
        """All heads in step."""
        q, k, gates, half = self.q, self.k, self.gates, self.half
        pairs, heads = range(half), [h for p in range(half) for h in (p, p + half)]
        kq_turned = {h: transpose(rows_of(k[h], padded(q[h]))) for h in heads}
        scores, decays = gates.scores(pairs, q, k)
        ends = {h: column(gates.to_end, h) * dot(k[h], operand(self.ds_ref[h])) for h in heads}
        dy = self._of_written(pairs, scores, ends)
        dx = self._of_values(pairs, dy)
        for h in heads:
            z = floats(self.z[h])
            self._sum("beta", h, z * dy[h])
            if self.gated:
                self._sum("to_end", h, gates.beta[:, h : h + 1] * z * ends[h])
            self.dv[h] = dx[h]
        products = [self._of_scores(p, dx) for p in pairs]
        reads, writes = {}, {}
        for h in heads:
            q_side = operand(self.scale * column(gates.from_start_q, h) * floats(self.do[h]))
            # Two parts of what stays in the gradient of the state; 256 deep, as the array of v6e is.
            k_side, rest = split(-column(gates.from_start, h) * dx[h])
            reads[h] = dot(rows_of(k_side, q_side), self.s[h], (1, 1))
            writes[h] = rows_of(k_side, padded(q_side), rest, jnp.zeros_like(rest))
        for h in heads:
            self._of_reads(h, reads[h])
        for h in heads:
            self.ds_ref[h] = column(gates.total, h) * self.ds_ref[h] + dot(
                lanes_of(kq_turned[h], kq_turned[h]), writes[h]
            )
        for p, *of_pair in zip(pairs, scores, decays, products, strict=True):
            self._of_pair(p, *of_pair)

    def _of_written(self, pairs, scores, ends):
        """dY by head."""
        dy = {}
        for p, (_, qk) in zip(pairs, scores, strict=True):
            other = p + self.half
            turned = transpose(stacked(padded(operand(self.scale * qk))))
            both = dot(turned, rows_of(padded(self.do[p]), padded(self.do[other])))
            dy[p], dy[other] = both[:ROWS] + ends[p], both[ROWS:] + ends[other]
        return dy

    def _of_values(self, pairs, dy):
        """dX by head, from two parts of T and of dY: (first + second) big + first small."""
        dx = {}
        for p in pairs:
            heads = (p, p + self.half)
            big, small = split(rows_of(*(self.gates.beta[:, h : h + 1] * dy[h] for h in heads)))
            parts = self.t[p]
            first, second = stacked(parts[:, :LANES]), stacked(parts[:, LANES:])
            both = dot(lanes_of(first, second), rows_of(big, big)) + dot(first, small)
            dx[heads[0]], dx[heads[1]] = both[:ROWS], both[ROWS:]
        return dx

    def _of_scores(self, p, dx):
        """dX Z^T above dO Z^T of a pair: [64 + C, 2 x 64].

        dX in two parts: of beta's gradient columns of the first are summed, weighed by products of keys that are all alike
        where keys are, and what is left is far smaller than what is summed.
        """
        other = p + self.half
        z = rows_of(self.z[p], self.z[other])
        (big, small), (big_other, small_other) = split(dx[p]), split(dx[other])
        x = either(
            dot(rows_of(big, small, operand(self.do[p]), big_other, small_other, operand(self.do[other])), z, (1, 1))
        )
        return rows_of(x[:ROWS] + x[ROWS : 2 * ROWS], x[2 * ROWS :])

    def _of_reads(self, h, reads):
        """Gradients of a head's q and k through the states, from their products with S^T."""
        gates, ds = self.gates, self.ds_ref[h]
        y = operand(column(gates.to_end, h) * gates.beta[:, h : h + 1] * floats(self.z[h]))
        self.dk[h], self.dq[h] = one() * reads[:ROWS] + dot(y, operand(ds), (1, 1)), reads[ROWS:]
        if self.gated:
            self._sum("from_start", h, floats(self.k[h]) * reads[:ROWS])
            self._sum("query", h, floats(self.q[h]) * reads[ROWS:])
            x = floats(self.s[h]) * ds
            self.totals[h] = jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=1, keepdims=True)

    def _of_pair(self, p, scores, decays, products):
        """Adds to dq and dk of a pair of heads what goes through the scores."""
        gates, row, other = self.gates, self.gates.beta_rows[p : p + 1], p + self.half
        dm = jnp.where(gates.below, -products[:ROWS], 0)
        dp = jnp.where(gates.seen, self.scale * products[ROWS:], 0)
        dm_m, dp_p = dm * scores[0], dp * scores[1]  # without beta
        self.sums["beta"][p] = jnp.sum(dm_m, axis=0, keepdims=True)
        if self.gated:
            self._sum_scores(p, dm_m * row, dp_p * row)
        d = rows_of(padded(operand(dp * row * decays[1])), operand(dm * row * decays[0]))
        d_turned, nothing = transpose(d), jnp.zeros((ROWS // 2, self.n.key_dim), jnp.int32)
        size = d_turned.shape[0] // 2
        for h, below, turned in (
            (p, (self.k[p], nothing), d_turned[:size]),
            (other, (nothing, self.k[other]), d_turned[size:]),
        ):
            x = dot(d, rows_of(*below))
            self.dq[h] = self.dq[h] + x[: self.n.tokens]
            self.dk[h] = self.dk[h] + x[ROWS:] + dot(turned, rows_of(padded(self.q[h]), self.k[h]))

    def _sum_scores(self, p, dm_m, dp_p):
        """Row sums and column sums of pairs of rows of different tokens."""
        n = self.n
        token = (iota((ROWS, LANES), 1) % ROWS) // n.steps
        dm_m = jnp.where(iota((ROWS, LANES), 0) // n.steps != token, dm_m, 0)
        dp_p = jnp.where(iota((n.tokens, LANES), 0) != token[: n.tokens], dp_p, 0)
        self.sums["gates"][p] = jnp.sum(dm_m, axis=0, keepdims=True) + jnp.sum(dp_p, axis=0, keepdims=True)
        for h, here in ((p, True), (p + self.half, False)):
            self._sum("m", h, jnp.where(left(dm_m) == here, dm_m, 0))
            self._sum("p", h, jnp.where(left(dp_p) == here, dp_p, 0))

    def _by_head(self, name):
        """Sums over rows [1, 2 x 64] of the pairs as [64, nh]."""
        x = rows_of(*(self.sums[name][p] for p in range(self.half)))
        return rows_of(x[:, :ROWS], x[:, ROWS:]).T

    def gradient_of_beta(self):
        """[64, nh]."""
        return self.columns["beta"] + self._by_head("beta")

    def gradient_of_gates(self):
        """[64, nh]. Row i's gate is met from the start by rows s >= i and queries whose last row is, to the end by rows s < i."""
        n, columns = self.n, self.columns
        i, s = iota((ROWS, ROWS), 0), iota((ROWS, ROWS), 1)
        last = iota((ROWS, n.tokens), 1) * n.steps + n.steps - 1
        inner = columns["from_start"] + columns["m"] - self._by_head("gates")
        sums = _masked_sums(s >= i, inner) + _masked_sums(s < i, columns["to_end"])
        sums += _masked_sums(last >= iota((ROWS, n.tokens), 0), columns["query"] + columns["p"])
        return sums + self.gates.total * lanes_of(*(self.totals[h] for h in range(n.nh)))


def _masked_sums(mask, x):
    """mask [M, N] times float32 x [N, nh], to 24 bits."""
    head, rest = halves(x)
    parts = (operand(head), *split(rest))
    copies = max(4, LANES // mask.shape[1])  # whole lanes: v5e's profiler does not know narrower products
    nothing = jnp.zeros(*operands(rows=(copies - 3) * mask.shape[1], lanes=x.shape[1]))
    return dot(operand(lanes_of(*[mask.astype(F32)] * copies)), rows_of(*parts, nothing))
