"""The delta product over tokens spread on simulated devices: prints the errors and the collectives of a case as JSON."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from delta_rule_cases import NAMES, draw, relative_rms
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from deltajax.layers import attention, delta, mixer
from deltajax.ops import delta_product

BATCH, LENGTH, DIM = 2, 96, 8


def evaluate(arguments, ids, implementation, devices):
    """(outputs and gradients by name, (shape, kind) of the compiled collectives); devices None: all tokens on one device."""
    names = [name for name in NAMES if name in arguments]

    def f(arguments, ids):
        return delta_product(
            **arguments, segment_ids=ids, implementation=implementation, sequence_axis="sequence" if devices else None
        )

    if devices:
        mesh = jax.make_mesh((devices,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
        tokens = P(None, "sequence")
        specs = {name: P() if name == "initial_state" else tokens for name in names}
        f = jax.shard_map(f, mesh=mesh, in_specs=(specs, tokens), out_specs=(tokens, P()))
    rng = np.random.default_rng(9)
    shapes = (arguments["v"][:, :, 0].shape, arguments["initial_state"].shape)
    weights = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]

    def loss(arguments):
        outputs = f(arguments, ids)
        return sum(jnp.sum(w * x.astype(w.dtype)) for w, x in zip(weights, outputs, strict=True)), outputs

    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(arguments).compile()
    gradients, (o, state) = compiled(arguments)
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    found = [
        (shape, kind)
        for shapes, kind in re.findall(rf"= (.*) ({kinds})(?:-start)?\(", compiled.as_text())
        for shape in re.findall(r"\w+\[[\d,]*\]", shapes)  # one instruction may carry several arrays
    ]
    return {"o": o, "state": state, **gradients}, found


def main(devices, implementation, steps, heads, value_heads, gate, beta, cosine, packed):
    """One case."""
    arguments = draw(0, BATCH, LENGTH, steps, heads, value_heads, DIM, 2 * DIM, gate, beta, cosine)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 2 if packed else 1, (BATCH, LENGTH // 12)).repeat(12, 1))
    exact, _ = evaluate(jax.tree.map(lambda x: x.astype("float64"), arguments), ids, "reference", None)
    with pltpu.force_tpu_interpret_mode():
        actual, found = evaluate(arguments, ids, implementation, devices)
    return {"errors": {name: relative_rms(actual[name], exact[name]) for name in exact}, "collectives": found}


def layers():
    """Relative errors of outputs and gradients of layers whose tokens are spread over eight devices, by name."""
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((8, 1), ("sequence", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jnp.asarray(rng.normal(size=(2, 16, 8)))  # two tokens a device: the convolution reaches over two devices
    ids = jnp.asarray([[0] * 16, [0, 1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3]])
    mixers = {f"window {w}": attention.Config(2, 4, window=w) for w in (None, 1, 4, 16)} | {
        "convolution": delta.kda(1, 4, implementation="reference")
    }
    errors = {}
    for name, config in mixers.items():
        module = mixer.module_of(config)
        params = jax.tree.map(lambda p: p.astype(x.dtype), module.init(jax.random.key(0), config, 8))

        def loss(params, x, ids, module=module, config=config):
            y, _ = module.apply(params, config, x, segment_ids=ids)
            return jnp.sum(jnp.sin(y)), y

        def spread(*arguments, loss=loss):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return loss(*arguments)

        one, eight = (
            jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True), in_shardings=jax.NamedSharding(mesh, P()))(
                params, x, ids
            )
            for f in (loss, spread)
        )
        errors[name] = max(map(relative_rms, jax.tree.leaves(eight), jax.tree.leaves(one)))
    return errors


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps([layers(), *(main(*case) for case in json.loads(sys.argv[1]))]))
