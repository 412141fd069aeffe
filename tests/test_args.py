"""The settings: each explained and used, and the order in which they override; and the house rules of the code."""

import ast
import dataclasses
import importlib
import json
import re
import typing
from collections import defaultdict
from pathlib import Path

import pytest

import bc_pretrain
import ppo_continuous
import ppo_residual as ppo
from envs import command, run

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
PACKAGE = sorted((ROOT / "envs").rglob("*.py"))
PPO = [path.stem for path in SCRIPTS if path.stem.startswith("ppo_")]  # scripts that train by PPO
MAY_DIFFER = ("Args", "TUNED", "collect", "train", "evaluate", "main")
COMMON = [
    "seed", "total_timesteps", "num_envs", "num_steps", "minibatch_size", "update_epochs", "learning_rate",
    "anneal_lr", "gamma", "gae_lambda", "clip_coef", "clip_value", "ent_coef", "vf_coef", "max_grad_norm",
    "target_kl", "norm_obs", "norm_reward", "norm_adv", "init_log_std", "hidden_sizes", "weight_decay",
    "critic_warmup", "freeze_normalizer", "device", "threads", "compile", "deterministic", "eval_every", "eval_first",
    "eval_episodes", "eval_seed", "checkpoint_every", "run_root", "run_name", "config", "resume", "pretrained",
    "evaluate", "json", "capture_video", "render", "env_kwargs", "eval_env_kwargs", "track", "dry_run",
]  # fmt: skip


def tree(path):
    return ast.parse(path.read_text(), str(path))


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def args_classes(path):
    """The dataclasses of settings of a script."""
    kinds = [node for node in tree(path).body if isinstance(node, ast.ClassDef)]
    return [node for node in kinds if any(ast.unparse(d) == "dataclass" for d in node.decorator_list)]


