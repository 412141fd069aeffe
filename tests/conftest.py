"""Fixtures that several test files use."""

import functools
import sys

import pytest
import torch
from helpers import assert_refused, files

from envs import cli
from envs.socnav import environment
from envs.socnav.scenarios import choose

torch.set_num_threads(1)  # the tests' workers share the cores


def pytest_addoption(parser):
    parser.addoption("--env-id", help="tests/test_contract.py: the environment to test instead of ours, MODULE:ID")


@pytest.fixture(scope="module")
def smaller_training_world():
    """Every fifth variant of the training scenarios, since to draw the starts of all takes ten seconds."""

    def some(split, training, scenario, file):
        return choose(split, training, scenario, file)[:: 5 if training and scenario is None else 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "choose", some)
        patch.setattr(environment, "load_world", functools.lru_cache(environment.load_world.__wrapped__))
        yield


@pytest.fixture
def command(request, monkeypatch, capsys):
    """Runs a script, the test file's SCRIPT if none is named, in this process: command line -> status, the lines on
    stderr."""

    def command(line, script=request.module.SCRIPT):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *line.split()])
        with pytest.raises(SystemExit) as end:
            sys.exit(cli.main(script.train, script.Args) if script.main is cli.main else script.main())
        return end.value.code or 0, [line for line in capsys.readouterr().err.splitlines() if line]

    return command


@pytest.fixture
def refused(command):
    """The command line is refused with that message (a pattern), and every file stays as it was."""

    def refused(line, message, *script):
        before = files()
        assert_refused(*command(line, *script), message)
        after = files()
        assert sorted(after) == sorted(before)
        assert after == before

    return refused
