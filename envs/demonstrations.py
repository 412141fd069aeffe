"""Datasets of demonstrations: <run-root>/datasets/NAME.npz and its metadata NAME.json.

Arrays over the n steps of all episodes, one episode after the other:
    obs              (n, obs_dim) float32; for dict observations one array per part: obs_robot, obs_grid, ...
    action           (n, action_dim) float32, the expert's intended action
    executed_action  (n, action_dim) float32, what was sent to the environment: with noise, or a DAgger policy's action
    reward           (n,) float32
Arrays over the m episodes:
    episode_starts   (m + 1,) int64, index of the first step of each episode, and n
    seed             (m, 2) int64; the episode was reset with SeedSequence([seed, episode index])
    returns          (m,) float64
    successes        (m,) bool; False if the task does not define success
    terminated       (m,) bool; False if the time limit truncated the episode
    scenario         (m,) text, for environments with scenarios
Binary grids are stored with eight cells per byte along the last axis; metadata["packed"] has the length of that axis.
metadata["quality"] is validated if the dataset passes its checks, has 200 episodes and at least half of them are
successful (where the task defines success), draft if it passes its checks only, and quarantined if a check fails.
"""

import io
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np

from envs import UserError, evaluation, make_vec
from envs.evaluation import check_env_module, sha256
from envs.run import dataset_file, file_hashes, git_commit, lineage, write_file, write_json, writing

STEP_KEYS = ("action", "executed_action", "reward")
EPISODE_KEYS = ("seed", "returns", "successes", "terminated")
REPLAYED_EPISODES = 3
VALIDATED_EPISODES, VALIDATED_SUCCESS = 200, 0.5  # a dataset without problems but with less is a draft


class Dataset:
    """A dataset in memory: dataset["action"] is one of the arrays above. Grids are packed, except in obs().

    Raises:
        UserError: the file is damaged or its arrays do not fit together.
    """

    def __init__(self, file: Path, metadata: dict):
        self.file, self.metadata = file, metadata
        try:
            self.env_id, self.packed = metadata["env_id"], metadata["packed"]
            self.env_kwargs = {k: tuple(x) if isinstance(x, list) else x for k, x in metadata["env_kwargs"].items()}
            self.replayable = metadata.get("replayable", True)  # False if it was imported from another format
            self.action_noise = metadata["collected_with"]["action_noise"]
            self.dagger_policy = metadata["collected_with"]["dagger_policy"]
            with np.load(file, allow_pickle=False) as content:
                self.arrays = dict(content)
            check_arrays(self.arrays)
        except Exception as error:  # the exceptions of zipfile, zlib and NumPy have no common base class
            raise UserError(f"{file}: damaged or not a dataset ({error!r}); collect it again") from error

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __len__(self) -> int:
        return len(self["seed"])

    def steps(self, episode: int) -> slice:
        return slice(*self["episode_starts"][episode : episode + 2])

    def obs(self, steps: slice) -> Any:
        """Observations (steps, ...) as the environment returns them: an array or a dict of arrays."""
        obs = {name: x[steps] for name, x in self.arrays.items() if name.startswith("obs")}
        for name, size in self.packed.items():
            obs[name] = np.unpackbits(obs[name], axis=-1, count=size)
        return obs["obs"] if "obs" in obs else {name.removeprefix("obs_"): x for name, x in obs.items()}

    def make_envs(self, **kwargs: Any) -> Any:
        """The environment that the dataset was collected in, with num_envs=1."""
        return make_vec(self.env_id, 1, **self.env_kwargs | {"training": False, "split": "train", **kwargs})

    def is_unchanged(self) -> bool:
        return sha256(self.file) == self.metadata.get("sha256")


def is_step_array(name: str) -> bool:
    return name in STEP_KEYS or name.startswith("obs")


def check_arrays(arrays: dict[str, np.ndarray]) -> None:
    """Raises KeyError or ValueError unless the arrays fit together."""
    starts = arrays["episode_starts"]
    if len(starts) < 2 or starts[0] != 0 or np.diff(starts).min() < 1:
        raise ValueError("episode_starts does not increase from 0")
    for name in (*STEP_KEYS, *EPISODE_KEYS, *arrays):
        x, length = arrays[name], starts[-1] if is_step_array(name) else len(starts) - (name != "episode_starts")
        if len(x) != length or x.dtype.kind not in ("U" if name == "scenario" else "fiub"):
            raise ValueError(f"{name} has length {len(x)} and dtype {x.dtype}")
    if arrays["executed_action"].shape != arrays["action"].shape or arrays["seed"].shape[1:] != (2,):
        raise ValueError("executed_action or seed has the wrong shape")


def read_dataset(args: Any) -> Dataset:
    """Read args.dataset. An environment MODULE:ID is imported only if args.env_id repeats it.

    Raises:
        UserError: it is missing, damaged or made by the first edition.
    """
    file = dataset_file(args)
    metadata_file = file.with_suffix(".json")
    for path in (file, metadata_file):
        if not path.is_file():
            raise UserError(f"{path}: no such file; collect the dataset")
    metadata = evaluation.read_json(metadata_file)
    if "played" in metadata:
        raise UserError(f"{file}: made by the first edition; collect it again")
    dataset = Dataset(file, metadata)
    check_env_module(dataset.env_id, args.env_id, str(metadata_file))
    return dataset