def settings_of(script):
    """Names of a script's settings."""
    return [field.name for field in dataclasses.fields(importlib.import_module(script).Args)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_field_has_its_help_text_below_it(path):
    for body in [node.body for node in args_classes(path)]:
        for statement, following in zip(body, [*body[1:], None]):
            if isinstance(statement, ast.AnnAssign):
                text = following.value.value if isinstance(following, ast.Expr) else None
                assert isinstance(text, str), f"{statement.target.id} has no help text"
                assert len(text) > 10, statement.target.id


def test_the_classes_of_settings_are_found():
    found = {path.stem: [node.name for node in args_classes(path)] for path in SCRIPTS}
    assert found.pop("bc_pretrain") == ["CollectArgs", "ValidateArgs", "InspectArgs", "Args"]
    assert set(map(tuple, found.values())) == {("Args",)}
    assert {"ppo_continuous", "ppo_residual"} <= set(PPO)


def names_read(path):
    """Attributes read from something called args, also by getattr with the name written out."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            owner, name = node.args[0], node.args[1].value
        else:
            continue
        if (owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)) in ("args", "chosen"):
            names.add(name)
    return names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_field_is_read(path):
    read = set().union(*map(names_read, [path, *PACKAGE]))
    for node in args_classes(path):
        fields = {statement.target.id for statement in node.body if isinstance(statement, ast.AnnAssign)}
        assert fields - read == set(), node.name


def test_every_name_listed_in_run_is_a_field():
    fields = set().union(*map(settings_of, PPO))
    for names in (command.MAY_CHANGE, command.NOT_INHERITED, command.EVALUATION_ONLY, command.USED_BY_EVALUATE):
        assert set(names) <= fields


@pytest.mark.parametrize("script", PPO)
def test_args_have_the_settings_that_all_scripts_share(script):
    assert set(COMMON) - set(settings_of(script)) == set()


@pytest.mark.parametrize("script", PPO)
def test_settings_of_several_scripts_have_one_order_and_one_type(script):
    own, others = (typing.get_type_hints(module.Args) for module in (importlib.import_module(script), ppo))
    if script == "ppo_grid_socnav":
        assert own.pop("num_envs") == int | typing.Literal["auto"]
    shared = [name for name in own if name in others]
    assert [name for name in others if name in own] == shared
    assert {name: own[name] for name in shared} == {name: others[name] for name in shared}


def help_texts(path):
    """{setting: text}"""
    (node,) = args_classes(path)
    pairs = zip(node.body, node.body[1:])
    return {a.target.id: b.value.value for a, b in pairs if isinstance(a, ast.AnnAssign)}


def test_settings_that_several_scripts_have_are_explained_alike():
    """Those whose meaning differs with the task may have their own words."""
    own_words = {"pretrained", "evaluate", "num_envs", "threads"}
    texts = {script: help_texts(ROOT / f"{script}.py") for script in PPO}
    for name in set(COMMON) - own_words:
        assert len({of_script[name] for of_script in texts.values()}) == 1, name


def test_defaults():
    args = ppo.Args()
    assert args.env_id == "SO101Paper-v0"
    assert args.base_policy == "ik"
    assert ppo_continuous.Args().env_id == "LateralControl-v0"


@pytest.mark.parametrize("script", PPO)
def test_defaults_of_all(script):
    module = importlib.import_module(script)
    args = module.Args()
    assert args.run_root == "runs"
    off = ("run_name", "config", "resume", "pretrained", "evaluate", "json", "render", "target_kl", "final_log_std")
    assert {name: getattr(args, name) for name in off} == dict.fromkeys(off)
    assert not any((args.track, args.capture_video, args.dry_run, args.compile, args.deterministic))
    assert (args.group_size, args.critic_warmup, args.freeze_normalizer) == (1, 0, False)
    assert typing.get_args(typing.get_type_hints(module.Args)["device"]) == ("auto", "cpu", "cuda")
    command.checked(args)


@pytest.mark.parametrize("script", PPO)
def test_every_tuned_row_is_one_that_can_work(script):
    module = importlib.import_module(script)
    for choice in module.TUNED:
        command.checked(module.Args.tuned(choice))


@pytest.fixture
def parse(monkeypatch):
    """What main() makes of a command line."""

    def parse(*argv, script=ppo):
        taken = []
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *argv])
        monkeypatch.setattr(script, "train", taken.append)
        monkeypatch.setattr(script, "evaluate", taken.append, raising=False)
        monkeypatch.setattr(script, "collect", lambda *args: taken.append(*args))
        script.main.__wrapped__()
        return taken[0]

    return parse


@pytest.fixture
def tuned(monkeypatch):
    monkeypatch.setitem(ppo.TUNED, "zero", {"learning_rate": 0.0125, "num_envs": 4})


def test_nothing_given_is_the_defaults_of_the_tuned_row(parse, monkeypatch):
    monkeypatch.setattr(ppo, "TUNED", {})
    assert parse() == ppo.Args()
    assert ppo.Args.tuned() == ppo.Args()


def test_tuned_row_follows_the_base_policy(parse, tuned):
    args = parse("--base-policy", "zero")
    assert args == ppo.Args(base_policy="zero", learning_rate=0.0125, num_envs=4)
    assert args == ppo.Args.tuned("zero")
    assert ppo.Args.tuned("zero", num_envs=3) == ppo.Args(base_policy="zero", learning_rate=0.0125, num_envs=3)
    elsewhere = parse("--base-policy", "zero", "--env-id", "Pendulum-v1")
    assert elsewhere == ppo.Args(base_policy="zero", env_id="Pendulum-v1")  # the rows are of SO101Paper-v0


def test_a_flag_wins_over_the_tuned_row(parse, tuned):
    args = parse("--base-policy", "zero", "--learning-rate", "0.5")
    assert (args.learning_rate, args.num_envs) == (0.5, 4)
    args = parse("--learning-rate", "3e-4", "--base-policy", "zero")  # also one that repeats the default
    assert args.learning_rate == 3e-4


def test_the_tuned_row_of_ppo_continuous_follows_the_environment(parse, monkeypatch, tmp_path):
    rows = {"Hopper-v5": {"learning_rate": 0.0125, "num_envs": 4}, "LateralControl-v0": {"gamma": 0.75}}
    monkeypatch.setattr(ppo_continuous, "TUNED", rows)
    fresh, script = ppo_continuous.Args, ppo_continuous
    assert parse(script=script) == fresh(gamma=0.75) == fresh.tuned()
    args = parse("--env-id", "Hopper-v5", "--num-envs", "2", script=script)
    assert args == fresh(env_id="Hopper-v5", learning_rate=0.0125, num_envs=2)
    assert args == fresh.tuned("Hopper-v5", num_envs=2)
    assert parse("--env-id", "Walker2d-v5", script=script) == fresh(env_id="Walker2d-v5")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"env_id": "Hopper-v5", "num_envs": 3}))
    args = dataclasses.replace(parse("--config", str(file), script=script), config=None)
    assert args == fresh(env_id="Hopper-v5", learning_rate=0.0125, num_envs=3)


def test_both_commands_of_bc_pretrain(parse):
    args = parse("collect", "--dataset", "x", "--seeds", "1", "2", "--env-kwargs", "copies", "2", script=bc_pretrain)
    assert args == bc_pretrain.CollectArgs(dataset="x", seeds=(1, 2), env_kwargs={"copies": 2})
    args = parse("train", "--dataset", "x", "--loss", "nll", "--norm-obs", "False", script=bc_pretrain)
    assert args == bc_pretrain.Args(dataset="x", loss="nll", norm_obs=False)
    assert parse("train", "--dataset", "x", script=bc_pretrain).norm_obs is None


def test_a_flag_wins_over_the_config_and_the_config_over_the_defaults(parse, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"learning_rate": 0.25, "gamma": 0.5, "hidden_sizes": [8, 8]}))
    args = parse("--config", str(file), "--gamma", "0.75")
    assert (args.learning_rate, args.gamma, args.hidden_sizes) == (0.25, 0.75, (8, 8))
    assert args.clip_coef == ppo.Args().clip_coef


def test_the_config_of_a_run_gives_its_settings_but_not_its_place(parse, tmp_path):
    file = tmp_path / "config.json"
    before = ppo.Args(
        learning_rate=0.25, hidden_sizes=(8,), run_root="elsewhere", run_name="old", resume="x", dry_run=True
    )
    file.write_text(json.dumps({"script": "ppo_residual", "args": dataclasses.asdict(before)}))
    args = dataclasses.replace(parse("--config", str(file)), config=None)
    assert args == ppo.Args(learning_rate=0.25, hidden_sizes=(8,))


def test_a_config_with_an_unknown_or_impossible_setting_is_refused(parse, tmp_path):
    file = tmp_path / "config.json"
    for content, says in (({"learnin_rate": 1.0}, "unknown"), ({"num_envs": "many"}, "num_envs"), ([1], "object")):
        file.write_text(json.dumps(content))
        with pytest.raises(run.UserError, match=says):
            parse("--config", str(file))


def test_all_config_values_survive_json(parse, tmp_path):
    file = tmp_path / "config.json"
    args = ppo.Args(
        env_kwargs={"frame_margin": 0.03, "randomize": False}, target_kl=0.02, hidden_sizes=(1, 2, 3), seed=9
    )
    file.write_text(json.dumps({"args": dataclasses.asdict(args)}))
    parsed = parse("--config", str(file))
    assert dataclasses.replace(parsed, config=None) == args


def help_text(parse, capsys, *argv, script=ppo):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv, "--help", script=script)
    assert stopped.value.code == 0
    return re.sub(r"[│\s]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))


def test_help_shows_the_values_in_force(parse, tuned, capsys, tmp_path):
    assert "default: 0.0125" not in help_text(parse, capsys)
    assert "default: 0.0125" in help_text(parse, capsys, "--base-policy", "zero")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"learning_rate": 0.0625}))
    assert "default: 0.0625" in help_text(parse, capsys, "--config", str(file))


@pytest.mark.parametrize("script", PPO)
def test_help_lists_every_setting(parse, capsys, script):
    text = help_text(parse, capsys, script=importlib.import_module(script))
    for name in settings_of(script):
        assert f"--{name.replace('_', '-')}" in text, name


@pytest.mark.parametrize(("command_", "args_class"), [("collect", "CollectArgs"), ("train", "Args")])
def test_help_of_bc_pretrain_lists_every_setting(parse, capsys, command_, args_class):
    text = help_text(parse, capsys, command_, script=bc_pretrain)
    for field in dataclasses.fields(getattr(bc_pretrain, args_class)):
        assert f"--{field.name.replace('_', '-')}" in text, field.name


def test_arguments_of_the_environment_add_to_those_that_are_there(parse, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"env_kwargs": {"action_mode": "absolute", "data_path": "a"}}))
    line = ("--config", str(config), "--env-kwargs", "data_path", "b", "model_path", "c")
    args = parse(*line, script=ppo_continuous)
    assert args.env_kwargs == {"action_mode": "absolute", "data_path": "b", "model_path": "c"}
    args = parse(*line[:2], script=ppo_continuous)
    assert args.env_kwargs == {"action_mode": "absolute", "data_path": "a"}


def test_nothing_is_silently_ignored(parse):
    with pytest.raises(run.UserError, match="--compare-base"):
        parse("--compare-base")
    with pytest.raises(run.UserError, match="--learning-rate"):
        parse("--evaluate", "ik", "--learning-rate", "0.1")
    assert parse("--evaluate", "ik", "--eval-episodes", "7").eval_episodes == 7


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"num_envs": 0}, "--num-envs"),
        ({"minibatch_size": 1}, "--minibatch-size"),
        ({"minibatch_size": 100}, "--minibatch-size"),
        ({"total_timesteps": 2047}, "--total-timesteps"),
        ({"gamma": 1.5}, "--gamma"),
        ({"gae_lambda": float("nan")}, "--gae-lambda"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"learning_rate": float("inf")}, "--learning-rate"),
        ({"clip_coef": 0.0}, "--clip-coef"),
        ({"ent_coef": float("nan")}, "--ent-coef"),
        ({"init_log_std": float("nan")}, "--init-log-std"),
        ({"target_kl": -0.1}, "--target-kl"),
        ({"hidden_sizes": (64, 0)}, "--hidden-sizes"),
        ({"eval_every": -1}, "--eval-every"),
        ({"env_kwargs": {"split": "test"}}, "--env-kwargs"),
        ({"group_size": 0}, "--group-size"),
        ({"group_size": 3}, "--group-size must be a divisor of --num-envs (8|256), not 3"),
        ({"critic_warmup": -1}, "--critic-warmup"),
        ({"freeze_normalizer": True, "norm_obs": True}, "--freeze-normalizer"),
        ({"freeze_normalizer": True, "norm_obs": False, "pretrained": "runs/clone"}, "--freeze-normalizer"),
        ({"final_log_std": float("nan")}, "--final-log-std"),
        ({"eval_episodes": -1}, "--eval-episodes"),
    ],
)
@pytest.mark.parametrize("script", PPO)
def test_values_that_cannot_work_are_refused_by_name(script, change, flag):
    with pytest.raises(run.UserError, match=flag):
        command.checked(importlib.import_module(script).Args(**change))


def imported(path):
    """Top-level names of the modules that a file imports."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", [*SCRIPTS, *PACKAGE], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_a_script(path):
    assert imported(path) & {script.stem for script in SCRIPTS} == set()
    assert imported(path) & {"tools", "tests"} == set()


def definitions(path):
    """Top-level functions and classes of a file: {name: text}."""
    source = path.read_text()
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name: text_of(source, node) for node in tree(path).body if isinstance(node, kinds)}


