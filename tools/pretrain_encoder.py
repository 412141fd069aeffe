"""Pretrain the depth encoder of BallbotDepth-v0 as half of an autoencoder.

    python tools/pretrain_encoder.py                                 writes runs/encoder.pt
    python tools/pretrain_encoder.py --policy pid --terrain-height 0.15
    python tools/pretrain_encoder.py --policy runs/<run>/policy.onnx       (a policy for Ballbot-v0)
    python ppo_continuous.py --env-id BallbotDepth-v0 --env-kwargs encoder runs/encoder.pt

1. `collect` lets a policy drive and keeps the depth images that it comes by.
2. `Autoencoder` squeezes an image through 20 numbers and draws it again: encoder and mirrored decoder.
3. `train` minimizes the mean squared error of the drawing on 80 % of the images; the encoder with the smallest error
   on the other 20 %, which come from other episodes, is written. TensorBoard shows losses and drawings.
"""

import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import UserError, make_vec
from envs.ballbot import IMAGE_EVERY, OBS_HIGH, Ballbot
from envs.ballbot_depth import CODE, DepthEncoder, save_encoder
from envs.cli import one_line_errors
from envs.evaluation import NonFiniteError, Policy, make_scripted_policy


@dataclass
class Args:
    output: str = "runs/encoder.pt"
    """where to write the encoder; TensorBoard's files go beside it"""
    policy: str = "random"
    """what drives: random, pid, pid-drive, or the policy.onnx of a run on Ballbot-v0"""
    frames: int = 50_000
    """images to collect"""
    depth_size: int = 16
    """pixels along each side of an image, a multiple of 4"""
    terrain_height: float = 0.1
    """height of the uneven ground, m"""
    num_envs: int = 64
    """robots that drive at a time"""
    seed: int = 1
    """seed of the episodes, the actions and the networks"""
    epochs: int = 20
    """most passes over the images"""
    patience: int = 10
    """stop after so many epochs without a better validation error"""
    batch_size: int = 64
    """images per gradient step"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    threads: int = 2
    """CPU threads of the simulator and of PyTorch"""


class RandomActions:
    """Uniform actions, each held for a while, so that the robot does not only tremble."""

    HELD = 10  # calls

    def __init__(self, seed: int):
        self.rng, self.calls = np.random.default_rng(seed), 0

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        if self.calls % self.HELD == 0:
            self.action = self.rng.uniform(-1, 1, (len(obs), 3)).astype(np.float32)
        self.calls += 1
        return self.action


def make_policy(args: Args) -> Policy:
    """What drives. It sees the 16 numbers of Ballbot-v0, not the images."""
    if args.policy == "random":
        return RandomActions(args.seed)
    if args.policy not in Ballbot.controllers and not args.policy.endswith(".onnx"):
        raise UserError(f"--policy must be random, {', '.join(Ballbot.controllers)} or PATH.onnx, not {args.policy}")
    return make_scripted_policy(args.policy, make_vec("Ballbot-v0", 1))


def collect(args: Args) -> tuple[Tensor, Tensor]:
    """Drives until there are enough images. Returns those of the first 80 % of the robots and of the others, each
    (n, 1, size, size), m."""
    policy = make_policy(args)
    repeat = getattr(policy, "env_kwargs", {}).get("action_repeat", 1)
    size, proprioception = args.depth_size, len(OBS_HIGH)
    settings = {"depth_size": size, "terrain_height": args.terrain_height, "action_repeat": repeat}
    vec = make_vec("BallbotDepth-v0", args.num_envs, training=False, threads=args.threads, **settings)
    obs, _ = vec.reset(seed=args.seed)
    if hasattr(policy, "reset"):
        policy.reset(np.arange(args.num_envs), vec)
    calls = -(-IMAGE_EVERY // repeat)  # until there is a new image
    images = []
    while len(images) * 2 * args.num_envs < args.frames:
        for _ in range(calls):
            obs, _, terminated, truncated, _ = vec.step(policy(obs[:, :proprioception]))
            begun = np.flatnonzero(terminated | truncated)
            if len(begun) and hasattr(policy, "reset"):
                policy.reset(begun, vec)
        images.append(obs[:, proprioception:].reshape(args.num_envs, 2, size, size))
    vec.close()
    training = round(0.8 * args.num_envs)
    frames = torch.as_tensor(np.stack(images))
    return tuple(part.reshape(-1, 1, size, size) for part in (frames[:, :training], frames[:, training:]))


class Autoencoder(nn.Module):
    """The encoder, and its mirror image that draws a picture from a code."""

    def __init__(self, size: int):
        super().__init__()
        self.encoder = DepthEncoder(size)
        self.decoder = nn.Sequential(
            nn.Linear(CODE, 32 * (size // 4) ** 2), nn.BatchNorm1d(32 * (size // 4) ** 2), nn.LeakyReLU(),
            nn.Unflatten(1, (32, size // 4, size // 4)),
            nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.LeakyReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))


@torch.no_grad()
def rmse(autoencoder: Autoencoder, images: Tensor) -> float:
    """Root mean square error of its drawings, m."""
    autoencoder.eval()
    total = sum((autoencoder(batch) - batch).square().sum().item() for batch in images.split(1024))
    return sqrt(total / images.numel())


def train(args: Args, training: Tensor, validation: Tensor, writer: SummaryWriter) -> tuple[Autoencoder, float]:
    """Returns the autoencoder that draws the validation images best, and its error there, m."""
    autoencoder = Autoencoder(args.depth_size)
    optimizer = torch.optim.Adam(autoencoder.parameters(), args.learning_rate, fused=True)
    best, best_error, waited = None, float("inf"), 0
    for epoch in range(1, args.epochs + 1):
        autoencoder.train()
        total = 0.0
        for batch in training[torch.randperm(len(training))].split(args.batch_size):
            if len(batch) == 1:  # has no variance to normalize by
                continue
            optimizer.zero_grad()
            loss = (autoencoder(batch) - batch).square().mean()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        error = rmse(autoencoder, validation)
        if not np.isfinite(error):
            raise NonFiniteError(f"the error is not finite after epoch {epoch}; try a lower --learning-rate")
        waited = 0 if error < best_error else waited + 1
        if error < best_error:
            best, best_error = deepcopy(autoencoder), error
        writer.add_scalar("train/rmse", sqrt(total / len(training)), epoch)
        writer.add_scalar("validation/rmse", error, epoch)
        shown = validation[:: max(1, len(validation) // 8)][:8]
        with torch.no_grad():
            writer.add_images("validation/image_above_drawing", torch.cat([shown, autoencoder(shown)], dim=2), epoch)
        print(f"epoch {epoch}: RMSE {1000 * error:.1f} mm, best {1000 * best_error:.1f} mm", flush=True)
        if waited == args.patience:
            break
    return best, best_error


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__)
        path = Path(args.output)
        for name in ("frames", "num_envs", "epochs", "patience", "batch_size", "threads"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
        if args.batch_size < 2:
            raise UserError("--batch-size must be at least 2, which batch normalization needs")
        if not args.learning_rate > 0:
            raise UserError(f"--learning-rate must be above 0, not {args.learning_rate}")
        if path.suffix != ".pt" or path.is_dir():
            raise UserError(f"--output must be a file that ends in .pt, not {path}")
        if args.num_envs < 5:
            raise UserError("--num-envs must be at least 5, of which 4 train and 1 validates")
        if args.depth_size < 4 or args.depth_size % 4:
            raise UserError(f"--depth-size must be a multiple of 4, not {args.depth_size}")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)

        begin = time.perf_counter()
        training, validation = collect(args)
        print(f"{len(training)} + {len(validation)} images in {time.perf_counter() - begin:.0f} s", flush=True)
        with SummaryWriter(path.with_suffix("")) as writer:
            autoencoder, error = train(args, training, validation, writer)
        mean = (validation - training.mean(0)).square().mean().sqrt().item()
        about = {"rmse": error, "rmse_of_mean_image": mean, "frames": len(training) + len(validation)}
        save_encoder(path, autoencoder.encoder, **about, seed=args.seed)
        took = time.perf_counter() - begin
        print(
            f"{path}: RMSE {1000 * error:.1f} mm on images of other episodes; the mean image has {1000 * mean:.1f} mm"
        )
        print(f"{took:.0f} s; use it with --env-id BallbotDepth-v0 --env-kwargs encoder {path}")


if __name__ == "__main__":
    main()