# Collecting


def new_file(args: Any) -> Path:
    """The file of a dataset to collect. Raises UserError if it exists or its folder cannot be made."""
    file = dataset_file(args)
    if file.exists():
        raise UserError(f"{file} exists; choose another --dataset name, or remove it")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    return file


def flatten_obs_dict(obs: Any) -> dict[str, Any]:
    """An observation or its space by array name: obs, or obs_<part> for each part of a dict."""
    return {f"obs_{name}": x for name, x in obs.items()} if hasattr(obs, "items") else {"obs": obs}


def packed_sizes(space: gym.Space) -> dict[str, int]:
    """{array name: length of the last axis} of the binary grids in an observation space."""
    parts = flatten_obs_dict(space).items()
    return {name: part.shape[-1] for name, part in parts if part.dtype == np.uint8 and part.high.max() == 1}


def pack_obs(obs: Any, packed: dict[str, int]) -> dict[str, np.ndarray]:
    """A copy of an observation by array name, grids packed."""
    return {k: np.packbits(x, -1) if k in packed else np.array(x) for k, x in flatten_obs_dict(obs).items()}


def write_dataset(
    file: Path, episodes: list[dict], results: list[dict], metadata: dict, policies: list[str]
) -> Dataset:
    """Write the file and, after the checks, its metadata.

    Args:
        episodes: the step arrays (T, ...) of each episode, grids packed, and `terminated`; emptied to save memory.
        results: what rollout() returns for each episode, and its `seed`.
        metadata: the settings.
        policies: files or names of the policies that acted.
    """
    arrays = {"episode_starts": np.cumsum([0, *(len(episode["reward"]) for episode in episodes)])}
    arrays["terminated"] = np.array([episode.pop("terminated")[-1] for episode in episodes])
    arrays["seed"] = np.array([result.pop("seed") for result in results])
    arrays["returns"] = np.array([result["return"] for result in results])
    arrays["successes"] = np.array([result["success"] is True for result in results])
    if "scenario" in results[0]:
        arrays["scenario"] = np.array([result["scenario"] for result in results])
    for name in list(episodes[0]):
        arrays[name] = np.concatenate([episode.pop(name) for episode in episodes])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_file(file, buffer.getvalue())

    metadata |= {"episodes": len(results), "steps": len(arrays["reward"]), **evaluation.summarize(results)}
    del metadata["per_episode"]
    metadata |= {"git_commit": git_commit(), "sha256": sha256(file), "parents": {}}
    for name in policies:
        files = file_hashes(SimpleNamespace(base_policy=name, env_kwargs=metadata["env_kwargs"]))
        metadata["parents"] |= {path: lineage(Path(path)) for path in files}
    arrays.clear()  # Dataset reads them again
    dataset = Dataset(file, metadata)
    return dataset


def write_quality(dataset: Dataset, problems: dict[str, str]) -> str:
    """Write the metadata with the quality that follows from the checks. Returns the quality and, for a draft, why."""
    success, reason = dataset.metadata["success_rate"], ""
    if len(dataset) < VALIDATED_EPISODES:
        reason = f" (fewer than {VALIDATED_EPISODES} episodes)"
    elif success is not None and success < VALIDATED_SUCCESS:
        reason = f" (success {success:.2f} is below {VALIDATED_SUCCESS})"
    quality = "quarantined" if any(problems.values()) else "draft" if reason else "validated"
    dataset.metadata["quality"] = quality
    write_json(dataset.file.with_suffix(".json"), dataset.metadata)
    return quality + (reason if quality == "draft" else "")


# Validating


def run_checks(dataset: Dataset) -> dict[str, str]:
    """{check: what is wrong, or ""}. A wrong shape or a number that is not finite ends the checks."""
    envs, problems = dataset.make_envs(), {}
    problems["sha256 of the file"] = "" if dataset.is_unchanged() else "differs from the metadata; one was changed"
    problems["shapes fit the environment"] = shape_mismatch(dataset, envs)
    floats = {name: x for name, x in dataset.arrays.items() if x.dtype.kind == "f"}
    not_finite = [name for name, x in floats.items() if not np.isfinite(x).all()]
    problems["numbers are finite"] = f"not in {', '.join(not_finite)}" if not_finite else ""
    if problems["shapes fit the environment"] or not_finite:
        return problems

    space, noise = envs.single_action_space, dataset.action_noise
    outside = ((dataset["action"] < space.low - 1e-6) | (dataset["action"] > space.high + 1e-6)).any(1).sum()
    problems["actions are within their bounds"] = f"{outside:,} are not" if outside else ""
    if not dataset.replayable:
        return problems | {"episodes replay from their seeds (imported: not checked)": ""}
    # Actions paired with the wrong step differ from the executed ones by more than the noise
    std = ((dataset["executed_action"] - dataset["action"]) / ((space.high - space.low) / 2)).std()
    wrong = dataset.dagger_policy is None and abs(std - noise) > 0.2 * noise + 1e-6
    problems["executed actions differ by the noise"] = f"by {std:.3f}, not {noise:.3f}" if wrong else ""
    problems["episodes replay from their seeds"] = replay_mismatch(dataset, envs)
    sums = np.add.reduceat(dataset["reward"].astype(float), dataset["episode_starts"][:-1])
    wrong = ~np.isclose(sums, dataset["returns"], rtol=1e-3, atol=1e-3)
    problems["rewards add up to the returns"] = f"not in episode {wrong.argmax()}" if wrong.any() else ""
    seeds, counts = np.unique(dataset["seed"], axis=0, return_counts=True)
    problems["seeds are unique"] = f"{seeds[counts.argmax()].tolist()} is not" if counts.max() > 1 else ""
    return problems


