"""Demonstrations on disk: <run-root>/datasets/NAME.npz, and beside it NAME.json, the manifest that says what they are.

The .npz holds flat arrays over all steps, n of them, one episode after the other:

    obs         (n, obs_dim) float32; of a dict of observations one array for each: obs_robot, obs_grid, ...
    action      (n, action_dim) float32, what the expert meant to do in that step
    played      (n, action_dim) float32, what was done: the same, or disturbed, or a clone's action
    reward      (n,) float32

and over the m episodes:

    start       (m + 1,) int64, where each begins and the last one ends
    seed        (m, 2) int64; an episode's randomness is that of SeedSequence([seed, number])
    returns     (m,) float64; successes (m,) bool
    terminated  (m,) bool; others were cut off by the time limit
    scenario    (m,) text, where the environment has scenarios
"""

import contextlib
import math
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

import envs
from envs.command import SCRIPT_SETS, require_named
from envs.contents import ARGUMENTS
from envs.files import UserError, lock, read_json, replacing, require, sha256, unwritable, write_json
from envs.rollout import Film
from envs.signals import signals_held

ENOUGH = 200  # episodes from which a dataset without problems counts as validated
CHUNK = 4096  # steps that are read at a time
OVER_STEPS, OVER_EPISODES = ("action", "played", "reward"), ("seed", "returns", "successes", "terminated")
# Of what sort the numbers are; arrays that nobody reads may be of any but pickled ones
KINDS = {
    **{"start": "i", "seed": "iu", "successes": "b", "terminated": "b", "scenario": "U"},
    **dict.fromkeys(("action", "played", "reward", "returns"), "f"),
}
MANIFEST = {
    **{"env_id": str, "env_kwargs": ARGUMENTS, "sha256": str, "quality?": str, "success_rate?": float | None},
    "collected_with?": {"dagger?": str | None, "action_noise?": float},
}
REPLAYED = 3  # episodes that are played again to see whether all is as it was


def named(obs: Any) -> dict[str, np.ndarray]:
    """An observation, or a dict of them, under the names of its arrays."""
    return {f"obs_{name}": x for name, x in obs.items()} if isinstance(obs, dict) else {"obs": obs}


class Writer:
    """Takes episodes as they end, in any order, and keeps no more of them in memory than wait for an earlier one.

    Used as a context; what is not finished leaves nothing behind."""

    def __init__(self, file: Path):
        self.file, self.parts = file, file.with_name(f".{file.stem}.parts")
        self.streams: dict[str, Any] = {}
        self.shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self.waiting: dict[int, dict[str, np.ndarray] | None] = {}
        self.next, self.start = 0, [0]

    def __enter__(self) -> "Writer":
        busy = f"{self.file}: another process is recording it; wait for its end, or choose another --dataset name"
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.parts, error) from error
        self.lock = lock(self.parts / ".lock", busy)
        try:  # to clear away what a killed process has left
            for left in {*self.parts.iterdir(), *self.file.parent.glob(f".{self.file.name}.tmp")}:
                if left.name != ".lock":
                    left.unlink()
            if self.file.exists():  # another process has just ended
                raise UserError(f"{self.file} exists; choose another --dataset name, or remove it")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        with signals_held():
            for stream in self.streams.values():
                with contextlib.suppress(OSError):  # a full disk, which has been reported
                    stream.close()
            shutil.rmtree(self.parts, ignore_errors=True)
            self.lock.close()

    def add(self, number: int, steps: dict[str, np.ndarray] | None) -> None:
        """Episode `number`, its arrays (T, ...); None leaves it out. Numbers are 0, 1, 2 and so on, each once."""
        self.waiting[number] = steps
        while self.next in self.waiting:
            steps = self.waiting.pop(self.next)
            self.next += 1
            if steps is not None:
                self._write(steps)

    def _write(self, steps: dict[str, np.ndarray]) -> None:
        try:
            for name, array in steps.items():
                if name not in self.streams:
                    self.streams[name] = open(self.parts / name, "wb")  # noqa: SIM115 (closed on exit)
                    self.shapes[name] = array.dtype, array.shape[1:]
                self.streams[name].write(np.ascontiguousarray(array).tobytes())
        except OSError as error:
            raise unwritable(self.file, error) from error
        self.start.append(self.start[-1] + len(steps["reward"]))

    def finish(self, **more: np.ndarray) -> None:
        """Pack what was added, and these arrays, into the file: whole or not at all."""
        with replacing(self.file) as temporary, open(temporary, "wb") as content:
            with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
                self._pack(archive, {"start": np.array(self.start), **more})
            content.flush()
            os.fsync(content.fileno())

    def _pack(self, archive: zipfile.ZipFile, more: dict[str, np.ndarray]) -> None:
        for name, (kind, shape) in self.shapes.items():
            self.streams[name].close()
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False}
            with open(self.parts / name, "rb") as part, member(archive, name) as out:
                np.lib.format.write_array_header_1_0(out, {**header, "shape": (self.start[-1], *shape)})
                shutil.copyfileobj(part, out, 2**20)
        for name, array in more.items():
            with member(archive, name) as out:
                np.lib.format.write_array(out, array, allow_pickle=False)


