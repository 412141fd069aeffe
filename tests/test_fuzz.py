"""Damaged and hostile files: whatever a file holds, reading it ends in success or in a user's error of one line.

    python tests/test_fuzz.py READER NUMBER        one case again, with its traceback
    python tests/test_fuzz.py READER FIRST LAST    those cases, in short

Files are read in a child process, so that a crash of native code, a hang or a greedy allocation is seen. An audit hook
notes what is executed or written there."""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT), str(ROOT / "tests")]

import mutate  # noqa: E402
from fuzz_readers import READERS, Reader, quickly, warm  # noqa: E402

import bc_pretrain  # noqa: E402
import envs  # noqa: E402
import ppo_continuous  # noqa: E402
from envs import command, run  # noqa: E402
from envs.files import LONGEST_MESSAGE, UserError  # noqa: E402

SEED = 1
LONGEST = 5.0  # s that a file may take
MEMORY = 3 * 2**30  # bytes that reading may ask for, beyond what the process has
MESSAGE = 1000  # characters, at most
SAMPLE, WHOLE = 300, 22_000  # files of the default suite, and of the slow test

# Cases that once went wrong, each in a way of its own
ONCE_WRONG = {
    "policy": (30, 53, 56, 101, 119, 182, 348, 359, 1063),
    "evaluate": (56, 60, 88, 322),
    "expert": (6, 237, 312, 387, 459),
    "resume": (71, 80, 109, 140, 435, 857),
    "resume_logs": (57, 62, 111, 165),
    "snapshot_ballbot": (46, 282),
    "snapshot_socnav": (58, 140),
    "dataset": (26, 60, 93, 292, 1024, 1288),
    "clone": (19, 38, 315, 936),
    "onnx_policy": (35, 63, 146, 148, 1104, 1147),
    "dynamics": (26, 994, 1122),
    "own_dynamics": (112,),
    "encoder": (28, 61, 110),
    "compare": (106, 117, 118, 120, 187, 481),
    "sweep": (1, 103, 292, 387),
}


def damage(name: str, number: int, folder: Path) -> str:
    """Write the mutated file of a case; which one, and by which mutator."""
    reader, rng = READERS[name], np.random.default_rng([SEED, zlib.crc32(name.encode()), number])
    files = [*reader.files]
    file = files[number % len(files)]
    mutators = reader.files[file]
    mutator = mutators[rng.integers(len(mutators))]
    if rng.integers(100) == 0:  # a file of another sort under this name
        others = sorted(path for path in folder.rglob("*") if path.is_file())
        (folder / file).write_bytes(others[rng.integers(len(others))].read_bytes())
        return f"{file}, another's content"
    (folder / file).write_bytes(mutator((folder / file).read_bytes(), rng))
    return f"{file}, {mutator.__name__}"


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """{file: size and time of the last change}, of folders nothing but the name."""
    found = {}
    for path, folders, files in os.walk(folder):
        found |= {os.path.join(path, name): (0, 0) for name in folders}
        for name in files:
            about = os.stat(os.path.join(path, name), follow_symlinks=False)
            found[os.path.join(path, name)] = about.st_size, about.st_mtime_ns
    return found


class Watch:
    """Notes what Python executes or writes outside the folders that it may write in, while it is on."""

    RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect")
    WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")

    def __init__(self, place: Path, writes: tuple[str, ...]):
        self.allowed, self.on, self.found = tuple(str(place / name) for name in writes), False, []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in self.RUNS or (event == "import" and args[0] == mutate.MODULE):
            self.found.append(f"{event} {args[:1]}")
        elif event in self.WRITES or (event == "open" and self.for_writing(*args[1:3])):
            paths = [str(arg) for arg in args[: 2 if event == "os.rename" else 1]]
            self.found += [f"{event} {path}" for path in paths if not self.may(path)]

    @staticmethod
    def for_writing(mode: str | None, flags: int) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(mode and set(mode) & set("wax+"))

    def may(self, path: str) -> bool:
        path = os.path.abspath(path)
        own = any(path == one or path.startswith(one + os.sep) for one in self.allowed)
        beside = any(os.path.basename(path).startswith(f".{os.path.basename(one)}") for one in self.allowed)
        return own or beside or path in ("/dev/null", os.sep + "dev")


