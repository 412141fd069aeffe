"""The structure of the project: which module may import which, what an import loads, which code is shared."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
PPO = [name for name in SCRIPTS if name.startswith("ppo_")]
TRAINING = {"envs.run", "envs.cli", "envs.distributed", "envs.demonstrations"}
MAY_DIFFER = {"Args", "collect_rollout", "train", "load_policy", "main"}


def tree(path):
    return ast.parse(path.read_text(), str(path))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path for path in [*ROOT.glob("*.py"), *(ROOT / "envs").rglob("*.py"), *ROOT.glob("tools/*.py")]
}


def imports(module):
    """The modules of this project that a module imports, also within functions."""
    found = set()
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys() | {name for name in found if name.split(".")[0] in ("tools", "tests")}


def test_imports_point_one_way():
    """tools -> scripts -> envs; within envs: run, cli, distributed -> evaluation -> batch_env."""
    for module in MODULES:
        found = imports(module)
        if module.startswith("tools."):
            continue
        assert not {name for name in found if name.startswith(("tools", "tests"))}, module
        scripts = found & set(SCRIPTS)
        assert scripts <= ({"ppo_grid_socnav"} if module == "bc_pretrain" else set()), (module, scripts)
    assert imports("envs") <= {"envs", "envs.batch_env"}
    assert imports("envs.batch_env") <= {"envs"}
    assert imports("envs.evaluation") <= {"envs", "envs.batch_env"}
    assert imports("envs.distributed") <= {"envs", "envs.run"}
    assert imports("envs.run") <= {"envs", "envs.batch_env", "envs.evaluation"}
    assert "envs.cli" not in imports("envs.demonstrations")
    environments = {name for name in MODULES if name.startswith("envs.")} - TRAINING - {"envs.evaluation"}
    assert {"envs.so101", "envs.lateral", "envs.ballbot", "envs.socnav.environment"} <= environments
    for module in environments:
        assert not imports(module) & TRAINING, module


PROGRAM = """
import contextlib, io, json, runpy, sys
loaded = {}
def note(name):
    loaded[name] = sorted(sys.modules)
import envs
note("envs")
for script, *flags in SCRIPTS:
    sys.argv = [script, *flags, "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(script, run_name="__main__")
    note(script)
print(json.dumps(loaded))
"""


def test_importing_envs_and_asking_for_help_load_no_slow_packages():
    scripts = [("bc_pretrain.py", "train"), *((f"{name}.py",) for name in PPO)]
    program = PROGRAM.replace("SCRIPTS", repr(scripts))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = json.loads(done.stdout)
    for name, modules in loaded.items():
        slow = ("mujoco", "onnxruntime", "tensorboard", "torch.utils.tensorboard", "matplotlib", "wandb", "imageio")
        assert not set(modules) & {*slow, *(("tyro",) if name == "envs" else ())}, name
    assert "tyro" in loaded["ppo_residual.py"]
    assert loaded.keys() == {"envs", *(f"{name}.py" for name in SCRIPTS)}


def definitions(script):
    """Top-level functions and classes of a script: {name: node}."""
    return {node.name: node for node in tree(MODULES[script]).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def text_of(script, node):
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(MODULES[script].read_text().splitlines()[first - 1 : node.end_lineno])


def test_what_several_scripts_define_has_the_same_text():
    versions = defaultdict(lambda: defaultdict(list))
    for script in SCRIPTS:
        for name, node in definitions(script).items():
            versions[name][text_of(script, node)].append(script)
    different = {name: [*texts.values()] for name, texts in versions.items() if len(texts) > 1}
    assert {name: scripts for name, scripts in different.items() if name not in MAY_DIFFER} == {}
    assert {"Args", "train"} <= different.keys()
    (users,) = versions["gae"].values()
    assert users == PPO


@pytest.mark.parametrize("script", PPO)
def test_train_calls_few_functions_of_the_support(script):
    """From train and what it calls in the same script, at most 20 distinct functions of the run support. Collectives
    (envs.distributed) and features (envs.socnav) do not count."""
    imported = {}
    for node in tree(MODULES[script]).body:
        if isinstance(node, ast.ImportFrom) and node.module in ("envs", "envs.cli", "envs.evaluation", "envs.run"):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    local, called, open_names, reached = definitions(script), set(), ["train"], set()
    while open_names:
        name = open_names.pop()
        if name in reached:
            continue
        reached.add(name)
        for node in ast.walk(local[name]):
            if isinstance(node, ast.Name) and node.id in local:  # called or passed on
                open_names.append(node.id)
            if isinstance(node, ast.Call):
                called.add(ast.unparse(node.func))
    imported = {name: source for name, source in imported.items() if source != "envs.distributed"}
    support = {name for name in called if name.split(".")[0] in imported}
    assert {"collect_rollout", "ppo_update", "ppo_loss", "gae"} <= reached
    assert "check_finite" in support
    assert len(support) <= 20, sorted(support)
