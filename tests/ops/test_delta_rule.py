"""Every implementation against the recurrence in float64: outputs, states and gradients of every argument."""

import functools
import itertools
import os
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import NAMES, compare, draw
from hypothesis import strategies as st

from deltajax.ops import delta_product, delta_product_step, delta_rule
from deltajax.ops.delta_rule.api import DEFAULTS, IMPLEMENTATIONS
from pallas_kernels import native

FAST = ["chunked"] + ["native_cpu"] * bool(native.compiler())  # the Pallas kernels have files of their own
ALL = ["reference", *FAST]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@hypothesis.settings(max_examples=8, derandomize=True)
@hypothesis.given(
    b=st.integers(1, 3),
    t=st.integers(0, 70),
    r=st.integers(1, 4),
    h=st.integers(1, 2),
    group=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    gate=st.sampled_from([None, "scalar", "channel", "strong"]),
    segmented=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_shape(b, t, r, h, group, key_dim, value_dim, gate, segmented, seed):
    arguments = draw(seed, b, t, r, h, h * group, key_dim, value_dim, gate, dtype="float64")
    segments = jnp.asarray(np.random.default_rng(seed).integers(0, 2, (b, t)) if segmented else np.zeros((b, t)), int)
    for name in FAST:
        compare(arguments, name, 1e-11, 1e-10, segment_ids=segments if segmented else None, scale=0.7)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("steps", "gate", "beta", "cosine"),
    [(1, None, 2.0, 0.95), (4, None, 2.0, 0.95), (3, "scalar", 2.0, 0.95), (2, "channel", 2.0, 0.95), (1, "strong", 1.0, 0.5)],
)  # fmt: skip
def test_accuracy_float32(implementation, steps, gate, beta, cosine):
    compare(draw(0, 1, 4096, steps, 1, 1, 64, 64, gate, beta, cosine), implementation, 1e-5, 1e-4)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(("steps", "gate"), [(1, "scalar"), (4, None), (1, "channel")])
def test_accuracy_bfloat16(implementation, steps, gate):
    compare(draw(1, 1, 1024, steps, 1, 2, 64, 64, gate, 2.0, 0.5, "bfloat16"), implementation, 1e-2, 2e-2)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("change", ["g=-50", "g=-inf", "beta=0", "k=0", "k=v=0", "T=1", "T=0"])
def test_degenerate_inputs_stay_finite_and_right(implementation, change):
    length = {"T=1": 1, "T=0": 0}.get(change, 70)
    arguments = draw(2, 2, length, 2, 1, 2, 8, 4, "scalar")
    for name in {"g=-50": "g", "g=-inf": "g", "beta=0": "beta", "k=0": "k", "k=v=0": "kv"}.get(change, ""):
        name = "beta" if change.startswith("beta") else name
        if name in arguments:
            arguments[name] = jnp.full_like(arguments[name], float(change.split("=")[-1]))
    compare(arguments, implementation, 1e-5, 1e-4)


