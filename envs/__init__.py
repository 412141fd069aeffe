"""The environments, registered with Gymnasium: gym.make("envs:SO101Paper-v0"), envs.make_vec("SO101Paper-v0", 8)."""

import importlib
import inspect
from typing import Any

import gymnasium as gym

from envs.batch_env import BatchEnv, GymVec
from envs.command import fits
from envs.files import UserError

gym.register("SO101Paper-v0", "envs.so101:SO101PaperEnv", vector_entry_point="envs.so101:SO101Paper")

gym.register("LateralControl-v0", "envs.lateral:LateralControlEnv", vector_entry_point="envs.lateral:LateralControl")

gym.register("Ballbot-v0", "envs.ballbot:BallbotEnv", vector_entry_point="envs.ballbot:Ballbot")
gym.register("BallbotDepth-v0", "envs.ballbot:BallbotDepthEnv", vector_entry_point="envs.ballbot:BallbotDepth")

gym.register(
    "SocNavGrid-v0",
    "envs.socnav.environment:SocNavGridEnv",
    vector_entry_point="envs.socnav.environment:SocNavGrid",
)

OURS = ("Ballbot-v0", "BallbotDepth-v0", "LateralControl-v0", "SO101Paper-v0", "SocNavGrid-v0")


def make_vec(env_id: str, num_envs: int, seed: int | None = None, **kwargs: Any) -> BatchEnv | GymVec:
    """A vector environment with SAME_STEP autoreset, info["final_obs"] and info["episode"]: a BatchEnv, or Gymnasium's
    own in that shape. With a seed it is also reset.

    `training`, `split` and `threads` are dropped where an environment does not know them.

    Raises:
        UserError: unknown environment, unknown argument, or an argument of the wrong type or value.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)  # which registers it
        spec = gym.spec(name)
    except (ImportError, TypeError, ValueError) as error:  # the last two of names that no module can have
        raise UserError(f"{env_id}: {error}; MODULE:ID takes a module that Python finds") from None
    except gym.error.Error:
        ours = ", ".join(OURS)
        raise UserError(f"unknown environment {env_id!r}; ours are {ours}, others as Gymnasium lists them") from None
    if num_envs < 1:
        raise UserError(f"num_envs must be at least 1, not {num_envs}")
    try:
        entry = spec.vector_entry_point
        cls = gym.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
        native = isinstance(cls, type) and issubclass(cls, BatchEnv)
        known = arguments(cls) if native else ()
        optional = ("training", "split", "threads") if native else ("training", "threads")
        kwargs = {name: value for name, value in kwargs.items() if name in known or name not in optional}
        if "copies" in kwargs and "copies" not in known:
            raise UserError(f"--group-size: {spec.id} cannot put several environments in one situation; leave it out")
        if native:
            check_kwargs(cls, kwargs)
        vec = cls(num_envs=num_envs, **kwargs) if native else GymVec(spec.id, num_envs, **kwargs)
    except UserError:
        raise
    except (TypeError, ValueError, ImportError, OSError, gym.error.Error) as error:
        raise UserError(f"{spec.id}: {error}") from error
    if seed is not None:
        vec.reset(seed=seed)
    return vec


def make_training(args: Any, flat: bool = True, **more: Any) -> BatchEnv | GymVec:
    """The environments to train in, with flat Boxes unless told otherwise, and with these arguments more; a mistake in
    --eval-env-kwargs shows here too, not only later."""
    check_evaluation(args)
    if args.group_size > 1 and "copies" in args.env_kwargs:
        raise UserError("copies is not for --env-kwargs: --group-size sets it; leave it out")
    grouped = {"copies": args.group_size} if args.group_size > 1 else {}
    vec = make_vec(args.env_id, args.num_envs, threads=args.threads, **grouped, **more, **args.env_kwargs)
    if flat:
        require_flat_box(vec)
    return vec


def check_evaluation(args: Any) -> None:
    """Raises UserError if the validation episodes that args ask for cannot be played: at the start, not hours later."""
    settings = {"training": False, "split": "validation", **args.env_kwargs, **args.eval_env_kwargs}
    vec = make_vec(args.env_id, 1, **settings)
    evaluation_episodes(args, vec)
    vec.close()


def evaluation_episodes(args: Any, vec: BatchEnv | GymVec) -> int:
    """How many episodes an evaluation plays in vec: --eval-episodes, or with 0 all there are.

    Raises:
        UserError: more than there are, or all of a number without end.
    """
    limit = getattr(vec, "num_episodes", None)
    if args.eval_episodes < 0:
        raise UserError(f"--eval-episodes must be 0 or more, not {args.eval_episodes}")
    if args.eval_episodes == 0 and limit is None:
        raise UserError(f"--eval-episodes 0 means all there are, but {args.env_id} has no end of them; give a number")
    if limit is not None and args.eval_episodes > limit:
        advice = "--eval-episodes 0 plays all"
        raise UserError(f"--eval-episodes {args.eval_episodes}: the {vec.split} split has only {limit}; {advice}")
    return args.eval_episodes or limit


def require_grid(vec: Any) -> None:
    """Raises UserError unless observations are those of SocNavGrid-v0."""
    space = vec.single_observation_space
    if not isinstance(space, gym.spaces.Dict) or "grid" not in space.spaces:
        what = " ".join(str(space).split())
        raise UserError(f"observations must be those of SocNavGrid-v0, not {what}; ppo_continuous.py takes flat ones")


def require_flat_box(vec: Any) -> None:
    """Raises UserError unless observations are flat Boxes and actions bounded ones."""
    obs, action = vec.single_observation_space, vec.single_action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        what = " ".join(str(obs).split())  # numpy breaks long lines
        raise UserError(f"observations must be a flat Box, not {what}; flatten them with a Gymnasium wrapper")
    if not isinstance(action, gym.spaces.Box) or len(action.shape) != 1 or not action.is_bounded():
        what = " ".join(str(action).split())
        raise UserError(f"actions must be a flat, bounded Box, not {what}; bound them with a Gymnasium wrapper")


def arguments(cls: type) -> dict[str, inspect.Parameter]:
    """What a constructor takes by name, and through its ** those of the classes that it extends."""
    taken: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(base).parameters.values())
            taken |= {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return taken


def check_kwargs(cls: type, kwargs: dict) -> None:
    """Compare an environment's arguments with the annotations of its constructor.

    Raises:
        TypeError: an unknown name, or a value of another type.
    """
    parameters = {name: p for name, p in arguments(cls).items() if name != "num_envs"}
    for name, value in kwargs.items():
        if name not in parameters:
            raise TypeError(f"no argument {name!r}; it has {', '.join(parameters)}")
        annotation = parameters[name].annotation
        if annotation is not inspect.Parameter.empty and not fits(value, annotation):
            expected = annotation.__name__ if isinstance(annotation, type) else annotation
            raise TypeError(f"{name} must be {expected}, not {value!r}")
