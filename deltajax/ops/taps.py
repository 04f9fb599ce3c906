"""Look at values inside any function, or replace them, without changing its signature.

A function marks a value with `tag`, which is JAX's own `checkpoint_name`: an identity that costs nothing and may stand anywhere,
in a Flax module, under jit, in the body of a scan over layers, under `jax.checkpoint`. `capture` makes of such a function one
that also returns what probes compute from the marked values, stacked over all places in the order in which they are reached:

    def apply(params, x):
        def block(x, p):
            return tag(x + jnp.tanh(x @ p), "residual"), None
        return jax.lax.scan(block, x, params)[0]

    y, seen = capture(apply, {"residual": jnp.max})(params, x)      # seen["residual"]: [layers]

The result is as differentiable, and as fit for jit, as the function was. `replace` puts other values in their place. A Linen
module goes in as `module.apply`, an NNX module as a function of its state: `lambda state, x: nnx.merge(graph, state)(x)`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

tag = checkpoint_name

Probe = Callable[[jax.Array], Any]  # a marked value -> a pytree of arrays, of the same shapes at every place
Replacement = Callable[
    [jax.Array, Any], jax.Array
]  # (a marked value, its place: 0, 1, ...) -> what stands there instead
_Visit = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def capture(f: Callable, probes: Mapping[str, Probe]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """`f`, returning (its result, {name: what the probe of that name computed, stacked over the places}).

    Args:
      f: positional arguments are pytrees of arrays; bind anything static, configs or strings, beforehand.
      probes: name of a tag -> probe.

    Raises (when the result is called):
      ValueError: no value has this tag, or one stands inside something other than scan, jit and checkpoint.
    """

    def look(probe: Probe) -> _Visit:
        return lambda x, _: (x, probe(x))

    return _visiting(f, {name: look(probe) for name, probe in probes.items()})


def replace(f: Callable, replacements: Mapping[str, Replacement]) -> Callable:
    """`f` with each marked value replaced; arguments and errors as in `capture`."""

    def put(change: Replacement) -> _Visit:
        return lambda x, place: (change(x, place), None)

    visiting = _visiting(f, {name: put(change) for name, change in replacements.items()})
    return lambda *args: visiting(*args)[0]


def replace_and_capture(f: Callable, visits: Mapping[str, _Visit]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Both at once: `f` with each marked value replaced, and what was computed from it; arguments and errors as in `capture`.

    Args:
      visits: name of a tag -> function of (a marked value, its place) -> (what stands there instead, a pytree of arrays).
    """
    return _visiting(f, visits)


def tags(f: Callable, *args: Any) -> list[str]:
    """The tags of the values that `f(*args)` marks, in the order in which they are reached; nothing is computed."""
    return _tags(jax.make_jaxpr(f)(*args).jaxpr)


def _visiting(f: Callable, visits: Mapping[str, _Visit]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    def call(*args):
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        missing = visits.keys() - _count(closed.jaxpr).keys()
        if missing:
            raise ValueError(f"no value is tagged {sorted(missing)[0]!r} in {getattr(f, '__name__', f)}")
        outputs, seen = _run(closed.jaxpr, closed.consts, jax.tree.leaves(args), visits, dict.fromkeys(visits, 0))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), seen

    return call


def _tags(jaxpr: Any) -> list[str]:
    found: list[str] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            found.append(eqn.params["name"])
        for inner in _inner(eqn):
            found += _tags(inner) * eqn.params.get("length", 1)
    return found


def _count(jaxpr: Any) -> Counter:
    return Counter(_tags(jaxpr))


def _inner(eqn: Any) -> list[Any]:
    """Programs inside an equation."""
    values = [x for v in eqn.params.values() for x in (v if isinstance(v, tuple | list) else (v,))]
    return [getattr(v, "jaxpr", v) for v in values if isinstance(v, jex.ClosedJaxpr | jex.Jaxpr)]


