"""tools/evaluate.py: every form of a policy acts alike, gains are those of the same episodes, files are whole."""

import json
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
from PIL import Image

import ppo_continuous
import ppo_residual
from envs import UserError, make_vec
from envs.batch_env import BatchEnv
from envs.evaluation import read_pt
from envs.run import save_pt
from envs.socnav.metrics import load_snqi

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import evaluate
from evaluate import Args

SCRIPT = evaluate
ARM = "SO101Paper-v0"


class OneStep(BatchEnv):
    """Episodes of one step; one metric is NaN."""

    measures = ("clearance",)

    def __init__(self, num_envs=1, training=True, split="train", render_mode=None, frame: tuple[int, ...] = (48, 64)):
        box = gym.spaces.Box(-1, 1, (1,), np.float32)
        super().__init__(num_envs, box, box, 1, training, split, render_mode)
        self.frame = frame

    def start(self, rows):
        pass

    def advance(self, action):
        return action[:, 0], np.zeros(self.num_envs, bool), {"clearance": np.full(self.num_envs, np.nan)}

    def observe(self, rows):
        return np.zeros((len(rows), 1), np.float32)

    def state(self):
        return {}

    def render(self):
        return np.full((*self.frame, 3), 200, np.uint8)


gym.register("OneStep-v0", vector_entry_point=OneStep)


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """A folder with base.onnx and a residual run `arm` on it."""
    folder = tmp_path_factory.mktemp("arm")
    small = {"num_envs": 2, "num_steps": 32, "minibatch_size": 32, "total_timesteps": 64, "eval_episodes": 1}
    small |= {"eval_every": 0, "checkpoint_every": 0, "hidden_sizes": (8,), "run_root": str(folder)}
    ppo_continuous.train(ppo_continuous.Args(env_id=ARM, run_name="base", **small))
    shutil.copy(folder / "base" / "policy.onnx", folder / "base.onnx")
    base = str(folder / "base.onnx")
    ppo_residual.train(ppo_residual.Args(run_name="arm", base_policy=base, residual_scale=0.05, **small))
    return folder


def rollout_by_hand(folder, episode):
    """Return and length of a test episode of the residual policy, from its two ONNX files."""
    sessions = [onnxruntime.InferenceSession(folder / name) for name in ("base.onnx", "arm/policy.onnx")]
    envs = make_vec(ARM, 1, training=False, split="test")
    low, high = envs.single_action_space.low, envs.single_action_space.high
    obs, _ = envs.reset(seed=[[7, episode]])
    while True:
        base, residual = (session.run(None, {"obs": obs})[0] for session in sessions)
        obs, _, terminated, truncated, info = envs.step(np.clip(base + 0.7 * 0.05 * residual, low, high))
        if terminated[0] or truncated[0]:
            return info["episode"]["r"][0], info["episode"]["l"][0]


def test_a_run_its_file_and_its_onnx_act_alike(arm):
    run = evaluate.run(Args(str(arm / "arm"), episodes=3, seed=7))
    assert (run["env_id"], run["episodes"], run["seed"]) == (ARM, 3, 7)
    assert run["sha256"] == json.loads((arm / "arm" / "summary.json").read_text())["sha256"]["best.pt"]
    file = evaluate.run(Args(str(arm / "arm" / "best.pt"), episodes=3, seed=7))
    assert {**file, "policy": run["policy"]} == run
    onnx = evaluate.run(Args(str(arm / "arm" / "policy.onnx"), episodes=2, seed=7))
    for i, episode in enumerate(onnx["per_episode"]):
        assert episode["return"] == pytest.approx(run["per_episode"][i]["return"], abs=1e-2)
        assert (episode["return"], episode["length"]) == pytest.approx(rollout_by_hand(arm, i), abs=1e-4)


def test_the_gain_over_the_base_is_that_of_the_same_episodes(arm, capsys):
    result = evaluate.run(Args(str(arm / "arm"), episodes=4, compare_base=True, env_kwargs={"frame_margin": 0.1}))
    base = evaluate.run(Args(str(arm / "base.onnx"), episodes=4, env_kwargs={"frame_margin": 0.1}))
    assert result["base"]["per_episode"] == base["per_episode"]
    success = [[float(episode["success"]) for episode in x["per_episode"]] for x in (result, base)]
    difference = np.subtract(*success)
    margin = 1.96 * difference.std(ddof=1) / 2
    gain = {"gain": difference.mean(), "low": difference.mean() - margin, "high": difference.mean() + margin}
    assert result["gain"] == {"of": "success", **{name: pytest.approx(x) for name, x in gain.items()}}
    evaluate.report(result)
    assert f"paired gain in success: {gain['gain']:+.3f}, 95 % interval" in capsys.readouterr().out


