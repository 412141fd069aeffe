"""What a training run writes, and how its files are read back."""

import contextlib
import io
import json
import logging
import netrc
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from envs.contents import ARGUMENTS, COUNT, misfit, shown, unlike
from envs.files import (
    UserError,
    WriteError,
    append,
    csv_text,
    lock,
    read_json,
    read_jsonl,
    read_progress,
    read_pt,
    require,
    save,
    sha256,
    write_json,
    write_whole,
)
from envs.signals import Interrupted, signals, signals_held

PACKAGES = ("torch", "gymnasium", "mujoco", "numpy", "onnxruntime")
# Arguments of environments that say what an action means: a deployed policy needs them
MEANING = {"action_mode", "action_repeat"}
# and those that say what it sees, where the shape of an observation does not tell
SIGHT = ("grid_channels", "grid_size", "grid_resolution")
# What files hold, as envs/contents.py says it: a policy, an evaluation, a process's part of a checkpoint, a checkpoint,
# a run's config.json
POLICY = {
    **{"kind": str, "env_id": str, "env_kwargs": ARGUMENTS, "args": {str: object}},
    **{"agent": {str: torch.Tensor}, "step": COUNT},
}
POLICY_KEYS = tuple(POLICY)
EVALUATION = {
    **{"mean_return": float, "mean_length": float, "success_rate": float | None, "failure_rate": float | None},
    "metrics": {str: float | None, "score?": float},
}
EPISODE = {"step": COUNT, "return": float, "length": float, "success": bool | None}
PROCESS = {"envs": dict, "rng": {"cpu": torch.Tensor, "cuda": [torch.Tensor]}}
CHECKPOINT = {
    **POLICY,
    **PROCESS,
    **{"optimizer": dict, "reward_scaler": {str: torch.Tensor}, "recent": [EPISODE], "other_ranks?": [PROCESS]},
    "best": (type(None), {"step": COUNT, "agent": {str: torch.Tensor}, "evaluation": EVALUATION}),
    "evaluations?": [{"step": COUNT, "success_rate": float, "failure_rate": float}],
}
PARENTS = {str: {"sha256": str, "config": dict | None, "steps?": int | None}}
CONFIG = {"parents?": PARENTS, "resumed?": list}


def require_finite(what: str, x: np.ndarray, step: int) -> None:
    """x: (N, ...), a row for each environment.

    Raises:
        FloatingPointError: names the step and the environment of the first value that is not finite.
    """
    if not np.isfinite(x).all():
        row = int(np.isfinite(x).reshape(len(x), -1).all(1).argmin())
        raise FloatingPointError(f"{what} not finite at step {step} in environment {row}; the last checkpoint is good")


def require_finite_update(agent: nn.Module, scalars: dict[str, float], step: int) -> None:
    """Raises FloatingPointError if an update left a statistic or a parameter that is not finite."""
    wrong = [name for name, value in scalars.items() if "variance" not in name and not np.isfinite(value)]
    wrong += [name for name, parameter in agent.named_parameters() if not torch.isfinite(parameter).all()]
    if wrong:
        raise FloatingPointError(
            f"{wrong[0]} not finite after step {step}; the last checkpoint is good; try a lower --learning-rate"
        )


# PyTorch


def prepare_torch(args: Any) -> torch.device:
    """Seed and determinism as args say; the device to use."""
    torch.set_num_threads(1)  # for layers of 64 units more of them cost more than they save
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


def compiled(function: Callable) -> Callable:
    """torch.compile, able to see through loss.backward() where this version of PyTorch can.

    Raises:
        UserError: there is no compiler; or, from the first call on, it failed.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what PyTorch looks for
    if shutil.which(compiler) is None:
        raise UserError(
            f"--compile needs a C++ compiler, and there is no {compiler}; install it or leave --compile out"
        )
    from torch._inductor.async_compile import AsyncCompile  # slow to import
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.config.trace_autograd_ops = True
    fast = torch.compile(function)

    def call(*args: Any) -> Any:
        try:
            return fast(*args)
        except Interrupted:  # or the process would end only when all that waits is compiled
            AsyncCompile.pool().shutdown(wait=False, cancel_futures=True)
            raise
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = f"{type(error.inner_exception).__name__}: {error.inner_exception}".splitlines()[0]
            remedy = f"delete PyTorch's cache {cache_dir()}, where a killed process may have left a damaged file"
            raise UserError(f"--compile failed ({reason}); {remedy}, or leave --compile out") from error

    return call


def rng_state() -> dict:
    """PyTorch's random generators."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def due(every: int, step: int, batch_size: int) -> bool:
    """Whether a multiple of `every` steps lies in the batch that ended at `step`; never if every is 0."""
    return every > 0 and step // every > (step - batch_size) // every


