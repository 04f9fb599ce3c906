"""The chunked delta product as GPU kernels (Pallas on Mosaic GPU, for Hopper): `gpu_blocks`, `gpu_scan`,
`gpu_backward`; with channel gates `gpu_channel`.

Rows of keys and values go in blocks of 64; tokens, i.e. queries, in chunks of 64, which are R blocks. With S the state before a
block and D_ij the gates of rows after j up to i, per head (arXiv 2406.06484, section 3.2; 2412.06464, section 3.3)::

    A = strict_tril(beta_i (k_i . k_j) exp(D_ij)),   P_tj = (q_t . k_j) exp(D_tj)         all blocks at once
    V' = (I + A)^-1 beta (V - exp(D_i,start) K S)                                         the scan: block by block
    S <- exp(D_end,start) S + K^T (exp(D_end,j) V')
    O = scale (exp(D_t,start) Q S + P V')                                                 beside the scan

V' does not depend on how rows are cut into blocks. So outputs may be read in chunks of 64 queries from the state that a chunk
starts with, whatever R is: no product has fewer than 64 rows, and nothing that has to do with queries is padded.

The backward keeps the inputs and, from the forward, the inverses, V' and the states in bfloat16. Only the cotangent of the
state is recurrent, and it obeys a scan of the same form as the state, in reverse; the rest is again done for all
blocks at once, before it (`outputs_backward`) and after (`rows_backward`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax._src import config

from pallas_kernels import gpu_backward, gpu_channel
from pallas_kernels.gpu_blocks import inverses_and_scores
from pallas_kernels.gpu_common import ROWS, gradient_of_beta, per_key_head
from pallas_kernels.gpu_scan import scan

SIZES = (64, 128, 256)  # of K and V; others are padded with zeros
LOWEST_GATE = -1000.0  # exp of it is 0 in every float type, and sums of it stay finite


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut; `for_shape` chooses.

    columns: of the state (of V) that one CTA of the scans holds: 16, 32 or 64. Fewer make more CTAs, which all read the keys.
    stages: blocks of rows that a scan has in shared memory, 2 or more; the others than the current one are on their way.
    late_stages: of what a block needs last: as many, or 1, which then arrives while the block begins.
    places: of a block's state and solution, 1 or 2: with 2 outputs are made and stored while the scan is at the next block.
    """

    columns: int
    stages: int
    late_stages: int
    places: int

    def __post_init__(self):
        """Check the ranges."""
        for name, allowed in (("columns", (16, 32, 64)), ("stages", (2, 3, 4)), ("places", (1, 2))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)}")
        if self.late_stages not in (1, self.stages):
            raise ValueError(f"late_stages must be 1 or stages = {self.stages}, got {self.late_stages}")

    def of_scan(self) -> dict[str, int]:
        """What `scan` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def for_shape(cls, batch: int, value_heads: int, key_dim: int, value_dim: int, channels: bool) -> "Blocks":
        """One of a scan's CTAs fits an SM: as many as there are SMs if possible, and wider ones where more would come in turns.

        With channel gates a scan holds two arrays of keys, so two stages; at K = 256 only one place for the second fits.
        """
        columns = 64 if key_dim == 64 and batch * value_heads * value_dim // 32 > 132 else 32
        if key_dim < 256:
            return cls(columns, stages=2 if channels else 3, late_stages=2 if channels else 3, places=2)
        return cls(columns=16, stages=2, late_stages=1, places=1) if channels else cls(columns, 2, 2, places=1)


def delta_product(q, k, v, beta, g, initial_state, *, scale: float):
    """Delta product; arguments as `IMPLEMENTATIONS` in `deltajax.ops.delta_rule.api` says.

    Raises:
      NotImplementedError: not a Hopper GPU, inputs other than bfloat16, a state other than float32, K or V over 256.
    """
    batch, length, steps, heads, value_dim = v.shape
    key_dim = q.shape[-1]
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        raise NotImplementedError(f"q, k and v must be bfloat16, got {q.dtype}, {k.dtype} and {v.dtype}")
    if initial_state.dtype != jnp.float32:
        raise NotImplementedError(f"the state must be float32, got {initial_state.dtype}")
    channels = g is not None and g.ndim == q.ndim
    if max(key_dim, value_dim) > SIZES[-1]:
        raise NotImplementedError(f"K and V must be at most {SIZES[-1]}, got {key_dim} and {value_dim}")
    _check_device()
    key_pad, value_pad = (min(size for size in SIZES if size >= dim) - dim for dim in (key_dim, value_dim))
    chunks = -(-length // ROWS)

    def pad(x, *last):
        """Tokens that change nothing up to whole chunks, and channels that change nothing."""
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, chunks * ROWS - length)
        if last:
            widths[-1] = (0, last[0])
        return jnp.pad(x, widths)

    def by_block(x):
        """[B, T, .., HV] -> float32 [B, blocks of 64, HV, 64]."""
        x = pad(x.astype(jnp.float32))
        return jnp.swapaxes(x.reshape(batch, -1, ROWS, heads), 2, 3)

    def merged(x):
        return x.reshape(batch, -1, *x.shape[3:])

    beta = by_block(beta)
    q, k, v = pad(q, key_pad), merged(pad(k, key_pad)), merged(pad(v, value_pad))
    state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, key_pad), (0, value_pad)))
    constant = scale if isinstance(scale, int | float) else 1.0
    blocks = Blocks.for_shape(batch, heads, key_dim + key_pad, value_dim + value_pad, channels)
    cut = {"scale": constant, "blocks": blocks}
    if g is not None:
        g = jnp.maximum(g.astype(jnp.float32), LOWEST_GATE)
    if channels:
        o, state = gpu_channel.delta_product(q, k, v, beta, pad(g, key_pad), state, *cut.values())
    else:
        gates = None
        # A row carries its token's gate if it is the token's first row, so that every decay is a sum of gates over rows.
        if g is not None:
            gates = by_block(g), by_block(jnp.stack([g] + [jnp.zeros_like(g)] * (steps - 1), axis=2))
        o, state = _run(q, k, v, _operands(beta, gates, steps), state, *cut.values())
    o, state = o[:, :length, :, :value_dim], state[:, :, :key_dim, :value_dim]
    return (o if constant is scale else (o.astype(jnp.float32) * scale).astype(v.dtype)), state


def _check_device():
    if config.pallas_tpu_interpret_mode_context_manager.value is not None:  # one switch for all of Pallas
        return
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    kind = device.device_kind
    if device.platform not in ("gpu", "cuda") or not any(
        name in kind for name in ("H100", "H200", "H800", "H20", "GH200")
    ):
        raise NotImplementedError(f"the kernels are for Hopper GPUs (wgmma), and this is {kind!r}")


def _operands(beta, gates, steps):
    """(rows, weights, tokens) of the kernels, from beta [B, S, HV, 64] and gates: of tokens [B, C, HV, 64], of rows as beta.

    Every decay is the exponential of a sum of gates. The rows bring back all of beta's gradient (`gradient_of_beta`).
    """
    fixed = jax.lax.stop_gradient(beta)
    if gates is None:
        one = jnp.ones_like(beta)
        return beta[..., None, :], jnp.stack([fixed, -fixed, one, one], axis=-2), one[:, ::steps, :, None]
    of_tokens, of_rows = gates
    later = jnp.pad(of_rows[..., 1:], [(0, 0)] * 3 + [(0, 1)])
    to_end = jnp.exp(jnp.cumsum(later[..., ::-1], axis=-1)[..., ::-1])
    from_start = jnp.exp(jnp.cumsum(of_rows, axis=-1))
    total = jnp.broadcast_to(from_start[..., -1:], from_start.shape)
    weights = jnp.stack([fixed, -fixed * from_start, to_end, total], axis=-2)
    tokens = jnp.stack([jnp.exp(jnp.cumsum(of_tokens, axis=-1)), of_tokens], axis=-2)
    return jnp.stack([beta, of_rows], axis=-2), weights, tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _run(q, k, v, operands, state, scale, blocks):
    """(o, last state) from whole chunks: q [B, T, H, K], k [B, T R, H, K], v [B, T R, HV, V], state [B, HV, K, V]."""
    return _forward(False, q, k, v, operands, state, scale, blocks)[0]


def _run_forward(*arguments):
    return _forward(True, *arguments)


def _forward(keep, q, k, v, operands, state, scale, blocks):
    rows, weights, tokens = operands
    inverses, p = inverses_and_scores(q, k, rows, tokens)
    queries = {"q": q, "p": p, "tokens": tokens if rows.shape[-2] > 1 else None, "scale": scale}
    out = scan(k, v, inverses, weights, state, **blocks.of_scan(), keep=keep, **queries)
    return (out["o"], out["last"]), (q, k, v, operands, inverses, out.get("y"), out.get("states"))


def _run_backward(scale, blocks, residuals, cotangents):
    q, k, v, (rows, weights, tokens), inverses, v_new, states = residuals
    do, dlast = cotangents
    dq, dk, dv_new, dstarts, dfrom_start, over_rows, over_tokens = gpu_backward.outputs_backward(
        q, k, v_new, states, tokens, do, scale=scale
    )
    w_in, _, w_out, total = jnp.moveaxis(weights, -2, 0)
    reverse_weights = jnp.stack([jnp.ones_like(w_in), w_out, weights[..., 1, :], total], axis=-2)
    out = scan(k, dv_new, inverses, reverse_weights, dlast, **blocks.of_scan(), extra=dstarts)
    dk_rows, dv, of_rows = gpu_backward.rows_backward(
        k, v, v_new, out["y"], states, out["states"], rows, weights, rows.shape[1] // tokens.shape[1]
    )
    from_start = jnp.exp(jnp.cumsum(rows[..., 1, :], axis=-1)) if rows.shape[-2] > 1 else 1.0
    direct = of_rows[..., 0, :] - from_start * of_rows[..., 1, :] + of_rows[..., 4, :]
    dbeta = gradient_of_beta(rows[..., 0, :], of_rows[..., 7, :], direct)
    drows, dweights, dtokens = dbeta[..., None, :], of_rows[..., :4, :], dfrom_start[..., None, :]
    if rows.shape[-2] > 1:
        over_tokens = over_tokens.swapaxes(2, 3).reshape(*tokens.shape[:2], ROWS, -1, tokens.shape[2]).sum(3)
        of_gates = _gates_met(over_rows, over_tokens.swapaxes(2, 3))
        dtokens = jnp.stack([dfrom_start, of_gates], axis=-2)
        drows = jnp.stack([dbeta, _gates_met(of_rows[..., 5, :], of_rows[..., 6, :])], axis=-2)
    dq, dk = per_key_head(q, dq), per_key_head(k, dk, dk_rows)
    return dq, dk, dv, (drows, dweights, dtokens), out["last"]


def _gates_met(by_query, by_key):
    """Cotangents of gates s from sums of d(exp D_ij) exp D_ij over j, and over i: a pair meets the gates j < s <= i."""
    return jnp.cumsum((by_query - by_key)[..., ::-1], axis=-1)[..., ::-1]


_run.defvjp(_run_forward, _run_backward)
