"""Every file that a user can name, with how the program reads it: small sound ones to damage, and the reading."""

import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ablate
import compare_runs
import gymnasium as gym
import mutate
import numpy as np
import onnx
import torch
import tune
from onnx import TensorProto, helper, numpy_helper
from torch.utils import tensorboard

import bc_pretrain
import envs
import ppo_continuous
from envs import ballbot_depth, command, lateral_model, lateral_segments, rollout, run
from envs.batch_env import BatchEnv
from envs.socnav import metrics

BYTES, TABLE = mutate.BLIND, (*mutate.BLIND, *[mutate.csv_cells] * 12)
JSON, LINES = (*mutate.BLIND, *[mutate.json_values] * 24), (*mutate.BLIND, *[mutate.jsonl_values] * 24)
TOML = (*mutate.BLIND, *[mutate.toml_values] * 24)
PT = (*mutate.BLIND, mutate.zip_members, mutate.zip_members, mutate.pt_bomb, *[mutate.pt_values] * 30)
NPZ = (*mutate.BLIND, *[mutate.zip_members] * 3, *[mutate.npz_arrays] * 12, *[mutate.npy_header] * 4)
ONNX = (*mutate.BLIND, *[mutator for mutator in mutate.ONNX for _ in range(4)])


@dataclass
class Reader:
    """How the program reads some files.

    make: writes sound files into a folder; read: reads them there, the working directory being the folder.
    files: {name: mutators} of those that are damaged, one at a time.
    writes: names of files that reading may write, and of folders in which it may.
    share: of all mutated files, relative to the other readers'.
    """

    make: Callable[[Path], None]
    read: Callable[[], None]
    files: dict[str, tuple]
    writes: tuple[str, ...] = ()
    share: float = 1.0
    fails: tuple[type[Exception], ...] = field(default=(run.UserError,))


class Home(BatchEnv):
    """A point moves by its action towards 0; 6 steps."""

    measures = ("distance",)

    def __init__(self, num_envs=1, training=True, split="train", gain: float = 1.0, render_mode=None):
        box, action = gym.spaces.Box(-20, 20, (2,), np.float32), gym.spaces.Box(-0.5, 0.5, (1,), np.float32)
        super().__init__(num_envs, box, action, 6, training, split, render_mode)
        self.x, self.gain = np.zeros(num_envs), gain

    def start(self, rows):
        for i in rows:
            self.x[i] = self.rngs[i].uniform(-1, 1)

    def advance(self, action):
        self.x += self.gain * np.clip(action[:, 0], -0.5, 0.5)
        arrived = np.abs(self.x) < 0.02
        return -np.abs(self.x), arrived, {"is_success": arrived, "distance": np.abs(self.x)}

    def observe(self, rows):
        return np.stack([self.x[rows], np.ones(len(rows))], axis=1).astype(np.float32)

    def state(self):
        return {"x": self.x}


HOME = "FuzzHome-v0"
if HOME not in gym.registry:
    gym.register(HOME, vector_entry_point=Home)


def tiny(**changes: Any) -> ppo_continuous.Args:
    """A run of two iterations."""
    settings = {
        "env_id": HOME, "env_kwargs": {"gain": 0.5}, "num_envs": 2, "num_steps": 8, "minibatch_size": 16,
        "update_epochs": 1, "hidden_sizes": (4,), "total_timesteps": 32, "eval_every": 16, "eval_episodes": 2,
        "checkpoint_every": 16, "run_root": ".", "run_name": "run",
    }  # fmt: skip
    return ppo_continuous.Args(**{**settings, **changes})


