"""The scenario matrix of SocNavGrid-v0 as data: what it holds, and that every map can be driven."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import envs
from envs import UserError
from envs.socnav.scenarios import check, choose, load_scenarios

FILE = Path(__file__).parents[1] / "envs" / "assets" / "socnav_scenarios.json"
SCENARIOS = json.loads(FILE.read_text())["scenarios"]
NAMED = {s["name"]: s for s in SCENARIOS}
ROBOT, PEDESTRIAN, MARGIN = 0.6, 0.4, 0.3  # radii and the margin that a route keeps, m

CLASSIC_HOLD_OUT = "bottleneck_low bottleneck_medium bottleneck_high group_crossing_low group_crossing_medium"
FRANCIS_HOLD_OUT = "crowd_navigation intersection_wait blind_corner narrow_doorway"

# name: size, time limit, length of the robot's route (None: free), pedestrians per tier.
CLASSIC = {
    "bottleneck": ((40, 40), 500, 20, {"low": 0, "medium": 1, "high": 3}),
    "realworld_double_bottleneck": ((60, 30), 700, 46, {"high": 8}),
    "station_platform": ((84, 28), 650, 95, {"medium": 26}),
    "cross_trap": ((40, 40), 600, None, {"low": 3, "medium": 8, "high": 12}),
    "doorway": ((44, 28), 500, None, {"low": 3, "medium": 6, "high": 9}),
    "group_crossing": ((40, 40), 500, 19, {"low": 2, "medium": 3, "high": 4}),
    "head_on_corridor": ((32, 40), 500, 30, {"low": 2, "medium": 4}),
    "merging": ((44, 40), 600, 70, {"low": 4, "medium": 9}),
    "overtaking": ((60, 28), 600, 35, {"low": 3, "medium": 6}),
    "t_intersection": ((44, 40), 500, None, {"low": 2, "medium": 3}),
    "urban_crossing": ((50, 50), 600, 32, {"medium": 5}),
}
FRANCIS = {  # size, length of the robot's route, pedestrians: names
    ((40, 10), 33, 1): "frontal_approach pedestrian_obstruction pedestrian_overtaking robot_overtaking down_path"
    " following_human leading_human accompanying_peer",
    ((30, 30), None, 1): "intersection_no_gesture intersection_proceed intersection_wait blind_corner",
    ((30, 6), None, 1): "narrow_hallway",
    ((30, 10), None, 1): "narrow_doorway",
    ((30, 20), None, 1): "entering_room exiting_room",
    ((20, 20), None, 1): "entering_elevator exiting_elevator",
    ((20, 20), 12, 3): "join_group",
    ((20, 20), 12, 2): "leave_group",
    ((30, 20), None, 9): "crowd_navigation",
    ((40, 10), 33, 8): "parallel_traffic",
    ((30, 30), None, 7): "perpendicular_traffic",
    ((20, 20), None, 6): "circular_crossing",
    ((20, 20), None, 24): "robot_crowding",
}
GAPS = [  # free width through a point along x and y (None: free)
    ("classic_bottleneck_low", (20, 20), (4.3, None)),
    ("classic_realworld_double_bottleneck_high", (30, 15), (None, 12)),
    ("classic_realworld_double_bottleneck_high", (22, 16), (None, 4)),
    ("classic_realworld_double_bottleneck_high", (39, 13.5), (None, 5)),
    ("classic_doorway_low", (22, 14), (None, 3.3)),
    ("classic_head_on_corridor_low", (16, 20), (28, 36)),
    ("classic_t_intersection_low", (22, 30), (5.7, None)),
    ("classic_t_intersection_low", (10, 10), (None, 5)),
    ("classic_urban_crossing_medium", (10, 25), (None, 6)),
    ("classic_urban_crossing_medium", (25, 10), (6, None)),
    ("francis2023_frontal_approach", (20, 5), (None, 8)),
    ("francis2023_intersection_wait", (5, 15), (None, 6)),
    ("francis2023_intersection_wait", (15, 5), (6, None)),
    ("francis2023_blind_corner", (10, 26), (None, 5)),
    ("francis2023_blind_corner", (26, 10), (5, None)),
    ("francis2023_narrow_hallway", (15, 3), (None, 4)),
    ("francis2023_narrow_doorway", (15, 5), (None, 2)),
    ("francis2023_entering_room", (15.5, 10), (None, 4)),
    ("francis2023_entering_room", (22, 5), (13, 13)),
    ("francis2023_entering_elevator", (8, 16), (5, 4)),
    ("francis2023_entering_elevator", (10, 13.6), (3, None)),
]


def walls(s: dict) -> np.ndarray:
    (w, h), b = s["size"], s.get("border", 1.0)
    border = [[0, 0, w, b], [0, h - b, w, h], [0, 0, b, h], [w - b, 0, w, h]]
    return np.array(border + s.get("obstacles", []), float)


def corners(box) -> np.ndarray:
    x0, y0, x1, y1 = box
    return np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1], [(x0 + x1) / 2, (y0 + y1) / 2]], float)


def length(points) -> float:
    return sum(math.dist(a, b) for a, b in pairwise(points))


def along(points, step: float = 0.1) -> np.ndarray:
    """Points of a polyline, at most `step` apart."""
    out = [np.asarray(points[:1], float)]
    for a, b in pairwise(points):
        t = np.linspace(0, 1, 2 + int(math.dist(a, b) / step))[1:, None]
        out.append((1 - t) * np.array(a) + t * np.array(b))
    return np.concatenate(out)


def routes(s: dict) -> list[list]:
    """The robot's route from the corners and the middle of its start box to those of its goal box, middles last."""
    r = s["robot"]
    return [[a, *r.get("via", []), b] for a in corners(r["start"]) for b in corners(r["goal"])]


