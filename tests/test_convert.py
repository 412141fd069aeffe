"""tools/convert.py: what comes back is what went out, and other packages can read it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import convert

import bc_pretrain
from envs import UserError, demonstrations
from envs.so101 import SO101Paper

SCRIPT = convert


@pytest.fixture(scope="module", autouse=True)
def arm(tmp_path_factory):
    """Two episodes of the arm in the working directory."""
    folder = tmp_path_factory.mktemp("convert")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        about = {"policy": "ik", "env_id": "SO101Paper-v0", "episodes": 2, "action_noise": 0.1}
        bc_pretrain.collect(bc_pretrain.CollectArgs(dataset="arm", **about))
        yield


def read(name):
    return demonstrations.read_dataset(bc_pretrain.ValidateArgs(dataset=name))


def test_minari_round_trip(command):
    minari = pytest.importorskip("minari")
    for line in ("to-minari arm arm/ik-v0", "from-minari arm/ik-v0 --dataset back"):
        assert command(line)[0] == 0
    there, back = read("arm"), read("back")
    for name in set(there.arrays) - {"seed", "returns"}:
        np.testing.assert_array_equal(back[name], there[name], err_msg=name)
    np.testing.assert_allclose(back["returns"], there["returns"], rtol=1e-5)
    assert (back.env_id, back.metadata["quality"], back.replayable) == ("SO101Paper-v0", "draft", False)
    with pytest.raises(UserError, match="imported"):
        demonstrations.replay(back, 0, video=False, render="human")

    envs = there.make_envs()
    episode = minari.load_dataset("arm/ik-v0")[1]
    envs.reset(seed=[there["seed"][1].tolist()])
    for action in episode.infos["executed_action"]:
        info = envs.step(action[None])[-1]
    np.testing.assert_array_equal(episode.observations[-1], info["final_obs"][0])
    assert episode.terminations[-1] == there["terminated"][1]


def test_lerobot_folder(command, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(SO101Paper, "render", lambda self: np.full((48, 64, 3), 51, np.uint8))
    assert command("to-lerobot arm lerobot --video --task drag")[0] == 0
    dataset, folder = read("arm"), Path("lerobot")
    info, stats = (json.loads((folder / "meta" / f"{name}.json").read_text()) for name in ("info", "stats"))
    n, starts = len(dataset["reward"]), dataset["episode_starts"]
    assert (info["fps"], info["total_frames"], info["total_episodes"], info["splits"]) == (30, n, 2, {"train": "0:2"})
    table = pq.read_table(folder / info["data_path"].format(chunk_index=0, file_index=0)).to_pydict()
    assert {*table} == {*info["features"]} - {convert.CAMERA}
    np.testing.assert_array_equal(np.float32(table["action"]), dataset["action"])
    np.testing.assert_array_equal(np.float32(table["observation.state"]), dataset["obs"])
    assert table["frame_index"][starts[1] - 1 : starts[1] + 2] == [starts[1] - 1, 0, 1]
    assert table["timestamp"][starts[1] + 1] == pytest.approx(1 / 30)
    np.testing.assert_array_equal(np.flatnonzero(table["next.done"]), starts[1:] - 1)
    np.testing.assert_allclose(stats["action"]["std"], dataset["action"].std(0), rtol=1e-4)
    episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pandas()
    assert episodes["dataset_to_index"].tolist() == starts[1:].tolist()
    assert episodes["tasks"][0].tolist() == ["drag"]
    assert pq.read_table(folder / "meta/tasks.parquet").to_pandas().index.tolist() == ["drag"]
    video = folder / info["video_path"].format(video_key=convert.CAMERA, chunk_index=0, file_index=0)
    assert imageio_ffmpeg.count_frames_and_secs(str(video))[0] == n
    assert episodes[f"videos/{convert.CAMERA}/from_timestamp"][1] == pytest.approx(starts[1] / 30)
    assert info["features"][convert.CAMERA]["shape"] == [48, 64, 3]
    np.testing.assert_allclose(np.ravel(stats[convert.CAMERA]["mean"]), 0.2)


def test_arrays_of_steps(command, refused):
    rng, names = np.random.default_rng(0), ("terminations", "truncations")
    arrays = {"observations": rng.normal(size=(9, 3)), "actions": rng.uniform(-2, 2, (9, 1)), "rewards": np.ones(9)}
    ends = dict(zip(names, np.array([[0, 0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0, 0]])))
    np.savez("steps.npz", **arrays, **ends)
    assert command("from-npz steps.npz --env-id Pendulum-v1 --dataset steps")[0] == 0
    dataset = read("steps")
    assert dataset["episode_starts"].tolist() == [0, 3, 7]  # the last two steps belong to no finished episode
    assert (dataset["terminated"].tolist(), dataset["returns"].tolist()) == ([True, False], [3, 4])
    np.testing.assert_array_equal(dataset["obs"], np.float32(arrays["observations"][:7]))
    line = "from-npz steps.npz --env-id Pendulum-v1 --dataset"
    refused(f"{line} steps", "exists; choose another --dataset name")
    np.savez("no_end.npz", **arrays, **dict.fromkeys(names, np.zeros(9)))
    refused(f"{line.replace('steps', 'no_end')} other", "no episode ends")
    refused("from-npz missing.npz --env-id Pendulum-v1 --dataset other", "not a file with observations")
    refused("to-lerobot steps folder --video", "cannot be replayed")