def text_of(source, node):
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def different(texts):
    """Names that several files define, and not alike; texts: {file: {name: text}}."""
    versions = defaultdict(set)
    for definitions_of_file in texts.values():
        for name, text in definitions_of_file.items():
            versions[name].add(text)
    return sorted(name for name, found in versions.items() if len(found) > 1 and name not in MAY_DIFFER)


def test_same_name_same_text():
    assert different({path.name: definitions(path) for path in SCRIPTS}) == []
    first, second = {"gae": "def gae(): 1", "train": "a"}, {"gae": "def gae(): 2", "train": "b"}
    assert different({"one": first, "two": second}) == ["gae"]


def depth(node, inside=0):
    """How deep blocks lie in one another; elif is no deeper than its if."""
    blocks = ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match
    deepest = inside
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.FunctionDef):
                is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
                deeper = isinstance(child, blocks) and not is_elif
                deepest = max(deepest, depth(child, inside + deeper))
    return deepest


def test_depth_counts_blocks(parse):
    source = "def f():\n for x in y:\n  if x:\n   pass\n  elif z:\n   while x:\n    pass\n"
    assert depth(ast.parse(source).body[0]) == 3


@pytest.mark.parametrize("path", [*SCRIPTS, *PACKAGE], ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_flat(path):
    for function in functions(path):
        if function.name == "train" and path in SCRIPTS:
            continue
        assert function.end_lineno - function.lineno < 60, function.name
        assert depth(function) <= 4, function.name
