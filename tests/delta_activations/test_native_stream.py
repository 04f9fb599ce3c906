"""The native kernel for streams: every map bit for bit its own dense inference, and XLA's but for roundings; what it computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.delta_activations import changes, fold, graph, native, stream
from deltajax.layers import delta_activation
from deltajax.models import efficientnet, frames, resnet
from pallas_kernels import native as kernels

pytestmark = pytest.mark.skipif(not kernels.compiler(), reason="no C++ compiler")
NEAR, WIDE, POINT = graph.Window(3, 1, (1, 1)), graph.Window(7, 2, (3, 3)), graph.Window()


def draw(rng, *shape):
    return jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)


def conv(rng, size, inputs, channels, step):
    return {"kernel": draw(rng, size, size, inputs, channels), "bias": draw(rng, channels), "step": jnp.asarray(step)}


def odd_graph(rng, size):
    """Odd channels, strides, groups, windows without padding on a side, steps of a layer, of channels and of neurons."""
    height, width = size
    nodes = (
        graph.Node("input", "input", 3),
        graph.Node("stem", "conv", 20, (("input", WIDE),), "relu"),
        graph.Node("pooled", "max_pool", 20, (("stem", graph.Window(3, 2, (1, 1))),)),
        graph.Node("deep", "conv", 20, (("pooled", NEAR), ("pooled", POINT)), "hard_swish", groups=20),
        graph.Node("grouped", "conv", 46, (("deep", graph.Window(3, 2, (0, 1))),), "hard_sigmoid", groups=2),
        graph.Node("joined", "conv", 33, (("grouped", NEAR), ("deep", graph.Window(1, 2))), quantized=False),
        graph.Node("both", "concat", 79, (("grouped", POINT), ("joined", POINT)), "relu"),
        graph.Node("again", "conv", 79, (("both", POINT), ("both", POINT)), quantized=False),
        graph.Node("sum", "add", 79, (("both", POINT), ("again", POINT), ("both", POINT))),
    )
    sizes = graph.Graph(nodes).sizes(height, width)
    params = {
        "input": {"step": jnp.asarray(0.01 + 0.1 * rng.random(sizes["input"]), jnp.float32)},
        "stem": conv(rng, 7, 3, 20, np.float32(0.125)),
        "pooled": {"step": jnp.full(20, 0.1)},
        "deep": conv(rng, 3, 1, 20, np.float32(0.1 + rng.random(sizes["deep"]))),
        "grouped": conv(rng, 3, 10, 46, np.full(46, -0.01, np.float32)),
        "joined": {"kernel": draw(rng, 3, 3, 46, 33), "shortcut": draw(rng, 1, 1, 20, 33), "bias": draw(rng, 33)},
        "both": {"step": jnp.full(79, 0.05)},
        "again": {"kernel": draw(rng, 1, 1, 79, 79), "bias": draw(rng, 79)},
        "sum": {"step": jnp.full(79, 0.05)},
    }
    params["grouped"]["step"] = jnp.abs(params["grouped"]["step"])
    return graph.Graph(nodes), {"maps": params, "head": {"weight": draw(rng, 79, 4), "bias": draw(rng, 4)}}


def network(config, size):
    """A folded network with random statistics, its steps large enough for changes to vanish on the way."""
    whole = frames.Config(config, size, delta_activation.Config(init_step=0.3))
    params, stats = jax.jit(lambda key: frames.init(key, whole))(jax.random.key(0)), frames.init_stats(whole)
    rng = np.random.default_rng(0)
    noisy = functools.partial(jax.tree.map, lambda x: (x * (0.8 + 0.4 * rng.random(x.shape))).astype(np.float32))
    return fold.fold({**params, "network": noisy(params["network"])}, noisy(stats), whole)


MOBILE = efficientnet.Config(
    stem=8,
    stages=(
        efficientnet.Stage("fused", 8, 1, activation="relu"),
        efficientnet.Stage("inverted", 24, 2, 5, 2, 2.0, activation="hard_swish"),
    ),
    head=40,
    activation="relu",
    num_classes=5,
)
GRAPHS = {
    "odd": ((37, 53), lambda: odd_graph(np.random.default_rng(1), (37, 53))),
    "one_row": ((5, 93), lambda: odd_graph(np.random.default_rng(2), (5, 93))),
    "basic": ((40, 52), lambda: network(resnet.resnet_small(widths=(8, 16, 40), num_classes=5), (40, 52))),
    "bottleneck": ((65, 33), lambda: network(resnet.resnet50(blocks=(1, 2), widths=(16, 24), num_classes=5), (65, 33))),
    "inverted": ((31, 44), lambda: network(MOBILE, (31, 44))),
}


def clip(rng, size):
    """Frames: the first, the same, one pixel, corners, a rectangle, scattered pixels, all."""
    frame = rng.standard_normal((*size, 3)).astype(np.float32)
    yield frame
    yield frame
    spots = np.zeros((5, *size), bool)
    spots[0, size[0] // 2, size[1] // 3] = True
    spots[1][np.ix_([0, -1], [0, -1])] = True
    spots[2, 3:12, -20:-4] = True
    spots[3] = rng.random(size) < 0.05
    spots[4] = True
    for spot in spots:
        frame = np.where(spot[..., None], rng.standard_normal(frame.shape).astype(np.float32), frame)
        yield frame


@pytest.mark.parametrize("name", GRAPHS)
def test_equals_dense_inference(name):
    """Bit for bit its own, XLA's but for values that rounding moves by a step; and no pixel is computed needlessly."""
    size, made = GRAPHS[name]
    net, params = made()
    runner = stream.Stream(net, params, (*size, 3))
    assert runner.implementation == "native" and stream.calibrate(runner, [0] * 3) == {} == runner.limits
    dense = jax.jit(functools.partial(graph.apply, net))
    step_of = {node.name: params["maps"][node.name].get("step") for node in net.nodes}
    state, fresh, before = runner.init_state(), runner.init_state(), None
    for t, frame in enumerate(clip(np.random.default_rng(3), size)):
        logits, state, counts = runner.step(state, frame)
        fresh_logits, fresh, every = runner.step(runner.reset(fresh), frame)
        assert (np.asarray(every) == stream.DENSE).all() and (t == 0) == (counts[0] == stream.DENSE)
        np.testing.assert_array_equal(logits, fresh_logits)
        for a, b in zip(jax.tree.leaves(state.maps), jax.tree.leaves(fresh.maps), strict=True):
            np.testing.assert_array_equal(a, b)
        now = {node.name: np.asarray(runner.map(state, node.name)) for node in net.nodes}
        changed = {node.name: np.zeros(now[node.name].shape[:2], bool) for node in net.nodes}
        for node, count in zip(net.nodes, np.asarray(counts), strict=True):
            # Each map from what the kernel itself read, so that a step that rounding moves is not carried on.
            inputs = [now[source][None] for source, _ in node.sources] or [frame[None]]
            paddings = [(w.padding, w.padding) for _, w in node.sources] or [graph.NO_PADDING]
            want = node.compute(params["maps"][node.name], inputs, paddings)[0]
            step = 0 if step_of[node.name] is None else np.broadcast_to(step_of[node.name], want.shape)
            wrong, rounding = np.abs(now[node.name] - want), 1e-5 * (1 + np.abs(want).max())
            assert (wrong < step + rounding).all() and np.mean(wrong > rounding) < 1e-3, node.name
            if t:
                changed[node.name] = (now[node.name] != before[node.name]).any(-1)
                read = [changes.readers(jnp.asarray(changed[source]), window) for source, window in node.sources]
                expected = functools.reduce(jnp.logical_or, read) if read else changed[node.name]
                assert count == np.sum(expected), node.name
        np.testing.assert_allclose(logits, dense(params, frame[None])[0], rtol=2e-2, atol=2e-2)
        before = now