CONVERGED_SUCCESS, CONVERGED_FAILURE, IN_A_ROW = 0.9, 0.05, 3


def converged_at(evaluations: list[dict]) -> int | None:
    """The step of the first of three evaluations in a row with success >= 0.9 and failure <= 0.05; None without."""
    row: list[int] = []
    for e in evaluations:
        good = e["success_rate"] >= CONVERGED_SUCCESS and e["failure_rate"] <= CONVERGED_FAILURE
        row = [*row, e["step"]] if good else []
        if len(row) == IN_A_ROW:
            return row[0]
    return None


# Policies and checkpoints


def load(path: Path) -> dict:
    """A checkpoint or a policy file.

    Raises:
        UserError: the file is missing, damaged, or something else.
    """
    content = read_pt(path, "use another checkpoint")
    if not set(POLICY_KEYS) <= content.keys():
        raise UserError(
            f"{path}: not a policy of this project; give best.pt, final.pt or checkpoints/step_*.pt of a run"
        )
    require(content, POLICY, path, "use another file")
    return content


def load_checkpoint(path: Path, kind: str | None = None) -> dict:
    """A .pt file that holds all that resuming needs."""
    checkpoint = load_policy(str(path), kind)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path}: a policy without its training state; --pretrained starts from one, --resume cannot")
    require(checkpoint, CHECKPOINT, path, "use another checkpoint")
    try:
        torch.Generator().set_state(checkpoint["rng"]["cpu"])
    except (RuntimeError, TypeError):
        raise UserError(f"{path}: its rng.cpu is no state of PyTorch's generator; use another checkpoint") from None
    return checkpoint


def is_policy_path(name: str) -> bool:
    """Whether --evaluate's argument is a policy file or a run directory, not the name of a scripted controller."""
    scripted = name.endswith(".onnx") or name.startswith("blend:")
    return not scripted and (name.endswith(".pt") or os.sep in name or Path(name).is_dir())


def policy_file(path: str) -> Path:
    """best.pt of a run directory, or the file itself."""
    return Path(path) / "best.pt" if Path(path).is_dir() else Path(path)


def video_path(args: Any) -> Path | None:
    """Where --capture-video records the evaluation of args.evaluate: beside the policy, or among the runs."""
    if not args.capture_video:
        return None
    if is_policy_path(args.evaluate):
        return policy_file(args.evaluate).parent / "videos" / "evaluation.mp4"
    return Path(args.run_root) / "videos" / f"{args.env_id}__{Path(args.evaluate).stem}.mp4"


def load_policy(path: str, kind: str | None = None) -> dict:
    """A policy file, or the best policy of a run; with `kind` (policy, residual) another kind is refused."""
    file = policy_file(path)
    policy = load(file)
    if kind is not None and policy["kind"] != kind:
        raise UserError(f"{file}: holds a {policy['kind']}, where a {kind} is needed; use the script that trained it")
    return policy


def run_folder(path: str) -> Path:
    """The run that a file belongs to, or the run directory itself."""
    path = Path(path).resolve()
    return path if path.is_dir() else path.parent.parent if path.parent.name == "checkpoints" else path.parent


