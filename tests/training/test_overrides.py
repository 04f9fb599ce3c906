"""Dotted-path overrides: every type, and one line for every mistake."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import pytest

from deltajax.training import overrides, serialize
from deltajax.training.config import Optimizer, Schedule


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 1
    rate: float = 0.5

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be >= 1, got {self.width}")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    by_name: Mapping[str, Inner] = dataclasses.field(default_factory=lambda: {"a": Inner(), "b": Inner()})
    flag: bool = False
    limit: int | None = 3
    kind: Literal["x", "y"] = "x"
    names: tuple[str, ...] = ("p", "q")
    pair: tuple[int, float] = (1, 2.0)
    steps: tuple[tuple[str, float], ...] = ()
    text: str = "t"
    low: int = 0
    high: int = 1

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError(f"low must be < high = {self.high}, got {self.low}")


@pytest.mark.parametrize(
    "path, text, value",
    [
        ("inner.width", "7", 7),
        ("inner.width", "1e3", 1000),
        ("inner.rate", "3e-4", 3e-4),
        ("inner.rate", "2", 2.0),
        ("by_name.b.width", "5", 5),
        ("flag", "true", True),
        ("flag", "False", False),
        ("limit", "none", None),
        ("limit", "9", 9),
        ("kind", "y", "y"),
        ("names", "r,s,t", ("r", "s", "t")),
        ("names", "(r,)", ("r",)),
        ("pair", "3,4e-1", (3, 0.4)),
        ("steps", "(a,0.5),(b.c,4)", (("a", 0.5), ("b.c", 4.0))),
        ("steps", "((a,0.5),(b.c,4))", (("a", 0.5), ("b.c", 4.0))),
        ("steps", "(a,0.5)", (("a", 0.5),)),
        ("steps", "()", ()),
        ("text", "a=b c", "a=b c"),
        ("text", "", ""),
    ],
)
def test_values(path, text, value):
    changed = overrides.apply(Outer(), {path: text})
    assert dict(overrides.leaves(changed)) == {**dict(overrides.leaves(Outer())), path: value}
    assert type(dict(overrides.leaves(changed))[path]) is type(value)


def test_checks_see_only_the_final_values():
    changed = overrides.apply(Outer(), {"low": "5", "high": "6"})
    assert (changed.low, changed.high) == (5, 6)


@pytest.mark.parametrize(
    "path, text, parts",
    [
        (
            "steps",
            "a,0.5",
            ["--config.steps=a,0.5: must be a list (a,b),(a,b) (a comma-separated list (text, a number"],
        ),
        ("inner.widht", "1", ["--config.inner.widht: no such key", "did you mean config.inner.width?", "width, rate"]),
        ("inne.width", "1", ["--config.inne: no such key", "did you mean config.inner?"]),
        ("width", "1", ["did you mean config.inner.width?"]),
        ("zzz", "1", ["no such key (keys here: inner, by_name,"]),
        ("by_name.c.width", "1", ["--config.by_name.c: no such key", "(keys here: a, b)"]),
        ("inner.width", "x", ["--config.inner.width=x: must be an integer"]),
        ("inner.width", "1.5", ["--config.inner.width=1.5: must be an integer"]),
        ("inner.width", "inf", ["must be an integer"]),
        ("inner.rate", "fast", ["--config.inner.rate=fast: must be a number"]),
        ("inner.width", "0", ["--config.inner.width=0: width must be >= 1, got 0"]),
        ("flag", "maybe", ["--config.flag=maybe: must be true or false"]),
        ("limit", "nothing", ["must be an integer or none"]),
        ("kind", "z", ["--config.kind=z: must be one of x, y"]),
        ("pair", "1", ["must be a comma-separated list (an integer, a number)"]),
        ("inner", "1", ["--config.inner=1: config.inner is a group", "width, rate"]),
        ("text.more", "1", ["config.text is a value ('t'), it has no keys"]),
        ("low", "2", ["--config.low=2: low must be < high = 1, got 2"]),
    ],
)
def test_mistakes(path, text, parts):
    with pytest.raises(ValueError) as caught:
        overrides.apply(Outer(), {path: text})
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_key_and_its_group():
    for order in (["inner", "inner.width"], ["inner.width", "inner"]):
        with pytest.raises(ValueError, match=r"given (a )?values?"):
            overrides.apply(Outer(), dict.fromkeys(order, "1"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Optimizer(learning_rate=-1.0), "learning_rate must be > 0 and finite, got -1.0"),
        (lambda: Optimizer(learning_rate=float("nan")), "learning_rate must be > 0 and finite, got nan"),
        (lambda: Optimizer(b2=1.0), r"b2 must be in \[0, 1\), got 1.0"),
        (lambda: Schedule(final_fraction=2.0), r"final_fraction must be in \[0, 1\], got 2.0"),
    ],
)
def test_ranges(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_json_round_trip(tiny_config):
    stored = serialize.to_json(tiny_config)
    assert serialize.from_json(stored) == tiny_config
    changed = overrides.apply(tiny_config, {"model.mixers.swa.window": "4"})
    assert serialize.differences(tiny_config, changed) == ["model.mixers.swa.window: 8 -> 4"]


def test_json_never_imports_what_is_not_ours():
    with pytest.raises(ValueError, match="'subprocess:Popen' is not one of this project's"):
        serialize.from_json({"type": "subprocess:Popen", "args": ["true"]})
    with pytest.raises(ValueError, match=r"this deltajax has no type 'deltajax\.train:main'"):
        serialize.from_json({"type": "deltajax.train:main"})


def test_json_of_another_version(tiny_config):
    """One line with the field; what came later has its default, and is told of."""

    def change(path: str, **changes: object) -> dict:
        tree = serialize.to_json(tiny_config)
        node = tree
        for name in path.split(".")[1:]:
            node = node[name]
        for name, value in changes.items():
            if value is None:
                del node[name]
            else:
                node[name] = value
        return tree

    for tree, message in (
        (
            change("config.model.mixers.swa", windows=8),
            "config.model.mixers.swa.windows: this deltajax has no such field (did it become window?); another version",
        ),
        (change("config.model", vocab_size=None), "config.model.vocab_size is missing; another version wrote"),
        (
            change("config.model", type="deltajax.models.ml:Config"),
            "config.model: this deltajax has no type 'deltajax.",
        ),
        (change("config.model", type="deltajax.models.lm:Conf"), "config.model: this deltajax has no type 'deltajax."),
        (change("config.data", seq_len=0), "config.data: seq_len: got 0; allowed"),
        (change("config", format=2), "config: written by a newer deltajax (format 2, this one reads up to 1)"),
        ([], "config: not one that deltajax wrote"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            serialize.from_json(tree)
    assert serialize.defaulted(serialize.to_json(tiny_config)) == []
    old = change("config", format=None, grad_accumulation=None, nonfinite=None)
    assert serialize.from_json(old) == tiny_config
    assert serialize.defaulted(old) == [
        "grad_accumulation=1",
        *(
            f"nonfinite.{f.name}={getattr(tiny_config.nonfinite, f.name)}"
            for f in dataclasses.fields(tiny_config.nonfinite)
        ),
    ]


@dataclasses.dataclass(frozen=True)
class OtherInner:
    depth: int = 2


@dataclasses.dataclass(frozen=True)
class Chooser:
    part: Inner | OtherInner = Inner(width=4)


def test_a_variant_is_chosen_by_name_and_then_set():
    """In either order; its defaults come first, and keys alone change the variant that is there."""
    chosen = OtherInner(depth=5)
    for given in ({"part": "other_inner", "part.depth": "5"}, {"part.depth": "5", "part": "other_inner"}):
        assert overrides.apply(Chooser(), given).part == chosen
    assert overrides.apply(Chooser(), {"part": "inner"}).part == Inner()
    assert overrides.apply(Chooser(), {"part.rate": "2"}).part == Inner(width=4, rate=2.0)
    for given, message in (
        ({"part": "other"}, "--config.part=other: must be one of inner, other_inner"),
        ({"part": "inner", "part.depth": "5"}, "--config.part.depth: no such key"),
        ({"part": "inner", "part.width": "0"}, r"--config.part.width=0: width must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            overrides.apply(Chooser(), given)