def member(archive: zipfile.ZipFile, name: str) -> Any:
    """A file in the archive to write to, without a date, so that the same demonstrations are the same bytes."""
    about = zipfile.ZipInfo(f"{name}.npy")
    about.compress_type = zipfile.ZIP_DEFLATED
    return archive.open(about, "w", force_zip64=True)


class Demonstrations:
    """What a Writer and collect have left: all arrays but the observations, which are read in chunks.

    Raises:
        UserError: they are missing, damaged, or no demonstrations, or their arrays do not fit together.
    """

    def __init__(self, file: Path, env_id: str | None = None):
        if not file.is_file():
            raise UserError(f"{file}: no such demonstrations; record them with collect, or name others")
        about = file.with_suffix(".json")
        if not about.is_file():
            cut_short = "as if collecting had been cut short; remove the file and record it anew"
            raise UserError(f"{file}: {about.name}, which says what it is, is missing, {cut_short}")
        self.file, self.manifest = file, read_json(about)
        shapes = self._shapes()
        needed = {*OVER_STEPS, *OVER_EPISODES, "start"}
        self.observed = [name for name in shapes if name == "obs" or name.startswith("obs_")]
        if (
            not {"env_id", "env_kwargs", "sha256"} <= self.manifest.keys()
            or not needed <= {*shapes}
            or not self.observed
        ):
            raise UserError(f"{file}: not demonstrations of this project; record them anew with collect")
        require(self.manifest, MANIFEST, file.with_suffix(".json"), "restore it, or record them anew with collect")
        require_named(self.manifest["env_id"], env_id, str(file.with_suffix(".json")))
        if taken := [name for name in SCRIPT_SETS if name in self.manifest["env_kwargs"]]:
            raise UserError(f"{file.with_suffix('.json')}: {taken[0]} is not for env_kwargs; leave it out")
        with self._reading(), np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in shapes if name not in self.observed}
        self.start, self.action, self.played, self.reward = (arrays[n] for n in ("start", *OVER_STEPS))
        self.seed, self.returns, self.successes, self.terminated = (arrays[name] for name in OVER_EPISODES)
        self.scenario = arrays.get("scenario")
        steps = {shapes[name][0] for name in (*OVER_STEPS, *self.observed) if shapes[name]}
        episodes = {
            shapes[name][0] for name in (*OVER_EPISODES, *["scenario"] * ("scenario" in shapes)) if shapes[name]
        }
        whole = self.start.ndim == 1 and self.start.dtype.kind == "i" and len(self.start) > 1
        whole = whole and self.start[0] == 0 and (np.diff(self.start) > 0).all() and self.start.max() == self.start[-1]
        whole = whole and all(array.dtype.kind in KINDS.get(name, "fiubUS") for name, array in arrays.items())
        whole = whole and self.seed.shape == (len(self.start) - 1, 2) and (self.seed >= 0).all()
        whole = whole and all(len(shapes[name]) == 1 for name in ("returns", "successes", "terminated"))
        whole = whole and steps == {self.start[-1]} and episodes == {len(self.start) - 1}
        whole = whole and self.action.ndim == 2 and self.action.shape == self.played.shape and self.reward.ndim == 1
        if not whole or not all(len(shapes[name]) > 1 for name in self.observed):
            raise UserError(f"{file}: its arrays do not fit together; record them anew with collect")

    def __len__(self) -> int:
        """Episodes."""
        return len(self.start) - 1

    def episode(self, number: int) -> slice:
        """The steps of an episode."""
        return slice(self.start[number], self.start[number + 1])

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # zipfile's, numpy's and zlib's exceptions have no common base
            raise UserError(f"{self.file}: damaged or not an .npz file; record it anew") from error

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each array, from its header."""
        with self._reading(), zipfile.ZipFile(self.file) as archive:
            found = {name.removesuffix(".npy"): header(archive, name) for name in archive.namelist()}
            if any(kind.kind not in "fiub" for name, (_, kind) in found.items() if name.startswith("obs")):
                raise ValueError("observations that are no numbers")
            return {name: shape for name, (shape, _) in found.items()}

    def chunks(self, size: int = CHUNK) -> Iterator[Any]:
        """The observations of all steps, (size, ...) at a time: arrays, or dicts of them."""
        with self._reading(), zipfile.ZipFile(self.file) as archive, contextlib.ExitStack() as stack:
            streams = {}
            for name in self.observed:
                shape, kind = header(archive, f"{name}.npy")
                stream = stack.enter_context(archive.open(f"{name}.npy"))
                skip_header(stream)
                streams[name] = (stream, kind, shape[1:])
            for begin in range(0, int(self.start[-1]), size):
                count = min(size, int(self.start[-1]) - begin)
                found = {name: read_rows(*stream, count) for name, stream in streams.items()}
                yield found["obs"] if "obs" in found else {name.removeprefix("obs_"): x for name, x in found.items()}


def header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in the archive.

    Raises:
        ValueError: what follows is of another size, so that memory is never asked for on a header's word alone.
    """
    with archive.open(name) as stream:
        shape, kind = skip_header(stream)
        size = archive.getinfo(name).file_size - stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != size or not kind.isnative:
        raise ValueError("a header that does not fit")
    return shape, kind


