"""The scan over blocks, forwards with the outputs and in reverse: the only kernel in which one block waits for another."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_common import (
    ROWS,
    along_rows,
    bf16,
    call,
    f32,
    load,
    parts_of,
    products,
    products_while,
    rows_of,
    square,
    store,
    transposed,
    unknown_zero,
)


def scan(
    k, x, inverses, weights, state, *, columns, stages, late_stages, places, keep=True, k_out=None, totals=None,
    extra=None, q=None, p=None, tokens=None, scale=1.0,
):  # fmt: skip
    """The recurrence over blocks, forwards or, where `extra` is given, in reverse, for some columns of the state in each CTA.

    Per block, with S the state in float32 and w_in, w_state, w_out the weights of its rows::

        y = (I + A)^-1 (w_in x + w_state (K S)),    in reverse (I + A)^-T
        S <- total S + K_out^T (w_out y)            in reverse plus extra[chunk], after a chunk's first block

    and forwards, per chunk, O = scale (tokens Q S + sum over its blocks of P y), S that before its first block.

    k [B, T R, H, K], x [B, T R, HV, V], inverses and p as `inverses_and_scores` gives them, weights [B, S, HV, 4, 64]: w_in,
    w_state, w_out and total; state [B, HV, K, V] in float32, extra [B, C, HV, K, V]. With channel gates k_out as k, and totals
    [B, S, HV, K] in place of total; else K_out is K. q [B, T, H, K]; tokens [B, C, HV, 1 or more, 64], of which it takes the
    first, None for ones. What a block needs last, extra and k_out, has late_stages places: as many as the rest, or one,
    and then it is fetched when the block before has ended.

    The first warpgroup goes from state to state and does nothing else. The second fetches, stores, and makes the outputs of a
    block while the first is at the next; `places` is how many blocks may stand between them.

    Returns a dict: "last" state; forwards "o" [B, T, HV, V]; with `keep`, "y" [B, T R, HV, V] and "states", before each block
    (in reverse: after it) [B, S, HV, K, V]. All but the last state in bfloat16.
    """
    batch, blocks, heads = weights.shape[:3]
    key_dim, value_dim = state.shape[2:]
    group = heads // k.shape[2]
    reverse, channels = extra is not None, totals is not None
    chunks = extra.shape[1] if reverse else q.shape[1] // ROWS
    steps = blocks // chunks
    stages, places = min(stages, blocks), min(places, blocks)
    late_stages = min(late_stages, stages)
    late = reverse + channels if late_stages < stages else 0  # copies with a barrier of their own
    inputs = {"k": k, "x": x, "inverses": inverses, "weights": weights, "state": state}
    inputs |= {"k_out": k_out, "totals": totals, "extra": extra, "q": q, "p": p, "tokens": tokens}
    inputs = {name: array for name, array in inputs.items() if array is not None}
    outputs = {"last": (state.shape, f32)}
    if keep:
        outputs |= {"y": (x.shape, bf16), "states": ((batch, blocks, heads, key_dim, value_dim), bf16)}
    if not reverse:
        outputs["o"] = ((batch, chunks * ROWS, heads, value_dim), bf16)

    def body(cta, sources, targets, **scratch):
        b, h, v = cta
        source, target = (
            SimpleNamespace(**dict(zip(names, refs, strict=True)))
            for names, refs in ((inputs, sources), (outputs, targets))
        )
        here = SimpleNamespace(**scratch)
        where = pl.ds(v * columns, columns)

        def put_beside(ref, x):
            ref[...] = jnp.concatenate(parts_of(x, rounded=False), axis=1)

        def folded(*pairs, work=tuple):
            """(products with parts that stand beside each other, which one wgmma takes at once; what is done meanwhile)."""
            both, done = products_while(work, *pairs)
            return both[:, :columns] + both[:, columns:], done

        def block_of(n):
            return blocks - 1 - n if reverse else n

        def in_turn(n, count):
            return jax.lax.rem(n, jnp.int32(count))

        def one_block(n, state):
            """The first warpgroup's part."""
            block, slot, place = block_of(n), in_turn(n, stages), in_turn(n, places)
            late_slot = unknown_zero(n) if late else slot
            parts, y = here.parts.at[place], here.y.at[place]

            @pl.when(n >= places)
            def _():
                plgpu.barrier_wait(here.left.at[place])

            put_beside(parts, state)
            plgpu.commit_smem()
            plgpu.barrier_wait(here.arrived.at[slot])
            keys, inverse = here.k.at[slot], here.inverses.at[slot]
            w_in, w_state, w_out = (along_rows(here.weights[slot, kind], columns) for kind in range(3))
            total = along_rows(here.totals[slot], columns) if channels else here.weights[slot, 3, 0]
            of_state, of_input = folded((keys, parts), work=lambda: w_in * here.x[slot].astype(f32))
            put_beside(here.work, of_input + w_state * of_state)
            plgpu.commit_smem()
            head, rest = (inverse.at[:, rows_of(part)] for part in range(2))
            if reverse:
                head, rest = transposed(head), transposed(rest)
            solution = folded((head, here.work), (rest, here.work))[0]
            put_beside(here.work, w_out * solution)
            plgpu.commit_smem()
            if late:
                plgpu.barrier_wait(here.late)
            of_keys = here.k_out.at[late_slot] if channels else keys

            def decayed():
                kept = total * state
                if reverse:
                    ends = jnp.where(jax.lax.rem(block, jnp.int32(steps)) == 0, 1.0, 0.0)
                    kept += ends * here.extra[late_slot].astype(f32)
                return kept

            def meanwhile():
                kept = None if key_dim == 256 else decayed()  # there registers do not hold both
                y[...] = solution.astype(bf16)
                plgpu.commit_smem()
                return kept

            update, kept = folded((transposed(of_keys), here.work), work=meanwhile)
            state = update + (decayed() if kept is None else kept)
            plgpu.barrier_arrive(here.done.at[place])
            return state

        def fetch(n):
            block, slot = block_of(n), in_turn(n, stages)
            barrier = here.arrived.at[slot]
            plgpu.copy_gmem_to_smem(source.k.at[b, rows_of(block), h // group], here.k.at[slot], barrier)
            plgpu.copy_gmem_to_smem(source.x.at[b, rows_of(block), h, where], here.x.at[slot], barrier)
            plgpu.copy_gmem_to_smem(source.inverses.at[b, block, h], here.inverses.at[slot], barrier)
            plgpu.copy_gmem_to_smem(source.weights.at[b, block, h], here.weights.at[slot], barrier)
            if channels:
                plgpu.copy_gmem_to_smem(source.totals.at[b, block, h], here.totals.at[slot], barrier)
            if not late:
                fetch_late(n, slot, barrier)

        def fetch_late(n, slot, barrier):
            block = block_of(n)
            if reverse:
                plgpu.copy_gmem_to_smem(source.extra.at[b, block // steps, h, :, where], here.extra.at[slot], barrier)
            if channels:
                plgpu.copy_gmem_to_smem(source.k_out.at[b, rows_of(block), h // group], here.k_out.at[slot], barrier)

        def fetch_queries(chunk):
            plgpu.copy_gmem_to_smem(source.q.at[b, rows_of(chunk), h // group], here.q, here.queries)
            if tokens is not None:
                plgpu.copy_gmem_to_smem(source.tokens.at[b, chunk, h, 0], here.tokens, here.queries)

        def fetch_scores(block):
            plgpu.copy_gmem_to_smem(source.p.at[b, block, h], here.p, here.scores)

        def after(n, o):
            """The second warpgroup's part of a block; o, the outputs of its chunk so far, comes back."""
            block, place = block_of(n), in_turn(n, places)
            parts, y = here.parts.at[place], here.y.at[place]
            plgpu.barrier_wait(here.done.at[place])
            plgpu.commit_smem()  # what the first warpgroup has read may be overwritten by copies

            @pl.when(n + stages < blocks)
            def _():
                fetch(n + stages)

            if late:

                @pl.when(n + 1 < blocks)
                def _():
                    fetch_late(n + 1, 0, here.late)

            if keep:
                head, rest = (parts[:, pl.ds(start, columns)].astype(f32) for start in (0, columns))
                here.stored[...] = (head + rest).astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(here.stored, target.states.at[b, block, h, :, where])
                plgpu.copy_smem_to_gmem(y, target.y.at[b, rows_of(block), h, where])
            if not reverse:
                chunk, step = n // steps, jax.lax.rem(n, jnp.int32(steps))
                o = jax.lax.cond(step == 0, lambda: of_state(chunk, parts), lambda: o)
                plgpu.barrier_wait(here.scores)
                o += products((here.p, y))
                plgpu.commit_smem()  # all warps have left p

                @pl.when(n + 1 < blocks)
                def _():
                    fetch_scores(n + 1)

                @pl.when(step == steps - 1)
                def _():
                    here.o[...] = (scale * o).astype(bf16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(here.o, target.o.at[b, rows_of(chunk), h, where])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(n + places < blocks)  # as often as the first waits for it
            def _():
                plgpu.barrier_arrive(here.left.at[place])

            return o

        def of_state(chunk, parts):
            plgpu.barrier_wait(here.queries)
            o = folded((here.q, parts))[0]
            if tokens is not None:
                o *= along_rows(here.tokens[...], columns)
            plgpu.commit_smem()  # all warps have left q

            @pl.when(chunk + 1 < chunks)
            def _():
                fetch_queries(chunk + 1)

            return o

        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            first = load(source.state.at[b, h, :, where])
            last = jax.lax.fori_loop(jnp.int32(0), jnp.int32(blocks), one_block, first)
            store(target.last.at[b, h, :, where], last)

        @pl.when(warpgroup == 1)
        def _():
            for n in range(stages):
                fetch(jnp.int32(n))
            if late:
                fetch_late(jnp.int32(0), 0, here.late)
            if not reverse:
                fetch_queries(0)
                fetch_scores(0)
            nothing: Any = () if reverse else jnp.zeros((ROWS, columns), f32)
            jax.lax.fori_loop(jnp.int32(0), jnp.int32(blocks), after, nothing)
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "k": plgpu.SMEM((stages, ROWS, key_dim), bf16),
        "x": plgpu.SMEM((stages, ROWS, columns), bf16),
        "inverses": plgpu.SMEM((stages, ROWS, 2 * ROWS), bf16),
        "weights": plgpu.SMEM((stages, 4, ROWS), f32),
        "parts": plgpu.SMEM((places, key_dim, 2 * columns), bf16),
        "work": plgpu.SMEM((ROWS, 2 * columns), bf16),
        "y": plgpu.SMEM((places, ROWS, columns), bf16),
        "arrived": plgpu.Barrier(num_arrivals=4 + channels + (0 if late else reverse + channels), num_barriers=stages),
        "done": plgpu.Barrier(num_barriers=places),
        "left": plgpu.Barrier(num_barriers=places),
    }
    if keep:
        scratch["stored"] = plgpu.SMEM((key_dim, columns), bf16)
    if channels:
        scratch["totals"] = plgpu.SMEM((stages, key_dim), f32)
        scratch["k_out"] = plgpu.SMEM((late_stages, ROWS, key_dim), bf16)
    if late:
        scratch["late"] = plgpu.Barrier(num_arrivals=late)
    if reverse:
        scratch["extra"] = plgpu.SMEM((late_stages, key_dim, columns), bf16)
    else:
        scratch |= {"q": plgpu.SMEM((ROWS, key_dim), bf16), "p": square(), "o": plgpu.SMEM((ROWS, columns), bf16)}
        scratch |= {"queries": plgpu.Barrier(num_arrivals=1 + (tokens is not None)), "scores": plgpu.Barrier()}
    if tokens is not None:
        scratch["tokens"] = plgpu.SMEM((ROWS,), f32)
    results = call(
        body,
        "backward_scan" if reverse else "scan",
        tuple(inputs.values()),
        list(outputs.values()),
        {"batch": batch, "head": heads, "columns": value_dim // columns},
        scratch,
        warpgroups=2,
    )
    return dict(zip(outputs, results, strict=True))
