"""Every experiment that sweeps: all members can be made, and its report asks for what the sweep's table will have."""

import inspect

import numpy as np
import pytest
from training_runs import ROOT

from deltajax import data
from deltajax.models import lm
from deltajax.training import reports, sweeps
from deltajax.training.config import load_experiment

NAMES = ("state_tracking", "formal_languages", "mqar", "language")


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_members_can_be_made(name, size):
    path = f"{ROOT}/experiments/{name}.py"
    takes_size = "size" in inspect.signature(load_experiment(path).get_grid).parameters
    found = sweeps.members(f"{path}:size={size}" if takes_size else path)
    assert len({member.name for member in found}) == len(found)
    if name == "language":  # "at equal parameters"
        sizes = [lm.num_params(member.config.model) for member in found]
        assert max(sizes) / min(sizes) < 1.005


@pytest.mark.parametrize("name", NAMES)
def test_report_asks_for_columns_of_its_table(name, tmp_path):
    path = f"{ROOT}/experiments/{name}.py"
    settings = dict.fromkeys(k.removeprefix("config.") for member in sweeps.members(path) for k in member.settings)
    row = {**dict.fromkeys(settings, "0"), **dict.fromkeys(sweeps.COLUMNS, ""), "status": "complete"}
    section = reports.section(load_experiment(path).get_report(), [row], name, tmp_path, tmp_path / "page.md")
    assert "**Not run.**" in section and "No numbers." in section


def test_letters_of_state_tracking_tell_nothing_by_position():
    """After many letters every state is equally likely, so that the random guess that is printed is one."""
    from deltajax.data import groups

    for generators in load_experiment(f"{ROOT}/experiments/state_tracking.py").GENERATORS.values():
        group = groups.group(generators)
        probability = [1.0] + [0.0] * (len(group) - 1)
        for _ in range(200):
            following = [0.0] * len(group)
            for state, p in enumerate(probability):
                for letter in group.generators:
                    following[group.table[state, letter]] += p / len(group.generators)
            probability = following
        assert max(probability) == pytest.approx(1 / len(group), rel=1e-2), generators


def test_what_the_notes_say_of_the_strings_with_brackets():
    """The share of answers that are 0, and of strings no longer than in training: the page compares models with them."""
    config = load_experiment(f"{ROOT}/experiments/formal_languages.py").get_config(task="brackets").data
    (source,) = data.load(config).evaluations.values()
    examples = [source[i] for i in range(len(source))]
    ends = [int(np.flatnonzero(example["weights"])[0]) for example in examples]
    zeros = np.mean([example["targets"][end] == 0 for example, end in zip(examples, ends, strict=True)])
    assert f"{zeros:.2f} {(zeros - 1 / 3) / (2 / 3):.2f}" == "0.46 0.20"
    assert f"{np.mean(np.array(ends) <= config.seq_len - 1):.2f}" == "0.18"
