"""What the README shows of the code and of the policies is what they are."""

import ast
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import gif  # noqa: E402

README = (ROOT / "README.md").read_text()


def blocks(language):
    """The README's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


# The diff of ppo_continuous.py and ppo_residual.py


def algorithm(path):
    """Numbers of the first and the last line between a script's settings and its train()."""
    body = ast.parse(path.read_text()).body
    names = [getattr(node, "name", getattr(getattr(node, "target", None), "id", None)) for node in body]
    return body[names.index("TUNED")].end_lineno + 1, body[names.index("train")].lineno - 1


def hunks_between(old, new):
    """The hunks of `diff -U1` of two scripts in what lies between their settings and train(), a list of lines each."""
    first, last = algorithm(old)
    hunks, texts = [], (path.read_text().splitlines() for path in (old, new))
    for line in list(difflib.unified_diff(*texts, n=1, lineterm=""))[2:]:
        if line.startswith("@@"):
            begin = int(re.match(r"@@ -(\d+)", line)[1])
            hunks.append((begin, []))
        else:
            hunks[-1][1].append(line.rstrip())
    return [lines for begin, lines in hunks if first <= begin <= last]


def test_the_diff_of_the_two_scripts_is_the_real_one():
    (block,) = blocks("diff")
    real = hunks_between(ROOT / "ppo_continuous.py", ROOT / "ppo_residual.py")
    expected = "".join("@@\n" + "".join(f"{line}\n" for line in lines) for lines in real)
    assert block == expected


def test_hunks_in_the_settings_and_in_train_are_left_out(tmp_path):
    source = "TUNED: dict = {%s}\n\n\ndef f():\n    return %s\n\n\ndef train():\n    return %s\n"
    old, new = tmp_path / "old.py", tmp_path / "new.py"
    old.write_text(source % ("", 1, 2))
    new.write_text(source % ("'a': 1", 3, 4))
    assert hunks_between(old, new) == [[" def f():", "-    return 1", "+    return 3", ""]]


# Pictures


def shown():
    """{file: line} of the tools/gif.py commands."""
    lines = re.findall(r"^ +python (tools/gif\.py .* --output docs/.*)$", README, re.MULTILINE)
    return {gif_args(line).output: line for line in lines}


def gif_args(line):
    return tyro.cli(gif.Args, args=shlex.split(line, comments=True)[1:])


def test_every_picture_in_docs_is_shown_and_every_gif_has_its_command():
    pictures = set(re.findall(r"!\[[^\]]+\]\((docs/[^)]+)\)", README))
    assert pictures == {str(path.relative_to(ROOT)) for path in (ROOT / "docs").iterdir()}
    assert {name for name in pictures if name.endswith(".gif")} == set(shown())


@pytest.mark.parametrize("name", shown())
def test_a_gif_is_small_and_what_its_command_makes(name):
    """As far as can be told without OpenGL."""
    args, path = gif_args(shown()[name]), ROOT / name
    assert Path(args.policy).name == path.stem
    assert path.stat().st_size < 1e6
    with Image.open(path) as image:
        assert image.is_animated
        assert image.info["loop"] == 0
        assert image.width == args.width
        holds = 0
        for i in range(image.n_frames):
            image.seek(i)
            holds += image.info["duration"] == gif.HOLD
        assert holds == args.episodes


# The notebook


DRIVER = """
import _thread, json, pathlib, sys, threading, time, types


def interrupt():
    # Python drops an interruption that comes in a destructor: a person whose training goes on presses again
    progress, lines = pathlib.Path("runs/notebook/progress.csv"), 2  # with two updates there is something to go on from
    while "stopped" not in globals():
        now = progress.read_text().count("\\n") if progress.exists() else 0
        if now > lines:
            _thread.interrupt_main()
            time.sleep(0.3)
        lines = max(lines, now)
        time.sleep(0.02)


names, shown = {}, []
train, *others, picture = json.loads(sys.argv[1])
threading.Thread(target=interrupt, daemon=True).start()
try:
    exec(train, names)
except KeyboardInterrupt:
    stopped = json.loads(pathlib.Path("runs/notebook/summary.json").read_text())
for cell in others:
    exec(cell, names)
display = types.SimpleNamespace(Image=lambda name: shown.append(pathlib.Path(name).read_bytes()[:3].decode()))
sys.modules |= {"IPython": types.SimpleNamespace(display=display), "IPython.display": display}
exec(picture, names)
(curve,) = names["plt"].gca().lines
told = {"stopped": stopped, "curve": curve.get_xydata().tolist(), "shown": shown}
print(json.dumps({**told, "summary": names["summary"], "result": names["result"]}))
"""


def test_the_cells_of_the_notebook_work(tmp_path):
    """In a process of their own, shorter, the first one interrupted; what a notebook sends to the shell goes there."""
    section = README[README.index("### In a notebook") :]
    cells = [cell for cell in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)][:4]
    assert "train(args)" in cells[0]
    cells[0] = cells[0].replace("total_timesteps=128_000", "total_timesteps=51_200, eval_episodes=10")
    shell = 'import subprocess, sys; subprocess.run([sys.executable, *"\\1".split()], check=True)'
    cells = [re.sub(r"^!python (.*)$", shell, cell, flags=re.MULTILINE) for cell in cells]
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    line = [sys.executable, "-c", DRIVER, json.dumps(cells)]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "runs/notebook/interrupted.pt").exists()
    assert told["stopped"]["status"] == "interrupted"
    assert 6_400 <= told["stopped"]["steps"] < 51_200
    assert (told["summary"]["status"], told["summary"]["steps"]) == ("completed", 51_200)
    assert told["summary"]["resumed_from_step"] == told["stopped"]["steps"]
    assert (told["result"]["episodes"], told["result"]["policy"]) == (10, "runs/notebook")
    assert told["shown"] == ["GIF"]
    curve = np.array(told["curve"])
    np.testing.assert_array_equal(curve[:, 0], np.arange(6_400, 51_201, 6_400))
    assert np.isfinite(curve[:, 1]).tolist() == [False, True] * 4


# CONTRIBUTING.md


def test_the_environment_of_the_guide_keeps_the_contract_and_trains(tmp_path):
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "reach.py").write_text(block)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    commands = re.findall(r"^    (pytest|python) (.* --env-id reach:.*)$", guide, re.MULTILINE)
    assert [program for program, _ in commands] == ["pytest", "python"]
    (_, contract), (_, training) = commands
    for line in (f"-m pytest -p no:cacheprovider {ROOT}/{contract}", f"{ROOT}/{training} --dry-run"):
        line = line.replace("--total-timesteps 50000 ", "")
        done = subprocess.run(
            [sys.executable, *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "best policy at step 2,048" in done.stdout