def counts(s: dict) -> int:
    total = len(s.get("pedestrians", []))
    for c in s.get("crowds", []):
        x0, y0, x1, y1 = c.get("zone", (0, 0, 0, 0))
        total += math.ceil((length(c["route"]) * 3 if "route" in c else (x1 - x0) * (y1 - y0)) * c["density"])
    return total


def near(value: float, published: float) -> bool:
    return abs(value / published - 1) <= 0.05 + 1e-9


def test_the_matrix_has_48_scenarios_and_12_of_our_own():
    published = {f"classic_{name}_{tier}" for name, row in CLASSIC.items() for tier in row[3]}
    published |= {f"francis2023_{name}" for names in FRANCIS.values() for name in names.split()}
    assert len(NAMED) == len(SCENARIOS) == 60
    assert {n for n, s in NAMED.items() if s["split"] != "validation"} == published
    assert all(n.startswith("validation_") == (s["split"] == "validation") for n, s in NAMED.items())
    assert Counter(s["split"] for s in SCENARIOS) == {"train": 39, "test": 9, "validation": 12}


def test_the_nine_hold_outs_are_the_published_ones():
    names = {f"classic_{n}" for n in CLASSIC_HOLD_OUT.split()} | {f"francis2023_{n}" for n in FRANCIS_HOLD_OUT.split()}
    assert {s["name"] for s in SCENARIOS if s["split"] == "test"} == names


@pytest.mark.parametrize("name", CLASSIC)
def test_classic_scenarios_have_the_published_dimensions(name):
    size, limit, metres, tiers = CLASSIC[name]
    for tier, pedestrians in tiers.items():
        s = NAMED[f"classic_{name}_{tier}"]
        assert (tuple(s["size"]), s["time_limit"], counts(s)) == (size, limit, pedestrians)
        assert metres is None or near(length(routes(s)[-1]), metres)
        densities = (0.04, 0.08, 0.12) if name == "group_crossing" else (0.02, 0.05, 0.08)
        assert {c["density"] for c in s.get("crowds", [])} <= {dict(zip(("low", "medium", "high"), densities))[tier]}


@pytest.mark.parametrize("row", FRANCIS, ids=FRANCIS.values())
def test_francis_scenarios_have_the_published_dimensions(row):
    for name in FRANCIS[row].split():
        s = NAMED[f"francis2023_{name}"]
        assert (tuple(s["size"]), s["time_limit"], counts(s)) == (row[0], 400, row[2])
        assert row[1] is None or near(length(routes(s)[-1]), row[1])


@pytest.mark.parametrize(("name", "point", "widths"), GAPS)
def test_lanes_and_doors_are_as_wide_as_published(name, point, widths):
    for i in (0, 1):
        w = walls(NAMED[name])
        w = w[(w[:, 1 - i] < point[1 - i]) & (point[1 - i] < w[:, 3 - i])]
        width = w[w[:, i] >= point[i], i].min() - w[w[:, i + 2] <= point[i], i + 2].max()
        assert widths[i] is None or near(width, widths[i])