def new_folder(folder: Path) -> bool:
    """Make the directory of a run; False if it is there already.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True)
        (folder / "checkpoints").mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --run-root") from None
    return True


def what_else(folder: Path) -> str:
    """What can be done about a directory that is there already, besides choosing another one."""
    if any(checkpoints_in(folder)):
        return ", or continue it with --resume"
    weights = any(folder.glob("*.pt")) or not (folder / ".lock").exists()
    return "" if weights else ", or remove it, if nothing is training there: it holds no weights"


def checkpoints_in(folder: Path) -> list[Path]:
    """The files of a run directory from which it can be resumed."""
    return [file for name in ("checkpoints/step_*.pt", "interrupted.pt", "final.pt") for file in folder.glob(name)]


def find_checkpoint(path: str, say: bool = True) -> Path:
    """The file itself, or a run directory's newest readable checkpoint; `say` which damaged ones are skipped."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    found, damaged = [], []
    for file in checkpoints_in(folder):
        try:
            found.append((load_checkpoint(file)["step"], file))
        except UserError as error:
            damaged.append(f"skipped: {error}")
    if damaged and (say or not found):
        print("\n".join(damaged), file=sys.stderr)
    if not found:
        raise UserError(
            f"{path}: no readable checkpoint in this directory; --resume takes a run directory or a .pt file"
        )
    return max(found)[1]


def load_agent(agent: nn.Module, policy: dict, args: Any, source: str) -> None:
    """Copy actor, critic and normaliser from a policy file.

    Raises:
        UserError: it belongs to another environment, its networks have other sizes, or its actions another range.
    """
    if policy["env_id"] != args.env_id:
        raise UserError(
            f"{source}: a policy for {policy['env_id']}, not {args.env_id}; give its --env-id or another file"
        )
    own, theirs = agent.state_dict(), policy["agent"]
    for name in {**own, **theirs}:
        here, there = (tuple(state[name].shape) if name in state else "absent" for state in (own, theirs))
        if here != there:
            advice = "use the settings it was trained with, such as --hidden-sizes"
            raise UserError(f"{source}: {shown(name)[1:-1]} is {there} there and {here} here; {advice}")
        if own[name].dtype != theirs[name].dtype:
            raise UserError(f"{source}: {name} is {theirs[name].dtype}, not {own[name].dtype}; use another file")
    for name in SIGHT:
        here, there = (kwargs.get(name, "the default") for kwargs in (args.env_kwargs, policy["env_kwargs"]))
        if here != there:
            raise UserError(f"{source}: was trained with {name} {there}, not {here}; give it in --env-kwargs")
    for name in {"center", "scale"} & {*own}:
        if not torch.equal(own[name].cpu(), theirs[name].cpu()):
            raise UserError(f"{source}: its actions have another range; give the --env-kwargs it was trained with")
    # Whoever does not resume takes no more than the networks
    if getattr(args, "resume", None) is not None and "optimizer" in policy:
        require_training_state(agent, policy, args, source)
    agent.load_state_dict(theirs)


def require_training_state(agent: nn.Module, checkpoint: dict, args: Any, source: str) -> None:
    """Raises UserError unless the checkpoint's optimiser, reward scaler and best policy fit the networks."""
    parameters = dict(enumerate(agent.parameters()))
    adam = torch.optim.AdamW(agent.parameters(), fused=True).state_dict()["param_groups"][0]
    saved, scalar = checkpoint["optimizer"], torch.zeros(())
    settings = {"lr": float, "eps": float, "weight_decay": float, "betas": [float], "params": list}
    wrong = misfit(saved, {"param_groups": [settings], "state": {int: dict}}, "optimizer")
    if not wrong:
        # A parameter without a gradient so far has no state; another version of PyTorch may have other settings
        used = [i for i in saved["state"] if i in parameters]
        moments = {i: {"step": scalar, "exp_avg": parameters[i], "exp_avg_sq": parameters[i]} for i in used}
        wrong = unlike(saved["state"], moments, "optimizer.state")
        shared = [{name: adam[name] for name in adam if name in group} for group in saved["param_groups"][:1]]
        known = [{name: x for name, x in group.items() if name in adam} for group in saved["param_groups"]]
        wrong = wrong or unlike(known, shared, "optimizer.param_groups")
        wrong = wrong or (
            "" if known and known[0]["params"] == adam["params"] else "its optimizer has other parameters"
        )
    stats = {"stats.mean": scalar, "stats.var": scalar, "stats.count": torch.zeros((), dtype=torch.int64)}
    scaler = {"returns": torch.zeros(args.num_envs), **stats}
    wrong = wrong or unlike(checkpoint["reward_scaler"], scaler, "reward_scaler")
    if checkpoint["best"] is not None:
        wrong = wrong or unlike(checkpoint["best"]["agent"], checkpoint["agent"], "best.agent")
    if wrong:
        raise UserError(f"{source}: {wrong}; resume from another checkpoint")


