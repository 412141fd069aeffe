"""Convert demonstrations from and to other formats.

    python tools/convert.py from-npz FILE.npz --env-id Pendulum-v1 --dataset pendulum     arrays of steps
    python tools/convert.py from-minari pendulum/pid-v0 --dataset pendulum                a local Minari dataset
    python tools/convert.py to-minari so101 so101/ik-v0
    python tools/convert.py to-lerobot so101 lerobot/so101 --video                        a LeRobotDataset v3 folder

Datasets are those of bc_pretrain.py. Minari needs pip install -e ".[minari]", LeRobot ".[lerobot]" and, for --video,
".[video]". An imported dataset has no seeds, so its episodes cannot be replayed; its metadata says so.

A .npz file holds observations (n, obs_dim), actions (n, action_dim), rewards (n,), terminations (n,) and truncations
(n,) of the steps of all episodes, one after the other.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError, check_flat_box, demonstrations, make_vec
from envs.cli import one_line_errors
from envs.demonstrations import Dataset, read_dataset
from envs.run import write_json

CAMERA = "observation.images.front"


@dataclass
class FromNpz:
    file: tyro.conf.Positional[str]  # .npz file of steps
    env_id: str  # environment
    dataset: str  # name of the new dataset
    run_root: str = "runs"  # parent directory of datasets/


@dataclass
class FromMinari:
    minari_id: tyro.conf.Positional[str]  # name of a local Minari dataset
    dataset: str  # name of the new dataset
    env_id: str | None = None  # environment; default: that of the Minari dataset
    run_root: str = "runs"  # parent directory of datasets/


@dataclass
class ToMinari:
    dataset: tyro.conf.Positional[str]  # dataset name, or path to its .npz
    minari_id: tyro.conf.Positional[str]  # name of the new Minari dataset, such as so101/ik-v0
    env_id: str | None = None  # repeat it if your own module registers the environment (MODULE:ID)
    run_root: str = "runs"  # parent directory of datasets/


@dataclass
class ToLerobot:
    dataset: tyro.conf.Positional[str]  # dataset name, or path to its .npz
    folder: tyro.conf.Positional[str]  # new folder
    video: bool = False  # replay the episodes and add camera frames (observation.images.front)
    task: str | None = None  # description of the task; default: the environment's id
    env_id: str | None = None  # repeat it if your own module registers the environment (MODULE:ID)
    run_root: str = "runs"  # parent directory of datasets/


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turns an ImportError into the advice to install an extra."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error}: pip install -e '.[{extra}]'") from None


# From other formats


def write_imported(args: Any, env_id: str, env_kwargs: dict, episodes: list[dict], source: str) -> None:
    """Write a dataset that cannot be replayed.

    Args:
        episodes: obs (T, obs_dim), action, reward, terminated and perhaps executed_action and success of each.
    """
    envs = make_vec(env_id, 1, **env_kwargs)
    check_flat_box(envs)
    steps, results = [], []
    for i, episode in enumerate(episodes):
        success = episode.pop("success", None)
        arrays = {name: np.asarray(x, np.float32) for name, x in episode.items() if name != "terminated"}
        if not len(arrays["reward"]):
            raise UserError(f"{source}: episode {i} has no steps")
        arrays["executed_action"] = arrays.get("executed_action", arrays["action"])
        steps.append({**arrays, "terminated": np.asarray(episode["terminated"], bool)})
        total = float(arrays["reward"].sum(dtype=float))
        results.append({"return": total, "length": len(arrays["reward"]), "success": success, "failure": None})
        results[-1]["seed"] = (0, i)
    file = demonstrations.new_file(args)
    totals = {"episodes": len(results), "env_steps": sum(result["length"] for result in results)}
    collected_with = {"action_noise": None, "dagger_policy": None, "source": source}
    about = {"env_id": env_id, "env_kwargs": env_kwargs, "collected_with": collected_with, "totals": totals}
    dataset = demonstrations.write_dataset(file, steps, results, {**about, "packed": {}, "replayable": False}, [])
    quality = demonstrations.write_quality(dataset, demonstrations.run_checks(dataset))
    print(f"{file}: {len(dataset)} episodes, {totals['env_steps']:,} steps, {quality}")


def from_npz(args: FromNpz) -> None:
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    try:
        with np.load(args.file, allow_pickle=False) as content:
            obs, action, reward, terminated, truncated = (content[name] for name in names)
    except Exception as error:  # the exceptions of zipfile, zlib and NumPy have no common base class
        raise UserError(f"{args.file}: not a file with {', '.join(names)} ({error!r})") from None
    if not len({len(x) for x in (obs, action, reward, terminated, truncated)}) == 1:
        raise UserError(f"{args.file}: {', '.join(names)} must have the same length")
    ends = np.flatnonzero(terminated.astype(bool) | truncated.astype(bool)) + 1  # steps after the last end are left out
    if len(ends) == 0:
        raise UserError(f"{args.file}: no episode ends; terminations or truncations must mark the last step of each")
    arrays = {"obs": obs, "action": action, "reward": reward, "terminated": terminated}
    episodes = [{name: x[a:b] for name, x in arrays.items()} for a, b in zip([0, *ends[:-1]], ends)]
    write_imported(args, args.env_id, {}, episodes, args.file)


def from_minari(args: FromMinari) -> None:
    with needs("minari"):
        import minari
    try:
        source = minari.load_dataset(args.minari_id)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{args.minari_id}: no local Minari dataset ({error})") from None
    spec, episodes = source.spec.env_spec, []
    for one in source.iterate_episodes():
        if isinstance(one.observations, dict | tuple):
            raise UserError(f"{args.minari_id}: observations must be flat arrays")
        episode = {"obs": one.observations[:-1], "action": one.actions, "reward": one.rewards}
        infos = one.infos or {}
        if "executed_action" in infos:
            episode["executed_action"] = infos["executed_action"]
        for name in ("is_success", "success"):
            if name in infos:
                episode["success"] = bool(np.any(infos[name]))
        episodes.append({**episode, "terminated": one.terminations})
    env_kwargs = dict(spec.kwargs) if spec is not None and args.env_id is None else {}
    env_id = args.env_id or (spec.id if spec is not None else None)
    if env_id is None:
        raise UserError(f"{args.minari_id} does not name its environment; give it with --env-id")
    write_imported(args, env_id, env_kwargs, episodes, args.minari_id)


# To other formats


def final_observation(dataset: Dataset, episode: int, envs: Any) -> np.ndarray:
    """The observation after the last step, from a replay; the last one that is known if that is impossible."""
    if not dataset.replayable:
        return dataset.obs(dataset.steps(episode))[-1]
    envs.reset(seed=[dataset["seed"][episode].tolist()])
    for action in dataset["executed_action"][dataset.steps(episode)]:
        *_, info = envs.step(action[None])
    return info["final_obs"][0]


def to_minari(args: ToMinari) -> None:
    with needs("minari"):
        import minari
        from minari.data_collector import EpisodeBuffer
    warnings.filterwarnings("ignore", category=UserWarning, module="minari")  # about descriptions of public datasets
    dataset, buffers = flat_dataset(args), []
    envs = dataset.make_envs()
    for episode in range(len(dataset)):
        steps = dataset.steps(episode)
        obs, last = dataset.obs(steps), np.zeros(steps.stop - steps.start, bool)
        last[-1] = True
        terminated = dataset["terminated"][episode]
        infos = {"executed_action": dataset["executed_action"][steps]}
        infos["is_success"] = last & dataset["successes"][episode]
        arrays = {"actions": dataset["action"][steps], "rewards": dataset["reward"][steps], "infos": infos}
        arrays |= {"terminations": last & terminated, "truncations": last & ~terminated}
        observations = np.concatenate([obs, final_observation(dataset, episode, envs)[None]])
        buffers.append(EpisodeBuffer(observations=observations, **arrays))
    spaces = {"action_space": envs.single_action_space, "observation_space": envs.single_observation_space}
    about = {"algorithm_name": str(dataset.metadata["collected_with"].get("policy")), "env": dataset.env_id}
    minari.create_dataset_from_buffers(args.minari_id, buffers, **about, **spaces, data_format="hdf5")
    print(f"{args.minari_id}: {len(dataset)} episodes")


def to_lerobot(args: ToLerobot) -> None:
    with needs("lerobot"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    dataset, folder = flat_dataset(args), Path(args.folder)
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    if args.video and not dataset.replayable:
        raise UserError(f"{dataset.file}: its episodes cannot be replayed; leave --video out")
    envs = dataset.make_envs(**({"render_mode": "rgb_array"} if args.video else {}))
    fps, starts = round(envs.metadata["render_fps"]), dataset["episode_starts"]
    lengths, n = np.diff(starts), int(starts[-1])
    last = np.isin(np.arange(n), starts[1:] - 1)
    index = np.arange(n) - np.repeat(starts[:-1], lengths)
    arrays = {
        "observation.state": dataset.obs(slice(0, n)),
        "action": dataset["action"],
        "next.reward": dataset["reward"],
        "next.done": last,
        "next.success": last & np.repeat(dataset["successes"], lengths),
        "timestamp": (index / fps).astype(np.float32),
        "frame_index": index,
        "episode_index": np.repeat(np.arange(len(dataset)), lengths),
        "index": np.arange(n),
        "task_index": np.zeros(n, np.int64),
    }
    features, stats = {}, {}
    for name, x in arrays.items():
        width = x.shape[1] if x.ndim == 2 else 1
        names = [f"{name.split('.')[-1]}_{k}" for k in range(width)] if x.ndim == 2 else None
        features[name] = {"dtype": str(x.dtype), "shape": [width], "names": names}
        stats[name] = statistics(x.reshape(n, width))
    episodes = {
        "episode_index": np.arange(len(dataset)),
        "tasks": [[args.task or dataset.env_id]] * len(dataset),
        "length": lengths,
        "dataset_from_index": starts[:-1],
        "dataset_to_index": starts[1:],
    }
    files = ["data", "meta/episodes"]
    if args.video:
        frames = write_video(dataset, envs, folder / "videos" / CAMERA / "chunk-000" / "file-000.mp4", fps)
        height, width, _ = frames.shape
        shape = {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
        video = {"codec": "h264", "pix_fmt": "yuv420p", "is_depth_map": False, "fps": fps, "channels": 3}
        info = {"video.height": height, "video.width": width, "has_audio": False}
        features[CAMERA] = {**shape, "info": {**info, **{f"video.{name}": x for name, x in video.items()}}}
        stats[CAMERA] = frames.stats
        episodes[f"videos/{CAMERA}/from_timestamp"] = starts[:-1] / fps
        episodes[f"videos/{CAMERA}/to_timestamp"] = starts[1:] / fps
        files.append(f"videos/{CAMERA}")
    for name in files:
        episodes |= {f"{name}/{part}_index": np.zeros(len(dataset), np.int64) for part in ("chunk", "file")}

    def write(path: str, columns: dict[str, Any], metadata: dict | None = None) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({name: list(x) if getattr(x, "ndim", 1) == 2 else x for name, x in columns.items()})
        pq.write_table(table.replace_schema_metadata(metadata), folder / path)

    write("data/chunk-000/file-000.parquet", arrays)
    write("meta/episodes/chunk-000/file-000.parquet", episodes)
    # The task is the index of the table when pandas reads it
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [{"name": x, "field_name": x, "pandas_type": a, "numpy_type": b} for x, (a, b) in kinds.items()]
    pandas = {"index_columns": ["task"], "columns": columns, "column_indexes": []}
    task = {"task_index": [0], "task": [args.task or dataset.env_id]}
    write("meta/tasks.parquet", task, {"pandas": json.dumps(pandas)})
    write_json(folder / "meta" / "stats.json", stats)
    about = {
        "codebase_version": "v3.0", "robot_type": dataset.env_id, "total_episodes": len(dataset), "total_frames": n,
        "total_tasks": 1, "chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": fps,
        "splits": {"train": f"0:{len(dataset)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4" if args.video else None,
        "features": features,
    }  # fmt: skip
    write_json(folder / "meta" / "info.json", about)
    print(f"{folder}: {len(dataset)} episodes, {n:,} frames")


def statistics(x: np.ndarray) -> dict[str, list]:
    """Statistics over the first axis of (n, k)."""
    values = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0, dtype=float), "std": x.std(0, dtype=float)}
    return {**{name: y.tolist() for name, y in values.items()}, "count": [len(x)]}


def write_video(dataset: Dataset, envs: Any, path: Path, fps: int) -> SimpleNamespace:
    """Replay all episodes into one video, a frame per step. Returns the shape of a frame, and the statistics of the
    channels in [0, 1] over every 20th frame."""
    with needs("video"):
        import imageio_ffmpeg
    path.parent.mkdir(parents=True)
    sample, writer = [], None
    for episode in range(len(dataset)):
        envs.reset(seed=[dataset["seed"][episode].tolist()])
        for t, action in enumerate(dataset["executed_action"][dataset.steps(episode)]):
            frame = envs.render()
            if writer is None:
                # A key frame every second frame makes random access fast
                size, options = frame.shape[1::-1], ["-g", "2", "-crf", "23"]
                writer = imageio_ffmpeg.write_frames(
                    str(path), size, fps=fps, macro_block_size=1, output_params=options
                )
                writer.send(None)
            writer.send(np.ascontiguousarray(frame))
            if t % 20 == 0:
                sample.append(frame.reshape(-1, 3)[::16] / 255)
            envs.step(action[None])
        if sys.stderr.isatty():
            print(f"\r{episode + 1}/{len(dataset)} episodes", end="", file=sys.stderr, flush=True)
    writer.close()
    stats = statistics(np.concatenate(sample))
    stats = {name: [[[x]] for x in values] if name != "count" else [len(sample)] for name, values in stats.items()}
    return SimpleNamespace(shape=frame.shape, stats=stats)


def flat_dataset(args: ToMinari | ToLerobot) -> Dataset:
    dataset = read_dataset(args)
    if isinstance(dataset.obs(slice(1)), dict):
        raise UserError(f"{dataset.file}: only datasets with flat observations can be converted")
    return dataset


def main() -> None:
    with one_line_errors():
        commands = {"from-npz": FromNpz, "from-minari": FromMinari, "to-minari": ToMinari, "to-lerobot": ToLerobot}
        functions = {FromNpz: from_npz, FromMinari: from_minari, ToMinari: to_minari, ToLerobot: to_lerobot}
        args = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
        functions[type(args)](args)


if __name__ == "__main__":
    main()
