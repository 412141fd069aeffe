"""Damage to files: blind, on their bytes, and sly, on what they hold, so that it passes the checks of the container.

Each mutator is a function (content, rng) -> content that draws from rng alone, so that a seed says what it does."""

import copy
import csv
import io
import json
import os
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

Random = np.random.Generator
CANARY = "canary"  # a file that appears if what a file holds is executed
MODULE = "canary_module"  # a Python module that leaves it on import


class Bomb:
    """Executed by whoever unpickles it."""

    def __init__(self, code: int):
        self.code = code

    def __reduce__(self) -> tuple:
        ways = [(open, (CANARY, "w")), (os.system, (f"touch {CANARY}",)), (exec, (f"open({CANARY!r}, 'w')",))]
        return ways[self.code % len(ways)]


# Bytes


def flip(content: bytes, rng: Random) -> bytes:
    """Some bits are others."""
    data = bytearray(content)
    for at in rng.integers(len(data), size=int(rng.integers(1, 9))) if data else ():
        data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


def cut(content: bytes, rng: Random) -> bytes:
    """The end is missing."""
    return content[: int(rng.integers(len(content) + 1))]


def insert(content: bytes, rng: Random) -> bytes:
    at, new = int(rng.integers(len(content) + 1)), rng.bytes(int(rng.integers(1, 40)))
    return content[:at] + new + content[at:]


def span(content: bytes, rng: Random) -> tuple[int, int]:
    begin, end = np.sort(rng.integers(len(content) + 1, size=2)).tolist()
    return begin, min(end, begin + 4000)


def delete(content: bytes, rng: Random) -> bytes:
    begin, end = span(content, rng)
    return content[:begin] + content[end:]


def repeat(content: bytes, rng: Random) -> bytes:
    """A part is there twice."""
    begin, end = span(content, rng)
    return content[:end] + content[begin:]


def swap(content: bytes, rng: Random) -> bytes:
    """Two parts have changed places."""
    begin, end = span(content, rng)
    middle = (begin + end) // 2
    return content[:begin] + content[middle:end] + content[begin:middle] + content[end:]


def zero(content: bytes, rng: Random) -> bytes:
    """A part reads as zeros, as after a crash of the machine."""
    begin, end = span(content, rng)
    return content[:begin] + bytes(end - begin) + content[end:]


def junk(content: bytes, rng: Random) -> bytes:
    return rng.bytes(int(rng.integers(1, 200)))


def words(content: bytes, rng: Random) -> bytes:
    """Text in other tongues, with control characters."""
    letters = [*"abc {}[]\",:\n\t=-01.eE#'", "é", "日", "\u202e", "\x00", "\x1b[31m", "\ufeff", "🤖"]
    return "".join(rng.choice(letters, size=int(rng.integers(1, 200)))).encode()


def splice(content: bytes, rng: Random) -> bytes:
    """Words in the middle of it."""
    at = int(rng.integers(len(content) + 1))
    return content[:at] + words(content, rng) + content[at:]


def nothing(content: bytes, rng: Random) -> bytes:
    return b""


def brackets(content: bytes, rng: Random) -> bytes:
    """Nested deeper than a parser that calls itself can follow."""
    count = int(rng.integers(500, 100_000))
    return [b"[" * count, b'{"a":' * count, b"a = " + b"[" * count, b"[" * count + b"]" * count][rng.integers(4)]


BLIND = (flip, cut, insert, delete, repeat, swap, zero, junk, words, splice, nothing, brackets)


# Values