class NoWriter:
    """In place of TensorBoard's, which takes longer than a tiny run."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def add_scalar(self, *args: Any) -> None:
        pass

    def close(self) -> None:
        pass


def quickly() -> None:
    """What takes long and reads nothing is left out."""
    torch.set_num_threads(1)
    tensorboard.SummaryWriter = NoWriter
    run.git_commit, run.version = lambda: None, lambda name: "0"
    run.export_onnx = lambda agent, obs, path, *about: path.write_bytes(b"onnx")
    run.os.fsync = lambda descriptor: None


@cache
def warm() -> None:
    """Import what is slow to import, so that child processes find it there."""
    import matplotlib.pyplot
    import onnxruntime  # noqa: F401
    import optuna  # noqa: F401

    matplotlib.use("agg")
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.sum().backward()
    optimizer.step()


def make_run(folder: Path) -> None:
    """A run of two iterations with all of its files, and the test.json of an evaluation."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        ppo_continuous.train(tiny(eval_first=1))
        result = rollout.evaluate(rollout.Zero(1), tiny(), "test")
        result["base"], result["gain"] = (
            rollout.evaluate(rollout.Zero(1), tiny(), "test"),
            {"of": "success", "gain": 0.5},
        )
        run.write_json(Path("run/test.json"), {"policy": "run", "sha256": run.sha256(Path("run/best.pt")), **result})
        shutil.copytree("run", "other")
        other = json.loads(Path("other/summary.json").read_text())
        run.write_json(Path("other/summary.json"), {**other, "run": "other"})
        config = json.loads(Path("run/config.json").read_text())
        parent = {"sha256": "x", "config": config, "steps": 32}
        run.write_json(Path("run/config.json"), {**config, "parents": {"x/best.pt": parent, "x.onnx": parent}})
    finally:
        os.chdir(here)


def listen(policy: Any, *about: Any) -> None:
    """In place of an evaluation: one action."""
    policy(np.zeros((3, 2), np.float32))


