"""The streaming runner against dense inference, frame by frame, and the graph against the network that it was folded from.

What only the native kernel does stands in `test_native_stream.py`.
"""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltajax.delta_activations import changes, fold, graph, stream
from deltajax.layers import delta_activation
from deltajax.models import efficientnet, fan_out, frames, mobilenet, resnet
from pallas_kernels import native

IMPLEMENTATIONS = ["native"] * bool(native.compiler()) + ["xla"]
SIZE = (40, 52)  # no multiple of any tile


def network(config, key=0, scale=1.0):
    """Parameters and statistics away from their initial values, steps large enough for changes to vanish on the way."""
    params, stats = jax.jit(lambda k: frames.init(k, config))(jax.random.key(key)), frames.init_stats(config)
    rng = np.random.default_rng(key)

    def draw(x):
        return (x + 0.2 * rng.random(x.shape)).astype(np.float32)

    params["network"] = jax.tree.map(draw, params["network"])
    params["delta"] = jax.tree.map(lambda x: scale * draw(x), params["delta"])
    return params, jax.tree.map(draw, stats)


BASIC = frames.Config(
    resnet.Config(blocks=(1, 1), widths=(8, 16), stem="small", num_classes=5),
    SIZE,
    delta_activation.Config(init_step=0.3),
)


def clip(rng, size=SIZE, length=9):
    """Frames: the first, nothing changed, a small change, a large one, all, then a small one moving."""
    frame = rng.standard_normal((*size, 3)).astype(np.float32)
    yield frame
    yield frame
    for t in range(length - 2):
        frame = frame.copy()
        if t == 2:
            frame = rng.standard_normal(frame.shape).astype(np.float32)
        elif t == 1:
            frame[:, :16] = rng.standard_normal(frame[:, :16].shape)
        else:
            frame[30:40, 40 + t : 46 + t] += 1
        yield frame


@pytest.fixture(scope="module")
def basic():
    params, stats = network(BASIC)
    return *fold.fold(params, stats, BASIC), params, stats


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def runner(basic, request):
    return stream.Stream(basic[0], basic[1], (*SIZE, 3), implementation=request.param)