def nested(depth: int, whole: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if whole else {"a": value}
    return value


def strange(rng: Random, kinds: int = 0) -> Any:
    """A value that nobody expects; kinds: 0 JSON's, 1 TOML's too (no None), 2 those of a .pt file too."""
    plain: list[Any] = [
        *(True, False, 0, 1, -1, 2, 64, -(10**12), 2**31, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e308, -1e308),
        *(float("nan"), float("inf"), -float("inf"), "", "x", "0", "nan", "../../x", "/etc/passwd", "/", ".", "a\nb"),
        *(
            f"{MODULE}:Env-v0",
            "../outside.onnx",
            "\x00",
            "\x1b[31m",
            "é🤖",
            "x" * 100_000,
            "\ud800" if kinds == 0 else "y",
        ),
        *([], {}, [1], ["a"], [None] if kinds != 1 else [[]], {"a": 1}, {"a": {}}, [[1, 2], [3]], {"": ""}),
        *([0] * 1000, nested(90, True), nested(60, False), [1.5, "a", {}], {"step": 1}, [{}], [{"step": 1}]),
    ]
    if kinds != 1:
        plain += [None, None]
    if kinds == 2:
        plain += [
            *((), (1, 2), b"bytes", torch.zeros(0), torch.zeros(()), torch.ones(3), torch.full((2, 2), float("nan"))),
            *(torch.zeros(2, 3, dtype=torch.int64), torch.tensor(float("inf")), torch.zeros(1, dtype=torch.complex64)),
            *(
                torch.full((4,), -1),
                torch.full((4,), 2**62),
                torch.zeros(4, dtype=torch.bool),
                {1: 2},
                {0: torch.zeros(1)},
            ),
            *(
                torch.zeros(3, dtype=torch.uint8),
                torch.zeros(4).to_sparse(),
                torch.zeros(1).expand(10**7),
                torch.float32,
            ),
            *(torch.zeros(5, dtype=torch.float16), torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8)),
        ]
    return plain[rng.integers(len(plain))]


def places(tree: Any, here: tuple = ()) -> list[tuple]:
    """The paths of all that lies in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        below = tree.items()
    elif isinstance(tree, list | tuple):
        below = enumerate(tree)
    else:
        return []
    return [path for key, value in below for path in [(*here, key), *places(value, (*here, key))]]


def changed(tree: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which change(container, key) was done where the path leads."""
    if isinstance(tree, tuple):
        tree = list(tree)
        whole = changed(tree, path, change)
        return tuple(whole)
    tree = copy.copy(tree)
    if len(path) == 1:
        change(tree, path[0])
    else:
        tree[path[0]] = changed(tree[path[0]], path[1:], change)
    return tree