def test_without_quantisation_it_is_the_same_function():
    net, params = network(resnet.resnet_small(widths=(16, 32, 64), num_classes=5), (48, 48))
    plain = graph.Graph(tuple(dataclasses.replace(node, quantized=False) for node in net.nodes))
    runner, state = stream.Stream(plain, params, (48, 48, 3)), None
    dense = jax.jit(functools.partial(graph.apply, plain))
    state = runner.init_state()
    for frame in clip(np.random.default_rng(4), (48, 48)):
        logits, state, _ = runner.step(state, frame)
        np.testing.assert_allclose(logits, dense(params, frame[None])[0], rtol=1e-5, atol=1e-5)


def test_rounding():
    """Halves to even, large levels, negative zeros: as `quantize`, bit for bit but for the sign of zero."""
    node = graph.Node("input", "input", 3)
    halves = (np.arange(-30, 30, dtype=np.float32) / 2).reshape(4, 5, 3)
    for values, step in (
        (halves, 1.0),
        (halves * 2.0**21 + 0.5, 1.0),
        (halves * 2.0**26, 3.0),
        (halves * 1e-3, 0.7),
        (halves, 0.1),
    ):
        params = {"maps": {"input": {"step": jnp.float32(step)}}, "head": {"weight": jnp.eye(3), "bias": jnp.zeros(3)}}
        runner = stream.Stream(graph.Graph((node,)), params, (4, 5, 3))
        _, state, _ = runner.step(runner.init_state(), values)
        want = node.compute(params["maps"]["input"], [values[None]], [graph.NO_PADDING])[0]
        np.testing.assert_array_equal(state.maps["input"], want)
        _, state, counts = runner.step(state, np.negative(np.negative(values)))
        assert counts[0] == 0