def test_a_base_is_found_beside_the_policy_and_must_be_the_same(arm, tmp_path):
    expected = evaluate.run(Args(str(arm / "arm"), episodes=1))
    shutil.copytree(arm / "arm", tmp_path / "moved")
    base = (arm / "base.onnx").rename(tmp_path / "moved" / "base.onnx")
    try:
        for name, places in (("", 9), ("policy.onnx", 2)):
            result = evaluate.run(Args(str(tmp_path / "moved" / name), episodes=1))
            assert round(result["mean_return"] - expected["mean_return"], places) == 0
    finally:
        shutil.copy(base, arm / "base.onnx")
    shutil.copy(arm / "arm" / "policy.onnx", base)
    (arm / "base.onnx").rename(arm / "away.onnx")
    try:
        with pytest.raises(UserError, match=r"base\.onnx is missing or not the file that .*best\.pt was trained with"):
            evaluate.run(Args(str(tmp_path / "moved"), episodes=1))
    finally:
        (arm / "away.onnx").rename(arm / "base.onnx")


def test_a_module_is_imported_only_if_the_command_line_names_it(arm, tmp_path, monkeypatch):
    env_id = "registers_an_arm:Arm-v0"
    save_pt(tmp_path / "arm.pt", read_pt(arm / "base" / "best.pt") | {"env_id": env_id})
    code = (
        f"import gymnasium\ngymnasium.register('Arm-v0', vector_entry_point=gymnasium.spec('{ARM}').vector_entry_point)"
    )
    (tmp_path / "registers_an_arm.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"would import the module registers_an_arm; .* give --env-id {env_id}"):
        evaluate.run(Args(str(tmp_path / "arm.pt"), episodes=1))
    assert evaluate.run(Args(str(tmp_path / "arm.pt"), env_id=env_id, episodes=1))["env_id"] == env_id


def test_scenarios_are_listed_with_their_rates(capsys):
    result = evaluate.run(Args("pursuit-stop", env_id="SocNavGrid-v0", episodes=8))
    evaluate.report(result)
    lines = capsys.readouterr().out.splitlines()[1:]
    names = sorted({episode["scenario"] for episode in result["per_episode"]})
    for line, name in zip(lines, names, strict=True):
        success = [episode["success"] for episode in result["per_episode"] if episode["scenario"] == name]
        assert line.split()[:5] == [name, str(len(success)), "episodes,", "success", f"{np.mean(success):.3f},"]


def test_the_video_of_an_episode_of_one_step_has_one_frame(command, tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    for name in ("x.mp4", "x.gif"):
        line = f"zero --env-id OneStep-v0 --episodes 3 --env-kwargs frame (32,64) --video {tmp_path / name}"
        assert command(line)[0] == 0
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "x.mp4"))[0] == 1
    with Image.open(tmp_path / "x.gif") as gif:
        assert (gif.n_frames, gif.size) == (1, (400, 200))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pid", "pid: no run or file that names its environment; a scripted controller needs --env-id"),
        (f"nobody --env-id {ARM}", "unknown policy 'nobody'; choose zero, ik"),
        ("missing.pt", "missing.pt: no such file"),
        ("missing.onnx", "missing.onnx: no such file"),
        ("RUN --env-id Ballbot-v0", f"a policy for {ARM}, not Ballbot-v0; leave --env-id out"),
        ("RUN --env-kwargs action_repeat 2", "unknown argument 'action_repeat'; it takes"),
        ("RUN --env-kwargs split train", "--env-kwargs split: the script sets it"),
        ("RUN --env-kwargs frame_margin wide", "frame_margin must be float, not 'wide'"),
        ("RUN/policy.onnx --env-id Ballbot-v0", f"a policy for {ARM}, not Ballbot-v0; leave --env-id out"),
        (f"ik --env-id {ARM} --compare-base", "--compare-base: ik is not a residual policy"),
        (
            "pid --env-id LateralControl-v0 --env-kwargs action_mode delta",
            "pid: is for action_mode absolute",
        ),
        ("RUN --episodes -1", "--episodes must be 0 or more, not -1"),
        ("RUN --episodes 0", "0 evaluation episodes means all, but SO101Paper-v0 has an unlimited number"),
        ("zero --env-id LateralControl-v0 --episodes 10000", "10000 evaluation episodes: the test split has"),
        ("RUN --seed -1", "--seed must be from 0 to"),
        ("RUN --threads 0", "--threads must be from 1 to"),
        ("RUN --json missing/x.json", "missing/x.json: no file can be written there"),
        ("RUN --json .", ".: no file can be written there"),
        ("RUN --video x.avi", "--video x.avi: must end in .mp4 or .gif"),
        ("RUN --video x.gif --render human", "excludes --render"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(line, message, arm, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(line.replace("RUN", str(arm / "arm")), message)


def test_a_baseline_of_the_snqi(command, tmp_path):
    """Medians and 95th percentiles of the episodes, with linear interpolation; the environment reads the file."""
    line = "pursuit --env-id SocNavGrid-v0 --env-kwargs scenario francis2023_frontal_approach grid_size 2 --episodes 3"
    assert command(f"{line} --json {tmp_path}/result.json --snqi-baseline {tmp_path}/snqi.json")[0] == 0
    baselines = load_snqi(str(tmp_path / "snqi.json"))["baselines"]
    episodes = json.loads((tmp_path / "result.json").read_text())["per_episode"]
    low, middle, high = sorted(episode["jerk"] for episode in episodes)
    assert baselines["jerk"] == pytest.approx({"median": middle, "p95": middle + 0.9 * (high - middle)})
    assert baselines["collisions"]["median"] == sorted(episode["failure"] for episode in episodes)[1]
    assert low < high