def of_another_type(value: Any, rng: Random) -> Any:
    """The same, said otherwise."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return [float(value), str(value), -value, value * 10**9, value + 1][rng.integers(5)]
    if isinstance(value, float):
        return [int(value) if np.isfinite(value) else 0, str(value), -value, value * 1e300, float("nan")][
            rng.integers(5)
        ]
    if isinstance(value, str):
        return [[value], value + "x", value[:-1], value.upper(), {value: value}][rng.integers(5)]
    if isinstance(value, dict):
        return [[*value], [[k, v] for k, v in value.items()], {**value, "more": 1}, {}][rng.integers(4)]
    if isinstance(value, list | tuple):
        return [dict(enumerate(map(str, value))), [*value, *value], [*value][1:], [*value][::-1]][rng.integers(4)]
    return [value]


def of_another_shape(x: torch.Tensor, rng: Random) -> Any:
    """A tensor with other numbers, another type or another shape."""
    if not (x.is_floating_point() or x.is_complex() or x.is_sparse) and rng.integers(2):
        if x.dtype == torch.bool:
            return ~x
        return [x * 0 - 1, x * 0 + 2**31, x + 1, x * 10**6, x // 2][rng.integers(5)]
    ways = (
        *(lambda: x.flatten(), lambda: x[None], lambda: x.double(), lambda: x.half(), lambda: x.long()),
        *(
            lambda: x.bool(),
            lambda: x.to(torch.complex64),
            lambda: x.flatten()[:-1],
            lambda: x.repeat(2, *[1] * (x.dim() - 1)),
        ),
        *(lambda: x * float("nan"), lambda: x / 0, lambda: x.float() * 1e38, lambda: -x.float(), lambda: x.tolist()),
        *(
            lambda: x.transpose(0, -1),
            lambda: torch.zeros(0),
            lambda: x.to(torch.uint8),
            lambda: torch.zeros_like(x).to_sparse(),
        ),
    )
    try:
        return ways[rng.integers(len(ways))]()
    except (RuntimeError, IndexError, TypeError):
        return torch.zeros(3)


def mutated(tree: Any, rng: Random, kinds: int) -> Any:
    """One or a few values are replaced, missing, doubled or added."""
    for _ in range(1 if rng.integers(4) else 3):
        every = places(tree)
        if not every or rng.integers(40) == 0:
            return strange(rng, kinds)
        depth = rng.integers(1, max(map(len, every)) + 1)  # or else the many numbers of the deepest list take it all
        there = [path for path in every if len(path) == depth]
        path = there[rng.integers(len(there))]

        def replace(box: Any, key: Any) -> None:
            box[key] = strange(rng, kinds)

        def twist(box: Any, key: Any) -> None:
            one = box[key]
            box[key] = of_another_shape(one, rng) if isinstance(one, torch.Tensor) else of_another_type(one, rng)

        def remove(box: Any, key: Any) -> None:
            del box[key]

        def add(box: Any, key: Any) -> None:
            if isinstance(box, dict):
                box[strange_name(rng, kinds)] = strange(rng, kinds)
            else:
                box.append(strange(rng, kinds))

        def rename(box: Any, key: Any) -> None:
            if isinstance(box, dict):
                box[strange_name(rng, kinds)] = box.pop(key)

        def exchange(box: Any, key: Any) -> None:
            keys = [*box] if isinstance(box, dict) else [*range(len(box))]
            other = keys[rng.integers(len(keys))]
            box[key], box[other] = box[other], box[key]

        tree = changed(tree, path, [replace, replace, twist, twist, remove, add, rename, exchange][rng.integers(8)])
    return tree


def strange_name(rng: Random, kinds: int) -> Any:
    names = [
        "",
        "x",
        "step",
        "args",
        "env_id",
        "seed",
        "num_envs",
        "render_mode",
        "../x",
        "a.b",
        "__class__",
        "é\n",
        "metrics",
    ]
    names += [0, 1, (1, 2), 1.5, None] if kinds == 2 else []
    return names[rng.integers(len(names))]


# Containers


def json_values(content: bytes, rng: Random) -> bytes:
    return json.dumps(mutated(json.loads(content), rng, 0)).encode("utf-8", "replace")


def jsonl_values(content: bytes, rng: Random) -> bytes:
    """A line holds something else, is torn, missing or there twice."""
    lines = content.splitlines()
    at = int(rng.integers(len(lines)))
    new = json_values(lines[at], rng)
    return b"\n".join(
        [*lines[:at], *[[new], [cut(lines[at], rng)], [], [new] * 2][rng.integers(4)], *lines[at + 1 :], b""]
    )


def toml_of(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return json.dumps(value) if not isinstance(value, float) else repr(value)


def toml_values(content: bytes, rng: Random) -> bytes:
    import tomllib

    tree = mutated(tomllib.loads(content.decode()), rng, 1)
    tree = tree if isinstance(tree, dict) else {"x": tree}
    return "\n".join(f"{json.dumps(str(k))} = {toml_of(v)}" for k, v in tree.items()).encode("utf-8", "replace")


def csv_cells(content: bytes, rng: Random) -> bytes:
    """Other cells, columns or rows."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(int(rng.integers(1, 4))):
        i = 0 if rng.integers(4) == 0 else int(rng.integers(len(rows)))
        j = int(rng.integers(len(rows[i]))) if rows[i] else 0
        cells = [
            *(
                "",
                "nan",
                "inf",
                "-inf",
                "1e999",
                "1e308",
                "-0",
                "word",
                "1,5",
                '"',
                "'",
                '""',
                "0x10",
                "1_0",
                "x" * 200_000,
            ),
            *("\x00", "é", "a\nb", "9" * 5000, "None", "True", "1e-400", "=cmd()", " 1 ", "../../x"),
        ]
        cell = cells[rng.integers(len(cells))]
        what = rng.integers(7)
        if what < 3 and rows[i]:
            rows[i] = [*rows[i][:j], cell, *rows[i][j + 1 :]]
        elif what == 3:
            rows[i] = [*rows[i], cell]
        elif what == 4:
            rows[i] = rows[i][:-1]
        elif what == 5:
            rows = rows[:i] + rows[i + 1 :] or [[]]
        else:
            rows = [[*row[j:], *row[:j]] for row in rows]
    text = io.StringIO()
    csv.writer(text, quoting=[csv.QUOTE_MINIMAL, csv.QUOTE_ALL][rng.integers(2)]).writerows(rows)
    return text.getvalue().encode()