def make_stopped(folder: Path) -> None:
    """A run that has one checkpoint, at half of its steps."""
    make_run(folder)
    for name in ("run/final.pt", "run/checkpoints/step_000000032.pt", "run/summary.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "other")
    run.write_json(folder / "run/summary.json", {"status": "interrupted", "steps": 16})


def read_policy() -> None:
    policy = run.load_policy("run", kind="policy")
    args = tiny()
    agent = ppo_continuous.make_agent(home(), args)
    run.load_agent(agent, policy, args, "run")
    rollout.Deployed(agent)(np.zeros((3, 2), np.float32))


@cache
def home() -> Home:
    return envs.make_vec(HOME, 1)


def read_evaluated() -> None:
    """--evaluate run, without the episodes."""
    rollout.measure = listen
    ppo_continuous.evaluate(command.parse(ppo_continuous.Args, ppo_continuous.Args.tuned, argv=["--evaluate", "run"]))


def read_expert() -> None:
    """collect --policy run, without the episodes; and where a run that started from it says that it is from."""
    bc_pretrain.who_plays(bc_pretrain.CollectArgs("x", policy="run"))
    run.parents(tiny(pretrained="run"))


def read_resumed() -> None:
    """--resume run: it goes on where it stopped, to its end."""
    with redirect_stdout(io.StringIO()):
        ppo_continuous.train(tiny(eval_first=1, run_name=None, resume="run"))


def snapshot(env_id: str, **kwargs: Any) -> tuple[Callable, Callable]:
    """The state of an environment: write and read."""

    @cache
    def vec() -> Any:
        return envs.make_vec(env_id, 2, seed=1, **kwargs)

    def make(folder: Path) -> None:
        vec().reset(seed=3)
        run.save(folder / "state.pt", {"envs": vec().state_dict()})

    def read() -> None:
        state = run.read_pt(Path("state.pt"), "use another")
        if "envs" not in state:
            raise run.UserError("state.pt: has no envs; use another")
        vec().load_state_dict(state["envs"])
        low, high = vec().single_action_space.low, vec().single_action_space.high
        for _ in range(2):
            vec().step(np.stack([low, high]))

    return make, read


def make_dataset(folder: Path) -> None:
    """Demonstrations of three episodes."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        settings = {"env_id": HOME, "episodes": 3, "seeds": (3,), "run_root": "."}
        bc_pretrain.collect(bc_pretrain.CollectArgs("home", policy="zero", **settings))
    finally:
        os.chdir(here)


def read_dataset() -> None:
    """validate and inspect."""
    with redirect_stdout(io.StringIO()):
        bc_pretrain.inspect(bc_pretrain.InspectArgs("home", run_root="."))
        bc_pretrain.inspect(bc_pretrain.InspectArgs("home", episode=1, run_root="."))
        bc_pretrain.validate(bc_pretrain.ValidateArgs("home", run_root="."))


def read_cloned() -> None:
    """Train on it as if its manifest said that it is this file."""
    manifest = run.read_json(Path("datasets/home.json"))
    if isinstance(manifest.get("sha256"), str):
        run.write_json(Path("datasets/home.json"), {**manifest, "sha256": run.sha256(Path("datasets/home.npz"))})
    shutil.rmtree("clone", ignore_errors=True)
    settings = {"epochs": 1, "hidden_sizes": (4,), "eval_episodes": 2, "run_root": ".", "run_name": "clone"}
    bc_pretrain.train(bc_pretrain.Args("home", **settings))


def make_onnx_policy(folder: Path) -> None:
    """A network of one hidden layer: (batch, 2) -> (batch, 1)."""
    rng = np.random.default_rng(1)
    shapes = {"w1": (2, 3), "b1": (3,), "w2": (3, 1), "b2": (1,)}
    weights = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), name) for name, s in shapes.items()]
    nodes = [
        helper.make_node("Gemm", ["obs", "w1", "b1"], ["hidden"]),
        helper.make_node("Tanh", ["hidden"], ["bent"]),
        helper.make_node("Gemm", ["bent", "w2", "b2"], ["action"]),
    ]
    value = helper.make_tensor_value_info
    inputs, outputs = (value(name, TensorProto.FLOAT, ["batch", n]) for name, n in (("obs", 2), ("action", 1)))
    graph = helper.make_graph(nodes, "policy", [inputs], [outputs], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, {"kind": "policy", "action_mode": '"delta"', "action_repeat": "2"})
    onnx.save(model, folder / "policy.onnx")
    (folder.parent / "outside.bin").write_bytes(bytes(100))
    (folder / "outside.bin").write_bytes(bytes(100))


def read_onnx_policy() -> None:
    policy = rollout.OnnxPolicy("policy.onnx", 2, 1)
    policy(np.zeros((3, 2), np.float32))


def make_dynamics(folder: Path) -> None:
    """A model of the challenge's shape: states (b, 20, 4), tokens (b, 20) -> logits (b, 20, 1024)."""
    rng = np.random.default_rng(1)
    table, weights = rng.normal(size=(1024, 2)), rng.normal(size=(6, 1024))
    tensors = [
        numpy_helper.from_array(x.astype(np.float16), name) for x, name in ((table, "table16"), (weights, "w16"))
    ]
    nodes = [
        helper.make_node("Cast", ["table16"], ["table"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["w16"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["table", "tokens"], ["embedded"]),
        helper.make_node("Concat", ["states", "embedded"], ["both"], axis=2),
        helper.make_node("MatMul", ["both", "w"], ["logits"]),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("states", TensorProto.FLOAT, ["b", 20, 4]), value("tokens", TensorProto.INT64, ["b", 20])]
    graph = helper.make_graph(nodes, "car", inputs, [value("logits", TensorProto.FLOAT, ["b", 20, 1024])], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "car.onnx")


def make_own_dynamics(folder: Path) -> None:
    shutil.copy(Path(lateral_model.__file__).parent / "assets" / "lateral_dynamics.onnx", folder / "car.onnx")


def read_dynamics() -> None:
    model = lateral_model.Dynamics("car.onnx")
    model.logits(np.zeros((3, 20, 4), np.float32), np.zeros((3, 20), np.int64))


def make_encoder(folder: Path) -> None:
    ballbot_depth.save_encoder(folder / "encoder.pt", ballbot_depth.DepthEncoder(4), rmse=0.1)


def read_encoder() -> None:
    ballbot_depth.FrozenEncoder("encoder.pt", 4)(np.zeros((2, 2, 4, 4), np.float32))


def make_segments(folder: Path) -> None:
    rows = [",".join(("t", *lateral_segments.COLUMNS))]
    rows += [f"{t / 10},{20 + t / 50},0.1,0.01,{np.sin(t / 40):.3f},0.2" for t in range(lateral_segments.MIN_ROWS)]
    (folder / "data").mkdir()
    for name in ("a", "b"):
        (folder / "data" / f"{name}.csv").write_text("\n".join(rows) + "\n")


def read_segments() -> None:
    lateral_segments.split_of(lateral_segments.load_folder("data"), "train")


def read_compared() -> None:
    """compare_runs.py: the table, and the comparison as if the damaged run had begun from a clone."""
    one, other = compare_runs.read_run("run"), compare_runs.read_run("other")
    compare_runs.table([one, other])
    compare_runs.origin([one, other])
    args = compare_runs.Args(criterion={"success_rate": 0.9, "mean_return": -100.0}, window=2, group="x")
    compare_runs.describe(compare_runs.compare([other], [one], args))


def read_drawn() -> None:
    """compare_runs.py --png."""
    compare_runs.draw({"evaluation": [compare_runs.read_run("run")]}, Path("curves.png"), True)


def make_sweep(folder: Path) -> None:
    (folder / "sweep.toml").write_text(
        """script = "ppo_continuous"
trials = 3
metric = "mean_return"
objective = "last_n_mean"
last_n = 2
[args]
env_id = "Ballbot-v0"
total_timesteps = 500
hidden_sizes = [4, 4]
anneal_lr = false
env_kwargs = {max_tilt = 20.0}
[space.learning_rate]
low = 1e-5
high = 1e-3
log = true
[space.num_steps]
low = 8
high = 64
step = 8
[space.minibatch_size]
choices = [128, 256]
[constraints]
failure_rate_max = 0.1
[pruning]
first_trials = 4
"""
    )


def read_sweep() -> None:
    """What the study makes of it, up to the first trial's command line."""
    import optuna

    sweep = tune.load_sweep("sweep.toml")
    types = tune.types_of(sweep.script)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    values = {name: tune.suggest(trial, name, space, types[name] is int) for name, space in sweep.space.items()}
    tune.flags({**sweep.args, **values}, types)
    optuna.pruners.MedianPruner(n_startup_trials=sweep.pruning.get("first_trials", 5))
    optuna.samplers.TPESampler(seed=sweep.seed + 3)
    json.dumps(asdict(sweep))


def make_ablation(folder: Path) -> None:
    (folder / "ablations").mkdir()
    (folder / "ablation.toml").write_text(
        """script = "ppo_residual"
seeds = [1, 2]
eval_episodes = 20
eval_seed = 7
[args]
total_timesteps = 5000
hidden_sizes = [4, 4]
env_kwargs = {frame_margin = 0.01}
[variants]
"as it comes" = {}
"alpha 1" = {alpha = 1.0, norm_obs = false, env_kwargs = {randomize = false}}
"""
    )


def read_ablation() -> None:
    """What ablate.py makes of it, up to the command lines."""
    ablation = ablate.load_ablation("ablation.toml")
    for variant in ablation.variants:
        for seed in ablation.seeds:
            ablate.Job(ablation, variant, seed, Path("ablations")).next_command()


def make_study(folder: Path) -> None:
    make_sweep(folder)
    study = tune.open_study(tune.load_sweep(str(folder / "sweep.toml")), Path("sweep.toml"), folder / "study")
    sweep, trial = tune.load_sweep(str(folder / "sweep.toml")), study.ask()
    for name, space in sweep.space.items():
        tune.suggest(trial, name, space, tune.types_of(sweep.script)[name] is int)
    trial.set_user_attr("error", "none")


def read_study() -> None:
    """A study that goes on: its database."""
    sweep = tune.load_sweep("sweep.toml")
    tune.report(tune.open_study(sweep, Path("sweep.toml"), Path("study")), sweep)


def make_config(folder: Path) -> None:
    config = {"script": "ppo_continuous", "args": asdict(tiny(final_log_std=-1.0, target_kl=0.1))}
    run.write_json(folder / "config.json", config)


def read_config() -> None:
    args = command.parse(ppo_continuous.Args, ppo_continuous.Args.tuned, argv=["--config", "config.json"])
    args = command.checked(args)
    if args.num_envs < 1000:
        envs.make_vec(args.env_id, 1, **args.env_kwargs)


def make_weights(folder: Path) -> None:
    shutil.copy(metrics.FILE, folder / "snqi.json")
    run.write_json(folder / "weights.json", metrics.REWARDS["route_completion"])


def read_weights() -> None:
    settings = metrics.load_snqi("snqi.json")
    for reward in ("route_completion", "snqi_step"):
        weights = metrics.reward_weights(reward, "weights.json" if reward != "snqi_step" else None, settings, 100.0)
        assert np.isfinite([*weights.values()]).all()
    names = ("success", "time", "comfort_exposure", *metrics.NORMALISED)
    assert np.isfinite(metrics.snqi({name: np.zeros(2) for name in names}, settings)).all()


NUMBERS = (run.UserError, FloatingPointError)  # where training goes on with what was read
SNAPSHOTS = {
    "home": (HOME, {}),
    "so101": ("SO101Paper-v0", {}),
    "lateral": ("LateralControl-v0", {}),
    "ballbot": ("Ballbot-v0", {}),
    "depth": ("BallbotDepth-v0", {"depth_size": 4}),
    "socnav": ("SocNavGrid-v0", {"scenario": "classic_doorway_low", "grid_size": 8}),
    "pendulum": ("Pendulum-v1", {}),
}
READERS = {
    "policy": Reader(make_run, read_policy, {"run/best.pt": PT}, share=3),
    "evaluate": Reader(make_run, read_evaluated, {"run/best.pt": PT, "run/config.json": JSON}, share=0.7),
    "expert": Reader(
        make_run, read_expert, {"run/best.pt": PT, "run/config.json": JSON, "run/summary.json": JSON}, share=1
    ),
    "checkpoint": Reader(
        make_run, lambda: run.load_checkpoint(run.find_checkpoint("run/final.pt")), {"run/final.pt": PT}, share=1
    ),
    "resume": Reader(
        make_stopped, read_resumed, {"run/checkpoints/step_000000016.pt": PT}, ("run",), share=1.5, fails=NUMBERS
    ),
    "resume_logs": Reader(
        make_stopped,
        read_resumed,
        {
            **{f"run/{name}.jsonl": LINES for name in ("evaluations", "episodes", "first_evaluations")},
            **{"run/progress.csv": TABLE, "run/config.json": JSON, "run/summary.json": JSON},
        },
        ("run",),
        share=1,
    ),
    **{
        f"snapshot_{name}": Reader(*snapshot(env_id, **kwargs), {"state.pt": PT}, share=0.8, fails=NUMBERS)
        for name, (env_id, kwargs) in SNAPSHOTS.items()
    },
    "dataset": Reader(
        make_dataset, read_dataset, {"datasets/home.npz": NPZ, "datasets/home.json": JSON}, ("datasets",), 3
    ),
    "clone": Reader(
        make_dataset, read_cloned, {"datasets/home.npz": NPZ, "datasets/home.json": JSON}, ("datasets", "clone"), 2,
        NUMBERS,
    ),
    "onnx_policy": Reader(make_onnx_policy, read_onnx_policy, {"policy.onnx": ONNX}, share=4),
    "dynamics": Reader(make_dynamics, read_dynamics, {"car.onnx": ONNX}, share=2),
    "own_dynamics": Reader(make_own_dynamics, read_dynamics, {"car.onnx": ONNX}, share=0.5),
    "encoder": Reader(make_encoder, read_encoder, {"encoder.pt": PT}, share=1.5),
    "segments": Reader(make_segments, read_segments, {"data/a.csv": TABLE}, share=1.5),
    "compare": Reader(
        make_run,
        read_compared,
        {
            **{f"run/{name}.json": JSON for name in ("config", "summary", "test")},
            **{"run/evaluations.jsonl": LINES, "run/progress.csv": TABLE},
        },
        share=1.5,
    ),
    "draw": Reader(
        make_run, read_drawn, {"run/evaluations.jsonl": LINES, "run/progress.csv": TABLE}, ("curves.png",), 0.1
    ),
    "sweep": Reader(make_sweep, read_sweep, {"sweep.toml": TOML}, share=2.5),
    "ablation": Reader(make_ablation, read_ablation, {"ablation.toml": TOML}, ("ablations",), share=1),
    "study": Reader(make_study, read_study, {"study/study.db": BYTES}, ("study",), share=0.05),
    "config": Reader(make_config, read_config, {"config.json": JSON}, share=1),
    "weights": Reader(make_weights, read_weights, {"snqi.json": JSON, "weights.json": JSON}, share=2.5),
}  # fmt: skip