def test_other_parameters(monkeypatch):
    """Parameters are packed again when they are assigned, and checked."""
    net, params = GRAPHS["basic"][1]()
    runner = stream.Stream(net, params, (40, 52, 3))
    frame = next(clip(np.random.default_rng(5), (40, 52)))
    first = runner.step(runner.init_state(), frame)[0]
    runner.params = {**params, "maps": jax.tree.map(lambda x: 2 * x, params["maps"])}
    second = runner.step(runner.init_state(), frame)[0]
    dense = jax.jit(functools.partial(graph.apply, net))
    np.testing.assert_allclose(second, dense(runner.params, frame[None])[0], rtol=2e-2, atol=2e-2)
    assert np.abs(second - first).max() > 0.1
    with pytest.raises(ValueError, match="steps of stem must be > 0"):
        runner.params = {**params, "maps": {**params["maps"], "stem": {**params["maps"]["stem"], "step": jnp.zeros(8)}}}
    np.testing.assert_array_equal(runner.step(runner.init_state(), frame)[0], second)


def test_where_it_is_not_to_be_had(monkeypatch, caplog):
    net, params = GRAPHS["basic"][1]()
    make = functools.partial(stream.Stream, net, params, (40, 52, 3))
    for given in ({"limits": {"stem": 3}}, {"tilings": {"stem": stream.Tiling((4, 4), 2)}}):
        assert make(**given).implementation == "xla"
        with pytest.raises(ValueError, match="tilings and limits are for implementation 'xla'"):
            make(**given, implementation="native")
    with pytest.raises(ValueError, match="limits are for implementation 'xla'"):
        make().set_limits({"stem": 3})
    with pytest.raises(ValueError, match="implementation must be native, xla or None, got 'c'"):
        make(implementation="c")
    other = graph.Graph(tuple(dataclasses.replace(n, activation="silu" if n.activation else None) for n in net.nodes))
    with pytest.raises(NotImplementedError, match=r"no activation 'silu' \(node stem\)"):
        stream.Stream(other, params, (40, 52, 3), implementation="native")
    assert stream.Stream(other, params, (40, 52, 3)).implementation == "xla"

    def missing():
        raise NotImplementedError("needs a C++ compiler")

    monkeypatch.setattr(native.delta_convolution, "register", missing)
    with pytest.raises(NotImplementedError, match=r"does not serve this graph: needs a C\+\+ compiler"):
        make(implementation="native")
    with caplog.at_level("WARNING", logger="absl"):
        runner = make()
    assert runner.implementation == "xla" and "slower: needs a C++ compiler" in caplog.text
    frame = next(clip(np.random.default_rng(6), (40, 52)))
    dense = jax.jit(functools.partial(graph.apply, net))
    np.testing.assert_allclose(runner.step(runner.init_state(), frame)[0], dense(params, frame[None])[0], rtol=1e-5)