def pt_values(content: bytes, rng: Random) -> bytes:
    tree = mutated(torch.load(io.BytesIO(content), weights_only=True), rng, 2)
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=bool(rng.integers(10)))
    return buffer.getvalue()


def pt_bomb(content: bytes, rng: Random) -> bytes:
    """A pickle that executes code."""
    tree = torch.load(io.BytesIO(content), weights_only=True)
    path = places(tree)[0] if rng.integers(2) else ("more",)

    def plant(box: Any, key: Any) -> None:
        box[key] = Bomb(int(rng.integers(3)))

    buffer = io.BytesIO()
    torch.save(changed(tree, path, plant), buffer, _use_new_zipfile_serialization=bool(rng.integers(2)))
    return buffer.getvalue()


def zip_members(content: bytes, rng: Random) -> bytes:
    """A .zip whose members are damaged, missing, renamed, doubled or added, with checksums that are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = int(rng.integers(len(members)))
    name, data = members[at]
    what = rng.integers(6)
    if what < 3:
        members[at] = (name, BLIND[rng.integers(len(BLIND))](data, rng))
    elif what == 3:
        del members[at]
    elif what == 4:
        names = ["../../x", "/tmp/x", name, "", "obs.npy", "x.npy", "data.pkl", name + "/"]
        members.append((names[rng.integers(len(names))], data))
    else:
        members[at] = (members[rng.integers(len(members))][0], data)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][rng.integers(2)]) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def npz_arrays(content: bytes, rng: Random) -> bytes:
    """Arrays of another type, shape or content; some missing, some more, some of pickled objects."""
    arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
    for _ in range(int(rng.integers(1, 3))):
        name = [*arrays][rng.integers(len(arrays))] if arrays else "start"
        x = arrays.get(name, np.zeros(3))
        ways = (
            *(
                lambda x: x.astype(np.float64),
                lambda x: x.astype(np.int32),
                lambda x: x.astype(str),
                lambda x: x.astype(bool),
            ),
            *(lambda x: x.astype(complex), lambda x: x.astype(np.uint8), lambda x: x.astype(">f4"), lambda x: x[:-1]),
            *(
                lambda x: x[None],
                lambda x: x.reshape(-1),
                lambda x: x[:0],
                lambda x: np.concatenate([x, x]),
                lambda x: x[::-1],
            ),
            *(lambda x: x * np.nan, lambda x: x * 0 - 1, lambda x: x / 0, lambda x: x * 10**9, lambda x: np.zeros(())),
            *(
                lambda x: np.asfortranarray(x),
                lambda x: np.array([Bomb(0)] * len(x), object),
                lambda x: x.astype("datetime64[s]"),
            ),
            *(lambda x: np.zeros(len(x), [("a", "f4"), ("b", "O")]), lambda x: np.zeros(len(x), "V8"), lambda x: x.T),
            *(lambda x: np.zeros(len(x), [("a", "f4")]), lambda x: np.zeros((*x.shape, 1)), lambda x: x.astype("S")),
        )
        what = rng.integers(5)
        if what == 0:
            arrays.pop(name, None)
        elif what == 1:
            arrays[["obs", "obs_x", "x", "file", "scenario", "../x", "obs_"][rng.integers(7)]] = x
        else:
            with np.errstate(all="ignore"):
                try:
                    arrays[name] = ways[rng.integers(len(ways))](x)
                except (TypeError, ValueError):
                    arrays[name] = np.zeros(3)
    buffer = io.BytesIO()
    arrays = {("file_" if name == "file" else name): x for name, x in arrays.items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_header(content: bytes, rng: Random) -> bytes:
    """A header that promises another shape or type than what follows, such as terabytes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = [*members][rng.integers(len(members))]
    shapes = [(10**12,), (2**40, 2**40), (10**9, 4), (-1,), (3.5,), (0, 10**18), (), (10**30,), (2**62,), ("a",)]
    kinds = ["<f4", "<f8", "|O", "<U1000000", "|V1000000000", "<i8", [("a", "<f4"), ("a", "<f4")], "x", "|S0", "<M8[s]"]
    about = {
        "descr": kinds[rng.integers(10)],
        "fortran_order": bool(rng.integers(2)),
        "shape": shapes[rng.integers(10)],
    }
    text = repr(about).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    members[name] = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + members[name][128:]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return buffer.getvalue()


