"""The CPU kernel's own promises: any vector width, no compiler, what the backward keeps. Values: test_delta_rule.py."""

import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_rule_cases import NAMES, draw
from native_processes import compiler, run

from deltajax.ops import delta_product
from pallas_kernels import native

pytestmark = pytest.mark.skipif(not native.compiler(), reason="no C++ compiler")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="vectors of x86")
@pytest.mark.parametrize(("option", "width"), [("-mno-avx512f", 32), ("-mno-avx -DDELTAJAX_OLD_GCC", 16)])
def test_narrower_vectors(option, width, tmp_path):
    """Blocks of columns are then narrower, and their parts of the gradients are added up; shuffles of compilers before GCC 12."""
    code = f"""
import jax
jax.config.update("jax_enable_x64", True)
from delta_rule_cases import compare, draw
from pallas_kernels import cpu
assert cpu.register().deltajax_vector_bytes() <= {width}
compare(draw(0, 2, 40, 2, 2, 4, 20, 70, "channel", dtype="float64"), "native_cpu", 1e-11, 1e-10)
compare(draw(0, 1, 40, 1, 1, 1, 9, 7, "scalar"), "native_cpu", 1e-5, 1e-4)
"""
    run(code, CXX=compiler(tmp_path, option), DELTAJAX_CACHE=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "delta_product.cc by no-such-compiler: [Errno 2] No such file or directory"),
        ({"CXX": "false"}, "false does not compile delta_product.cc"),
        ({"PATH": "/nowhere"}, "needs a C++ compiler: none of c++, g++, clang++ is on PATH"),
    ],
)
def test_without_a_compiler_the_chunked_form_serves(settings, reason, tmp_path):
    code = """
import logging, numpy as np
logging.basicConfig(level=logging.INFO)
from absl import logging as absl_logging
absl_logging.set_verbosity(absl_logging.INFO)
from deltajax.ops import delta_product
x = np.ones((1, 3, 1, 2), np.float32) / 2
o, state = delta_product(x, x[:, :, None], x[:, :, None], x[:, :, None, :, 0])
again, _ = delta_product(x, x[:, :, None], x[:, :, None], x[:, :, None, :, 0], implementation="chunked")
np.testing.assert_array_equal(o, again)
"""
    err = run(code, DELTAJAX_CACHE=str(tmp_path), **settings)
    assert f'delta product by "chunked"; native_cpu: {reason}' in err


def test_a_cache_that_cannot_be_written(tmp_path):
    """The kernel is compiled for this process, and the folder in which it stood goes with it."""
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "tmp").mkdir()
    code = """
import numpy as np
from pallas_kernels import cpu
cpu.register()
"""
    err = run(code, DELTAJAX_CACHE=str(file), TMPDIR=str(tmp_path / "tmp"))
    assert "compiled kernels are not kept" in err
    assert not list((tmp_path / "tmp").iterdir())


def test_no_home(tmp_path):
    """As in a container whose user is not in /etc/passwd."""
    code = """
import os, pathlib
def nowhere():
    raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = nowhere
from pallas_kernels import native
print(native._folder())
"""
    assert "compiled kernels are not kept: Could not determine home directory" in run(code, XDG_CACHE_HOME="")
    run(code + f"assert str(native._folder()) == {str(tmp_path.resolve())!r}", DELTAJAX_CACHE=str(tmp_path))