def _run(
    jaxpr: Any, consts: Sequence, args: Sequence, visits: Mapping[str, _Visit], places: Mapping[str, Any]
) -> tuple:
    """Evaluate a program; (outputs, {name: results of visits [number of places, ...]}). places: the first of each name."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    found: dict[str, list] = {}
    places = dict(places)

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        inside = sum((_count(inner) for inner in _inner(eqn)), Counter())
        seen: dict[str, Any] = {}
        with eqn.ctx.manager:
            if eqn.primitive.name == "name" and eqn.params["name"] in visits:
                name = eqn.params["name"]
                value, result = visits[name](inputs[0], places[name])
                if jnp.shape(value) != inputs[0].shape:
                    raise ValueError(
                        f"what replaces a value tagged {name!r} must have its shape {inputs[0].shape}, "
                        f"got {jnp.shape(value)}"
                    )
                outputs, seen = [jnp.asarray(value, inputs[0].dtype)], {name: jax.tree.map(lambda x: x[None], result)}
                places[name] += 1
            elif not inside.keys() & visits.keys():
                bound = eqn.primitive.get_bind_params(eqn.params)
                functions, params = bound if isinstance(bound, tuple) else ((), bound)  # JAX < 0.12, and from there on
                outputs = eqn.primitive.bind(*functions, *inputs, **params)
                outputs = outputs if eqn.primitive.multiple_results else [outputs]
            else:
                outputs, seen = _run_nested(eqn, inputs, visits, places)
                for name in visits:
                    places[name] += inside[name] * eqn.params.get("length", 1)
        values.update(zip(eqn.outvars, outputs, strict=True))
        for name, result in seen.items():
            found.setdefault(name, []).append(result)
    return [read(atom) for atom in jaxpr.outvars], {name: _stacked(name, results) for name, results in found.items()}


def _stacked(name: str, results: list) -> Any:
    """Concatenate the results of visits along their first axis, the places."""
    shapes = [[leaf.shape[1:] for leaf in jax.tree.leaves(result)] for result in results]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise ValueError(
            f"probes of {name!r} gave results of different shapes, {shapes[0]} and {other}: the values with this tag "
            "differ in width; tag them by different names"
        )
    return jax.tree.map(lambda *x: jnp.concatenate(x), *results)


def _run_nested(eqn: Any, inputs: list, visits: Mapping[str, _Visit], places: Mapping[str, Any]) -> tuple:
    """An equation whose inner program holds tags."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _run_scan(eqn, inputs, visits, places)
    if name not in ("jit", "pjit", "closed_call", "remat", "remat2", "checkpoint"):
        raise ValueError(f"a tagged value stands inside {name}; it may stand inside scan, jit and checkpoint")
    (inner,) = _inner(eqn)
    consts = getattr(params.get("jaxpr"), "consts", [])
    if name in ("remat", "remat2", "checkpoint"):

        def run(*args):
            return _run(inner, consts, args, visits, places)

        return jax.checkpoint(run, policy=params["policy"], prevent_cse=params["prevent_cse"])(*inputs)
    return _run(inner, consts, inputs, visits, places)


def _run_scan(eqn: Any, inputs: list, visits: Mapping[str, _Visit], places: Mapping[str, Any]) -> tuple:
    params, closed, length = eqn.params, eqn.params["jaxpr"], eqn.params["length"]
    # Told by ranks, because how a scan stores these numbers differs between versions of JAX: what is scanned has an axis more.
    num_carry = sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.outvars, closed.jaxpr.outvars, strict=True))
    num_consts = (
        sum(o.aval.ndim == i.aval.ndim for o, i in zip(eqn.invars, closed.jaxpr.invars, strict=True)) - num_carry
    )
    consts, carry, xs = (
        inputs[:num_consts],
        inputs[num_consts : num_consts + num_carry],
        inputs[num_consts + num_carry :],
    )
    each = _count(closed.jaxpr)

    def body(carry, x):
        i, xs = x
        first = {name: place + i * each[name] for name, place in places.items()}
        outputs, seen = _run(closed.jaxpr, closed.consts, (*consts, *carry, *xs), visits, first)
        return outputs[:num_carry], (outputs[num_carry:], seen)

    carry, (ys, seen) = jax.lax.scan(
        body, carry, (jnp.arange(length), xs), length=length, reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *ys], jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