# ONNX


def onnx_metadata(content: bytes, rng: Random) -> bytes:
    model = onnx.load_from_string(content)
    for _ in range(int(rng.integers(1, 3))):
        values = [
            "policy",
            "residual",
            "{",
            "[]",
            "1",
            "NaN",
            '"x"',
            '"absolute"',
            "",
            "[" * 5000,
            "x" * 10**6,
            "null",
            "{}",
        ]
        entry = model.metadata_props.add()
        entry.key = ["kind", "action_mode", "action_repeat", "", "x", "ort_config"][rng.integers(6)]
        entry.value = values[rng.integers(len(values))]
    return model.SerializeToString()


def onnx_shapes(content: bytes, rng: Random) -> bytes:
    """Inputs and outputs of another shape, type or name."""
    model = onnx.load_from_string(content)
    graph = model.graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    info = infos[rng.integers(len(infos))]
    what = rng.integers(7)
    if what == 0:
        info.name = ["", "x", "obs", "states", "../x", "é"][rng.integers(6)]
    elif what == 1:
        info.type.tensor_type.elem_type = int(rng.integers(0, 30))
    elif what == 2:
        info.type.tensor_type.ClearField("shape")
    elif what == 3:
        info.type.ClearField("tensor_type")
    elif what == 4:
        fields = [graph.input, graph.output]
        del fields[rng.integers(2)][:]
    elif what == 5:
        graph.input.append(copy.deepcopy(info))
    else:
        dims = info.type.tensor_type.shape.dim
        dim = dims[rng.integers(len(dims))] if dims else dims.add()
        dim.dim_value = int(rng.choice([0, 1, -1, 2, 1000, 2**31, 2**62]))
    return model.SerializeToString()


