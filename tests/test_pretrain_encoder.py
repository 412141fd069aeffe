"""tools/pretrain_encoder.py: images come from the cameras, the split is by robot, and the best encoder is written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from envs.ballbot import BallbotDepth
from envs.ballbot_depth import FrozenEncoder, load_encoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pretrain_encoder
from pretrain_encoder import Args, collect, rmse, train

SCRIPT = pretrain_encoder


def blobs(n, seed=0):
    """Images (n, 1, 16, 16) that two numbers describe: a near disc somewhere."""
    centre = 4 + 8 * torch.rand(n, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    line = torch.arange(16.0)
    distance = (line - centre[:, 0]).square() + (line[:, None] - centre[:, 1]).square()
    return (0.7 - 0.5 * torch.exp(-distance / 8)).unsqueeze(1)


@pytest.mark.parametrize("policy", ["random", "pid"])
def test_images_are_those_that_the_cameras_took(policy, monkeypatch):
    taken = []
    look = BallbotDepth.look

    def noted(self, rows):
        look(self, rows)
        if len(rows) == self.num_envs:
            taken.append(self.features.copy())

    monkeypatch.setattr(BallbotDepth, "look", noted)
    training, validation = collect(Args(policy=policy, frames=100, num_envs=5, depth_size=8, threads=1))
    assert training.shape == (10 * 4 * 2, 1, 8, 8)  # four robots of five, two cameras, ten looks
    assert validation.shape == (10 * 2, 1, 8, 8)
    expected = np.stack(taken[1:]).reshape(10, 5, 2, 8, 8)  # the first one is of the start
    np.testing.assert_array_equal(training.reshape(10, 4, 2, 8, 8), expected[:, :4])
    np.testing.assert_array_equal(validation.reshape(10, 1, 2, 8, 8), expected[:, 4:])
    assert len(np.unique(expected[:, 0, 0, 0, 0])) == 10  # never the same image twice


def test_it_learns_to_draw_and_early_stopping_keeps_the_best(tmp_path, monkeypatch):
    torch.manual_seed(0)
    errors = iter([0.5, 0.2, 0.3, 0.25, 0.1])
    states = []

    def scripted(autoencoder, images):
        states.append({name: x.clone() for name, x in autoencoder.state_dict().items()})
        autoencoder.eval()
        return next(errors)

    monkeypatch.setattr(pretrain_encoder, "rmse", scripted)
    with SummaryWriter(tmp_path) as writer:
        best, error = train(Args(epochs=9, patience=2), blobs(128), blobs(32, 1), writer)
    assert error == 0.2
    assert len(states) == 4  # two epochs without a better one, and the better one after them is never reached
    torch.testing.assert_close(best.state_dict(), states[1], rtol=0, atol=0)

    monkeypatch.undo()
    with SummaryWriter(tmp_path) as writer:
        best, error = train(Args(epochs=20, batch_size=32), blobs(1024), blobs(256, 1), writer)
    mean = (blobs(256, 1) - blobs(1024).mean(0)).square().mean().sqrt()
    assert error < mean / 3
    assert error == rmse(best, blobs(256, 1))


def test_from_the_command_line_to_the_environment(command, refused, tmp_path, monkeypatch):
    path = tmp_path / "encoder.pt"
    line = f"--output {path} --data-dir {tmp_path} --frames 400 --num-envs 5 --epochs 2 --threads 1"
    assert command(f"{line} --depth-size 8")[0] == 0
    first = load_encoder(str(path))
    # The second run trains from the images of the first
    monkeypatch.setattr(pretrain_encoder, "collect", None)
    assert command(f"{line} --depth-size 8 --keep-checkpoints")[0] == 0
    torch.testing.assert_close(load_encoder(str(path))["encoder"], first["encoder"], rtol=0, atol=0)
    assert [file.name for file in sorted((tmp_path / "encoder").glob("*.pt"))] == ["epoch_001.pt", "epoch_002.pt"]
    refused(f"{line} --depth-size 16", "depth_size is 8, not 16; change --depth-size")
    refused("--output encoder", "must be a file that ends in .pt")
    content = load_encoder(str(path))
    assert content["frames"] == 400
    assert list((tmp_path / "encoder").glob("events.*"))
    obs, _ = BallbotDepth(2, depth_size=8, encoder=str(path)).reset(seed=1)
    pixels, _ = BallbotDepth(2, depth_size=8).reset(seed=1)
    codes = FrozenEncoder(str(path), 8)(pixels[:, 16:].reshape(2, 2, 8, 8))
    np.testing.assert_array_equal(obs[:, 16:], codes)
