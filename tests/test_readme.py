"""The commands, code, links and pictures of the documentation are right."""

import ast
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import tyro
from helpers import placeholder_export

from envs import BUNDLED, check_kwargs, cli, constructor_parameters, run

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCS = ("README.md", "CONTRIBUTING.md", "runs/README.md", *PAGES)
sys.path.insert(0, str(ROOT / "tools"))


def blocks(text, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# The commands


def code(name):
    """The indented lines and the inline code of a document; a command that goes on in the next line is one line."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r" \\\n +", " ", text)
    return re.findall(r"^    (.*)$", text, re.MULTILINE) + [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", text)]


def commands():
    """(script or tool, its arguments) of every command of ours, with values for the variables of the shell."""
    values = {"S": "1000", "ENV": "HalfCheetah-v5"}
    lines = [line for name in DOCS for line in code(name)]
    for line in lines:
        if assignment := re.fullmatch(r'(\w+)="(.*)"', line):
            values[assignment[1]] = assignment[2]
    found = []
    for line in lines:
        line = re.sub(r"\$\(\(.*?\)\)", "901000", line).replace(" ...", "")
        line = re.sub(r"\$(\w+)", lambda variable: values[variable[1]], line)
        match = re.match(
            r"((?:\w+=\w+ )?(?:python|torchrun|sbatch) .*?)?((?:tools/)?\w+\.(?:py|sbatch))(?: (.*))?$", line
        )
        if match and (match[1] or match[3]) and match[2] != "tinyphysics.py" and " -c " not in line:
            found.append((match[2], tuple(shlex.split(match[3] or "", comments=True))))
    return list(dict.fromkeys(found))


class Parsed(Exception):  # noqa: N818 (it is no error)
    """The settings of a command line: a script or tool stops here."""


def then_stop(parse):
    def parse_and_stop(*args, **kwargs):
        raise Parsed(parse(*args, **kwargs))

    return parse_and_stop


@pytest.mark.parametrize(("script", "argv"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_command_is_understood(script, argv, monkeypatch, tmp_path):
    """Its flags and values are valid, and an environment takes its arguments. Files need not exist."""
    assert (ROOT / script).is_file()
    module = import_module("ppo_grid_socnav" if script.endswith(".sbatch") else Path(script).stem)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    monkeypatch.setattr(cli, "read_checkpoint", lambda *args, **kwargs: {"args": {}})  # --resume
    monkeypatch.setattr(cli, "read_json", lambda path: {})  # --config
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            cli.parse(module.Args)
        return
    if hasattr(module, "PRESETS"):
        args = cli.parse(module.Args)
    else:
        for owner, name in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict")):
            monkeypatch.setattr(owner, name, then_stop(getattr(owner, name)))
        with pytest.raises(Parsed) as parsed:
            module.main()
        args = parsed.value.args[0]
    for name in ("env_kwargs", "eval_env_kwargs"):
        kwargs, env_id = getattr(args, name, {}), getattr(args, "env_id", None)
        known = BUNDLED if env_id is None else [env_id] if env_id in BUNDLED else []
        assert not (kwargs and known) or any(accepts(x, kwargs) for x in known)


NEEDS_MORE = r"<|runs/(?!reference)|tinyphysics|:|cuda|--track|--help|--render|--config|--json|bench|--compile"


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        f"{script} {line} {'--episodes 2' if 'evaluate' in script else '--dry-run'}"
        for script, line in ((script, " ".join(argv)) for script, argv in commands())
        if re.match(r"ppo_|tools/evaluate", script) and not re.search(NEEDS_MORE, line)
    ],
)
def test_a_command_runs(line, tmp_path):
    """In a short form: the commands that need no files of other commands."""
    line = line.replace("runs/reference", f"{ROOT}/runs/reference")
    done = subprocess.run([sys.executable, *f"{ROOT}/{line}".split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def accepts(env_id, kwargs):
    cls = gym.envs.registration.load_env_creator(gym.spec(env_id).vector_entry_point)
    try:
        check_kwargs(constructor_parameters(cls), kwargs)
    except TypeError:
        return False
    return True


# Code


def between_presets_and_train(path):
    """The numbers of the first and the last line between a script's PRESETS and its train()."""
    body = ast.parse(path.read_text()).body
    names = [getattr(node, "name", getattr(getattr(node, "target", None), "id", None)) for node in body]
    return body[names.index("PRESETS")].end_lineno + 1, body[names.index("train")].lineno - 1


def real_diff():
    """`diff -U1` of ppo_continuous.py and ppo_residual.py between PRESETS and train(), without line numbers."""
    old, new = ROOT / "ppo_continuous.py", ROOT / "ppo_residual.py"
    first, last = between_presets_and_train(old)
    lines, shown = [], False
    texts = (path.read_text().splitlines() for path in (old, new))
    for line in list(difflib.unified_diff(*texts, n=1, lineterm=""))[2:]:
        if line.startswith("@@"):
            shown = first <= int(re.match(r"@@ -(\d+)", line)[1]) <= last
            line = "@@"
        if shown:
            lines.append(f"{line.rstrip()}\n")
    return "".join(lines)


def test_the_diff_of_the_two_scripts_is_the_real_one():
    """docs/so101.md has all of it, and the README lines of it."""
    assert blocks((ROOT / "docs/so101.md").read_text(), "diff") == [real_diff()]
    (excerpt,) = blocks((ROOT / "README.md").read_text(), "diff")
    lines = iter(real_diff().splitlines())
    assert all(line in lines for line in excerpt.splitlines())  # in this order


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(Image=lambda path: Path(path).read_bytes()))
    monkeypatch.chdir(tmp_path)  # the notebook changes the directory, and this fixture changes it back
    cells = json.loads((ROOT / "docs/train.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = re.sub(r"^!python (.*)$", r"subprocess.run([sys.executable, *'\1'.split()], check=True)", code, flags=re.M)
    code = code.replace("runs/notebook", f"{tmp_path}/notebook")
    code = code.replace("run_name=", f"run_root='{tmp_path}', run_name=")
    names = {"subprocess": subprocess, "sys": sys}
    exec(code, names)
    assert (names["summary"]["status"], names["summary"]["steps"]) == ("completed", 256_000)
    assert names["summary"]["resumed_from_step"] == 128_000
    assert np.nanmin(names["plt"].gca().lines[0].get_ydata()) < -60 < names["summary"]["best"]["mean_return"]


def test_the_commands_for_the_challenge_fine_tune_a_clone(tmp_path, monkeypatch):
    """Shorter, and with the embedded dynamics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "export_onnx", placeholder_export)
    page = (ROOT / "docs/lateral.md").read_text()
    section = page[page.index("With the challenge's files") : page.index("## Deploy in the challenge")]
    lines = re.findall(
        r"^    python (\w+)\.py (.*?) (?:--env-kwargs \$FILES)?$", section.replace("clone\n", "clone \n"), re.M
    )
    assert [name for name, _ in lines] == ["bc_pretrain", "bc_pretrain", "ppo_continuous"]
    for (name, line), shorter in zip(lines, ("--episodes 4", "--dry-run", "--dry-run")):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *line.split(), *shorter.split()])
        script = import_module(name)
        summary = script.train(cli.parse(script.Args)) if name == "ppo_continuous" else script.main()
    config = json.loads((Path(summary["run"]) / "config.json").read_text())
    assert config["args"] == config["args"] | {"gae_lambda": 1.0, "critic_warmup_updates": 5}
    assert list(config["parents"]) == ["runs/lateral_clone/best.pt"]


def test_the_environment_of_the_guide_keeps_the_contract_and_trains(tmp_path, monkeypatch):
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = blocks(guide, "python")
    (tmp_path / "reach.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (contract,) = re.findall(r"^    pytest (tests/test_contract.py --env-id .*)$", guide, re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    line = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *f"{ROOT}/{contract}".split()]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (training,) = re.findall(r"^    python (ppo_\w+)\.py (.* --?.*reach:.*|.*reach:.*)$", guide, re.MULTILINE)
    script = import_module(training[0])
    summary = script.train(cli.parse(script.Args, [*training[1].split(), "--total-timesteps", "4096"]))
    config = json.loads((Path(summary["run"]) / "config.json").read_text())
    assert (summary["status"], config["env_id"]) == ("completed", "reach:Reach-v0")


# Links and pictures


def test_links_lead_to_files_and_headings_and_every_picture_is_shown():
    shown = set()
    for name in DOCS:
        for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), (name, link)
            assert not anchor or anchor in headings(file), (name, link)
            shown.add(str(file.resolve().relative_to(ROOT)))
    pictures = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*") if path.suffix in (".gif", ".png")}
    assert pictures <= shown


def headings(file):
    """Anchors of the headings of a page."""
    lines = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines]