def onnx_weights(content: bytes, rng: Random) -> bytes:
    """Weights with other numbers, shapes and types, or in files outside."""
    model = onnx.load_from_string(content)
    tensors = [*model.graph.initializer]
    if not tensors:
        return content
    tensor = tensors[rng.integers(len(tensors))]
    what = rng.integers(8)
    if what == 0:
        tensor.dims[:] = [int(d) for d in rng.choice([0, 1, 3, -1, 64, 2**20, 2**40, 2**62], size=rng.integers(0, 4))]
    elif what == 1:
        tensor.data_type = int(rng.integers(0, 30))
    elif what == 2:
        tensor.raw_data = tensor.raw_data[: int(rng.integers(len(tensor.raw_data) + 1))]
    elif what == 3:
        x = numpy_helper.to_array(tensor)
        with np.errstate(all="ignore"):
            x = [x * np.nan, x * 1e38, x.T, x.astype(np.float64), x[None], x[None][:0]][rng.integers(6)]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(x), tensor.name))
    elif what == 4:
        tensor.name = ["", "x", "obs"][rng.integers(3)]
    else:
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        where = [
            "../outside.bin",
            "/etc/passwd",
            "/dev/zero",
            "outside.bin",
            "",
            ".",
            "../../../../../../etc/passwd",
            CANARY,
        ]
        for key, value in (
            ("location", where[rng.integers(len(where))]),
            ("offset", str(rng.choice([0, -1, 10**18, "x"]))),
            ("length", str(rng.choice([4, -1, 10**18, "x"]))),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    return model.SerializeToString()


def onnx_nodes(content: bytes, rng: Random) -> bytes:
    """Other operators, inputs, outputs and attributes; cycles; loops that never end; results of terabytes."""
    model = onnx.load_from_string(content)
    graph = model.graph
    node = graph.node[rng.integers(len(graph.node))]
    names = [name for n in graph.node for name in [*n.input, *n.output]]
    what = rng.integers(10)
    if what == 0:
        kinds = [
            "Add",
            "MatMul",
            "Loop",
            "If",
            "Scan",
            "Reshape",
            "Expand",
            "Nope",
            "",
            "Tile",
            "Conv",
            "Gather",
            "Cast",
            "Resize",
        ]
        node.op_type = kinds[rng.integers(len(kinds))]
    elif what == 1 and node.input:
        node.input[rng.integers(len(node.input))] = names[rng.integers(len(names))]
    elif what == 2:
        node.output[rng.integers(len(node.output))] = names[rng.integers(len(names))]
    elif what == 3:
        graph.node.remove(node)
    elif what == 4:
        graph.node.append(copy.deepcopy(node))
    elif what == 5:
        name = ["axis", "axes", "to", "perm", "alpha", "transB", "value", "body"][rng.integers(8)]
        values = [2**62, -(2**31), [1, 2, 3], float("nan"), "x", [2**40] * 3]
        node.attribute.append(helper.make_attribute(name, values[rng.integers(6)]))
    elif what == 6:
        model.opset_import[0].version = int(rng.choice([0, 1, 7, 1000, -1, 2**40]))
    elif what == 7:
        node.domain = ["com.microsoft", "evil", "ai.onnx.ml"][rng.integers(3)]
    elif what == 8:
        huge = numpy_helper.from_array(
            np.array([2 ** int(rng.integers(20, 50))] * int(rng.integers(1, 4))), "huge/shape"
        )
        graph.initializer.append(huge)
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["huge/shape"], ["huge"]))
        if rng.integers(2):
            graph.node.insert(1, helper.make_node("ReduceMax", ["huge"], ["huge/max"], keepdims=0))
            graph.node.append(helper.make_node("Add", [graph.output[0].name, "huge/max"], ["action/huge"]))
            graph.output[0].name = "action/huge"
    else:
        endless(graph, forever=int(rng.choice([3, 10**6, 2**62])))
    return model.SerializeToString()


def endless(graph: onnx.GraphProto, forever: int) -> None:
    """Add a loop that counts to `forever` before the answer comes."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["sum", "sum"], ["twice"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("sum", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("twice", TensorProto.FLOAT, None)],
    )
    graph.initializer.append(numpy_helper.from_array(np.array(forever), "loop/times"))
    graph.initializer.append(numpy_helper.from_array(np.array(True), "loop/go"))
    answer = graph.output[0].name
    graph.node.append(helper.make_node("Loop", ["loop/times", "loop/go", answer], ["looped"], body=body))
    graph.output[0].name = "looped"


ONNX = (onnx_metadata, onnx_shapes, onnx_weights, onnx_nodes)
