"""The environments, registered with Gymnasium: gym.make("envs:SO101Paper-v0"), envs.make_vec("SO101Paper-v0", 8)."""

import importlib
import inspect
import types
import typing
from typing import Any, Literal

import gymnasium as gym
import numpy as np


class UserError(ValueError):
    """An error that the user can fix. The message says in one line what is wrong and what to do."""


from envs.batch_env import BatchEnv, GymVec, SameStepVec, make_async  # noqa: E402 (environments may raise UserError)

gym.register("SO101Paper-v0", "envs.so101:SO101PaperEnv", vector_entry_point="envs.so101:SO101Paper")
gym.register("LateralControl-v0", "envs.lateral:LateralControlEnv", vector_entry_point="envs.lateral:LateralControl")
gym.register("Ballbot-v0", "envs.ballbot:BallbotEnv", vector_entry_point="envs.ballbot:Ballbot")
gym.register("BallbotDepth-v0", "envs.ballbot:BallbotDepthEnv", vector_entry_point="envs.ballbot:BallbotDepth")
gym.register(
    "SocNavGrid-v0",
    "envs.socnav.environment:SocNavGridEnv",
    vector_entry_point="envs.socnav.environment:SocNavGrid",
)

BUNDLED = ("Ballbot-v0", "BallbotDepth-v0", "LateralControl-v0", "SO101Paper-v0", "SocNavGrid-v0")


def make_vec(
    env_id: str, num_envs: int, seed: int | None = None, vectorization: str = "sync", **kwargs: Any
) -> BatchEnv | GymVec:
    """Make a vector environment with SAME_STEP autoreset, info["final_obs"] and info["episode"].

    Args:
        env_id: a registered id, or MODULE:ID to import a module that registers it.
        num_envs: number of parallel environments.
        seed: if given, the environments are also reset with it.
        vectorization: sync, or async to step Gymnasium's environments in worker processes.
        kwargs: arguments of the environment. `training`, `split` and `threads` are dropped if it does not take them.

    Raises:
        UserError: unknown environment; or, for the bundled environments, an unknown or invalid argument.
    """
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gym.spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its own imports does not
        raise UserError(f"{env_id}: {error}; add its folder to PYTHONPATH") from None
    except gym.error.Error as error:
        raise UserError(f"{env_id}: {error} The bundled environments are {', '.join(BUNDLED)}.") from None

    entry = spec.vector_entry_point
    cls = gym.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    is_batch_env = isinstance(cls, type) and issubclass(cls, BatchEnv)
    parameters = constructor_parameters(cls) if is_batch_env else {}
    optional = ("training", "split", "threads") if is_batch_env else ("training", "threads")
    kwargs = {name: value for name, value in kwargs.items() if name in parameters or name not in optional}
    if kwargs.get("threads", 0) is None:  # the environment's default
        del kwargs["threads"]
    if "copies" in kwargs and "copies" not in parameters:
        raise UserError(f"--group-size: {spec.id} cannot put several environments in one situation; leave it out")
    if is_batch_env and vectorization != "sync":
        raise UserError(f"--vectorization {vectorization}: {spec.id} steps its environments together; leave it out")
    if not is_batch_env:
        split = kwargs.pop("split", "train")
        if vectorization == "async":
            envs = SameStepVec(make_async(env_id, num_envs, **kwargs), split)
        elif getattr(cls, "metadata", {}).get("autoreset_mode") == gym.vector.AutoresetMode.SAME_STEP:
            envs = SameStepVec(cls(num_envs=num_envs, **spec.kwargs | kwargs), split)
        else:
            envs = GymVec(spec.id, num_envs, split, **kwargs)
    elif cls.__module__.startswith("envs."):
        try:
            check_kwargs(parameters, kwargs)
            envs = cls(num_envs=num_envs, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(f"{spec.id}: {error}") from error
    else:
        envs = cls(num_envs=num_envs, **kwargs)
    if seed is not None:
        envs.reset(seed=seed)
    return envs


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The named parameters of a constructor, including those it passes on to its base classes as **kwargs."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(base).parameters.values()
            parameters = {p.name: p for p in own if p.kind is not p.VAR_KEYWORD} | parameters
            if not any(p.kind is p.VAR_KEYWORD for p in own):
                break
    return parameters


def check_kwargs(parameters: dict[str, inspect.Parameter], kwargs: dict) -> None:
    """Raises TypeError for an unknown argument or one whose type differs from the annotation."""
    for name, value in kwargs.items():
        if name not in parameters:
            known = ", ".join(parameter for parameter in parameters if parameter != "num_envs")
            raise TypeError(f"unknown argument {name!r}; it takes {known}")
        annotation = parameters[name].annotation
        if annotation is not inspect.Parameter.empty and not matches(value, annotation):
            expected = annotation.__name__ if isinstance(annotation, type) else annotation
            raise TypeError(f"{name} must be {expected}, not {value!r}")


def matches(value: Any, annotation: Any) -> bool:
    """Whether a value has the annotated type. An int matches float; a bool matches only bool."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return matches(value, inner[0])
    if origin in (types.UnionType, typing.Union):
        return any(matches(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(matches(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches(k, inner[0]) and matches(v, inner[1]) for k, v in value.items())
    if isinstance(value, bool) or annotation is Any:
        return annotation in (bool, Any)
    return isinstance(value, (int, float) if annotation is float else annotation)


def check_flat_box(envs: BatchEnv | GymVec) -> None:
    """Raises UserError unless observations are a flat Box and actions a flat, bounded Box of floats."""
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        advice = "flatten them with gymnasium.wrappers.FlattenObservation"
        raise UserError(f"observations must be a flat Box, not {one_line(obs_space)}; {advice}")
    if not isinstance(action_space, gym.spaces.Box):
        advice = "discrete actions need a categorical policy, which these scripts do not have"
        raise UserError(f"actions must be a Box of floats, not {one_line(action_space)}; {advice}")
    if action_space.dtype.kind != "f":
        advice = "declare a float Box and round inside the environment"
        raise UserError(f"actions must be a Box of floats, not of {action_space.dtype}; {advice}")
    if len(action_space.shape) != 1 or not action_space.is_bounded():
        advice = "flatten or bound them with gymnasium.wrappers.TransformAction or RescaleAction"
        raise UserError(f"actions must be a flat, bounded Box, not {one_line(action_space)}; {advice}")


def one_line(x: Any) -> str:
    return " ".join(str(x).split())


def float32_bounds(space: gym.spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of an action space in float32, rounded inward so that float32 actions at the bounds are inside it."""
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    low = np.where(low.astype(np.float64) < space.low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high.astype(np.float64) > space.high, np.nextafter(high, np.float32(-np.inf)), high)
    return low, high