def shape_mismatch(dataset: Dataset, envs: Any) -> str:
    """How the shapes differ from those of the environment, or ""."""
    expected = {name: space.shape for name, space in flatten_obs_dict(envs.single_observation_space).items()}
    shapes = {name: x.shape[1:] for name, x in flatten_obs_dict(dataset.obs(slice(1))).items()}
    expected["action"], shapes["action"] = envs.single_action_space.shape, dataset["action"].shape[1:]
    return "" if shapes == expected else f"they are {shapes}, not {expected}"


def replay_mismatch(dataset: Dataset, envs: Any) -> str:
    """Replay the first episodes. Returns where observations or rewards differ from the recorded ones, or ""."""
    for episode in range(min(REPLAYED_EPISODES, len(dataset))):
        steps = dataset.steps(episode)
        recorded = flatten_obs_dict(dataset.obs(steps))
        obs, _ = envs.reset(seed=[dataset["seed"][episode].tolist()])
        for t, action in enumerate(dataset["executed_action"][steps]):
            for name, x in flatten_obs_dict(obs).items():
                if not np.allclose(x[0], recorded[name][t], rtol=1e-3, atol=1e-4):
                    return f"{name} differs in episode {episode}, step {t}"
            obs, reward, *_ = envs.step(action[None])
            if not np.isclose(reward[0], dataset["reward"][steps][t], rtol=1e-3, atol=1e-4):
                return f"the reward differs in episode {episode}, step {t}"
    return ""


def replay(dataset: Dataset, episode: int, video: bool, render: str | None) -> None:
    """Describe an episode and, if requested, replay it to a video beside the dataset or in a window.

    Raises:
        UserError: there is no such episode, or it cannot be shown.
    """
    if not 0 <= episode < len(dataset):
        raise UserError(f"--episode must be from 0 to {len(dataset) - 1}, not {episode}")
    if video and render:
        raise UserError("--video and --render exclude each other; leave one out")
    if (video or render) and not dataset.replayable:
        raise UserError(f"{dataset.file} was imported; its episodes have no seeds and cannot be shown")
    if video and find_spec("imageio_ffmpeg") is None:
        raise UserError("--video needs imageio-ffmpeg: pip install -e '.[video]'")
    actions = dataset["executed_action"][dataset.steps(episode), None]
    values = ", ".join(f"{name} {dataset[name][episode]}" for name in EPISODE_KEYS)
    print(f"episode {episode}: {len(actions)} steps, {values}")
    if not video and not render:
        return
    envs, remaining = dataset.make_envs(render_mode=render or "rgb_array"), iter(actions)
    recorder = evaluation.VideoRecorder(lambda obs: next(remaining), envs)
    envs.reset(seed=[dataset["seed"][episode].tolist()])
    recorder.reset(np.arange(1), envs)
    for action in actions:
        envs.step(recorder(None) if video else action)
    if video:
        recorder.save(dataset.file.with_name(f"{dataset.file.stem}_{episode}.mp4"))
    envs.close()


def validate(args: Any) -> bool:
    """Check a dataset, print the results and note its quality in the metadata. Returns whether all checks pass."""
    dataset = read_dataset(args)
    problems = run_checks(dataset)
    for check, problem in problems.items():
        print(f"FAILED  {check}: {problem}" if problem else f"ok      {check}")
    print(f"{dataset.file}: {write_quality(dataset, problems)}")
    return not any(problems.values())


def inspect(args: Any) -> None:
    """Print the metadata and statistics of a dataset, or describe and optionally replay one of its episodes."""
    dataset = read_dataset(args)
    if args.episode is None:
        if args.video or args.render:
            raise UserError("--video and --render show one episode; choose it with --episode")
        print(f"{dataset.env_id}, {evaluation.describe(dataset.metadata)}, {dataset.metadata['quality']}")
    for name, x in dataset.arrays.items():
        print(f"{name:15} {x.shape} {x.dtype}")
    if args.episode is not None:
        replay(dataset, args.episode, args.video, args.render)
