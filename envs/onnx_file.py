"""Opens ONNX files, which are programs: what is not needed in a network, and could do harm, is refused."""

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from envs.files import UserError

LOOPS = {"Loop", "Scan"}  # they may never end


def read_model(path: str | Path, advice: str) -> ModelProto:
    """The model in a file.

    Raises:
        UserError: it is no model, it may never end, or its weights lie in other files.
    """
    try:
        model = onnx.load_from_string(Path(path).read_bytes())
    except Exception as error:  # what protobuf raises for damaged files has no common public base
        raise UserError(f"{path}: not a readable ONNX model; {advice}") from error
    nodes = [node for graph in [model.graph, *model.functions] for node in nodes_of(graph)]
    if found := sorted(LOOPS.intersection(node.op_type for node in nodes)):
        raise UserError(f"{path}: a network without loops is needed, and it has a {found[0]}; {advice}")
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors_of(model, nodes)):
        raise UserError(f"{path}: has weights in another file; export it with all of them inside")
    return model


def nodes_of(graph: GraphProto | onnx.FunctionProto) -> Iterator[NodeProto]:
    """All nodes, those of the graphs inside nodes too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from nodes_of(inner)


def graphs_of(graph: GraphProto, nodes: list[NodeProto]) -> list[GraphProto]:
    """A graph and those inside nodes."""
    attributes = [attribute for node in nodes for attribute in node.attribute]
    return [graph, *(a.g for a in attributes if a.HasField("g")), *(g for a in attributes for g in a.graphs)]


def tensors_of(model: ModelProto, nodes: list[NodeProto]) -> Iterator[TensorProto]:
    """All weights and constants."""
    for graph in graphs_of(model.graph, nodes):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from constants(attribute)


def constants(attribute: AttributeProto) -> Iterator[TensorProto]:
    sparse = [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []), *attribute.sparse_tensors]
    yield from [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
    yield from (part for one in sparse for part in (one.values, one.indices))


def open_session(path: str | Path, model: ModelProto, threads: int, advice: str) -> onnxruntime.InferenceSession:
    """Raises UserError if onnxruntime cannot run the model, which `path` names."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it has to say is in the exception
    options.intra_op_num_threads = threads
    if threads > 1:  # idle threads sleep: a core they would spin on may have other work
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common public base
        raise UserError(f"{path}: onnxruntime cannot run it; {advice}") from error
