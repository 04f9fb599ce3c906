"""The TPU kernels inside shard_map over batch and heads, on four simulated devices: prints each case's errors and collectives."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from delta_rule_cases import NAMES, draw, relative_rms
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from deltajax.ops import delta_product


def main(steps, heads, value_heads, dim, gate, dtype):
    """Errors by name against "reference" in float64 on one device, and the collectives of forward and backward together."""
    arguments = draw(0, 2, 70, steps, heads, value_heads, dim, dim, gate, dtype=dtype)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, outputs = P("data", None, None, "tensor"), (P("data", None, "tensor"), P("data", "tensor"))
    layouts = dict(zip(NAMES, (outputs[0], rows, rows, rows, *outputs), strict=True))
    specs = ({name: layouts[name] for name in arguments}, P())
    rng = np.random.default_rng(9)

    def evaluate(arguments, implementation, spread=lambda f: f):
        def f(arguments, scale):
            return delta_product(**arguments, scale=scale, implementation=implementation)

        def all_of(arguments, scale, cotangents):
            primals, pull = jax.vjp(spread(f), arguments, scale)
            dtypes = (x.dtype for x in primals)
            gradients, dscale = pull(tuple(x.astype(dtype) for x, dtype in zip(cotangents, dtypes, strict=True)))
            return dict(zip(("o", "state"), primals, strict=True)) | gradients | {"scale": dscale}

        compiled = jax.jit(all_of).lower(arguments, scale, cotangents).compile()
        return compiled(arguments, scale, cotangents), compiled.as_text()

    shapes = (arguments["v"][:, :, 0].shape, arguments["initial_state"].shape)
    cotangents = tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    scale = jnp.float32(0.3)
    exact, _ = evaluate(jax.tree.map(lambda x: x.astype("float64"), arguments), "reference")
    with pltpu.force_tpu_interpret_mode():
        actual, text = evaluate(
            arguments,
            "pallas_tpu",
            lambda f: jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outputs),
        )
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    found = re.findall(rf"= (.*) ({kinds})(?:-start)?\(", text)
    return {"errors": {name: relative_rms(actual[name], exact[name]) for name in exact}, "collectives": found}


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps([main(*case) for case in json.loads(sys.argv[1])]))