def skip_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Read an array up to where its numbers begin; shape and type."""
    major = np.lib.format.read_magic(stream)[0]
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(stream)
    if kind.hasobject or fortran:
        raise ValueError("an array of objects, or in Fortran's order")
    return shape, kind


def read_rows(stream: Any, kind: np.dtype, shape: tuple[int, ...], count: int) -> np.ndarray:
    """The next `count` rows of an array."""
    content = stream.read(count * int(np.prod(shape)) * kind.itemsize)
    return np.frombuffer(bytearray(content), kind).reshape(count, *shape)


def problems(found: Demonstrations, vec: Any) -> list[tuple[str, str]]:
    """(check, what is wrong) for every check; "" where nothing is. vec: the environment that they are from, one row."""
    return [
        ("the file is the one that the manifest describes", other_file(found)),
        ("observations and actions fit the environment", misfits(found, vec)),
        ("observations are finite", not_finite(found)),
        ("actions and rewards are finite", not_finite_actions(found)),
        ("actions lie inside their bounds", out_of_bounds(found, vec)),
        ("actions differ from what was played by the noise alone", misaligned(found, vec)),
        ("episodes are played again as they were", played_otherwise(found, vec)),
        ("rewards add up to the returns", wrong_sums(found)),
        ("no episode is there twice", duplicates(found)),
        ("the manifest's figures are those of the episodes", wrong_figures(found)),
    ]


def other_file(found: Demonstrations) -> str:
    if sha256(found.file) == found.manifest["sha256"]:
        return ""
    return "its sha256 is not the manifest's: one of the two was changed or replaced"


def misfits(found: Demonstrations, vec: Any) -> str:
    """Observations and actions of another shape than the environment's."""
    obs = next(found.chunks(1))
    needed = {name: space.shape for name, space in named(spaces_of(vec)).items()}
    shapes = {name: x.shape[1:] for name, x in named(obs).items()}
    if shapes != needed:
        return f"observations are {shapes}, the environment's {needed}"
    actions = vec.single_action_space.shape
    return "" if found.action.shape[1:] == actions else f"actions are {found.action.shape[1:]}, not {actions}"


