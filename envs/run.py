"""A training run: its settings, checkpoints, run directory, stopping and resuming, export. No algorithm is here."""

import ast
import contextlib
import csv
import inspect
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map
from tyro.constructors import PrimitiveConstructorSpec

from envs import UserError, make_vec, matches
from envs.evaluation import (
    ACTION_KWARGS,
    BLEND,
    OBS_KWARGS,
    converged_at,
    evaluate,
    example_obs,
    figures,
    make_eval_envs,
    read_json,
    read_policy,
    selection_key,
    sha256,
)

LATEST_INTERVAL = 60.0  # seconds between two writes of checkpoints/latest.pt
PACKAGES = ("torch", "gymnasium", "mujoco", "numpy", "onnxruntime")
POLICY_KEYS = ("policy_type", "script", "args", "env_id", "env_kwargs", "files", "agent", "step")
# Settings that may change when a run is resumed
MAY_CHANGE = {
    *("resume", "config", "preset", "run_root", "run_name", "total_timesteps", "device", "threads", "compile"),
    *("vectorization", "eval_every", "eval_episodes", "checkpoint_every"),
    *("stop_at_convergence", "track", "capture_video", "dry_run"),
}
SET_BY_SCRIPT = ("env_id", "num_envs", "seed", "training", "split", "threads", "render_mode", "copies")
# {smallest and largest valid value: names of settings}
RANGES = {
    (1, 2**20): ("num_envs", "num_steps", "update_epochs", "threads", "group_size", "epochs", "patience"),
    (1, 2**14): ("hidden_sizes", "cnn_channels", "pedestrian_hidden", "num_rays", "num_pedestrians"),
    (0, math.inf): ("eval_every", "eval_episodes", "checkpoint_every", "critic_warmup_updates"),
    (0, 2**32 - 1): ("seed", "eval_seed"),  # NumPy splits a larger seed, and streams could coincide
    (0, 1e9): ("ent_coef", "vf_coef", "weight_decay"),
    (1e-12, 1e9): ("learning_rate", "clip_coef", "max_grad_norm", "target_kl", "val_fraction"),
    (0, 1): ("gamma", "gae_lambda"),
    (-20, 5): ("init_log_std", "final_log_std"),
}
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def parse_value(text: str) -> Any:
    """A number, True, False or a tuple in Python's notation, or else the text itself. A list becomes a tuple."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        if text[:1] in ("(", "["):
            raise ValueError(f"{text} is not a Python tuple or list") from None
        return text
    return tuple(value) if isinstance(value, list) else value if isinstance(value, int | float | tuple) else text


def key_value_pairs(parse: Callable[[str], Any]) -> PrimitiveConstructorSpec:
    """How tyro reads a dict from the command line: as KEY VALUE KEY VALUE ..."""

    def from_strings(strings: list[str]) -> dict[str, Any]:
        if len(strings) % 2:
            raise ValueError(f"a value must follow {strings[-1]}")
        return {key: parse(value) for key, value in zip(strings[::2], strings[1::2])}

    def to_strings(x: dict) -> list[str]:
        return [str(word) for pair in x.items() for word in pair]

    return PrimitiveConstructorSpec("*", "[KEY VALUE ...]", from_strings, lambda x: isinstance(x, dict), to_strings)


EnvKwargs = Annotated[dict[str, int | float | bool | str | tuple], key_value_pairs(parse_value)]
Thresholds = Annotated[dict[str, float], key_value_pairs(float)]


@dataclass(kw_only=True)
class BaseArgs:
    """Settings of all scripts."""

    env_id: str | None = None  # environment
    env_kwargs: EnvKwargs = field(default_factory=dict)  # keyword arguments for the environment, as KEY VALUE pairs
    eval_env_kwargs: EnvKwargs = field(default_factory=dict)  # for evaluation only, added to --env-kwargs
    seed: int = 1  # seed of the networks, the environments and the minibatch order
    threads: int | None = None  # CPU threads of the bundled simulators; None = one per core with MuJoCo, else one

    eval_episodes: int = 100  # episodes per evaluation; 0 = all, if the environment has a fixed number
    eval_seed: int = 1  # seed of the evaluation episodes (train, validation and test use disjoint random streams)
    run_root: str = "runs"  # parent directory of all run directories
    run_name: str | None = None  # name of the run directory; default: <script>__<env id>__seed<seed>__<time>
    config: str | None = None  # JSON or TOML file of settings, such as the config.json of a run
    track: bool = False  # also log to Weights & Biases (offline without a login)
    capture_video: bool = False  # record the first episode of each evaluation in videos/
    dry_run: bool = False  # smoke test: one iteration, an evaluation of two episodes, all output files

    presets: ClassVar[dict[str, dict]] = {}  # {name: values that replace the defaults}
    preset_key: ClassVar[str] = "env_id"  # setting that names the preset of a task

    @classmethod
    def from_preset(cls, name: str | None = None, **overrides: Any) -> Self:
        """Settings with the values of a preset, which keyword arguments override. By default it is the one named like
        env_id or, in a script for one environment, like its base policy or encoder.

        Raises:
            UserError: there is no such preset.
        """
        if name is not None and name not in cls.presets:
            raise UserError(f"unknown preset {name!r}; choose from {', '.join(cls.presets)}")
        if name is None and (cls.preset_key == "env_id" or overrides.get("env_id", cls.env_id) == cls.env_id):
            name = overrides.get(cls.preset_key, getattr(cls, cls.preset_key))
        return cls(**cls.presets.get(name, {}) | overrides)

    @classmethod
    def check_values(cls, values: dict[str, Any], source: str, strict: bool = True) -> dict[str, Any]:
        """Settings from a JSON file or a checkpoint, with tuples for lists. Unknown names are dropped unless strict.

        Raises:
            UserError: an unknown name or a value of the wrong type.
        """

        def with_tuples(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: with_tuples(item) for k, item in x.items()}
            return tuple(map(with_tuples, x)) if isinstance(x, list) else x

        types, values = {f.name: f.type for f in fields(cls)}, with_tuples(values)
        for name, value in values.items():
            if name not in types and strict:
                raise UserError(f"{source}: unknown setting {name!r}; --help lists the settings")
            if name in types and not matches(value, types[name]):
                raise UserError(f"{source}: {name} cannot be {value!r}; --help says what it takes")
        return {name: x for name, x in values.items() if name in types}

    @classmethod
    def from_checkpoint(cls, checkpoint: dict) -> Self:
        """The settings of a policy file, with its environment."""
        values = cls.check_values(checkpoint["args"], checkpoint["file"], strict=False)
        return cls(**values | {"env_id": checkpoint["env_id"], "env_kwargs": checkpoint["env_kwargs"]})


@dataclass(kw_only=True)
class RunArgs(BaseArgs):
    """Settings of the PPO scripts that do not belong to the algorithm."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"  # device for the networks; auto = CUDA if available
    vectorization: Literal["sync", "async"] = "sync"  # async: step Gymnasium's environments in worker processes
    compile: bool = False  # compile the gradient step with torch.compile (needs a C++ compiler)
    deterministic: bool = False  # use deterministic GPU algorithms only

    eval_every: int = 100_000  # environment steps between evaluations on the validation split; 0 = only at the end
    checkpoint_every: int = 100_000  # environment steps between checkpoints; 0 = none
    best_metric: str = "auto"  # metric that selects best.pt; auto = success rate, then the task's score or mean return
    stop_at_convergence: Thresholds | None = None  # stop when three evaluations meet METRIC THRESHOLD ...
    preset: str | None = None  # named settings that replace the defaults; default: the preset of the task
    resume: str | None = None  # run directory or checkpoint to continue; Gymnasium environments start fresh episodes
    pretrained: str | None = None  # policy file or run that initializes actor, critic and normalizer

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps per rollout, over all environments. With action repeat k, one action counts as k steps."""
        return self.num_envs * self.num_steps * self.env_kwargs.get("action_repeat", 1)

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.steps_per_iteration

    def is_due(self, interval: int, step: int) -> bool:
        """Whether the iteration that ended at `step` contains a multiple of the interval; never if it is 0."""
        return interval > 0 and step // interval > (step - self.steps_per_iteration) // interval


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_args(args: BaseArgs) -> None:
    """Raises UserError for a setting out of range, a package that is missing or a setting that the script makes."""
    for (low, high), names in RANGES.items():
        for name in names:
            value = getattr(args, name, None)
            for x in value if isinstance(value, tuple) else [value]:
                if x is not None and not low <= x <= high:
                    raise UserError(f"{flag(name)} must be from {low:g} to {high:g}, not {x}")
    for name in SET_BY_SCRIPT:
        if name in args.env_kwargs or name in args.eval_env_kwargs:
            raise UserError(f"--env-kwargs {name}: the script sets it; use {flag(name)} if there is such a flag")
    for name, package, extra in (("track", "wandb", "track"), ("capture_video", "imageio_ffmpeg", "video")):
        if getattr(args, name) and find_spec(package) is None:
            raise UserError(f"{flag(name)} needs {package}: pip install -e '.[{extra}]'")


def setup(args: Any, distributed: bool = False) -> tuple[Any, torch.device]:
    """Check the settings of a PPO script, seed PyTorch and select the device. Returns the settings, shortened for
    --dry-run, and the device. `distributed` says whether torchrun may start the script.

    Raises:
        UserError: a value that cannot work.
    """
    if args.env_kwargs.get("action_repeat", 1) not in range(1, 10**6):
        raise UserError("--env-kwargs action_repeat must be a whole number from 1")
    steps, rollout_size = args.steps_per_iteration, args.num_envs * args.num_steps
    if args.dry_run:
        args = replace(args, total_timesteps=steps, checkpoint_every=steps, eval_episodes=2)
    check_args(args)
    if torch.distributed.is_torchelastic_launched() and not distributed:
        raise UserError("this script trains in one process; start it without torchrun")
    if args.minibatch_size < 2 or rollout_size % args.minibatch_size:
        raise UserError(f"--minibatch-size must be at least 2 and divide num_envs * num_steps = {rollout_size}")
    if args.total_timesteps < steps:
        raise UserError(f"--total-timesteps must be at least one rollout, {steps} steps")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; use --device cpu or install PyTorch with CUDA")
    if getattr(args, "freeze_obs_stats", False) and not (args.norm_obs and args.pretrained):
        raise UserError("--freeze-obs-stats needs --norm-obs and --pretrained")
    if args.stop_at_convergence == {}:
        raise UserError("--stop-at-convergence needs METRIC THRESHOLD pairs, such as success_rate 0.9")

    torch.set_num_threads(1)  # for layers of 64 units more threads cost more than they save
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return args, torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def make_envs(args: Any, **kwargs: Any) -> Any:
    """The training environments. The evaluation's are made once before, so that their errors appear now.

    Raises:
        UserError: invalid arguments, or no frame for --capture-video.
    """
    check_evaluation(args)
    for name in kwargs:
        if name in args.env_kwargs:
            raise UserError(f"--env-kwargs {name}: use {flag(name)}")
    group_size = getattr(args, "group_size", 1)
    if args.num_envs % group_size:
        raise UserError(f"--group-size must divide --num-envs {args.num_envs}")
    if group_size > 1:
        kwargs["copies"] = group_size
    kwargs |= {"threads": args.threads, "vectorization": args.vectorization}
    return make_vec(args.env_id, args.num_envs, **kwargs, **args.env_kwargs)


def check_evaluation(args: Any) -> None:
    """Make the evaluation environment and, with --capture-video, render a frame. Raises UserError if that fails, or
    unless --best-metric and --stop-at-convergence name metrics of the environment."""
    envs = make_eval_envs(args, 1, "validation", **({"render_mode": "rgb_array"} if args.capture_video else {}))
    known = ("success_rate", "failure_rate", "mean_return", "mean_length", *envs.measures)
    for metric in (args.best_metric, *(args.stop_at_convergence or ())):
        if metric not in ("auto", *known):
            raise UserError(f"{metric} is not a metric of {args.env_id}; choose from {', '.join(known)}")
    if args.capture_video:
        envs.reset(seed=args.eval_seed)
        if not isinstance(envs.render(), np.ndarray):
            raise UserError(f"--capture-video: {args.env_id} does not render images")
    envs.close()


def compile_fn(function: Callable) -> Callable:
    """torch.compile that traces through loss.backward() where this version of PyTorch can.

    Raises:
        UserError: there is no compiler.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"--compile needs a C++ compiler, and there is no {compiler}; install it")
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function)