@pytest.mark.parametrize("implementation", ALL)
def test_segments_equal_separate_documents(implementation):
    """An id may come back: only a change resets. The initial state belongs to the first document."""
    arguments = draw(3, 1, 90, 2, 2, 2, 8, 8, "channel", dtype="float64")
    bounds = [0, 1, 33, 64, 90]
    ids = jnp.asarray(np.repeat([5, 7, 5, 1], np.diff(bounds)))[None]
    tokens = [arguments[name] for name in NAMES[:5]]
    call = functools.partial(delta_product, implementation=implementation)
    o, state = call(*tokens, initial_state=arguments["initial_state"], segment_ids=ids)
    initial = arguments["initial_state"]
    for start, stop in itertools.pairwise(bounds):
        expected, last = call(*(x[:, start:stop] for x in tokens), initial_state=initial)
        np.testing.assert_allclose(o[:, start:stop], expected, rtol=1e-9, atol=1e-12)
        initial = None
    np.testing.assert_allclose(state, last, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
def test_step_continues_a_sequence(gate):
    arguments = draw(4, 2, 20, 3, 2, 4, 8, 6, gate, dtype="float64")
    tokens = [arguments.get(name) for name in NAMES[:5]]
    o, final = delta_product(*tokens, initial_state=arguments["initial_state"], implementation="chunked")
    state = arguments["initial_state"]
    for t in range(20):
        o_t, state = delta_product_step(state, *(None if x is None else x[:, t] for x in tokens))
        np.testing.assert_allclose(o_t, o[:, t], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state, final, rtol=1e-9, atol=1e-12)


def test_delta_rule_is_the_product_with_one_step():
    a = draw(5, 2, 17, 1, 1, 2, 8, 4, "scalar")
    tokens = (a["q"], a["k"][:, :, 0], a["v"][:, :, 0], a["beta"][:, :, 0], a["g"])
    ids = jnp.asarray(np.arange(17) // 6)[None].repeat(2, 0)
    expected = delta_product(*(a[name] for name in NAMES[:5]), scale=2.0, segment_ids=ids)
    for x, y in zip(delta_rule(*tokens, scale=2.0, segment_ids=ids), expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", FAST)
def test_under_vmap_and_remat(implementation):
    a = draw(6, 3, 40, 2, 1, 2, 8, 4, "channel", dtype="float64")
    tokens = [a[name] for name in NAMES[:5]]

    def loss(*tokens):
        o, state = delta_product(*tokens, implementation=implementation)
        return jnp.sum(o**2) + jnp.sum(state**3)

    expected = jax.grad(loss, argnums=range(5))(*tokens)
    one = jax.grad(jax.checkpoint(lambda *x: loss(*(y[None] for y in x))), argnums=range(5))
    for x, y in zip(jax.vmap(one)(*tokens), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_the_backward_keeps_inputs_and_few_states():
    """Residuals beyond the inputs: one [K, V] state per block of chunks, far below one per token."""
    t, dim = 4096, 16
    a = draw(7, 1, t, 1, 1, 1, dim, dim, "scalar")
    tokens = [a[name] for name in NAMES[:5]]
    _, backward = jax.vjp(lambda *x: delta_product(*x, implementation="chunked"), *tokens)
    kept = sum(x.size for x in jax.tree.leaves(backward))
    inputs = sum(x.size for x in tokens)
    assert kept - inputs < t / 32 * dim * dim + 1000


def test_dtypes():
    for dtype, state_dtype in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        a = draw(8, 1, 3, 1, 1, 1, 4, 4, "scalar", dtype=dtype)
        o, state = delta_product(*(a[name] for name in NAMES[:5]))
        assert (o.dtype, state.dtype) == (dtype, state_dtype)


def test_every_default_exists():
    assert {name for names in DEFAULTS.values() for name in names} <= set(IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"q": np.zeros((2, 5, 8))}, r"q must be \[B, T, H, K\], got shape \(2, 5, 8\)"),
        ({"k": np.zeros((2, 5, 2, 1, 7))}, r"k must be .*\(2, 5, 2, 1, 8\).*got shape \(2, 5, 2, 1, 7\)"),
        ({"v": np.zeros((2, 5, 0, 2, 4))}, "R >= 1"),
        ({"v": np.zeros((2, 6, 2, 2, 4))}, "v must be"),
        ({"q": np.zeros((2, 5, 3, 8))}, "HV must be a multiple of H >= 1, got v with 2 heads and q with 3"),
        ({"beta": np.zeros((2, 5, 2))}, "beta must be"),
        ({"g": np.zeros((2, 5, 2, 7))}, "g must be .*HV, K"),
        ({"g": np.zeros((2, 5))}, "g must be"),
        ({"initial_state": np.zeros((2, 2, 4, 8))}, "initial_state must be"),
        ({"segment_ids": np.zeros((2, 4), int)}, "segment_ids must be"),
        ({"beta": np.zeros((2, 5, 2, 2), int)}, "beta must be floating-point, got int"),
        ({"segment_ids": np.zeros((2, 5))}, "segment_ids must be integers, got float"),
        ({"scale": np.ones(3)}, "scale must be one number"),
        ({"implementation": 3}, "3 is not one of"),
        ({"implementation": "chunky"}, "'chunky' is not one of chunked, native_cpu, pallas_gpu, pallas_tpu, reference"),
        ({"implementation": ()}, "empty sequence"),
    ],
)
def test_bad_arguments_are_named(replace, message):
    arguments = draw(9, 2, 5, 2, 1, 2, 8, 4, "scalar") | {
        name: x if name in ("implementation", "scale") else jnp.asarray(x) for name, x in replace.items()
    }
    with pytest.raises(ValueError, match=message) as error:
        delta_product(**arguments)
    assert "\n" not in str(error.value)


def test_messages_name_the_callers_axes():
    a = {name: x[:, :, 0] if name in ("k", "v", "beta") else x for name, x in draw(9, 2, 5, 1, 1, 2, 8, 4).items()}
    q, k, v, beta = (a[name] for name in NAMES[:4])
    with pytest.raises(
        ValueError, match=r"beta must be \[B, T, HV\] = \(2, 5, 2\) to agree with q and v, got shape \(2, 4, 2\)"
    ):
        delta_rule(q, k, v, beta[:, 1:])
    with pytest.raises(ValueError, match=r"^state must be \[B, HV, K, V\] = \(2, 2, 8, 4\)"):
        delta_product_step(a["initial_state"][:1], q[:, 0], k[:, :1], v[:, :1], beta[:, :1])


@pytest.mark.parametrize("empty", ["B", "T", "HV", "K", "V"])
@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_empty_axes(empty, implementation):
    sizes = {"B": 2, "T": 3, "HV": 2, "K": 4, "V": 5} | {empty: 0}
    b, t, hv, k, v = (sizes[name] for name in ("B", "T", "HV", "K", "V"))
    q, keys, values, beta = (np.ones(s) for s in ((b, t, 1, k), (b, t, 2, 1, k), (b, t, 2, hv, v), (b, t, 2, hv)))
    o, state = delta_product(q, keys, values, beta, implementation=implementation)
    assert (o.shape, state.shape) == ((b, t, hv, v), (b, hv, k, v))
    assert not np.any(o) and not np.any(state)


@pytest.mark.parametrize("over", ["batch", "heads"])
def test_inside_shard_map(over):
    """Eight simulated devices, varying axes checked, no state given: values and gradients as without."""
    code = f"""
import itertools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from deltajax.ops import delta_product
draw = np.random.default_rng(0).standard_normal
q, k = draw((8, 20, 8, 4), np.float32), draw((8, 20, 2, 8, 4), np.float32) / 3
v, beta, ids = draw((8, 20, 2, 8, 4), np.float32), np.full((8, 20, 2, 8), 0.7, np.float32), np.arange(160).reshape(8, 20) // 9
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
if {over!r} == "batch":
    specs, out = (P("x"),) * 5, P("x")
else:
    specs, out = (P(None, None, "x"), *(P(None, None, None, "x"),) * 3, P()), P(None, "x")
for implementation, packed in itertools.product({ALL}, (True, False)):
    def local(q, k, v, beta, ids):
        o, state = delta_product(q, k, v, beta, segment_ids=ids if packed else None, implementation=implementation)
        return jnp.sum(o**2, (1, 3)), jnp.sum(state**2, (2, 3))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(out, out))
    def total(f, *x):
        return sum(map(jnp.sum, f(*x, ids)))
    gradients = [jax.jit(jax.value_and_grad(lambda *x, f=f: total(f, *x), argnums=(0, 1, 2, 3))) for f in (local, mapped)]
    expected, actual = (f(q, k, v, beta) for f in gradients)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), expected, actual)
"""
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", code], check=True, env=settings)


def test_implementations_are_tried_in_order(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("needs a unicorn")

    monkeypatch.setitem(IMPLEMENTATIONS, "picky", refuse)
    a = draw(10, 1, 3, 1, 1, 1, 4, 4)
    arguments = [a[name] for name in NAMES[:4]]
    o, _ = delta_product(*arguments, implementation=("picky", "reference"))
    np.testing.assert_array_equal(o, delta_product(*arguments, implementation="reference")[0])
    with pytest.raises(NotImplementedError, match="picky: needs a unicorn"):
        delta_product(*arguments, implementation="picky")