def spaces_of(vec: Any) -> Any:
    space = vec.single_observation_space
    return dict(space.spaces) if hasattr(space, "spaces") else space


def not_finite(found: Demonstrations) -> str:
    begin = 0
    for obs in found.chunks():
        for x in named(obs).values():
            finite = np.isfinite(x).reshape(len(x), -1).all(1)
            if not finite.all():
                return f"not so in step {begin + int((~finite).argmax())}"
        begin += len(x)
    return ""


def not_finite_actions(found: Demonstrations) -> str:
    for name in OVER_STEPS:
        finite = np.isfinite(getattr(found, name)).reshape(found.start[-1], -1).all(1)
        if not finite.all():
            return f"{name} is not in step {int((~finite).argmax())}"
    return ""


def out_of_bounds(found: Demonstrations, vec: Any) -> str:
    """Of the expert's actions; what was played may lie outside, for the environment cuts it off."""
    space = vec.single_action_space
    if found.action.shape[1:] != space.shape:
        return ""  # which is another problem
    outside = ((found.action < space.low - 1e-6) | (found.action > space.high + 1e-6)).any(1)
    return f"{outside.sum():,} of {len(outside):,} do not" if outside.any() else ""


def misaligned(found: Demonstrations, vec: Any) -> str:
    """Without a clone that drives, what was played is what was meant, or that with noise of a known deviation; pairs
    that are off by a step differ by more."""
    collected, space = found.manifest.get("collected_with", {}), vec.single_action_space
    if collected.get("dagger") is not None or found.action.shape[1:] != space.shape or not_finite_actions(found):
        return ""
    noise = collected.get("action_noise", 0.0)
    seen = ((found.played - found.action) / ((space.high - space.low) / 2)).std()
    return f"by {seen:.3f} of half the range, not {noise:.3f}" if abs(seen - noise) > 0.2 * noise + 1e-6 else ""


def played_otherwise(found: Demonstrations, vec: Any) -> str:
    """Play the first episodes again from their seeds and compare what is seen and paid in each step."""
    if misfits(found, vec):
        return ""  # which is another problem
    chunks = (named(obs) for obs in found.chunks(1))
    for k in range(min(REPLAYED, len(found))):
        obs, _ = vec.reset(seed=[found.seed[k].tolist()])
        for t in range(found.start[k], found.start[k + 1]):
            recorded, now = next(chunks), named(obs)
            if not all(np.allclose(now[name], recorded[name], rtol=1e-3, atol=1e-4) for name in now):
                return f"not in episode {k}: other observations from step {t - found.start[k]} on"
            obs, reward, *_ = vec.step(found.played[t][None])
            if not np.isclose(reward[0], found.reward[t], rtol=1e-3, atol=1e-4):
                return f"not in episode {k}: another reward in step {t - found.start[k]}"
    return ""


def wrong_sums(found: Demonstrations) -> str:
    sums = np.add.reduceat(found.reward.astype(float), found.start[:-1])
    wrong = ~np.isclose(sums, found.returns, rtol=1e-3, atol=1e-3)
    return f"not in episode {int(wrong.argmax())}" if wrong.any() else ""


def duplicates(found: Demonstrations) -> str:
    same = [seed for seed, count in Counter(map(tuple, found.seed.tolist())).items() if count > 1]
    return f"{len(same)} seeds appear more than once, such as {list(same[0])}" if same else ""


def played_alike(found: Demonstrations) -> int:
    """Episodes in which the same was played as in an earlier one, from the same start by chance: no mistake, but no
    more to learn from either."""
    episodes = map(found.episode, range(len(found)))
    different = {found.played[steps].tobytes() + found.reward[steps].tobytes() for steps in episodes}
    return len(found) - len(different)


