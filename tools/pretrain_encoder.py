"""Pretrain the depth encoder of BallbotDepth-v0 as half of an autoencoder.

    python tools/pretrain_encoder.py                                       writes runs/encoder.pt
    python tools/pretrain_encoder.py --data-dir runs/depth_images          collects there, or trains from images there
    python tools/pretrain_encoder.py --policy runs/<run>/policy.onnx       a policy for Ballbot-v0
    python ppo_continuous.py --env-id BallbotDepth-v0 --env-kwargs encoder runs/encoder.pt

A policy collects depth images; the autoencoder compresses an image to 20 numbers and reconstructs it. Training
minimizes the mean squared error on 80 % of the environments. The encoder with the smallest error on the others is
saved. TensorBoard shows errors and reconstructions.
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
    output: str = "runs/encoder.pt"  # file of the encoder; TensorBoard files go to a folder beside it
    data_dir: str | None = None  # folder of images.npz: train from it if it exists, else collect and write it
    keep_checkpoints: bool = False  # also save the encoder of each epoch, beside the TensorBoard files
    policy: str = "random"  # random, pid, pid-drive, or the policy.onnx of a run on Ballbot-v0
    frames: int = 50_000  # number of images to collect
    depth_size: int = 16  # pixels per side of an image; a multiple of 4
    terrain_height: float = 0.1  # height of the uneven ground, m
    num_envs: int = 64  # number of environments, of which a fifth validates; at least 5
    seed: int = 1  # seed of episodes, actions and networks
    epochs: int = 20  # maximum number of epochs
    patience: int = 10  # stop after this many epochs without a smaller validation error
    batch_size: int = 64  # images per gradient step
    learning_rate: float = 1e-3  # learning rate of Adam
    threads: int = 2  # CPU threads of the simulator and of PyTorch


class RandomActions:
    """Uniform random actions, held for 10 steps each."""

    def __init__(self, seed: int):
        self.rng, self.calls = np.random.default_rng(seed), 0

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        if self.calls % 10 == 0:
            self.action = self.rng.uniform(-1, 1, (len(obs), 3)).astype(np.float32)
        self.calls += 1
        return self.action


def make_policy(args: Args) -> Policy:
    """The policy that collects. Its observation is that of Ballbot-v0, without images."""
    if args.policy == "random":
        return RandomActions(args.seed)
    if args.policy not in Ballbot.controllers and not args.policy.endswith(".onnx"):
        raise UserError(f"--policy must be random, {', '.join(Ballbot.controllers)} or PATH.onnx, not {args.policy}")
    return make_scripted_policy(args.policy, make_vec("Ballbot-v0", 1))


def collect(args: Args) -> tuple[Tensor, Tensor]:
    """Collect images. Returns those of the first 80 % of the environments and of the others (n, 1, size, size), m."""
    policy = make_policy(args)
    repeat = getattr(policy, "env_kwargs", {}).get("action_repeat", 1)
    size, proprioception = args.depth_size, len(OBS_HIGH)
    settings = {"depth_size": size, "terrain_height": args.terrain_height, "action_repeat": repeat}
    vec = make_vec("BallbotDepth-v0", args.num_envs, training=False, threads=args.threads, **settings)
    obs, _ = vec.reset(seed=args.seed)
    if hasattr(policy, "reset"):
        policy.reset(np.arange(args.num_envs), vec)
    calls = -(-IMAGE_EVERY // repeat)  # until the next image
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


def images(args: Args) -> tuple[Tensor, Tensor]:
    """Training and validation images, from args.data_dir or collected.

    Raises:
        UserError: the file in args.data_dir is damaged or has another depth_size.
    """
    file = Path(args.data_dir) / "images.npz" if args.data_dir else None
    if file is None or not file.exists():
        training, validation = collect(args)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(file, training=training.numpy(), validation=validation.numpy())
        return training, validation
    try:
        with np.load(file) as content:
            training, validation = (torch.as_tensor(content[name]) for name in ("training", "validation"))
    except Exception as error:  # the exceptions of NumPy and zipfile have no common base class
        raise UserError(f"{file}: damaged or not images ({error!r}); remove it to collect them again") from error
    if training.shape[-1] != args.depth_size:
        raise UserError(f"{file}: depth_size is {training.shape[-1]}, not {args.depth_size}; change --depth-size")
    return training, validation


class Autoencoder(nn.Module):
    """The encoder and a decoder with mirrored layers."""

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
    """Root mean square error of the reconstructions, m."""
    autoencoder.eval()
    total = sum((autoencoder(batch) - batch).square().sum().item() for batch in images.split(1024))
    return sqrt(total / images.numel())


def train(args: Args, training: Tensor, validation: Tensor, writer: SummaryWriter) -> tuple[Autoencoder, float]:
    """Returns the autoencoder with the smallest error on the validation images, and this error, m."""
    autoencoder = Autoencoder(args.depth_size)
    optimizer = torch.optim.Adam(autoencoder.parameters(), args.learning_rate, fused=True)
    best, best_error, waited = None, float("inf"), 0
    for epoch in range(1, args.epochs + 1):
        autoencoder.train()
        total = 0.0
        for batch in training[torch.randperm(len(training))].split(args.batch_size):
            if len(batch) == 1:  # batch normalization needs two images
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
            writer.add_images(
                "validation/image_and_reconstruction", torch.cat([shown, autoencoder(shown)], dim=2), epoch
            )
        print(f"epoch {epoch}: RMSE {1000 * error:.1f} mm, best {1000 * best_error:.1f} mm", flush=True)
        if args.keep_checkpoints:
            path = Path(args.output).with_suffix("") / f"epoch_{epoch:03d}.pt"
            save_encoder(path, autoencoder.encoder, rmse=error, seed=args.seed)
        if waited == args.patience:
            break
    return best, best_error


def main() -> None:
    with one_line_errors():
        args = tyro.cli(Args, description=__doc__)
        path = Path(args.output)
        if args.num_envs < 5 or args.batch_size < 2 or args.frames < 1 or args.epochs < 1:
            raise UserError("--num-envs must be at least 5, --batch-size 2, --frames and --epochs 1")
        if path.suffix != ".pt" or path.is_dir():
            raise UserError(f"--output must be a file that ends in .pt, not {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)

        begin = time.perf_counter()
        training, validation = images(args)
        print(f"{len(training)} + {len(validation)} images in {time.perf_counter() - begin:.0f} s", flush=True)
        with SummaryWriter(path.with_suffix("")) as writer:
            autoencoder, error = train(args, training, validation, writer)
        mean = (validation - training.mean(0)).square().mean().sqrt().item()
        about = {"rmse": error, "rmse_of_mean_image": mean, "frames": len(training) + len(validation)}
        save_encoder(path, autoencoder.encoder, **about, seed=args.seed)
        print(f"{path}: validation RMSE {1000 * error:.1f} mm; that of the mean image is {1000 * mean:.1f} mm")
        print(f"use it with --env-id BallbotDepth-v0 --env-kwargs encoder {path}")


if __name__ == "__main__":
    main()
