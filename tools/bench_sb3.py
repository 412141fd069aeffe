"""Train with Stable-Baselines3 or SBX, its JAX version, in a Gymnasium environment, with the settings and the
progress.csv of ppo_continuous.py.

    python tools/bench_sb3.py --env-id HalfCheetah-v5                  needs pip install -e ".[bench]"
    python tools/bench_sb3.py --env-id HalfCheetah-v5 --library sbx

Two differences remain: VecNormalize updates its statistics in every step instead of once per rollout, and with value
clipping Stable-Baselines3 uses the clipped error instead of the larger one.
"""

import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from envs import BUNDLED, UserError
from envs.cli import one_line_errors, parse
from ppo_continuous import Args


@dataclass(kw_only=True)
class PeerArgs(Args):
    library: Literal["sb3", "sbx"] = "sb3"  # Stable-Baselines3 or SBX


def sb3_settings(args: Args) -> dict[str, Any]:
    """The settings under the names of Stable-Baselines3."""

    def annealed(remaining: float) -> float:  # it is called after each rollout instead of before
        return args.learning_rate * min(1.0, remaining + 1 / args.num_iterations)

    return {
        "learning_rate": annealed if args.anneal_lr else args.learning_rate,
        "n_steps": args.num_steps,
        "batch_size": args.minibatch_size,
        "n_epochs": args.update_epochs,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "clip_range": args.clip_coef,
        "clip_range_vf": args.clip_coef if args.clip_vloss else None,
        "normalize_advantage": args.norm_adv,
        "ent_coef": args.ent_coef,
        "vf_coef": args.vf_coef / 2,  # of the squared error instead of half of it
        "max_grad_norm": args.max_grad_norm,
        "target_kl": None if args.target_kl is None else args.target_kl / 1.5,  # it stops at 1.5 times the value
        "policy_kwargs": {"net_arch": list(args.hidden_sizes), "log_std_init": args.init_log_std},
        "seed": args.seed,
        "device": "cpu",
    }


class Progress(BaseCallback):
    """Writes step, mean return of the last 100 episodes and steps/s after each rollout."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def _on_training_start(self) -> None:
        self.file = open(self.path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed at the end of training)
        self.writer = csv.writer(self.file)
        self.writer.writerow(["step", "rollout/ep_reward", "time/sps"])
        self.begin = time.time()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:  # the update of the last rollout is complete
        if self.num_timesteps:
            self._write()

    def _on_training_end(self) -> None:
        self._write()
        self.file.close()

    def _write(self) -> None:
        step = self.num_timesteps
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        mean = float(np.mean(returns)) if returns else ""
        self.writer.writerow([step, mean, step / (time.time() - self.begin)])


def train_sb3(args: PeerArgs) -> Any:
    """Train as ppo_continuous.py would with these settings; progress.csv is written to the run directory."""
    if args.env_id in BUNDLED:
        raise UserError(f"{args.env_id}: Stable-Baselines3 trains in Gymnasium's environments, such as HalfCheetah-v5")
    env = make_vec_env(args.env_id, args.num_envs, seed=args.seed)
    env = VecNormalize(env, norm_obs=args.norm_obs, norm_reward=args.norm_reward, gamma=args.gamma)
    folder = Path(args.run_root) / (args.run_name or f"sb3__{args.env_id}__seed{args.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    if args.library == "sbx":
        import sbx  # imports JAX
    algorithm = sbx.PPO if args.library == "sbx" else PPO
    model = algorithm("MlpPolicy", env, **sb3_settings(args))
    total = args.num_iterations * args.num_envs * args.num_steps
    model.learn(total, callback=Progress(folder / "progress.csv"))
    return model


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    with one_line_errors():
        train_sb3(parse(PeerArgs))