def wrong_figures(found: Demonstrations) -> str:
    """What the manifest says of the number of episodes and steps and of success."""
    manifest, real = found.manifest, {"episodes": len(found), "steps": int(found.start[-1])}
    for name, value in real.items():
        if manifest.get(name) != value:
            return f"it says {manifest.get(name)} {name}, there are {value}"
    rate = manifest.get("success_rate")
    if rate is not None and not np.isclose(rate, found.successes.mean()):
        return f"it says a success rate of {rate:.3f}, it is {found.successes.mean():.3f}"
    return ""


def demonstrated(found: Demonstrations, **more: Any) -> VectorEnv:
    """The environment that demonstrations are from, one row."""
    settings = {"training": False, "split": "train", **found.manifest["env_kwargs"], **more}
    return envs.make_vec(found.manifest["env_id"], 1, **settings)


def validate(found: Demonstrations) -> bool:
    """Print what is right and wrong with demonstrations, and note it in their manifest. Whether nothing is wrong."""
    checks = problems(found, demonstrated(found))
    for check, wrong in checks:
        print(f"{'WRONG' if wrong else 'ok':5}  {check}{f': {wrong}' if wrong else ''}")
    print(describe(found))
    judged = quality(checks, len(found))
    if judged != found.manifest.get("quality"):
        write_json(found.file.with_suffix(".json"), {**found.manifest, "quality": judged})
    print(f"{found.file}: {judged}")
    return judged != "quarantined"


def quality(found: list[tuple[str, str]], episodes: int) -> str:
    """What the manifest calls demonstrations with these problems."""
    if any(wrong for _, wrong in found):
        return "quarantined"
    return "validated" if episodes >= ENOUGH else "draft"


def describe(found: Demonstrations) -> str:
    """Demonstrations in a few lines."""
    lengths = np.diff(found.start)
    lines = [
        f"{len(found):,} episodes of {found.manifest['env_id']}, {found.start[-1]:,} steps: length {lengths.min()} to "
        f"{lengths.max()}, return {found.returns.mean():.2f} +- {found.returns.std():.2f}, "
        f"{found.successes.sum():,} successes, {played_alike(found)} as an earlier one",
    ]
    for k, column in enumerate(found.action.T):
        lines.append(
            f"action {k}: mean {column.mean():.3f}, standard deviation {column.std():.3f}, {column.min():.3f} to "
            f"{column.max():.3f}; played otherwise by {np.abs(found.played[:, k] - column).mean():.3f} on average"
        )
    if found.scenario is not None:
        for name in np.unique(found.scenario):
            there = found.scenario == name
            lines.append(f"  {name:45} {there.sum():4} episodes, success {found.successes[there].mean():.3f}")
    return "\n".join(lines)


def describe_episode(found: Demonstrations, episode: int) -> str:
    """Raises UserError if there is no such episode."""
    if not 0 <= episode < len(found):
        raise UserError(f"--episode must be from 0 to {len(found) - 1}, not {episode}")
    steps, scenario = found.episode(episode), "" if found.scenario is None else f", {found.scenario[episode]}"
    result = "a success" if found.successes[episode] else "no success"
    about = f"return {found.returns[episode]:.3f}, {result}, seed {found.seed[episode].tolist()}{scenario}"
    return f"episode {episode}: {steps.stop - steps.start} steps, {about}"


def show(found: Demonstrations, episode: int, window: str | None) -> None:
    """Play an episode again, in a window ("human") or, with None, for a film beside the demonstrations."""
    vec = demonstrated(found, render_mode=window or "rgb_array")
    film = None if window else Film(vec, found.file.with_name(f"{found.file.stem}_{episode}.mp4"))
    try:
        vec.reset(seed=[found.seed[episode].tolist()])
        for played in found.played[found.episode(episode)]:
            _, reward, terminated, truncated, _ = vec.step(played[None])
            if film is not None:
                film(np.zeros(1, int), reward, terminated, terminated | truncated)
    finally:
        vec.close()