def judged(reader: Reader, watch: Watch, outside: dict, place: Path) -> tuple[str, str]:
    """Read the files in the working directory; the verdict, and what there is to say."""
    watch.on = True
    try:
        reader.read()
        verdict, text = "accepted", ""
    except reader.fails as error:
        verdict, text = "refused", str(error)
        if "\n" in text or not text.isprintable() or len(text) > MESSAGE:
            verdict = "message not one line of readable length"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/envs/" in f.filename or "ppo_" in f.filename]
        where = f"{Path((ours or [last])[-1].filename).name}:{(ours or [last])[-1].lineno}"
        verdict, text = "traceback", f"{type(error).__name__} at {where}: {error}"
    finally:
        watch.on = False
    if watch.found:
        verdict, text, watch.found = "executed or wrote", "; ".join(watch.found), []
    now = state_of(place.parent)
    if changed := {path for path in {*now, *outside} if now.get(path) != outside.get(path) and not watch.may(path)}:
        verdict, text = "executed or wrote", f"changed: {sorted(changed)[:3]}"
    return verdict, text


def read_all(name: str, numbers: list[int], root: Path, answers: Any) -> None:
    """In the child: prepare the files once, then send (verdict, text, mutator, seconds) of each case."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    sys.dont_write_bytecode = True
    reader, sound, place = READERS[name], root / "sound", root / "world" / "place"
    quickly()
    shutil.rmtree(root, ignore_errors=True)
    for folder in (sound, place.parent):
        folder.mkdir(parents=True)
    reader.make(sound)
    canary = place / mutate.CANARY
    (place.parent / f"{mutate.MODULE}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    sys.path.insert(0, str(place.parent))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    watch = Watch(place, reader.writes)
    files = Files(sound, place)
    with contextlib.suppress(Exception):  # what is imported at the first reading, and read once
        files.renew()
        reader.read()
    for number in [None, *numbers]:
        files.renew()
        about = damage(name, number, place) if number is not None else "nothing"
        outside = state_of(place.parent)
        answers.send(about)
        begin = time.perf_counter()
        verdict, text = judged(reader, watch, outside, place)
        answers.send((verdict, text, about, time.perf_counter() - begin))


class Files:
    """Sound files, and a place where they are damaged; renew() puts back those that are no longer as they were."""

    def __init__(self, sound: Path, place: Path):
        self.sound, self.place = sound, place
        shutil.copytree(sound, place)
        self.before = state_of(place)

    def renew(self) -> dict:
        """The state of the place then."""
        os.chdir(self.place)
        now = state_of(self.place)
        for path in sorted(now.keys() - self.before.keys(), reverse=True):  # what lies in a folder before the folder
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
        for path in sorted(path for path in self.before if self.before[path] != now.get(path)):
            source = self.sound / os.path.relpath(path, self.place)
            if source.is_dir():
                os.makedirs(path, exist_ok=True)
            else:
                shutil.copy2(source, path)
        self.before |= state_of(self.place)
        return self.before


def cases(name: str, numbers: list[int], root: Path) -> Iterator[tuple[int | None, str, str, str, float]]:
    """(number, verdict, text, mutator, seconds) of each case; number None is the sound file."""
    waiting, context = [None, *numbers], multiprocessing.get_context("fork")
    warm()
    while waiting:
        ours, theirs = context.Pipe()
        child = context.Process(target=read_all, args=(name, [n for n in waiting if n is not None], root, theirs))
        child.start()
        theirs.close()
        if waiting[0] is not None:  # a child that follows another begins with the sound file too
            waiting.insert(0, None)
        begun = ""
        while waiting:
            if not ours.poll(LONGEST if begun else 120.0):
                verdict = "hang", f"no answer within {LONGEST} s"
                break
            try:
                answer = ours.recv()
            except EOFError:
                child.join()
                verdict = "crash", f"the process ended with {child.exitcode}"
                break
            begun = answer if isinstance(answer, str) else ""
            if not begun:
                yield (waiting.pop(0), *answer)
        else:
            child.join()
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        yield (waiting.pop(0), *verdict, begun, LONGEST)


def shares(total: int) -> dict[str, int]:
    """How many of all files each reader gets."""
    whole = sum(reader.share for reader in READERS.values())
    return {name: max(3, round(total * reader.share / whole)) for name, reader in READERS.items()}


GOOD = ("accepted", "refused")


def fuzz(name: str, numbers: list[int], root: Path) -> tuple[list[str], str]:
    """What went wrong in these cases of a reader, and a row of the report."""
    wrong, verdicts, slowest, begin = [], Counter(), (0.0, ""), time.perf_counter()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    for number, verdict, text, about, seconds in cases(name, numbers, root):
        if number is None:
            if verdict != "accepted":
                wrong.append(f"{name}: the sound files: {verdict} {text}")
            continue
        verdicts[verdict if verdict in GOOD else "wrong"] += 1
        slowest = max(slowest, (seconds, f"#{number} {about}"))
        if verdict not in GOOD or seconds > LONGEST:
            wrong.append(
                f"{name} {number} ({about}): {verdict} {text}; again: python tests/test_fuzz.py {name} {number}"
            )
    took, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
    counts = " | ".join(str(verdicts[key]) for key in (*GOOD[::-1], "wrong"))
    return (
        wrong,
        f"| {name} | {len(numbers)} | {counts} | {slowest[0]:.2f} s {slowest[1]} | {took:.0f} s | {cpu:.0f} s |",
    )


@pytest.fixture
def root(tmp_path):
    """Where the files lie: in memory, if there is such a place."""
    place = Path(tempfile.mkdtemp(dir="/dev/shm")) if os.access("/dev/shm", os.W_OK) else tmp_path
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_in_one_line(name, root):
    wrong, _ = fuzz(name, [*range(shares(SAMPLE)[name]), *ONCE_WRONG.get(name, ())], root / name)
    assert wrong == []


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that an import of mutate.MODULE leaves in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{mutate.MODULE}.py").write_text(f"open({mutate.CANARY!r}, 'w').close()\n")
    yield tmp_path / mutate.CANARY
    sys.modules.pop(mutate.MODULE, None)


@pytest.mark.parametrize("flag", ["--config", "--evaluate"])
def test_a_file_cannot_have_a_module_run(flag, canary):
    asked = f"{mutate.MODULE}:Env-v0"
    if flag == "--config":
        file = Path("config.json")
        file.write_text(f'{{"env_id": "{asked}"}}')
    else:
        file = Path("policy.pt")
        policy = {
            "kind": "policy",
            "env_id": asked,
            "env_kwargs": {},
            "args": {"env_id": asked},
            "agent": {},
            "step": 0,
        }
        run.save(file, policy)
        with pytest.raises(UserError, match=r"policy\.pt: its environment .* no file may ask for"):
            bc_pretrain.who_plays(bc_pretrain.CollectArgs("x", policy="./policy.pt"))
    line = [flag, f"./{file}"]
    with pytest.raises(UserError, match=r"its environment .* no file may ask for; if you trust it, give --env-id"):
        command.parse(ppo_continuous.Args, ppo_continuous.Args.tuned, argv=line)
    assert not canary.exists()
    args = command.parse(ppo_continuous.Args, ppo_continuous.Args.tuned, argv=[*line, "--env-id", asked])
    with pytest.raises(UserError, match="unknown environment"):
        envs.make_vec(args.env_id, 1)
    assert canary.exists()


def test_demonstrations_cannot_have_a_module_run(canary):
    READERS["dataset"].make(Path())
    manifest = run.read_json(Path("datasets/home.json"))
    run.write_json(Path("datasets/home.json"), {**manifest, "env_id": f"{mutate.MODULE}:Env-v0"})
    with pytest.raises(UserError, match=r"home\.json: its environment .* no file may ask for"):
        bc_pretrain.validate(bc_pretrain.ValidateArgs("home", run_root="."))
    assert not canary.exists()


@pytest.mark.parametrize("code", range(3))
def test_a_pickle_is_not_executed(code, canary):
    torch.save({**dict.fromkeys(run.POLICY_KEYS), "agent": mutate.Bomb(code)}, "bomb.pt")
    with pytest.raises(UserError, match=r"bomb\.pt: .*not a file of this project"):
        run.load(Path("bomb.pt"))
    assert not canary.exists()


def test_messages_are_one_line_that_a_terminal_can_show():
    assert str(UserError("a\nb\x1b[31mc \u202e d")) == "a b [31mc d"
    long = str(UserError("x" * 10_000 + "; use another"))
    assert len(long) <= LONGEST_MESSAGE
    assert long.endswith("xx; use another")


@pytest.mark.slow
def test_twenty_thousand_damaged_files(root):
    """All readers; the table is shown with -s."""
    counts, wrong = shares(WHOLE), []
    assert sum(counts.values()) >= 20_000
    print("\n| reader | files | refused | accepted | wrong | slowest | took | CPU |", "| --- " * 8 + "|", sep="\n")
    for name in READERS:
        found, row = fuzz(name, [*range(counts[name])], root / name)
        print(row, *found, sep="\n", flush=True)
        wrong += found
    assert wrong == []


if __name__ == "__main__":
    which, *numbers = sys.argv[1:]
    begin, end = (int(numbers[0]), int(numbers[-1]) + 1) if numbers else (0, 100)
    with tempfile.TemporaryDirectory() as folder:
        found = Counter()
        t0 = time.time()
        for number, verdict, text, about, seconds in cases(which, [*range(begin, end)], Path(folder)):
            found[verdict] += 1
            if verdict not in GOOD or number is None or seconds > 1:
                print(number, about, verdict, text[:300], f"{seconds:.2f}")
        print(which, dict(found), time.time() - t0)