def small_graph(rng, inputs, channels, window, groups=1, activation="relu", size=None):
    """input -> "a" by the window -> "b" by 3 x 3 and groups, which also reads the input, if the sizes agree."""
    nodes = (
        graph.Node("input", "input", inputs),
        graph.Node("a", "conv", 2 * inputs, (("input", window),), activation),
        graph.Node("b", "conv", channels, (("a", NEAR),), activation, groups=groups),
        graph.Node("again", "conv", channels, (("input", POINT),), quantized=False),
    )
    params = {
        "input": {"step": jnp.float32(0.01)},
        "a": conv(rng, window.size, inputs, 2 * inputs, np.full(2 * inputs, 0.05, np.float32)),
        "b": conv(rng, 3, 2 * inputs // groups, channels, np.float32(0.05)),
        "again": {"kernel": draw(rng, 1, 1, inputs, channels), "bias": draw(rng, channels)},
    }
    return graph.Graph(nodes), {"maps": params, "head": {"weight": draw(rng, channels, 3), "bias": draw(rng, 3)}}


@pytest.mark.parametrize(
    ("size", "inputs", "channels", "window", "groups"),
    [
        ((1, 1), 1, 33, WIDE, 1),
        ((1, 65), 17, 1, NEAR, 1),
        ((64, 1), 3, 17, POINT, 1),
        ((9, 13), 4, 4, NEAR, 4),  # as many groups as channels, but two inputs each
        ((5, 7), 3, 12, NEAR, 6),  # two channels of one input
        ((20, 20), 1, 5, graph.Window(70, 3, (0, 64)), 1),  # margins only behind, longer than the rows that they end
        ((33, 64), 3, 5, graph.Window(4, 4, (3, 1)), 1),
    ],
)
def test_odd_sizes(size, inputs, channels, window, groups):
    """One row, column or pixel; channels that fill no vector; groups; margins of one side; large strides."""
    rng = np.random.default_rng(7)
    net, params = small_graph(rng, inputs, channels, window, groups)
    runner = stream.Stream(net, params, (*size, inputs), implementation="native")
    maps, state = jax.jit(functools.partial(graph.maps, net)), runner.init_state()
    frame = rng.standard_normal((*size, inputs)).astype(np.float32)
    for added in (None, np.eye(*size), np.eye(*size, 1), np.ones(size)):
        frame = frame if added is None else frame + added[..., None].astype(np.float32)
        _, state, counts = runner.step(state, frame)
        for name, want in maps(params, frame[None]).items():
            near = np.abs(runner.map(state, name) - want[0]) < 1e-4
            assert near.all() if name in ("input", "again") else near.mean() > 0.99, name  # rounding may move a step
        assert counts[0] == (stream.DENSE if added is None else added.sum())


@pytest.mark.parametrize("step", [None, 0.25, 4.0])
def test_relu6(step):
    """Values above 6 are cut, by both implementations, in the way of dense inference; the step rounds what is left."""
    nodes = (
        graph.Node("input", "input", 3, quantized=False),
        graph.Node("a", "conv", 20, (("input", NEAR),), "relu6", quantized=step is not None),
        graph.Node("pooled", "max_pool", 20, (("a", graph.Window(3, 2, (1, 1))),), quantized=False),
        graph.Node("b", "conv", 20, (("pooled", NEAR), ("pooled", POINT)), "relu6", groups=20, quantized=False),
    )
    rng = np.random.default_rng(9)
    steps = {} if step is None else {"step": jnp.float32(step)}
    a, b = (conv(rng, 3, inputs, 20, 1.0) for inputs in (3, 1))
    params = {"input": {}, "a": {"kernel": 5 * a["kernel"], "bias": a["bias"], **steps}, "pooled": {}}
    params["b"] = {name: b[name] for name in ("kernel", "bias")}
    net, both = graph.Graph(nodes), {"maps": params, "head": {"weight": draw(rng, 20, 4), "bias": draw(rng, 4)}}
    maps = jax.jit(functools.partial(graph.maps, net))
    runners = [stream.Stream(net, both, (19, 23, 3), implementation=name) for name in ("native", "xla")]
    assert stream.Stream(net, both, (19, 23, 3)).implementation == "native"
    states = [runner.init_state() for runner in runners]
    for frame in clip(rng, (19, 23)):
        wanted = maps(both, frame[None])
        plain = graph.maps(
            graph.Graph((nodes[0], dataclasses.replace(nodes[1], activation="relu"))), both, frame[None]
        )["a"]
        assert plain.max() > 8 and 0.05 < np.mean(plain > 6.5) < 0.5
        for i, runner in enumerate(runners):
            _, states[i], _ = runner.step(states[i], frame)
            for name, want in wanted.items():
                got = runner.map(states[i], name)
                assert np.mean(np.abs(got - want[0]) > 1e-4) < 0.01, name
            assert runner.map(states[i], "a").max() == (8 if step == 4 else 6)  # 6 / 4 is rounded to 2
            assert runner.map(states[i], "b").max() == 6


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "hard_swish", "hard_sigmoid"])
def test_what_is_no_number_goes_on(activation):
    """As in dense inference, under a trace, where values are not looked at; and when no frame has it any more it is gone."""
    nodes = (
        graph.Node("input", "input", 3, quantized=False),
        graph.Node("a", "conv", 5, (("input", NEAR),), activation),
        graph.Node("pooled", "max_pool", 5, (("a", graph.Window(2, 2)),)),
        graph.Node("sum", "add", 5, (("pooled", POINT), ("pooled", POINT)), activation, quantized=False),
    )
    rng = np.random.default_rng(8)
    params = {"input": {}, "a": conv(rng, 3, 3, 5, np.float32(0.25)), "pooled": {"step": jnp.full(5, 0.5)}, "sum": {}}
    both = {"maps": params, "head": {"weight": draw(rng, 5, 2), "bias": draw(rng, 2)}}
    runner = stream.Stream(graph.Graph(nodes), both, (12, 14, 3))
    frame = rng.standard_normal((12, 14, 3)).astype(np.float32)
    broken = frame.copy()
    broken[5, 6, 1], broken[8:, 0, 2], broken[0, 13] = np.nan, np.inf, -np.inf
    step, state = jax.jit(runner.step), runner.init_state()
    for values in (frame, broken, broken, frame):
        logits, state, _ = step(state, values)
        for name, want in graph.maps(graph.Graph(nodes), both, jnp.asarray(values[None])).items():
            np.testing.assert_allclose(runner.map(state, name), want[0], atol=1e-5, err_msg=name)
    assert np.isfinite(logits).all()
    maps = {**params, "a": {**params["a"], "bias": jnp.full(5, jnp.nan)}}
    runner.params = {**both, "maps": maps}
    assert np.isnan(runner.step(runner.init_state(), frame)[0]).all()


