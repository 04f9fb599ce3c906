"""What the GPU kernels are written in: grids, products of references, sums of gates, writes through shared memory.

One CTA is one warpgroup, in the scans two. Every product is a `wgmma` of operands in shared memory, bfloat16 (with channel
gates also float16), summed in float32. "In parts"
means as a sum of two bfloat16 arrays, 16 bits: it is used wherever an error would stay in the state.

Shapes, in all these files: the tokens T are whole chunks of 64, their T R rows of keys and values whole blocks of 64 rows. B
batch, H key heads, HV value heads, C = T / 64 chunks, S = T R / 64 blocks.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import manual_axes

ROWS = 64  # the rows of one wgmma, of a block and of a chunk
bf16, f32 = jnp.bfloat16, jnp.float32


def call(body, name, inputs, outputs, grid, scratch, warpgroups=1):
    """Runs `body(indices of the CTA, refs of inputs, of outputs, *scratch)`; grid: axis name -> size, the last runs fastest.

    With several warpgroups a CTA each runs it; their axis is "warpgroup". scratch may be a dict: then it comes by name.

    Results vary over every manual mesh axis over which an input does; `plgpu.kernel` itself says that they vary over none.
    """

    def kernel(*refs, **named):
        refs, unnamed = refs[: len(inputs) + len(outputs)], refs[len(inputs) + len(outputs) :]
        cta = [jax.lax.axis_index(axis) for axis in grid]
        body(cta, refs[: len(inputs)], refs[len(inputs) :], *unnamed, **named)

    results = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*output) for output in outputs],
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=f"delta_product_{name}",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),  # of exp: two instructions in place of eight
        **({"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}),
    )(*inputs)
    return [manual_axes.vary_alike(x, *inputs)[0] for x in results]


def rows_of(index, count=ROWS):
    return pl.ds(index * count, count)


def unknown_zero(turn=0):
    """An index 0 that the compiler does not know: what follows from a known one, addresses for every wgmma, fills registers.

    turn: in a loop its index, else the addresses are still worked out once, before it, and kept.
    """
    return jax.lax.optimization_barrier(jnp.int32(turn)) - turn


def load(ref):
    """From global memory to registers; jax 0.11 has no "optimized" way.

    Times one, which costs nothing: inside shard_map an argument's reference says over which mesh axes it varies, no other
    number in a kernel does, and a loop's carry must not change in that; what is computed from it does not say so any more.
    """
    return 1.0 * plgpu.load(ref, optimized=False)


def store(ref, x):
    """From registers to global memory, rows of any length; assignment does that in jax 0.11, in 0.12 from 128 bytes on."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def square(*shape, dtype=bf16):
    return plgpu.SMEM((*shape, ROWS, ROWS), dtype)


def transposed(ref):
    return ref.transpose((1, 0))


def products(*pairs):
    """The sum of the products of pairs of references, in float32."""
    return products_while(tuple, *pairs)[0]


def products_while(work, *pairs):
    """(the sum of the products, work()): what is worked out while the tensor cores are busy."""

    def accumulate(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        found = work()
        return acc[...], found

    return pl.run_scoped(accumulate, plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), f32))


def parts_of(x, rounded=True):
    """X in parts; the first rounded or, which is less work and costs one bit of the sum, cut off.

    By integer arithmetic, as converting one number there and back is slow.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    if rounded:
        bits += jnp.uint32(0x8000)
    head = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), f32)
    return head.astype(bf16), (x - head).astype(bf16)


def put_parts(ref, x):
    """X in parts, to ref[0] and ref[1]."""
    ref[0], ref[1] = parts_of(x)


def writer(*stages):
    """write(x, target): x [64, 64] to global memory, through shared memory, each time another of the stages."""
    turns = itertools.cycle(stages)

    def write(x, target):
        stage = next(turns)
        plgpu.wait_smem_to_gmem(len(stages) - 1, wait_read_only=True)
        stage[...] = x.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage, target)

    return write


def row_and_column():
    return (plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis) for axis in (0, 1))


def along_rows(vector, columns=ROWS):
    """One entry of the vector for each row."""
    return jax.lax.broadcast_in_dim(vector, (vector.shape[0], columns), (0,))


def put_prefix_mask(ref):
    i, s = row_and_column()
    ref[...] = jnp.where(s <= i, 1.0, 0.0).astype(bf16)


def decays_between(gates, begins, mask, parts):
    """exp of the sums over s <= i of gates[s] where begins(s, j): [64, 64], by products with a mask, so that sums stay sums.

    gates: a vector reference; mask: shared memory with 1 where s <= i; parts: shared memory to work in.
    """
    s, j = row_and_column()
    put_parts(parts, jnp.where(begins(s, j), along_rows(gates[...]), 0.0))
    plgpu.commit_smem()
    return jnp.exp(products((mask, parts.at[0]), (mask, parts.at[1])))


def per_key_head(like, *cotangents):
    """The sum of arrays and over the value heads of each key head."""
    shape = (*like.shape[:3], -1, like.shape[3])
    return sum(x.astype(f32).reshape(shape).sum(3) for x in cotangents).astype(like.dtype)


def gradient_of_beta(beta, dlog_beta, direct):
    """From V' = beta U: dbeta is dV' . V' / beta, where `direct`, dV' . U, is a difference of large numbers if keys are alike.

    dV' is the cotangent of the right-hand side of (I + A) V' = ..; where beta leaves nothing of V' only the latter says
    something.
    """
    small = jnp.abs(beta) < 2.0**-60
    return jnp.where(small, direct, dlog_beta / jnp.where(small, 1.0, beta))