def test_what_is_compiled_is_kept_whole(tmp_path):
    """A library appears under its name when it is complete, once for all threads; one that was damaged is made again."""
    cache, seen = tmp_path / "cache", tmp_path / "seen"
    script = tmp_path / "compiler"
    look = f'case "$*" in *-shared*) ls {cache} >> {seen};; esac'
    script.write_text(f'#!/bin/sh\n{native.compiler()[0]} "$@" || exit 1\n{look}\n')
    script.chmod(0o755)
    code = """
import threading
from pallas_kernels import cpu
threads = [threading.Thread(target=cpu.register) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
cpu.register()
"""

    def times():
        run(code, CXX=str(script), DELTAJAX_CACHE=str(cache))
        assert [path.suffix for path in sorted(cache.iterdir())] == [".sha256", ".so"]
        return seen.read_text().count("making-")

    assert (times(), times()) == (1, 1)
    (kept,) = cache.glob("*.so")
    assert kept.name not in seen.read_text()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])  # loaded, it would be a bus error
    assert times() == 2
    assert kept.stat().st_size == len(whole)


def test_the_backward_keeps_inputs_and_few_states():
    t, dim = 4096, 16
    a = draw(7, 1, t, 1, 1, 1, dim, dim, "scalar")
    tokens = [a[name] for name in NAMES[:5]]
    _, backward = jax.vjp(lambda *x: delta_product(*x, implementation="native_cpu"), *tokens)
    kept = sum(x.size for x in jax.tree.leaves(backward))
    assert kept - sum(x.size for x in tokens) <= t / 64 * dim * dim + 1000


def test_more_calls_than_threads():
    """Calls that XLA runs beside each other share its threads: each ends, whoever helps it."""
    a = draw(3, 2, 33, 1, 2, 2, 8, 8)
    tokens = [a[name] for name in NAMES[:4]]

    @jax.jit
    def many(*tokens):
        return [delta_product(tokens[0] * n, *tokens[1:], implementation="native_cpu")[0] for n in range(1, 40)]

    first, *others = many(*tokens)
    for n, o in enumerate(others, 2):
        np.testing.assert_allclose(o, n * first, rtol=1e-5, atol=1e-4)


def test_bits_do_not_depend_on_the_batch():
    a = draw(5, 4, 20, 1, 2, 2, 8, 24, "scalar")
    tokens = [a[name] for name in NAMES[:5]]
    together = delta_product(*tokens, implementation="native_cpu")
    alone = [delta_product(*(x[i : i + 1] for x in tokens), implementation="native_cpu") for i in range(4)]
    for x, parts in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(x, jnp.concatenate(parts))


def test_twice_differentiated_names_what_can():
    a = draw(6, 1, 5, 1, 1, 1, 4, 4)
    q, *rest = (a[name] for name in NAMES[:4])

    def slope(q, implementation):
        return jnp.sum(
            jax.grad(lambda q: jnp.sum(delta_product(q, *rest, implementation=implementation)[0] ** 3))(q) ** 2
        )

    assert jax.grad(slope)(q, "chunked").shape == q.shape
    with pytest.raises(NotImplementedError, match='"native_cpu" is differentiated once; implementation="chunked"'):
        jax.grad(slope)(q, "native_cpu")


def test_queries_are_scaled_in_the_precision_of_the_state():
    """K = 100: a scale that is no power of two would round bfloat16 queries once more."""
    a = draw(7, 1, 30, 1, 1, 1, 100, 16, dtype="bfloat16")
    tokens = [a[name] for name in NAMES[:4]]
    o, expected = (
        delta_product(*tokens, implementation=name)[0].astype(jnp.float32) for name in ("native_cpu", "reference")
    )
    assert np.mean(np.asarray(o) != np.asarray(expected)) < 0.02


def test_infinite_arguments_go_on_as_in_the_recurrence():
    a = draw(4, 1, 12, 1, 1, 1, 4, 20, "scalar")
    tokens = [a[name] for name in NAMES[:5]]
    tokens[2] = tokens[2].at[0, 5, 0, 0, 3].set(jnp.inf)  # one column of the values
    o, expected = (delta_product(*tokens, implementation=name)[0] for name in ("native_cpu", "reference"))
    np.testing.assert_array_equal(np.isfinite(o), np.isfinite(expected))
    assert np.all(np.isfinite(o[0, :, 0, :3])) and not np.any(np.isfinite(o[0, 6:, 0, 3]))