# Files


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        advice = "free some space or make it writable, then continue with --resume"
        raise UserError(f"{path} could not be written ({error.strerror or error}); {advice}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def append_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(to_json(row)) + "\n" for row in rows)


def to_json(x: Any) -> Any:
    """With None for NaN and infinity, which JSON does not have, and text for other objects."""
    return json.loads(json.dumps(x, default=str), parse_constant=lambda constant: None)


def write_json(path: Path, content: dict) -> None:
    write_file(path, (json.dumps(to_json(content), indent=2) + "\n").encode())


def read_jsonl(path: Path) -> list[dict]:
    """The lines of a log, without a torn last one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def cut_log(source: Path, target: Path, last_step: int) -> None:
    """Copy the header of a .csv log and the lines of a .jsonl or .csv log up to a step."""
    kept = []
    for line in source.read_text(encoding="utf-8").splitlines(keepends=True) if source.exists() else []:
        step = re.match(r'(?:{"step": )?(\d+),', line)  # a torn last line has none
        if line.startswith("step,") or (step and int(step[1]) <= last_step):
            kept.append(line)
    write_file(target, "".join(kept).encode())


def save_pt(path: Path, content: dict) -> None:
    """Save a dict so that it loads with weights_only=True: arrays become tensors and NumPy scalars numbers."""

    def plain(x: Any) -> Any:
        return torch.as_tensor(x) if isinstance(x, np.ndarray) else x.item() if isinstance(x, np.generic) else x

    buffer = io.BytesIO()
    torch.save(tree_map(plain, content), buffer)
    write_file(path, buffer.getvalue())


# Checkpoints


def rng_state() -> dict:
    """The state of PyTorch's random generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def run_folder(path: str | Path) -> Path:
    """The run directory that a file belongs to, or the directory itself."""
    file = Path(path).resolve()
    if file.is_dir():
        return file
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints of a run directory; those that are named by their step come last, the newest of them first."""
    names = [folder / "final.pt", folder / "interrupted.pt", folder / "checkpoints" / "latest.pt"]
    return [*filter(Path.exists, names), *sorted(folder.glob("checkpoints/step_*.pt"), reverse=True)]


def read_checkpoint(path: str, quiet: bool = False) -> dict:
    """A checkpoint file, or the readable checkpoint of a run directory with the largest step.

    Raises:
        UserError: there is none, or the file is a policy without training state.
    """
    newest: dict | None = None
    is_run = Path(path).is_dir()
    for file in checkpoint_files(Path(path)) if is_run else [Path(path)]:
        if newest and file.name.startswith("step_") and file.name <= f"step_{newest['step']:09d}.pt":
            break
        try:
            checkpoint = read_policy(str(file))
        except UserError as error:
            if not is_run or "damaged" not in str(error):
                raise
            if not quiet:
                print(f"skipped {error}", file=sys.stderr)
            continue
        if "optimizer" not in checkpoint:
            raise UserError(f"{file}: a policy without training state; start from it with --pretrained")
        if newest is None or checkpoint["step"] > newest["step"]:
            newest = checkpoint
    if newest is None:
        raise UserError(f"{path}: no readable checkpoint; --resume takes a run directory or a checkpoint")
    return newest


def restore(args: Any, policy_type: str, agent: nn.Module, **objects: Any) -> dict | None:
    """Load what --resume or --pretrained names.

    --pretrained initializes the agent alone. --resume also loads PyTorch's random generators and each of `objects` from
    the entry of the checkpoint with its name.

    Returns:
        The checkpoint of --resume, or None.

    Raises:
        UserError: the file does not fit, the run is complete, or a setting differs that must stay as it was.
    """
    if not args.resume:
        if args.pretrained:
            load_agent(agent, read_policy(args.pretrained, policy_type), args)
        return None
    checkpoint = read_checkpoint(args.resume)
    check_resume(args, checkpoint, policy_type)
    load_agent(agent, checkpoint, args)
    try:
        for name, x in objects.items():
            x.load_state_dict(checkpoint[name])
        set_rng_state(checkpoint["rng"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{checkpoint['file']} does not fit this version or these settings: {error}") from error
    return checkpoint


def check_resume(args: Any, checkpoint: dict, policy_type: str) -> None:
    """Raises UserError if a run is complete or cannot continue with these settings."""
    if checkpoint["policy_type"] != policy_type:
        raise UserError(f"{args.resume}: holds a {checkpoint['policy_type']}, but a {policy_type} is needed")
    before = type(args)(**args.check_values(checkpoint["args"], checkpoint["file"]))
    for f in fields(args):
        old, new = getattr(before, f.name), getattr(args, f.name)
        if isinstance(old, dict) and isinstance(new, dict):  # paths may change, but not the names of files and folders
            old, new = ({k: Path(x).name if os.path.exists(str(x)) else x for k, x in d.items()} for d in (old, new))
        if f.name not in MAY_CHANGE and to_json(old) != to_json(new):
            advice = "--pretrained starts a new run from a policy"
            raise UserError(f"{flag(f.name)} was {old!r} in {args.resume} and cannot change to {new!r}; {advice}")
    summary = run_folder(args.resume) / "summary.json"
    completed = summary.exists() and read_json(summary).get("status") == "completed"
    is_last = completed and Path(checkpoint["file"]).name == "final.pt"  # an older checkpoint can be continued
    done = is_last and args.total_timesteps <= before.total_timesteps
    if done or checkpoint["step"] > args.num_iterations * args.steps_per_iteration:
        raise UserError(f"{args.resume} is complete at {checkpoint['step']:,} steps; raise --total-timesteps to go on")


def load_agent(agent: nn.Module, policy: dict, args: Any) -> None:
    """Copy the parameters and the normalizer of a policy file into an agent.

    Raises:
        UserError: the policy is for another environment, network, observation or action range.
    """
    source, bounds = policy["file"], ("action_low", "action_high")
    if policy["env_id"] != args.env_id:
        raise UserError(f"{source}: a policy for {policy['env_id']}, not {args.env_id}; give its --env-id")
    for name in OBS_KWARGS:
        here, there = (kwargs.get(name, "the default") for kwargs in (args.env_kwargs, policy["env_kwargs"]))
        if here != there:
            raise UserError(f"{source}: was trained with {name} {there}, not {here}; set it with --env-kwargs")
    before = {name: getattr(agent, name).clone() for name in bounds}
    try:
        agent.load_state_dict(policy["agent"])
    except RuntimeError as error:
        advice = "use the settings that it was trained with, such as --hidden-sizes"
        raise UserError(f"{source}: does not fit this agent ({error}); {advice}") from error
    if not all(torch.equal(getattr(agent, name), before[name]) for name in bounds):
        raise UserError(f"{source}: its actions have another range; give the --env-kwargs it was trained with")


def file_hashes(args: BaseArgs) -> dict[str, str]:
    """{path: sha256} of the files that a policy depends on: ONNX base policies and files among the env_kwargs."""
    base_policy = getattr(args, "base_policy", "")
    blend = BLEND.fullmatch(base_policy)
    names = [*(blend.groups() if blend else [base_policy]), *args.env_kwargs.values()]
    return {name: sha256(name) for name in names if isinstance(name, str) and os.path.isfile(name)}


def policy_contents(policy_type: str, script: str, args: Any, agent: nn.Module, step: int) -> dict:
    """The contents of a policy file, which are also the first entries of a checkpoint. policy_type is policy or
    residual; `script` names the file that defines load_policy."""
    about = {"policy_type": policy_type, "script": script, "args": asdict(args), "files": file_hashes(args)}
    environment = {"env_id": args.env_id, "env_kwargs": args.env_kwargs}
    return {**about, **environment, "agent": agent.state_dict(), "step": step}


def export_onnx(agent: nn.Module, envs: Any, policy: dict, path: Path) -> None:
    """Export the deterministic policy, normalizer included: observations (batch, ...) to action (batch, action_dim).
    The metadata say what the policy is for."""
    obs = example_obs(envs)
    obs = obs if isinstance(obs, dict) else {"obs": obs}
    inputs = {name: torch.as_tensor(obs[name]) for name in inspect.signature(agent.forward).parameters}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            deepcopy(agent).cpu().eval(),
            tuple(inputs.values()),
            input_names=[*inputs],
            output_names=["action"],
            dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in inputs},
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer, model.graph, model):
        part.ClearField("metadata_props")  # the exporter notes source lines there, with absolute paths
    metadata = {name: policy[name] for name in ("policy_type", "script", "env_id")}
    metadata |= {name: json.dumps(x) for name, x in policy["env_kwargs"].items() if name in ACTION_KWARGS + OBS_KWARGS}
    if policy["policy_type"] == "residual":
        metadata |= {name: str(policy["args"][name]) for name in ("base_policy", "alpha", "residual_scale")}
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    write_file(path, model.SerializeToString())


# The run


class StopSignal:
    """A context in which SIGINT, SIGTERM and SIGUSR1 set stop_requested instead of ending the process."""

    signum: int | None = None

    @property
    def stop_requested(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> Self:
        main_thread = threading.current_thread() is threading.main_thread()  # others cannot install handlers
        self.previous = {s: signal.signal(s, self._handle) for s in STOP_SIGNALS} if main_thread else {}
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.signum is None:
            self.signum, self.since = signum, time.monotonic()
            os.write(2, b"\nstopping after this iteration; press again to stop at once\n")
        elif time.monotonic() - self.since > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


class Run(StopSignal):
    """A run directory, and the context in which a script trains.

    Args:
        script: name of the training script, without .py.
        args: its settings.
        total_steps: step at which the run is complete.
        checkpoint: what the run is resumed from; logs and best.pt are cut back to it.

    Raises:
        UserError: the directory exists, another process is training in it, or it cannot be written.
    """

    def __init__(self, script: str, args: Any, total_steps: int, checkpoint: dict | None = None):
        self.script, self.args, self.total_steps = script, args, total_steps
        self.start_step = checkpoint["step"] if checkpoint else 0
        self.step, self.start_time, self.last_save = self.start_step, time.time(), time.monotonic()
        self.fresh_episodes = bool(checkpoint) and "fresh_episodes" in checkpoint["envs"]
        self.completed = False
        source = run_folder(args.resume) if checkpoint else None
        self.folder = self._make_folder(source)
        self.lock = self._lock()
        self.recent_episodes: deque[dict] = deque(maxlen=100)
        self.evaluations: list[dict] = []
        if checkpoint:
            self._cut_back(source, checkpoint)
            self.recent_episodes.extend(read_jsonl(self.folder / "episodes.jsonl"))
            self.evaluations = read_jsonl(self.folder / "evaluations.jsonl")
        self.config = self._make_config(source)
        self.wandb = self._start_wandb() if args.track else None
        write_json(self.folder / "config.json", self.config)
        print(self.folder, file=sys.stderr)
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        with writing(self.folder):
            self.writer = SummaryWriter(self.folder, purge_step=self.start_step + 1 if checkpoint else None)
            table = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
            self.writer.add_text("hyperparameters", f"|setting|value|\n|-|-|\n{table}", self.start_step)

    def _make_folder(self, source: Path | None) -> Path:
        root, name = Path(self.args.run_root), self.args.run_name
        if source is not None and (name is None or (root / name).resolve() == source):
            if not (source / "config.json").exists():
                raise UserError(f"{self.args.resume}: not in a run directory; give a new one with --run-name")
            return source
        env_id = self.args.env_id.replace("/", "-").replace(":", "-")
        folder = root / (name or f"{self.script}__{env_id}__seed{self.args.seed}__{datetime.now():%Y%m%d-%H%M%S}")
        if name is None and folder.exists():  # another run began in this second
            folder = folder.with_name(f"{folder.name}-{os.getpid()}")
        if folder.exists():
            advice = ", or continue it with --resume" if checkpoint_files(folder) else ""
            raise UserError(f"{folder} exists; choose another --run-name{advice}")
        with writing(folder):
            (folder / "checkpoints").mkdir(parents=True)
        return folder

    def _lock(self) -> Any:
        import filelock

        lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        with writing(self.folder):
            try:
                lock.acquire()
            except filelock.Timeout:  # which is an OSError
                raise UserError(f"{self.folder}: another process is training in it; wait for its end") from None
        return lock

    def _cut_back(self, source: Path, checkpoint: dict) -> None:
        """Keep of the run in `source` only what came before the checkpoint."""
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        for name in ("progress.csv", "evaluations.jsonl", "episodes.jsonl"):
            cut_log(source / name, self.folder / name, self.start_step)
        for file in checkpoint_files(self.folder):
            with contextlib.suppress(UserError):
                if read_policy(str(file))["step"] > self.start_step:
                    file.unlink()
        for name in ("summary.json", "best.pt"):
            (self.folder / name).unlink(missing_ok=True)
        if checkpoint["best"] is not None:
            self.save("best.pt", {k: checkpoint["best"].get(k, checkpoint[k]) for k in POLICY_KEYS})

    def _make_config(self, source: Path | None) -> dict:
        on_gpu = getattr(self.args, "device", "cpu") != "cpu" and torch.cuda.is_available()
        now = {
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
            "start_time": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        if source is not None and (source / "config.json").exists():  # keep how the run began
            config = read_json(source / "config.json")
            config["resumed"] = [*config.get("resumed", []), {"step": self.start_step, **now}]
            if source != self.folder:
                config.pop("wandb_id", None)
        else:
            about = {"script": self.script, "env_id": self.args.env_id}
            config = {**about, **now, "parents": parents(self.args), "resumed": []}
        return {**config, "args": asdict(self.args)}

    def _start_wandb(self) -> Any:
        """Weights & Biases. Without a login it logs offline into the run directory."""
        import wandb

        self.config.setdefault("wandb_id", f"{self.folder.name}-{time.time_ns() % 10**9}")
        about = {"project": "robot-ppo", "name": self.folder.name, "id": self.config["wandb_id"], "resume": "allow"}
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        settings = wandb.Settings(quiet=True)
        return wandb.init(**about, dir=self.folder, config=self.config, mode=mode, settings=settings)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        super().__exit__()
        try:
            if error is not None and not self.completed:
                with contextlib.suppress(UserError):  # the error itself is what the user must see
                    self._summarize("failed", error=str(error))
            with contextlib.suppress(OSError):
                self.writer.close()
            if self.wandb is not None:
                self.wandb.finish()
        finally:
            self.lock.release()

    def evaluate(self, policy: Any, step: int) -> dict:
        """Evaluate a policy on the validation split. --capture-video records the first episode."""
        video = self.folder / "videos" / f"step_{step:09d}.mp4" if self.args.capture_video else None
        evaluation = {"step": step, **evaluate(policy, self.args, "validation", video)}
        self.evaluations.append(evaluation)
        return evaluation

    def is_best(self, evaluation: dict, best: dict | None) -> bool:
        """Whether an evaluation is the first or, by --best-metric, better than that of the best policy so far."""
        if best is None:
            return True
        metric = self.args.best_metric
        return selection_key(evaluation, metric) > selection_key(best["evaluation"], metric)

    @property
    def converged(self) -> bool:
        """Whether three consecutive evaluations have met --stop-at-convergence."""
        return converged_at(self.evaluations, self.args.stop_at_convergence) is not None

    def save(self, name: str, content: dict) -> None:
        save_pt(self.folder / name, content)
        if name.startswith("checkpoints/"):
            self.last_save = time.monotonic()

    @property
    def latest_due(self) -> bool:
        """Whether the last checkpoint is a minute old."""
        return time.monotonic() - self.last_save >= LATEST_INTERVAL

    def save_checkpoint_if_due(self, state: Callable[[], dict], step: int) -> None:
        """Write checkpoints/step_*.pt every --checkpoint-every steps, else latest.pt every minute."""
        if self.args.is_due(self.args.checkpoint_every, step):
            self.save(f"checkpoints/step_{step:09d}.pt", state())
        elif self.latest_due:
            self.save("checkpoints/latest.pt", state())

    def log(
        self, step: int, stats: dict[str, float], episodes: Iterable[dict] = (), evaluation: dict | None = None
    ) -> None:
        """Log an iteration to TensorBoard, progress.csv, episodes.jsonl, evaluations.jsonl and the screen.

        Args:
            stats: statistics of the update, logged under train/ unless their name has a slash.
            episodes: training episodes that ended in this iteration.
            evaluation: the evaluation, if there was one.
        """
        self.step = step
        self.recent_episodes.extend(episodes)
        scalars: dict[str, float | None] = {}
        for name, key in {"ep_reward": "return", "ep_length": "length", "success_rate_100": "success"}.items():
            values = [episode[key] for episode in self.recent_episodes if episode[key] is not None]
            scalars[f"rollout/{name}"] = float(np.mean(values)) if values else None
        scalars |= {name if "/" in name else f"train/{name}": x for name, x in stats.items()}
        names = {"mean_reward": "mean_return", "mean_ep_length": "mean_length", "success_rate": "success_rate"}
        scalars |= {f"eval/{name}": evaluation[key] if evaluation else None for name, key in names.items()}
        scalars["time/sps"] = (step - self.start_step) / (time.time() - self.start_time)
        row = {"step": step, **scalars}
        path = self.folder / "progress.csv"
        with writing(path), open(path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        append_jsonl(self.folder / "episodes.jsonl", episodes)
        if evaluation:
            append_jsonl(self.folder / "evaluations.jsonl", [evaluation])
            others = figures(evaluation).items()
            scalars |= {f"eval/{name}": x for name, x in others if name not in names.values()}

        scalars = {name: x for name, x in scalars.items() if x is not None}
        with writing(self.folder):
            for name, x in scalars.items():
                self.writer.add_scalar(name, x, step)
            self.writer.flush()
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)
        self._print_status(scalars)

    def _print_status(self, scalars: dict[str, float]) -> None:
        parts = [f"{self.step:>9,}/{self.total_steps:,} steps", f"{scalars['time/sps']:,.0f} steps/s"]
        for label, name in (("return", "rollout/ep_reward"), ("success", "rollout/success_rate_100")):
            if name in scalars:
                parts.append(f"{label} {scalars[name]:.2f}")
        line = "  ".join([*parts, f"{(self.total_steps - self.step) / scalars['time/sps']:.0f} s left"])
        if sys.stderr.isatty():
            print("\r" + line.ljust(90), end="", file=sys.stderr, flush=True)
        elif "eval/mean_reward" in scalars:  # a log file gets a line per evaluation
            print(line, file=sys.stderr, flush=True)

    def interrupted(self, checkpoint: dict) -> dict:
        """Save interrupted.pt and the summary of a run that a signal stopped. Returns the summary."""
        self.save("interrupted.pt", checkpoint)
        (self.folder / "checkpoints" / "latest.pt").unlink(missing_ok=True)
        print(f"\nstopped at step {self.step:,}; continue with --resume {self.folder}", file=sys.stderr)
        return self._summarize("interrupted", signal=int(self.signum or signal.SIGTERM))

    def finish(self, checkpoint: dict, agent: nn.Module, best: dict, envs: Any) -> dict:
        """Save final.pt, export the best policy to policy.onnx and write the summary. Returns the summary."""
        if "optimizer" in checkpoint:
            self.save("final.pt", checkpoint)
        agent.load_state_dict(best["agent"])
        export_onnx(agent, envs, checkpoint, self.folder / "policy.onnx")
        for name in ("checkpoints/latest.pt", "interrupted.pt"):
            (self.folder / name).unlink(missing_ok=True)
        hidden = ("per_episode", "per_scenario")
        evaluation = {name: x for name, x in best["evaluation"].items() if name not in hidden}
        convergence = {}
        if criterion := getattr(self.args, "stop_at_convergence", None):
            convergence["converged_at_step"] = converged_at(self.evaluations, criterion)
        summary = self._summarize("completed", best={**evaluation, "step": best["step"]}, **convergence)
        self.completed = True
        success = "" if evaluation["success_rate"] is None else f", success {evaluation['success_rate']:.2f}"
        about = f"return {evaluation['mean_return']:.2f}{success} (validation)"
        print(f"\nbest policy at step {best['step']:,}: {about}\n{self.folder}")
        return summary

    def _summarize(self, status: str, **results: Any) -> dict:
        wall_time = time.time() - self.start_time
        note = {"note": "the environment has no snapshot: resuming began fresh episodes"} if self.fresh_episodes else {}
        files = sorted([*self.folder.rglob("*.pt"), *self.folder.glob("*.onnx")])
        summary = {
            "status": status,
            "run": str(self.folder),
            "steps": self.step,
            "resumed_from_step": self.start_step or None,
            **note,
            "wall_time_s": round(wall_time, 2),
            "steps_per_second": round((self.step - self.start_step) / wall_time, 1),
            **results,
            "parents": self.config["parents"],
            "sha256": {str(file.relative_to(self.folder)): sha256(file) for file in files},
        }
        write_json(self.folder / "summary.json", summary)
        return summary


# Provenance


def parents(args: Any) -> dict[str, dict]:
    """{path: sha256, config and steps} of the files that a run starts from: policies, demonstrations and files among
    the environment's arguments."""
    files = [Path(name) for name in file_hashes(args)]
    if getattr(args, "pretrained", None):
        files.append(Path(read_policy(args.pretrained)["file"]))
    if getattr(args, "reward_weights", None):
        files.append(Path(args.reward_weights))
    if getattr(args, "dataset", None):
        files.append(dataset_file(args))
    return {str(file): lineage(file) for file in files}


def lineage(file: Path) -> dict[str, Any]:
    """sha256 of a file, and the config and number of training steps of the run that wrote it."""
    config = file.with_suffix(".json") if file.suffix == ".npz" else run_folder(file) / "config.json"
    summary = run_folder(file) / "summary.json"
    steps = read_json(summary).get("steps") if summary.exists() else None
    if file.parent.name == "checkpoints":
        steps = read_policy(str(file))["step"]
    return {"sha256": sha256(file), "config": read_json(config) if config.exists() else None, "steps": steps}


def dataset_file(args: Any) -> Path:
    """The .npz of args.dataset, a name or a path. Its metadata are beside it in a .json."""
    if args.dataset.endswith(".npz"):
        return Path(args.dataset)
    return Path(args.run_root) / "datasets" / f"{args.dataset}.npz"


def git_commit() -> str | None:
    """The commit of this project with a "+" for uncommitted changes; None if git does not track its files."""

    def git(*command: str) -> str:
        line = ["git", "-C", str(Path(__file__).parent), *command]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