def export_onnx(agent: nn.Module, obs: int | dict[str, Any], path: Path, kind: str, env_kwargs: dict) -> None:
    """The deployed policy, normaliser included: input obs (batch, number of observations), or those of a dict of
    observations (batch, ...) such as `obs`; output action. The kind (policy, residual) and what in env_kwargs says how
    its actions are meant stand in the file's metadata."""
    batches = {"obs": torch.zeros(2, obs)} if isinstance(obs, int) else {k: torch.as_tensor(x) for k, x in obs.items()}
    inputs = {name: torch.zeros(2, *x.shape[1:], dtype=x.dtype) for name, x in batches.items()}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of a missing torchvision, which we do not need
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
        part.ClearField("metadata_props")  # where the exporter notes source lines, with their absolute paths
    meaning = {name: json.dumps(env_kwargs[name]) for name in MEANING & {*env_kwargs}}
    for key, value in {"kind": kind, **meaning}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    write_whole(path, model.SerializeToString())


# The run directory


class Events:
    """TensorBoard's log. PyTorch's own writer has a thread that writes up to two minutes late: a killed process would
    lose what its last checkpoint has already seen, and an error on the disk ends in that thread.

    Args:
        folder: where it lies.
        purge_step: the step from which on what earlier files say no longer counts.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._write(file_version="brain.Event:2", step=purge_step or 0)
        if purge_step is not None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            self._write(session_log=SessionLog(status=SessionLog.START), step=purge_step)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(summary=Summary(value=values), step=step)

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        append(self.path, record.getvalue())


class Run:
    """A run's directory, and the context in which it trains: whatever ends the training leaves a summary, and a signal
    also leaves `snapshot` (the whole state at the start of the iteration) as interrupted.pt.

    Args:
        script: name of the training script.
        args: its Args.
        device: where the networks live.
        resumed: the checkpoint it continues from, if any: what the directory holds beyond its step is cut off.
        total: the step at which it is complete.
    """

    def __init__(self, script: str, args: Any, device: torch.device, resumed: dict | None, total: int):
        self.args, self.start_time, self.start_step = args, time.time(), resumed["step"] if resumed else 0
        self.total = total
        self._snapshot: dict | None = None
        signals.held = True  # until there is something to save
        self.fresh_episodes = resumed is not None and "fresh_episodes" in resumed["envs"]
        self.finished = False
        self.folder, source = self._folder(script, args)
        self.lock = lock(self.folder / ".lock", f"{self.folder}: another process is training in it; wait for its end")
        try:
            self._begin(script, device, source, resumed)
        except BaseException:
            self.lock.close()
            raise

    def _begin(self, script: str, device: torch.device, source: Path | None, resumed: dict | None) -> None:
        """What the directory holds from the start."""
        args = self.args
        if source is not None:
            self._cut(source, resumed)
        now = {
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
            "start_time": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        if source is None:
            self.config = {"script": script, "env_id": args.env_id, **now, "parents": parents(args), "resumed": []}
        else:  # how it began stays, how it goes on is added
            begun = read_json(source / "config.json")
            self.config = {**begun, "resumed": [*begun.get("resumed", []), {"step": self.start_step, **now}]}
        self.config["args"] = asdict(args)
        write_json(self.folder / "config.json", self.config)
        print(self.folder, file=sys.stderr)
        self.events = Events(self.folder, purge_step=self.start_step + 1 if resumed else None)
        self.wandb = start_wandb(self) if args.track else None

    @property
    def snapshot(self) -> dict | None:
        """The whole state at the start of the iteration. A signal that came before there was one is raised now."""
        return self._snapshot

    @snapshot.setter
    def snapshot(self, state: dict) -> None:
        self._snapshot = state
        signals.let()

    def _folder(self, script: str, args: Any) -> tuple[Path, Path | None]:
        """Where the run lies, which is made if it is new, and where the run lies that it continues."""
        resume = getattr(args, "resume", None)
        source = run_folder(resume) if resume is not None else None
        if source is not None and args.run_name in (None, source.name):
            (source / "checkpoints").mkdir(exist_ok=True)
            return source, source
        name = f"{script}__{args.env_id.replace('/', '-')}__seed{args.seed}__{datetime.now():%Y%m%d-%H%M%S}"
        folder, count = Path(args.run_root) / (args.run_name or name), 1
        while not new_folder(folder):
            if args.run_name is not None:
                raise UserError(f"{folder} exists; choose another --run-name{what_else(folder)}")
            count += 1  # two runs begun in the same second
            folder = Path(args.run_root) / f"{name}-{count}"
        return folder, source

    def _cut(self, source: Path, resumed: dict) -> None:
        """Keep of what lies in `source` only what the resumed checkpoint had seen; a torn last line goes too."""
        for name in ("evaluations.jsonl", "episodes.jsonl"):
            rows = [row for row in read_jsonl(source / name) if row["step"] <= self.start_step]
            write_whole(self.folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode())
        if (source / "first_evaluations.jsonl").exists():  # the one at this step comes again
            rows = [row for row in read_jsonl(source / "first_evaluations.jsonl") if row["step"] < self.start_step]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_whole(self.folder / "first_evaluations.jsonl", text.encode())
        rows = [row for row in read_progress(source / "progress.csv") if int(row["step"]) <= self.start_step]
        write_whole(self.folder / "progress.csv", csv_text(rows, header=bool(rows)).encode())
        for file in checkpoints_in(self.folder):
            with contextlib.suppress(UserError):
                if load_checkpoint(file)["step"] > self.start_step:
                    file.unlink()
        for file in [*self.folder.glob(".*.tmp"), *self.folder.glob("checkpoints/.*.tmp")]:  # of a killed process
            file.unlink()
        (self.folder / "summary.json").unlink(missing_ok=True)
        if resumed["best"] is not None:
            self.save_policy("best.pt", {**resumed, **resumed["best"]})
        else:
            (self.folder / "best.pt").unlink(missing_ok=True)

    def __enter__(self) -> "Run":
        if not hasattr(self.args, "resume"):  # a script that cannot resume takes no snapshots to wait for
            try:
                signals.let()
            except Interrupted as interrupted:
                self.__exit__(type(interrupted), interrupted, None)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with signals_held():  # a second one must not cut short the saving that the first one began
            try:
                self._close(error)
            except WriteError as unwritten:
                raise self._with_remedy(unwritten) from error
            finally:
                self.lock.close()

    def _close(self, error: BaseException | None) -> None:
        # a library may have made an error of its own out of Interrupted
        stopped = isinstance(error, Interrupted | KeyboardInterrupt) or (error is not None and signals.came is not None)
        if not self.finished and stopped:
            if self.snapshot is not None:
                save(self.folder / "interrupted.pt", self.snapshot)
            step = self.snapshot["step"] if self.snapshot else self.start_step
            self.summarize("interrupted", step)
            how = f"; to go on: --resume {self.folder}" if self.snapshot else ""  # nothing was saved without one
            print(f"\nstopped at step {step:,}{how}", file=sys.stderr)
        elif not self.finished and error is not None:
            with contextlib.suppress(UserError, OSError):  # as a full disk: the error itself is what the user must see
                self.summarize("failed", self.snapshot["step"] if self.snapshot else self.start_step, error=str(error))
        if self.wandb is not None:
            self.wandb.finish()
        if isinstance(error, WriteError):
            raise error

    def _with_remedy(self, error: WriteError) -> WriteError:
        """Says also how to go on."""
        return WriteError(f"{error}, then --resume {self.folder}" if any(checkpoints_in(self.folder)) else str(error))

    def finish(self, step: int, best: dict, **figures: Any) -> dict:
        """The run is complete; figures go into the summary too."""
        signals.held = True
        best = {"step": best["step"], **{k: v for k, v in best["evaluation"].items() if k != "per_episode"}}
        summary = self.summarize("completed", step, best=best, **figures)
        self.finished = True
        success = "" if best["success_rate"] is None else f", success {best['success_rate']:.2f}"
        text = f"best policy at step {best['step']:,}: return {best['mean_return']:.2f}{success} (validation)"
        print(f"\n{text}\n{self.folder}")
        return summary

    def summarize(self, status: str, step: int, **figures: Any) -> dict:
        """Write and return summary.json."""
        wall = time.time() - self.start_time
        summary = {
            "status": status,
            "run": str(self.folder),
            "steps": step,
            "resumed_from_step": self.start_step or None,
            **(
                {"note": "its environment has no snapshot: resuming began fresh episodes"}
                if self.fresh_episodes
                else {}
            ),
            "wall_time_s": round(wall, 2),
            "steps_per_second": round((step - self.start_step) / wall, 1),
            **figures,
            "parents": self.config.get("parents", {}),
            "sha256": {
                str(file.relative_to(self.folder)): sha256(file)
                for file in sorted([*self.folder.rglob("*.pt"), *self.folder.glob("*.onnx")])
            },
        }
        write_json(self.folder / "summary.json", summary)
        return summary

    def save(self, name: str, content: dict) -> None:
        save(self.folder / name, content)

    def save_policy(self, name: str, checkpoint: dict) -> None:
        """The part of a checkpoint that is a policy file."""
        self.save(name, {key: checkpoint[key] for key in POLICY_KEYS})

    def _log_scalars(self, step: int, scalars: dict[str, float | None]) -> None:
        """To TensorBoard, progress.csv, Weights & Biases and the status line; None where there is no figure yet."""
        sps = (step - self.start_step) / (time.time() - self.start_time)
        scalars = {**scalars, "time/sps": sps}
        known = {name: value for name, value in scalars.items() if value is not None}
        self.events.add(step, known)
        if self.wandb is not None:
            self.wandb.log(known, step=step)
        row = {"step": step, **scalars}
        path = self.folder / "progress.csv"
        append(path, csv_text([row], header=not path.exists() or path.stat().st_size == 0))

        parts = [f"{step:>9,}/{self.total:,} steps", f"{sps:,.0f} steps/s"]
        for label, name in (("return", "rollout/ep_reward"), ("success", "rollout/success_rate_100")):
            if name in known:
                parts.append(f"{label} {known[name]:.2f}")
        line = "  ".join([*parts, f"{(self.total - step) / sps:.0f} s left"])
        if sys.stderr.isatty():
            print("\r" + line.ljust(90), end="", file=sys.stderr, flush=True)
        elif "eval/mean_reward" in known:  # a log file gets a line at each evaluation
            print(line, file=sys.stderr, flush=True)

    def log(
        self,
        step: int,
        recent: Iterable[dict],
        episodes: list[dict],
        scalars: dict[str, float],
        evaluation: dict | None,
    ) -> None:
        """All that an iteration has to tell: the last 100 episodes, those new among them, what learning said, and the
        evaluation if there was one."""
        self._log_scalars(step, {**episode_scalars(recent), **scalars, **evaluation_scalars(evaluation)})
        append(self.folder / "episodes.jsonl", "".join(json.dumps(episode) + "\n" for episode in episodes))
        if evaluation is not None:
            self._line("evaluations.jsonl", step, evaluation)

    def look(self, step: int, evaluation: dict) -> None:
        """One of the first evaluations, by which nothing is chosen."""
        self._line("first_evaluations.jsonl", step, evaluation)

    def _line(self, name: str, step: int, evaluation: dict) -> None:
        line = {"step": step, **evaluation, "per_episode": None}
        append(self.folder / name, json.dumps(line) + "\n")

    def video(self, step: int) -> Path | None:
        """Where --capture-video records an evaluation."""
        return self.folder / "videos" / f"step_{step:09d}.mp4" if self.args.capture_video else None


def episode_scalars(recent: Iterable[dict]) -> dict[str, float | None]:
    """The rollout/ scalars of the last finished training episodes."""

    def mean(name: str) -> float | None:
        values = [episode[name] for episode in recent if episode[name] is not None]
        return float(np.mean(values)) if values else None

    names = {"rollout/ep_reward": "return", "rollout/ep_length": "length", "rollout/success_rate_100": "success"}
    return {scalar: mean(name) for scalar, name in names.items()}


def evaluation_scalars(evaluation: dict | None) -> dict[str, float | None]:
    """The eval/ scalars; None where there was no evaluation."""
    names = {
        "eval/mean_reward": "mean_return",
        "eval/mean_ep_length": "mean_length",
        "eval/success_rate": "success_rate",
    }
    return {scalar: evaluation[name] if evaluation else None for scalar, name in names.items()}


def parents(args: Any) -> dict[str, dict]:
    """The files a run starts from, {path: sha256 and what their own run said}: --pretrained, ONNX base policies, the
    demonstrations of a clone, and files among the environment's arguments."""
    pretrained = getattr(args, "pretrained", None)
    files = [policy_file(pretrained)] if pretrained is not None else []
    files += [dataset_file(args)] if hasattr(args, "dataset") else []
    return origins([*files, *onnx_files(getattr(args, "base_policy", "")), *files_among(args.env_kwargs)])