def test_roles_speeds_and_pauses_are_the_published_ones():
    def single(name):
        return NAMED[f"francis2023_{name}"]["pedestrians"][-1]

    assert (single("following_human")["role"], single("following_human")["offset"]) == ("lead", [2, 0])
    assert (single("leading_human")["role"], single("leading_human")["offset"]) == ("follow", [-1.5, 0])
    assert (single("accompanying_peer")["role"], single("accompanying_peer")["offset"]) == ("accompany", [0, 1])
    assert [p["role"] for p in NAMED["francis2023_join_group"]["pedestrians"]] == ["wait", "wait", "join"]
    assert [p["role"] for p in NAMED["francis2023_leave_group"]["pedestrians"]] == ["leave", "wait"]
    assert single("intersection_wait")["wait"] == [[1, 2]]
    assert single("intersection_wait")["path"] == single("intersection_proceed")["path"]
    assert single("pedestrian_obstruction")["speed"] == single("robot_overtaking")["speed"] == 0.3
    assert single("pedestrian_overtaking")["speed"] == 0.8
    assert {p["speed"] for p in NAMED["classic_realworld_double_bottleneck_high"]["pedestrians"]} == {0.7}


# Scenarios of one's own


MAPS = json.loads((Path(__file__).parents[1] / "docs" / "own_maps.json").read_text())["scenarios"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sise": [9, 9]}, "unknown key 'sise'"),
        ({"size": 24}, r"size must be numbers of shape \(2,\)"),
        ({"size": [24]}, r"size must be numbers of shape \(2,\)"),
        ({"time_limit": "long"}, "time_limit must be a number"),
        ({"name": "corner"}, "another scenario has the same name"),
        ({"split": "trian"}, "split must be train, validation or test"),
        ({"robot": {"start": [2, 6, 4, 10]}}, "goal is missing"),
        ({"obstacles": [[3, 7, 5, 8]]}, "the robot's route is inside an obstacle"),
        ({"obstacles": [[1, 9, 5, 12]]}, "the robot's start is inside an obstacle"),
        ({"obstacles": [[14, 1, 15, 15]]}, "the robot's route is inside an obstacle"),
        ({"obstacles": [[9, 5, 8, 6]]}, "a box must be"),
        ({"time_limit": 50}, "the route takes at least 9"),
        ({"crowds": [{"route": [[12, 2], [12, 18]], "density": 0.1}]}, "crowds.0. is inside an obstacle"),
        ({"crowds": [{"density": 0.1}]}, "give either a route of at least two points or a zone"),
        ({"pedestrians": [{"path": [[8.5, 5.5]]}]}, "pedestrians.0.: path is inside an obstacle"),
        ({"pedestrians": [{"path": [[18, 11]], "role": "sit"}]}, "unknown role 'sit'; choose from wait"),
        ({"pedestrians": [{"path": [[18, 11]], "wait": [[1, 2]]}]}, "indices of its points"),
        ({"pedestrians": [5]}, "scenario lobby"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_wrong_scenario_is_one_line(change, message, tmp_path):
    """With the robot's route from x = 3 to 21 along y = 8."""
    file = tmp_path / "maps.json"
    file.write_text(json.dumps({"scenarios": [MAPS[1], {**MAPS[0], **change}]}))
    with pytest.raises(UserError, match=message) as refused:
        envs.make_vec("SocNavGrid-v0", 1, scenarios=str(file))
    assert "\n" not in str(refused.value)


def test_own_scenarios_and_their_splits(tmp_path):
    file = tmp_path / "maps.json"
    file.write_text(json.dumps({"scenarios": [{**MAPS[0], "split": "train"}, MAPS[1]]}))
    names = {split: [one.name for one in choose(split, False, None, str(file))] for split in ("train", "test")}
    assert names == {"train": ["lobby", "corner"], "test": ["corner"]}
    env = envs.make_vec("SocNavGrid-v0", 2, split="test", training=False, scenarios=str(file))
    env.reset(seed=0)
    assert env.world.names == ["corner"]
    assert env.limit.tolist() == [400, 400]
    file.write_text(json.dumps({"scenarios": [{**MAPS[0], "split": "test"}]}))
    load_scenarios.cache_clear()
    with pytest.raises(ValueError, match="no scenario for the validation split"):
        choose("validation", False, None, str(file))


def test_the_bundled_scenarios_pass_the_checks_of_a_file():
    for scenario in load_scenarios().values():
        check(scenario)