def test_equals_dense_inference(basic):
    runner = stream.Stream(basic[0], basic[1], (*SIZE, 3), limits={"stages.1.0": 12})
    assert runner.implementation == "xla"
    dense = jax.jit(functools.partial(graph.apply, basic[0]))
    state, kinds = runner.init_state(), []
    for frame in clip(np.random.default_rng(0)):
        logits, state, tiles = runner.step(state, frame)
        np.testing.assert_allclose(logits, dense(basic[1], frame[None])[0], atol=1e-5)
        kinds.append(tiles)
    kinds = np.array(kinds)
    assert (kinds[0] == stream.DENSE).all() and not kinds[1].any()  # the first frame; nothing changed
    assert (kinds[4] == stream.DENSE).all()  # everything changed
    assert (kinds[2] >= 0).all() and (kinds[2] < [runner.tile_counts[name] // 2 for name in runner.nodes]).all()
    assert (kinds[3] == stream.DENSE).any() and (kinds[3] > 0).any()  # some maps overflow, not all
    for start in (runner.init_state(), runner.reset(state)):
        fresh, _, tiles = runner.step(start, frame)
        np.testing.assert_array_equal(fresh, logits)
        assert (np.asarray(tiles) == stream.DENSE).all()


def test_every_map_is_exact_without_dense_fallback(basic):
    """All maps, bit for bit, when every frame after the first goes by tiles, whatever the limits say about cost."""
    limits = {node.name: 10**6 for node in basic[0].nodes}
    runner = stream.Stream(*basic[:2], (*SIZE, 3), limits=limits)
    maps = jax.jit(functools.partial(graph.maps, basic[0]))
    state = runner.init_state()
    for t, frame in enumerate(clip(np.random.default_rng(1), length=6)):
        _, state, tiles = runner.step(state, frame)
        assert t == 0 or (np.asarray(tiles) >= 0).all()
        for name, want in maps(basic[1], frame[None]).items():
            np.testing.assert_allclose(runner.map(state, name), want[0], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantisation_stops_changes(basic, implementation):
    maps = {k: v if k == "input" else {**v, "step": v["step"] * 20} for k, v in basic[1]["maps"].items()}
    params = {**basic[1], "maps": maps}
    coarse, fine = (stream.Stream(basic[0], p, (*SIZE, 3), implementation=implementation) for p in (params, basic[1]))
    counts = []
    for runner in (coarse, fine):
        state = runner.init_state()
        rng = np.random.default_rng(2)
        frame = rng.standard_normal((*SIZE, 3)).astype(np.float32)
        _, state, _ = runner.step(state, frame)
        frame[20:24, 20:24] += 0.5
        _, state, tiles = runner.step(state, frame)
        counts.append(np.asarray(tiles))
    assert counts[0][0] == counts[1][0] > 0 and counts[0][-1] < counts[1][-1]


@pytest.mark.parametrize(
    "config",
    [
        BASIC,
        frames.Config(resnet.resnet50(blocks=(1, 1), widths=(4, 8), num_classes=5, head_hidden=8), SIZE, BASIC.delta),
        frames.Config(
            efficientnet.Config(
                stem=8,
                stages=(
                    efficientnet.Stage("fused", 8, 1, activation="relu"),
                    efficientnet.Stage("inverted", 8, 2, 3, 2, 2.0, activation="relu"),
                ),
                head=16,
                activation="relu",
                num_classes=5,
            ),
            SIZE,
            BASIC.delta,
        ),
        frames.Config(
            mobilenet.v2(0.25, stages=mobilenet.v2(0.25).stages[:3], head=16, num_classes=5), SIZE, BASIC.delta
        ),
    ],
    ids=["basic", "bottleneck", "inverted", "relu6"],
)
def test_folding(config):
    """The graph computes what the network does in evaluation mode; its operations are those of the network's own trace."""
    plain = dataclasses.replace(config, delta=None)
    params, stats = network(config)
    x = jax.random.normal(jax.random.key(5), (2, 1, *SIZE, 3))
    network_graph, folded = fold.fold({"network": params["network"]}, stats, plain)
    want, _ = frames.apply(params, stats, plain, x)
    np.testing.assert_allclose(graph.apply(network_graph, folded, x[:, 0]), want[:, 0], rtol=2e-4, atol=2e-5)
    # With delta activations rounding may fall to the other side of a tie, rarely.
    network_graph, folded = fold.fold(params, stats, config)
    seen = {}
    frames.apply(params, stats, config, x, observe=seen.__setitem__)
    maps = graph.maps(network_graph, folded, x[:, 0])
    for name, o in seen.items():
        assert jnp.mean(jnp.abs(maps[name] - o[:, 0]) > 1e-4) < 0.01, name
    fed = network_graph.operations(folded, *SIZE)
    for name, (shape, fan) in frames.activations(config.network, SIZE).items():
        assert fed[name] == pytest.approx(np.prod(shape) * fan), name


def test_a_head_that_the_graph_cannot_be():
    """A graph's head has relu after its hidden layer."""
    network = efficientnet.Config(
        8, (efficientnet.Stage("fused", 8),), 16, head_hidden=8, activation="relu6", num_classes=5
    )
    config = frames.Config(network, SIZE)
    params, stats = frames.init(jax.random.key(0), config), frames.init_stats(config)
    with pytest.raises(ValueError, match="activation must be relu for a head with a hidden layer, got 'relu6'"):
        fold.fold(params, stats, config)
    same = frames.Config(dataclasses.replace(network, activation="relu"), SIZE)
    folded = fold.fold(params, stats, same)
    x = jax.random.normal(jax.random.key(5), (1, 1, *SIZE, 3))
    want, _ = frames.apply(params, stats, same, x)
    np.testing.assert_allclose(graph.apply(*folded, x[:, 0]), want[:, 0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pooling_addition_and_concatenation(implementation):
    """A graph of every kind of node, with strides and margins that differ between the readers of a map."""
    near, wide, half = graph.Window(3, 1, (1, 1)), graph.Window(5, 2, (2, 2)), graph.Window(2, 2)
    nodes = (
        graph.Node("input", "input", 3),
        graph.Node("a", "conv", 6, (("input", near),), "relu"),
        graph.Node("b", "conv", 6, (("a", near),), "relu", groups=2),
        graph.Node("sum", "add", 6, (("a", graph.Window()), ("b", graph.Window()))),
        graph.Node("both", "concat", 12, (("sum", graph.Window()), ("a", graph.Window())), quantized=False),
        graph.Node("pooled", "max_pool", 12, (("both", half),)),
        graph.Node("strided", "conv", 12, (("both", wide), ("pooled", graph.Window())), "relu"),
    )
    rng = np.random.default_rng(6)

    def draw(*shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)

    params = {"input": {}, "sum": {}, "both": {}, "pooled": {}, "a": {"kernel": draw(3, 3, 3, 6), "bias": draw(6)}}
    params["b"] = {"kernel": draw(3, 3, 3, 6), "bias": draw(6)}
    params["strided"] = {"kernel": draw(5, 5, 12, 12), "bias": draw(12)}
    for node in nodes:
        if node.quantized:
            params[node.name] = {**params[node.name], "step": jnp.full(node.channels, 0.25)}
    built = graph.Graph(nodes), {"maps": params, "head": {"weight": draw(12, 4), "bias": draw(4)}}
    limits = {node.name: 10**6 for node in nodes} if implementation == "xla" else None
    runner = stream.Stream(*built, (40, 48, 3), limits=limits, implementation=implementation)
    dense, state = jax.jit(functools.partial(graph.apply, built[0])), runner.init_state()
    for t, frame in enumerate(clip(rng, (40, 48), 5)):
        logits, state, counts = runner.step(state, frame)
        np.testing.assert_allclose(logits, dense(built[1], frame[None])[0], atol=1e-4)
        assert t == 0 or (np.asarray(counts) >= 0).all()
    assert graph.Graph(nodes[:2]).operations({"maps": params, "head": {"weight": draw(6, 4)}}, 40, 48) == {
        "input": 40 * 48 * 9 * 3 * 6,
        "a": 6 * 4,
    }


def test_calibration(basic, monkeypatch):
    """By a clock that charges for tiles: dense maps and frames win where they are cheaper, numbers stay the same."""
    runner = stream.Stream(*basic[:2], (*SIZE, 3), implementation="xla")
    clock = [0.0]
    price = {"tile": 1.0, "dense": 100.0}
    step = runner.step

    def charged(state, frame):
        logits, state, counts = step(state, frame)
        counts = np.asarray(counts)
        clock[0] += float(np.where(counts == stream.DENSE, price["dense"], price["tile"] * counts).sum())
        return logits, state, counts

    monkeypatch.setattr(runner, "step", charged)
    monkeypatch.setattr(stream.time, "perf_counter", lambda: clock[0])
    seen = list(clip(np.random.default_rng(5)))
    limits = stream.calibrate(runner, seen, rounds=1)
    assert limits == runner.limits and limits["stem"] == runner.tile_counts["stem"]  # tiles are always cheaper here
    _, state, _ = charged(runner.init_state(), seen[0])
    assert (charged(state, seen[1] + 1)[2] >= 0).all()
    price["tile"] = 1e3
    limits = stream.calibrate(runner, seen, rounds=1)
    assert limits["input"] == 0  # only frames without any change are cheaper by tiles
    for frames_, rounds in ((seen[:2], 1), (seen, 0)):
        with pytest.raises(ValueError, match="calibration needs 3 frames"):
            stream.calibrate(runner, frames_, rounds)
    with pytest.raises(ValueError, match="limits must be integers >= -1"):
        runner.set_limits({"input": -2})


def test_assemble():
    """Tiles of a map whose last tiles overlap their neighbours."""
    changed = np.random.default_rng(0).random((10, 13)) < 0.2
    by_tile = []
    for n in range(12):
        top, left = (int(x) for x in changes.origins(jnp.asarray(n), 10, 13, (4, 4)))
        by_tile.append(changed[top : top + 4, left : left + 4])
    np.testing.assert_array_equal(changes.assemble(jnp.asarray(by_tile), 10, 13), changed)
    np.testing.assert_array_equal(changes.assemble(jnp.asarray(changed[None]), 10, 13), changed)


def test_the_caller_may_reuse_its_buffer(basic, runner):
    """Frames are read after `step` has returned; what the caller writes then must not be seen."""
    rng = np.random.default_rng(4)
    frames_ = rng.standard_normal((12, *SIZE, 3)).astype(np.float32)
    buffer, state, got = np.empty_like(frames_[0]), runner.init_state(), []
    for frame in frames_:
        buffer[:] = frame
        logits, state, _ = runner.step(state, buffer)
        buffer[:] = 0
        got.append(logits)
    dense = jax.jit(functools.partial(graph.apply, basic[0]))
    np.testing.assert_allclose(got, [dense(basic[1], frame[None])[0] for frame in frames_], rtol=1e-5)


def test_readers_and_tiles():
    """Against loops."""
    rng = np.random.default_rng(0)
    for window in (
        graph.Window(3, 1, (1, 1)),
        graph.Window(7, 2, (3, 3)),
        graph.Window(3, 2, (0, 1)),
        graph.Window(1, 2),
    ):
        changed = rng.random((21, 17)) < 0.03
        rows, columns = window.outputs(21), window.outputs(17)
        padded = np.pad(changed, (window.padding, window.padding))
        want = np.zeros((rows, columns), bool)
        for i in range(rows):
            for j in range(columns):
                a, b = i * window.stride, j * window.stride
                want[i, j] = padded[a : a + window.size, b : b + window.size].any()
        got = changes.readers(jnp.asarray(changed), window)
        np.testing.assert_array_equal(got, want)
        tiles = np.asarray(changes.tiles(got, (4, 5))).reshape(changes.grid(rows, columns, (4, 5)))
        for i in range(tiles.shape[0]):
            for j in range(tiles.shape[1]):
                assert tiles[i, j] == want[4 * i : 4 * i + 4, 5 * j : 5 * j + 5].any()


def test_bad_input_leaves_the_state_as_it_was(basic, runner):
    rng = np.random.default_rng(3)
    frame = rng.standard_normal((*SIZE, 3)).astype(np.float32)
    _, state, _ = runner.step(runner.init_state(), frame)
    broken = frame.copy()
    broken[3, 4, 0] = np.nan
    other = stream.Stream(*basic[:2], (*SIZE, 3), implementation=runner.implementation)
    for bad, given, message in (
        (frame[:-1], state, "frames of this stream have shape"),
        (broken, state, "1 of the frame's 6240 values are not finite"),
        (jnp.asarray(broken), state, "not finite"),
        (frame, other.init_state(), "not one of this stream"),
        (frame + 1j, state, "frames must be of real numbers, got complex64"),
        (jnp.asarray(frame + 1j), state, "frames must be of real numbers, got complex64"),
        (np.full(frame.shape, 1e300), state, "6240 of the frame's 6240 values are not finite"),
        (np.full(frame.shape, "a"), state, "frames must be of real numbers, got <U1"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.step(given, bad)
    _, after, tiles = runner.step(state, frame)
    assert not np.asarray(tiles).any()  # it still knows the frame before
    with pytest.raises(ValueError, match="the state was consumed by a step"):
        runner.step(state, frame)
    with pytest.raises(ValueError, match="the state was consumed by a step"):
        runner.step(runner.reset(state), frame)
    for wrong, message in (
        (
            {**after.maps, "stem": after.maps["stem"][1:]},
            r"map stem must be float32\[42, 54, 8\], got float32\[41,54,8\]",
        ),
        ({**after.maps, "stem": after.maps["stem"].astype(jnp.bfloat16)}, "got bfloat16"),
        ({k: v for k, v in after.maps.items() if k != "stem"}, "got None"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.step(dataclasses.replace(after, maps=wrong), frame)
    assert not np.asarray(runner.step(after, frame)[2]).any()
    for step in (0.0, -0.1, np.nan, 1e-40):
        maps = {**basic[1]["maps"], "stem": {**basic[1]["maps"]["stem"], "step": jnp.full(8, step)}}
        with pytest.raises(ValueError, match=r"steps of stem must be > 0"):
            stream.Stream(basic[0], {**basic[1], "maps": maps}, (*SIZE, 3))
    for shape in ((*SIZE, 4), (40.0, 52.0, 3), (-40, 52, 3), (), 40):
        with pytest.raises(ValueError, match=r"frame_shape must be \(height, width, 3\), got"):
            stream.Stream(*basic[:2], shape)
    for tiling in (((50, 4), 1), ((0, 4), 1), ((4, 4), 0), ((4, 4), 131)):
        with pytest.raises(ValueError, match="tiles of stem must be of 1 to 40 x 52 pixels, a block of 1 to all tiles"):
            stream.Stream(*basic[:2], (*SIZE, 3), tilings={"stem": stream.Tiling(*tiling)})
    with pytest.raises(ValueError, match="no map is named 'stm'"):
        stream.Stream(*basic[:2], (*SIZE, 3), limits={"stm": 3})


def test_frames_of_any_type(basic, runner):
    """Real numbers wherever and however they stand, as float32."""
    whole = np.random.default_rng(5).integers(0, 9, (*SIZE, 3))
    dense = jax.jit(functools.partial(graph.apply, basic[0]))(basic[1], whole[None].astype(np.float32))[0]
    other = np.ascontiguousarray(whole.transpose(2, 0, 1)).transpose(1, 2, 0)
    kinds = [np.uint8, np.float64, np.float16, jnp.bfloat16]
    for frame in (*(whole.astype(kind) for kind in kinds), *(jnp.asarray(whole, kind) for kind in kinds[2:]), other):
        np.testing.assert_allclose(runner.step(runner.init_state(), frame)[0], dense, rtol=1e-5)
    np.testing.assert_allclose(runner.step(runner.init_state(), whole.tolist())[0], dense, rtol=1e-5)


def test_where_integers_have_64_bits(basic):
    limits = {node.name: 10**6 for node in basic[0].nodes}
    seen = list(clip(np.random.default_rng(10), length=3))
    dense = jax.jit(functools.partial(graph.apply, basic[0]))
    want = [dense(basic[1], frame[None])[0] for frame in seen]
    with jax.enable_x64(True):
        got = list(stream.Stream(*basic[:2], (*SIZE, 3), implementation="xla", limits=limits).run(seen))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_within_other_programs(runner):
    """A step under scan and vmap, which consume no state."""
    seen = jnp.asarray(list(clip(np.random.default_rng(6), length=4)))
    want, state, counted = [], runner.init_state(), []
    for frame in seen:
        logits, state, counts = runner.step(state, frame)
        want, counted = [*want, logits], [*counted, counts]

    def advance(state, frame):
        logits, state, counts = runner.step(state, frame)
        return state, (logits, counts)

    start = runner.init_state()
    last, (logits, counts) = jax.lax.scan(advance, start, seen)
    np.testing.assert_allclose(logits, want, rtol=1e-5)
    np.testing.assert_array_equal(counts, counted)
    np.testing.assert_allclose(runner.step(last, seen[-1])[0], want[-1], rtol=1e-5)
    if runner.implementation == "native":  # the other one takes long to compile
        two = jax.tree.map(lambda x: jnp.stack([x, x]), start)
        for frame in seen[:3]:
            (two, (logits, _)) = jax.vmap(advance)(two, jnp.stack([frame, seen[0]]))
        np.testing.assert_allclose(logits, [want[2], want[0]], rtol=1e-5)


def test_new_parameters_hold_from_the_next_frame(basic, runner):
    """For every state, without a reset; parameters of other shapes are refused and change nothing."""
    frame = np.random.default_rng(7).standard_normal((*SIZE, 3)).astype(np.float32)
    dense = jax.jit(functools.partial(graph.apply, basic[0]))
    _, state, _ = runner.step(runner.init_state(), frame)
    maps = {name: {k: v if k == "step" else -v for k, v in own.items()} for name, own in basic[1]["maps"].items()}
    runner.params = new = {**basic[1], "maps": maps}
    logits, state, counts = runner.step(state, frame)
    np.testing.assert_allclose(logits, dense(new, frame[None])[0], rtol=1e-4, atol=1e-5)
    assert (np.asarray(counts) == stream.DENSE).all()
    stem = maps["stem"]
    for wrong, message in (
        ({**stem, "kernel": stem["kernel"][:2]}, r"kernel of stem must have shape \(3, 3, 3, 8\), got \(2, 3, 3, 8\)"),
        ({**stem, "bias": stem["bias"][:2]}, "bias of stem must have shape"),
        ({**stem, "step": jnp.ones(3)}, r"step of stem must have shape \(\) or \(8,\) or \(40, 52, 8\), got \(3,\)"),
        ({"kernel": stem["kernel"], "bias": stem["bias"]}, "step of stem must have .*, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.params = {**new, "maps": {**maps, "stem": wrong}}
    with pytest.raises(ValueError, match=r"weights of the head must have shape \(16, ...\), got \(3, 2\)"):
        runner.params = {**new, "head": {"weight": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    assert runner.params is new and not np.asarray(runner.step(state, frame)[2]).any()
    runner.params = basic[1]


def test_threads_share_a_stream(runner):
    """Each with its state, at once: each gets what it gets alone."""
    seen = list(clip(np.random.default_rng(8), length=5))
    alone = np.stack(list(runner.run(seen)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: np.stack(list(runner.run(seen))), range(8)):
            np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_of_neurons(implementation):
    """Folded behind a pooled stem too; tiles have those of their pixels."""
    config = frames.Config(
        resnet.resnet18(blocks=(1, 1), widths=(4, 8), num_classes=5),
        SIZE,
        delta_activation.Config(init_step=0.3, steps="neuron"),
    )
    params, stats = network(config)
    net, folded = fold.fold(params, stats, config)
    limits = {node.name: 10**6 for node in net.nodes} if implementation == "xla" else None
    runner = stream.Stream(net, folded, (*SIZE, 3), limits=limits, implementation=implementation)
    dense, state = jax.jit(functools.partial(graph.apply, net)), runner.init_state()
    frame = np.random.default_rng(9).standard_normal((*SIZE, 3)).astype(np.float32)
    want, _ = frames.apply(params, stats, config, jnp.asarray(frame)[None, None])
    np.testing.assert_allclose(dense(folded, frame[None]), want[:, 0], rtol=0.1, atol=0.1)
    for _ in range(3):
        logits, state, _ = runner.step(state, frame)
        np.testing.assert_allclose(logits, dense(folded, frame[None])[0], rtol=2e-2, atol=2e-2)
        frame[33:, 9:21] += 1


def test_graphs_that_cannot_be():
    point, near, half = graph.Window(), graph.Window(3, 1, (1, 1)), graph.Window(1, 2)
    source = graph.Node("input", "input", 3)
    for values in ((0,), (1, 0), (1, 1, (-1, 0))):
        with pytest.raises(ValueError, match="a window needs size and stride >= 1 and padding >= 0"):
            graph.Window(*values)
    for kind, windows in (
        ("add", (near,)),
        ("concat", (point, half)),
        ("max_pool", (point, point)),
        ("conv", (point,) * 3),
    ):
        with pytest.raises(ValueError, match=f"node x: {kind} cannot read"):
            graph.Graph((source, graph.Node("x", kind, 3, tuple(("input", window) for window in windows))))
    kernel, bias = jnp.ones((1, 1, 3, 4)), jnp.ones(4)
    for node, own, message in (
        (graph.Node("x", "max_pool", 4, (("input", point),)), {}, r"a max_pool of maps of \[3\] channels has not 4"),
        (graph.Node("x", "add", 4, (("input", point),) * 2), {}, r"a add of maps of \[3, 3\] channels has not 4"),
        (graph.Node("x", "concat", 4, (("input", point),) * 2), {}, "a concat of maps"),
        (graph.Node("x", "conv", 4, (("input", point),), groups=2), {}, "2 groups of 3 and 4 channels"),
        (
            graph.Node("x", "conv", 4, (("input", point),) * 2),
            {"kernel": kernel, "bias": bias},
            "cannot be added to it",
        ),
        (
            graph.Node("x", "conv", 4, (("input", point),) * 2),
            {"kernel": kernel, "bias": bias, "shortcut": jnp.ones((3, 3, 3, 4))},
            r"shortcut of x must have shape \(1, 1, 3, 4\)",
        ),
    ):
        net = graph.Graph((dataclasses.replace(source, quantized=False), dataclasses.replace(node, quantized=False)))
        with pytest.raises(ValueError, match=message):
            stream.Stream(net, {"maps": {"input": {}, "x": own}, "head": {"weight": jnp.ones((4, 2))}}, (4, 4, 3))


def test_fan_out_of_a_small_function():
    def function(x, w):
        y = fan_out.mark("a", x) @ w
        return fan_out.mark("b", jax.nn.relu(y)).mean(0) @ w.T

    fed = fan_out.operations(function, jnp.zeros((5, 3)), jnp.zeros((3, 4)))
    assert fed == {"a": 5 * 3 * 4, "b": 4 * 3}