def origins(files: list[Path]) -> dict[str, dict]:
    """{path: where it is from}."""
    return {str(file): lineage(file) for file in files}


def onnx_files(policy: str) -> list[Path]:
    """The files in the name of a policy: PATH.onnx, or those of a blend."""
    return [Path(part) for part in policy.split(":") if part.endswith(".onnx")]


def files_among(env_kwargs: dict) -> list[Path]:
    """Those arguments of an environment that are files."""
    return [Path(value) for value in env_kwargs.values() if isinstance(value, str) and os.path.isfile(value)]


def lineage(file: Path) -> dict[str, Any]:
    """Where a file is from: its sha256, what its run or its manifest says of itself, and the steps of training that it
    took: all of its run's, or those up to a checkpoint."""
    about = file.with_suffix(".json") if file.suffix == ".npz" else run_folder(file) / "config.json"
    summary = run_folder(file) / "summary.json"
    if file.parent.name == "checkpoints":
        steps = load(file)["step"]
    else:
        ended = read_json(summary) if summary.exists() else {}
        require(ended, {"steps?": int | None}, summary, "restore it, or remove it")
        steps = ended.get("steps")
    return {"sha256": sha256(file), "config": read_json(about) if about.exists() else None, "steps": steps}


def require_alike(source: str, theirs: dict, ours: dict, names: set[str]) -> None:
    """Raises UserError if one of these arguments of the environment is another than the policy is for."""
    for name in sorted(names):
        if theirs.get(name) != ours.get(name):
            there, here = (kwargs.get(name, "the default") for kwargs in (theirs, ours))
            raise UserError(f"{source}: is for {name} {there}, not {here}; change --env-kwargs")