def test_layout_of_new_parameters():
    """Steps of neurons here and of channels there, then the other way round: as many numbers as before, elsewhere."""
    rng = np.random.default_rng(9)
    nodes = (graph.Node("input", "input", 2), *(graph.Node(n, "conv", 2, (("input", POINT),)) for n in "ab"))
    whole, one = np.full((4, 6, 2), 0.5, np.float32), np.full(2, 0.25, np.float32)
    whole[1:3, 2:4] = 2

    def params(a, b):
        maps = {"input": {"step": jnp.float32(0.1)}, "a": conv(rng, 1, 2, 2, a), "b": conv(rng, 1, 2, 2, b)}
        return {"maps": maps, "head": {"weight": jnp.eye(2), "bias": jnp.zeros(2)}}

    runner, frame = None, rng.standard_normal((4, 6, 2)).astype(np.float32)
    for given in (params(whole, one), params(one, whole)):
        runner = runner or stream.Stream(graph.Graph(nodes), given, (4, 6, 2))
        runner.params = given
        _, state, _ = runner.step(runner.init_state(), frame)
        want = graph.maps(graph.Graph(nodes), given, frame[None])
        for name in "ab":
            np.testing.assert_allclose(runner.map(state, name), want[name][0], atol=1e-6)


def test_comparisons_that_stop_nothing_rest():
    """For three frames a map whose every pixel differed counts all that it computes as changed; numbers are the same."""
    nodes = (graph.Node("input", "input", 2), graph.Node("a", "conv", 2, (("input", POINT),)))
    nodes += (graph.Node("b", "conv", 3, (("a", NEAR),)),)
    rng = np.random.default_rng(10)
    maps = {"input": {"step": jnp.float32(0.01)}, "b": conv(rng, 3, 2, 3, np.float32(0.25))}
    maps["a"] = {"kernel": jnp.eye(2)[None, None], "bias": jnp.zeros(2), "step": jnp.float32(1)}
    params = {"maps": maps, "head": {"weight": jnp.eye(3), "bias": jnp.zeros(3)}}
    runner = stream.Stream(graph.Graph(nodes), params, (8, 10, 2))
    whole, frame = 3 * rng.integers(1, 9, (8, 10, 2)).astype(np.float32), np.zeros((8, 10, 2), np.float32)
    little = np.full(frame.shape, 0.02, np.float32)  # which "a" does not see
    corner = np.zeros(frame.shape, np.float32)
    corner[0, 0] = 0.02
    state = runner.init_state()
    for change, computed in (
        (0, [stream.DENSE] * 3),
        (whole, [80, 80, 80]),
        (little, [80, 80, 80]),
        (corner, [1, 1, 0]),  # a comparison of so little is worth its while
        (little, [80, 80, 80]),
        (little, [80, 80, 80]),
        (little, [80, 80, 0]),
        (little, [80, 80, 0]),
        (whole, [80, 80, 80]),
        (little, [80, 80, 80]),
        (None, [stream.DENSE] * 3),
        (little, [80, 80, 0]),
    ):
        state, frame = (runner.reset(state), frame) if change is None else (state, frame + change)
        _, state, counts = runner.step(state, frame)
        np.testing.assert_array_equal(counts, computed)
        for name, want in graph.maps(graph.Graph(nodes), params, jnp.asarray(frame[None])).items():
            np.testing.assert_allclose(runner.map(state, name), want[0], atol=1e-5)
