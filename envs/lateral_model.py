"""The learned dynamics of LateralControl-v0: a distribution over the next lateral acceleration, from an ONNX file."""

import contextlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from envs.lateral_segments import CONTEXT

BINS = np.linspace(-5, 5, 1024)  # the lateral accelerations of the tokens, m/s^2
TEMPERATURE = np.float32(0.8)


class Dynamics:
    """A model with the signature of the challenge: states (b, 20, 4) float32 = steering, roll, v, a of steps t-19..t;
    tokens (b, 20) int64, the bins of the lateral accelerations of t-20..t-1; logits (b, 20 or 1, 1024), of which the
    last position is used.

    Raises:
        ValueError: the file is missing, or not an ONNX model with this signature.
    """

    def __init__(self, path: str | Path, threads: int = 1):
        advice = "model_path is the challenge's tinyphysics.onnx, or left out"
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; {advice}")
        try:
            self.session = session(last_position_only(onnx.load_from_string(Path(path).read_bytes())), threads)
            shape = self.logits(*random_batch(3)).shape
        except Exception as error:  # the exceptions of onnx and onnxruntime have no public base class
            raise ValueError(f"{path}: not a model of the dynamics ({error}); {advice}") from error
        if shape != (3, len(BINS)):
            raise ValueError(f"{path}: returns {shape} logits for three cars, not {(3, len(BINS))}; {advice}")

    def logits(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(b, 1024) float32."""
        return self.session.run(None, {"states": states, "tokens": tokens})[0][:, -1]


def tokens_of(lat: np.ndarray) -> np.ndarray:
    """Bins of lateral accelerations."""
    return np.digitize(np.clip(lat, BINS[0], BINS[-1]), BINS, right=True)


def distribution(logits: np.ndarray) -> np.ndarray:
    """Probabilities of the bins, (b, 1024) -> (b, 1024) float32, with the arithmetic of the official simulator."""
    x = logits / TEMPERATURE
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def draw(probability: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """One bin per car, (b, 1024) and (b,) -> (b,), with the arithmetic of NumPy's RandomState.choice."""
    cdf = np.cumsum(probability, axis=1, dtype=np.float64)
    cdf /= cdf[:, -1:]
    return (cdf <= uniform[:, None]).sum(1)


def session(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are in the exception
    options.intra_op_num_threads = threads
    if threads > 1:  # idle threads must not keep a core busy
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def random_batch(size: int) -> tuple[np.ndarray, np.ndarray]:
    """States and tokens of random cars."""
    rng = np.random.default_rng(size)
    return rng.normal(size=(size, CONTEXT, 4)).astype(np.float32), rng.integers(len(BINS), size=(size, CONTEXT))


def last_position_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without computations that only affect the logits of earlier positions, which takes three quarters of
    the time. It cuts the graph at the earliest tensor for which the last position of the output does not change by a
    bit on two random batches."""
    batches = [random_batch(2), random_batch(3)]
    expected = [run(model, *batch) for batch in batches]
    for name in cut_points(model.graph):
        candidate = keep_last_position(model, name)
        with contextlib.suppress(Exception):  # of onnxruntime, if the graph needs all positions of this tensor
            if all(np.array_equal(run(candidate, *batch), x) for batch, x in zip(batches, expected)):
                return candidate
    return model


def run(model: onnx.ModelProto, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return session(model).run(None, {"states": states, "tokens": tokens})[0][:, -1]


def cut_points(graph: onnx.GraphProto) -> list[str]:
    """Tensors through which everything that depends on the inputs reaches the output, in the order of the graph."""
    depends = {i.name for i in graph.input} - {t.name for t in graph.initializer}
    last_use = {name: k for k, node in enumerate(graph.node) for name in node.input}
    points, alive = [], set(depends)
    for k, node in enumerate(graph.node):
        if depends.intersection(node.input):
            depends.update(node.output)
            alive.update(node.output)
        alive = {name for name in alive if last_use.get(name, -1) > k}
        if len(alive) == 1:
            points += alive
    return list(dict.fromkeys(points))


def keep_last_position(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A copy in which the nodes after tensor `name` (batch, time, n) get its last position only."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph, nodes = model.graph, []
    for key, value in (("start", -1), ("end", 2**31 - 1), ("axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value]), f"last/{key}"))
    for node in graph.node:
        for k, used in enumerate(node.input):
            if used == name:
                node.input[k] = f"{name}/last"
        nodes.append(node)
        if name in node.output:
            nodes.append(helper.make_node("Slice", [name, "last/start", "last/end", "last/axis"], [f"{name}/last"]))
    del graph.node[:], graph.value_info[:]  # the shapes in value_info are no longer valid
    graph.node.extend(nodes)
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    return model