def require_same_files(source: str, env_kwargs: dict) -> None:
    """Raises UserError if a base policy, or a file among the environment's arguments, is another than in the run of
    `source`, a policy file or a run."""
    config = run_folder(source) / "config.json"
    content = read_json(config) if config.exists() else {}
    require(content, CONFIG, config, "restore it")
    for path, parent in content.get("parents", {}).items():
        used = path.endswith(".onnx") or path in env_kwargs.values()
        if used and os.path.isfile(path) and sha256(path) != parent["sha256"]:
            raise UserError(f"{path} is no longer the file that {source} was trained with; put it back")


def dataset_file(args: Any) -> Path:
    """Where the demonstrations args.dataset lie, a name or a path; the manifest beside them ends in .json."""
    if args.dataset.endswith(".npz"):
        return Path(args.dataset)
    return Path(args.run_root) / "datasets" / f"{args.dataset}.npz"


def start_wandb(run: Run) -> Any:
    """Weights & Biases; without a login it logs offline into the run directory."""
    import wandb

    login = None
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        login = netrc.netrc().authenticators("api.wandb.ai")
    known = "WANDB_API_KEY" in os.environ or login is not None
    mode = os.environ.get("WANDB_MODE") or ("online" if known else "offline")
    quiet = wandb.Settings(quiet=True)
    about = {"project": "robot-ppo", "name": run.folder.name, "dir": run.folder, "config": run.config}
    return wandb.init(**about, mode=mode, settings=quiet)


def git_commit() -> str | None:
    """The commit of this code, "+" marking uncommitted changes; None outside a git checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
