"""The backward kernel in bfloat16; names as in `tpu_bfloat16_forward`.

With Y = beta Z, S' the state after the chunk, each product masked as its factors are, and scale left out::

    beta dY = P^T dO + decay beta K dS'
    dX = T^T (beta dY) = dV           dM = -dX Z^T,  dP = dO Z^T
    dS = decay dS' + (decay Q)^T dO - (decay K)^T dX
    dQ = decay dO S^T + (dP beta D) K
    dK = -decay dX S^T + decay Y dS'^T + (dP beta D)^T Q + (dM beta D + its transpose) K

The gradient of beta sums dM M + dP P, without beta, over rows, and Z times decay K dS' over channels.

A decay between two rows is exp of the sum of the gates up to the one less that up to the other. The gradient of the sum up
to a row is therefore what flows through states, q dQ and k dK summed over channels, and row sums less column sums of
dM M + dP P; of the sum to the chunk's end <S', dS'>, of which a row that is written takes back its own. A gate adds those of
all sums that hold it. Not q dQ and k dK in whole: those are of rounded dM, and of like keys sums of large terms of which little
is left. And without pairs of rows of one token, whose decay is no gate's: where gates are closed they are all there is.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.tpu_bfloat16_call import Packed, PerHead, beta_and_gates, call, sizes
from pallas_kernels.tpu_bfloat16_common import (
    BF16,
    F32,
    LANES,
    LOWEST_GATE,
    ROWS,
    Gates,
    apart,
    column,
    dot,
    either,
    floats,
    halves,
    iota,
    lanes_of,
    left,
    operand,
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
            # None where the gate was raised to the lowest.
            outs["g"][...] = jnp.where(refs["g"] > LOWEST_GATE, block.gradient_of_gates(), 0)

    inputs = {"q": q, "k": k, **beta_and_gates(n, beta, g), "inverses": inverses, "z": z, "states": states}
    inputs |= {"o": do, "state": dlast}
    sequences = {"q": q.shape, "k": k.shape, "v": (*k.shape[:2], n.heads, n.value_dim)}
    outputs = {name: (shape, BF16) for name, shape in sequences.items()}
    columns = {"beta": n.rows} | ({} if g is None else {"g": n.tokens})
    outputs |= {name: ((n.batch, n.heads // n.nh, n.chunks * x, n.nh), F32) for name, x in columns.items()}
    outputs["state"] = (dlast.shape, F32)
    dq, dk, dv, *of_columns, dstate = call(n, kernel, "backward", inputs, outputs, reverse=True)

    def in_order(x, like):
        return jnp.moveaxis(x, 1, 2).reshape(n.batch, -1, n.heads)[:, : like.shape[1]].astype(like.dtype)

    return [dq, dk, dv, *map(in_order, of_columns, (beta, g)), dstate]


def _sum_of_group(x, first, group):
    """Of the value heads that share a key head."""
    return x[first] if group == 1 else sum(apart(x[first + i]) for i in range(group))


class _Block:
    """A chunk of a block of heads: gradients dq, dk, dv by value head, and sums for those of beta and gates."""

    def __init__(self, n, refs, ds_ref, scale):
        self.n, self.half, self.scale, self.ds_ref = n, n.nh // 2, scale, ds_ref
        self.q, self.k, self.do = (PerHead(refs[name], n.nh // refs[name].shape[0]) for name in "qko")
        self.t, self.z, self.s = (Packed(refs[name]) for name in ("inverses", "z", "states"))
        self.gates = Gates(refs["beta"], refs.get("g"), n.tokens, n.steps)
        self.gated = self.gates.total is not None
        self.dq: dict[int, jax.Array] = {}
        self.dk: dict[int, jax.Array] = {}
        self.dv: dict[int, jax.Array] = {}
        self.of_end: dict[int, jax.Array] = {}  # what stays of the state, <decay S, dS'>, in parts [8, V]
        # Sums over lanes, by head, and over rows, by pair.
        self.columns = {
            name: jnp.zeros((rows, n.nh), F32)
            for name, rows in (("beta", ROWS), ("k", ROWS), ("q", n.tokens), ("end", 8))
        }
        self.sums: dict[str, dict[int, jax.Array]] = {"beta": {}, "gates": {}}

    def _sum(self, name, h, *xs):
        x = sum(xs) if len({x.shape for x in xs}) == 1 else lanes_of(*xs)
        sums = jnp.sum(x, axis=1, keepdims=True)
        self.columns[name] = jnp.where(iota(self.columns[name].shape, 1) == h, sums, self.columns[name])

    def run(self):
        """All heads in step. Products and moves of lanes are executed in the order they are written in: what waits for nothing
        stands where the others wait, and last what has most products for the rest of the work to stand beside.
        """
        q, k, gates, half = self.q, self.k, self.gates, self.half
        pairs, heads = range(half), [h for p in range(half) for h in (p, p + half)]
        scores, decays = gates.scores(pairs, q, k)
        weight = gates.beta * gates.to_end if self.gated else gates.beta
        read = {h: dot(k[h], operand(self.ds_ref[h])) for h in heads}
        dx = self._of_values(self._of_written(pairs, scores, {h: column(weight, h) * read[h] for h in heads}))
        for h in heads:
            self._sum("beta", h, floats(self.z[h]) * read[h])
            self.dv[h] = dx[h]
        products = [self._of_scores(p, dx) for p in pairs]
        reads, ends, kq_turned, writes = {}, {}, {}, {}
        for h in heads:
            ends[h] = column(weight, h) * dot(self.z[h], operand(self.ds_ref[h]), (1, 1))
            if self.gated:
                self.of_end[h] = column(gates.total, h) * _by_tiles(floats(self.s[h]) * self.ds_ref[h])
        for h in heads:
            kq_turned[h] = transpose(rows_of(k[h], padded(q[h])))
            q_side = operand(self.scale * column(gates.from_start_q, h) * floats(self.do[h]))
            # Two parts of what stays in the gradient of the state; 256 deep, as the array of v6e is.
            k_side, rest = split(-column(gates.from_start, h) * dx[h])
            reads[h] = dot(rows_of(k_side, q_side), self.s[h], (1, 1))
            writes[h] = rows_of(k_side, padded(q_side), rest, jnp.zeros_like(rest))
        for p, score, decay, product in zip(pairs, scores, decays, products, strict=True):
            self._of_pair(p, score, decay, product, reads, ends)
        for h in heads:
            update = dot(lanes_of(kq_turned[h], kq_turned[h]), writes[h])
            self.ds_ref[h] = column(gates.total, h) * self.ds_ref[h] + update

    def _of_written(self, pairs, scores, ends):
        """beta dY by head."""
        dy = {}
        for p, (_, qk) in zip(pairs, scores, strict=True):
            other = p + self.half
            turned = transpose(stacked(operand(self.scale * self.gates.beta_rows[p : p + 1] * qk)))
            both = dot(turned, rows_of(self.do[p], self.do[other]))
            dy[p], dy[other] = both[:ROWS] + ends[p], both[ROWS:] + ends[other]
        return dy

    def _of_values(self, dy):
        """dX by head, from two parts of T and of beta dY: (first + second) big + first small."""
        dx = {}
        for h, x in dy.items():
            t = self.t[h % self.half]
            size = t.shape[0] // 2
            t, (big, small) = t[:size] if h < self.half else t[size:], split(x)
            dx[h] = dot(lanes_of(t, t), rows_of(big, big, small, jnp.zeros_like(small)))
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

    def _of_pair(self, p, scores, decays, products, reads, ends):
        """Gradients of q and k of a pair of heads, of which `reads` and `ends` are what goes through the states."""
        gates, row, heads = self.gates, self.gates.beta_rows[p : p + 1], (p, p + self.half)
        dm = jnp.where(gates.below, -products[:ROWS], 0)
        dp = jnp.where(gates.seen, self.scale * products[ROWS:], 0)
        dm_m, dp_p = dm * scores[0], dp * scores[1]  # without beta
        self.sums["beta"][p] = jnp.sum(_by_tiles(dm_m) + _by_tiles(dp_p), axis=0, keepdims=True)
        if self.gated:
            token = iota((ROWS, LANES), 1) % ROWS // self.n.steps
            dm_m = jnp.where(iota((ROWS, LANES), 0) // self.n.steps != token, dm_m, 0) if self.n.steps > 1 else dm_m
            dp_p = jnp.where(iota(dp.shape, 0) != token[: self.n.tokens], dp_p, 0)
            self.sums["gates"][p] = jnp.sum(_by_tiles(dm_m) + _by_tiles(dp_p), axis=0, keepdims=True)
        d = rows_of(operand(dm * row * decays[0]), operand(dp * row * decays[1]))
        turned = transpose(d)
        both, rows, size = (
            dot(stacked(d), rows_of(*(self.k[h] for h in heads))),
            ROWS + self.n.tokens,
            turned.shape[0] // 2,
        )
        for i, h in enumerate(heads):
            written = dot(turned[i * size : (i + 1) * size], rows_of(self.k[h], self.q[h]))
            read = apart(reads[h]) + both[i * rows : (i + 1) * rows]
            self.dk[h], self.dq[h] = read[:ROWS] + (ends[h] + written), read[ROWS:]
            if self.gated:
                self._sum_of_gates(h, reads[h], dm_m * row, dp_p * row)

    def _sum_of_gates(self, h, reads, dm_m, dp_p):
        """Row sums of a head for the gradient of gates; of a pair of heads dM M and dP P are its own left or right lanes."""
        own = [jnp.where(left(x) == (h < self.half), x, 0) for x in (dm_m, dp_p)]
        self._sum("k", h, floats(self.k[h]) * reads[:ROWS], own[0])
        self._sum("q", h, floats(self.q[h]) * reads[ROWS:], own[1])
        self._sum("end", h, self.of_end[h])

    def gradient_of_beta(self):
        """[64, nh]."""
        decay = 1.0 if self.gates.to_end is None else self.gates.to_end
        return decay * self.columns["beta"] + self._column_sums("beta")

    def _column_sums(self, name):
        """Of dM M + dP P without beta, [64, nh]."""
        x = rows_of(*(self.sums[name][p] for p in range(self.half)))
        return rows_of(x[:, :ROWS], x[:, ROWS:]).T

    def gradient_of_gates(self):
        """[C, nh]. A token's gate is met by its rows and query and later ones, by the state, and by what earlier rows write."""
        n = self.n
        met = self.columns["k"] - self.gates.beta * self._column_sums("gates")
        written = self.gates.beta * self.gates.to_end * self.columns["beta"]
        sums = rows_of(met, self.columns["q"], self.columns["end"], written)
        head, rest = halves(sums)
        parts = (head, *halves(rest))  # to 24 bits
        token, row = (iota((n.tokens, 3 * sums.shape[0]), axis) for axis in range(2))
        row %= sums.shape[0]
        later = row - ROWS - n.tokens - 8
        holds = jnp.where(row < ROWS, row // n.steps >= token, row - ROWS >= token) & (
            (later < 0) | (later // n.steps < token)
        )
        return dot(operand(holds.astype(F32)), operand(rows_of(*parts)))


def _by_tiles(x):
    """Sums of every 8th row of [rows, lanes]: no row moves."""
    return jnp.sum(x.reshape(-1, 8, x.shape[1]), axis=0)
