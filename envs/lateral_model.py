"""The learned car of LateralControl-v0: a distribution over the next lateral acceleration, from an ONNX file."""

import contextlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from envs.lateral_segments import CONTEXT

BINS = np.linspace(-5, 5, 1024)  # lateral accelerations that the model can tell apart, m/s^2
TEMPERATURE = np.float32(0.8)

# Operators that act on each position by itself, as long as their constant operands are the same at every position
ELEMENTWISE = set("Abs Add Div Erf Exp Gelu Identity Mul Neg Pow Relu Sigmoid Sqrt Sub Tanh".split())  # noqa: SIM905


class Dynamics:
    """A model with the challenge's signature: states (b, 20, 4) float32 = steer, roll, v, a of steps t-19..t; tokens
    (b, 20) int64, the bins of the lateral accelerations of t-20..t-1; output logits (b, 20 or 1, 1024), whose last
    position counts.

    Raises:
        ValueError: the file is missing, no ONNX model, or one with other inputs or outputs.
    """

    def __init__(self, path: str | Path, threads: int = 1):
        advice = "model_path is the challenge's tinyphysics.onnx, or left out"
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; {advice}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are in the exception
        options.intra_op_num_threads = threads
        if threads > 1:  # idle threads sleep: a core they would spin on may have other work
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            model = onnx.load_from_string(Path(path).read_bytes())
            with contextlib.suppress(ValueError):  # its output is made in another way; the whole of it does as well
                model = last_position_only(model)
            content = model.SerializeToString()
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # what onnx and onnxruntime raise for damaged files has no common public base
            raise ValueError(f"{path}: not a readable ONNX model ({error}); {advice}") from error
        found = {i.name: (i.type, i.shape[1:]) for i in self.session.get_inputs()}
        needed = {"states": ("tensor(float)", [CONTEXT, 4]), "tokens": ("tensor(int64)", [CONTEXT])}
        if found != needed:
            raise ValueError(f"{path}: takes {found} instead of {needed}; {advice}")
        for cars, many in ((2, "two"), (3, "three")):
            try:
                shape = self.logits(np.zeros((cars, CONTEXT, 4), np.float32), np.zeros((cars, CONTEXT), np.int64)).shape
            except Exception as error:  # a fixed number of cars, for one
                raise ValueError(f"{path}: cannot run {many} cars at once; {advice}") from error
            if shape != (cars, len(BINS)):
                needed = f"{many} cars instead of {(cars, len(BINS))}"
                raise ValueError(f"{path}: gives {shape} logits for {needed}; {advice}")

    def logits(self, states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(b, 1024) float32."""
        return self.session.run(None, {"states": states, "tokens": tokens})[0][:, -1]


def tokens_of(lat: np.ndarray) -> np.ndarray:
    """The bins of lateral accelerations."""
    return np.digitize(np.clip(lat, BINS[0], BINS[-1]), BINS, right=True)


def distribution(logits: np.ndarray) -> np.ndarray:
    """Probabilities of the bins, (b, 1024) -> (b, 1024) float32, with the official simulator's arithmetic."""
    x = logits / TEMPERATURE
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def draw(probability: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """One bin for each row, (b, 1024) and (b,) -> (b,), with the arithmetic of numpy's RandomState.choice."""
    cdf = np.cumsum(probability, axis=1, dtype=np.float64)
    cdf /= cdf[:, -1:]
    return (cdf <= uniform[:, None]).sum(1)


def made_by_position(graph: onnx.GraphProto) -> tuple[set[str], dict[str, int]]:
    """The first outputs of the nodes at the graph's end that act on each position by itself and that nothing else
    reads, and the ranks of the constants by name."""
    rank = {i.name: len(i.type.tensor_type.shape.dim) for i in [*graph.value_info, *graph.input, *graph.output]}
    constant = {t.name: len(t.dims) for t in graph.initializer}  # their ranks
    constant |= {
        node.output[0]: len(node.attribute[0].t.dims)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }

    def by_position(node: onnx.NodeProto) -> bool:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        moving = [name for name in node.input if name not in constant]
        if not moving or any(rank.get(name) != 3 for name in moving):
            return False
        if node.op_type == "MatMul":
            return moving == [node.input[0]] and constant[node.input[1]] == 2
        if node.op_type == "ReduceMean":
            return attributes.get("axes") in ([-1], [2]) and attributes.get("keepdims", 1) == 1 and len(node.input) == 1
        if node.op_type == "LayerNormalization":
            return attributes.get("axis", -1) in (-1, 2) and moving == [node.input[0]] and len(node.output) == 1
        return node.op_type in ELEMENTWISE and all(constant.get(name, 0) < 2 for name in node.input)

    cut, wanted, read_whole = set(), {graph.output[0].name}, {o.name for o in graph.output[1:]}
    for node in reversed(graph.node):  # whoever reads a tensor comes before the node that makes it
        if wanted.intersection(node.output) and not read_whole.intersection(node.output) and by_position(node):
            cut.add(node.output[0])
            wanted.update(name for name in node.input if name not in constant)
        else:
            read_whole.update(node.input)
    return cut, constant


def last_position_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose output (batch, time, n) is computed for the last position only, (batch, 1, n): the same numbers bit
    for bit in three quarters of the time. It walks back from the output through operators that act on each position by
    itself and that nothing else reads, and slices what flows into them.

    Raises:
        ValueError: the output is not made position by position.
    """
    if model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 1:
        return model
    model = onnx.shape_inference.infer_shapes(model)  # a copy
    graph, output = model.graph, model.graph.output[0]
    cut, constant = made_by_position(graph)
    made = {name for node in graph.node if node.output[0] in cut for name in node.output}
    if output.name not in made:
        raise ValueError("the output is not made position by position")

    for name, value in (("start", -1), ("end", 2**31 - 1), ("axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value]), f"last/{name}"))
    nodes, sliced = [], set()
    for node in graph.node:
        for k, name in enumerate(node.input) if node.output[0] in cut else ():
            if name in constant or name in made:
                continue
            if name not in sliced:
                nodes.append(helper.make_node("Slice", [name, "last/start", "last/end", "last/axis"], [f"last/{name}"]))
            sliced.add(name)
            node.input[k] = f"last/{name}"
        nodes.append(node)
    del graph.node[:], graph.value_info[:]  # the shapes noted there no longer hold
    graph.node.extend(nodes)
    output.type.tensor_type.shape.dim[1].dim_value = 1
    onnx.checker.check_model(model)
    return model
