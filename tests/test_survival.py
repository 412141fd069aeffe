"""What real machines do to long runs: processes killed at any moment, signals, full disks, directories that disappear,
two runs with one name. Nothing is lost but the steps since the last snapshot or checkpoint."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import survival
from helpers import assert_refused, same, same_runs
from survival import Child
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bc_pretrain
import ppo_residual
from envs import command as commands
from envs import demonstrations, files, rollout, run
from envs import signals as envs_signals
from envs.command import command_line
from envs.files import UserError
from envs.signals import SIGNALS

SCRIPT = ppo_residual
ROOT = Path(__file__).parents[1]
TRAINING = ["ppo_continuous", "ppo_residual", "ppo_grid_socnav"]
MOMENTS = ["between", "rollout", "update", "evaluation", "saving", "logging", "export", "opening", "json"]
OF_CLONING = ["opening", "epoch", "evaluation", "saving", "logging", "export", "json", "between"]
OF_COLLECTING = ["between", "playing", "packing", "json"]
LIMIT = 5.0  # s from a signal to the end


@pytest.fixture(scope="module")
def root(tmp_path_factory, request):
    """A directory of runs with demonstrations, and uninterrupted runs that others are compared with as they are asked
    for."""
    survival.start_server(export="not slow" not in request.config.option.markexpr)
    folder = tmp_path_factory.mktemp("runs")
    line = ["collect", "--dataset", "demos", "--episodes", "3", "--run-root", str(folder)]
    assert Child("bc_pretrain", line, folder / "log").wait() == 0
    return folder


def whole(script, root):
    """The directory of an uninterrupted run."""
    folder = root / f"{script}_whole"
    if not folder.exists():
        child = Child(script, survival.begin(script, root, folder.name), root / "log")
        assert child.wait() == 0, child.text()
    return folder


def scalars(folder):
    """What TensorBoard shows, without what depends on the machine: {name: [(step, value)]}."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name != "time/sps"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def assert_whole(folder):
    """Every file of weights can be read, whatever happened."""
    for file in run.checkpoints_in(folder):
        run.load_checkpoint(file)
    if (folder / "best.pt").exists():
        run.load(folder / "best.pt")
    if (folder / "policy.onnx").exists() and (folder / "policy.onnx").read_bytes() != b"onnx":
        onnx.checker.check_model(onnx.load(folder / "policy.onnx"))


def completed(folder):
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["status"] == "completed"


def next_line(script, folder):
    """The command line that goes on after an end before its time: from the newest checkpoint, or from the start."""
    assert_whole(folder)
    if any(run.checkpoints_in(folder)):
        return ["--resume", str(folder)]
    shutil.rmtree(folder, ignore_errors=True)
    return survival.begin(script, folder.parent, folder.name)


def kill_and_resume(script, folder, whole, rng, kills):
    """A run that is killed so many times, and finished. What it was doing when it was killed."""
    struck, line = [], survival.begin(script, folder.parent, folder.name)
    while not completed(folder):
        child = Child(script, line, folder.with_suffix(".log"))
        hit = child.strike(signal.SIGKILL, rng, MOMENTS) if len(struck) < kills else None
        status = child.wait()
        assert status == (137 if hit else 0), (status, child.text())
        struck += [hit[0]] if hit else []
        line = next_line(script, folder)
    same_runs(folder, whole)
    assert scalars(folder) == scalars(whole)
    return struck


def test_a_killed_run_goes_on_as_if_nothing_had_been(root):
    rng = random.Random(1)
    assert len(kill_and_resume("ppo_residual", root / "killed", whole("ppo_residual", root), rng, 3)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINING)
def test_kills(root, script):
    """Fifty in each script."""
    rng, struck, chains = random.Random(script), Counter(), 0
    while struck.total() < 50:
        chains += 1
        kills = min(rng.randint(1, 6), 50 - struck.total())
        struck.update(kill_and_resume(script, root / f"{script}_{chains}", whole(script, root), rng, kills))
    print(f"\n{script}: {struck.total()} kills in {chains} runs: {dict(struck)}")


@pytest.mark.slow
def test_kills_while_cloning(root):
    """Twenty-five. A clone is not resumed: what lies there is whole, its name is taken, and another one is free."""
    rng, struck, attempts, reference = random.Random(3), Counter(), 0, whole("bc_pretrain", root)
    while struck.total() < 25:
        attempts += 1
        folder = root / f"clone_{attempts}"
        child = Child("bc_pretrain", survival.begin("bc_pretrain", root, folder.name), root / "clone.log")
        hit = child.strike(signal.SIGKILL, rng, OF_CLONING)
        assert child.wait() == (137 if hit else 0)
        struck.update([hit[0]] if hit else [])
        if not folder.exists():
            continue
        assert_whole(folder)
        if completed(folder):
            same({**run.load(folder / "best.pt"), "args": 0}, {**run.load(reference / "best.pt"), "args": 0})
        again = Child("bc_pretrain", survival.begin("bc_pretrain", root, folder.name), root / "clone.log")
        assert_refused(again.wait(), again.text(), "exists; choose another --run-name")
    print(f"\ncloning: {struck.total()} kills in {attempts} attempts: {dict(struck)}")


@pytest.mark.slow
def test_kills_while_collecting(root):
    """Twenty-five. Demonstrations are the same as without the kill, or they are missing, or they say what to do."""
    rng, struck, attempts = random.Random(4), Counter(), 0
    reference = (root / "datasets" / "demos.npz").read_bytes()
    while struck.total() < 25:
        attempts += 1
        name = f"killed_{attempts}"
        line = ["collect", "--dataset", name, "--episodes", "3", "--run-root", str(root)]
        hit = None
        while hit is None and attempts < 100:
            child = Child("bc_pretrain", line, root / "collect.log")
            hit = child.strike(signal.SIGKILL, rng, OF_COLLECTING)
            assert child.wait() == (137 if hit else 0), child.text()
            if hit is None:
                for path in (root / "datasets").glob(f"*{name}*"):
                    path.unlink()
        struck.update([hit[0]])
        file = root / "datasets" / f"{name}.npz"
        again = Child("bc_pretrain", line, root / "collect.log")
        status = again.wait()
        if status:
            assert_refused(status, again.text(), rf"{name}\.npz exists; choose another --dataset name, or remove it")
        else:
            assert not list(file.parent.glob(f".{name}*"))
        assert file.read_bytes() == reference
        checked = "quality" in run.read_json(file.with_suffix(".json")) if file.with_suffix(".json").exists() else False
        assert checked or status
        with contextlib.nullcontext() if checked else pytest.raises(run.UserError, match=r"collecting.* cut short"):
            bc_pretrain.load_demonstrations(bc_pretrain.Args(name, run_root=str(root)))
    print(f"\ncollecting: {struck.total()} kills in {attempts} attempts: {dict(struck)}")


# Signals


def strike(child, rng, phases):
    """Send one of the signals, now and then two. The signals, what the child was doing, and how long it took to end."""
    sent = [rng.choice([signal.SIGTERM] * 4 + [signal.SIGINT, signal.SIGUSR1])]
    hit = child.strike(sent[0], rng, phases)
    if hit is not None and rng.random() < 0.3 and child.alive():
        time.sleep(rng.choice((0.001, 0.02, 0.2)) * rng.random())
        sent.append(rng.choice(SIGNALS))
        if child.alive():
            os.kill(child.process.pid, sent[-1])
    status = child.wait()
    if hit is None:
        assert status == 0, child.text()
        return None
    assert status in [128 + signum for signum in sent] or status == 0, (status, child.text())
    assert not any("Traceback" in line or "ignored" in line for line in child.text()), child.text()
    return sent, hit[0], time.monotonic() - hit[1], status


def interrupt_and_resume(script, folder, whole, rng, signals):
    """A run that gets so many signals, and is finished. (what it was doing, how long it took to end) of each."""
    struck, line = [], survival.begin(script, folder.parent, folder.name)
    while not completed(folder):
        before = run.load_checkpoint(run.find_checkpoint(str(folder)))["step"] if "--resume" in line else 0
        child = Child(script, line, folder.with_suffix(".log"))
        if len(struck) >= signals:
            assert child.wait() == 0, child.text()
            break
        hit = strike(child, rng, MOMENTS)
        if hit is not None:
            _, doing, took, status = hit
            struck.append((doing, took))
            assert took < LIMIT, (doing, took)
            assert completed(folder) or status != 0
        if folder.exists() and not completed(folder):
            summary = json.loads((folder / "summary.json").read_text())
            assert summary["status"] == "interrupted"
            assert run.load_checkpoint(folder / "interrupted.pt")["step"] == summary["steps"] >= before
            assert f"stopped at step {summary['steps']:,}; to go on: --resume {folder}" in child.text()
        line = next_line(script, folder)
    same_runs(folder, whole)
    assert scalars(folder) == scalars(whole)
    return struck


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(root):
    rng = random.Random(2)
    assert len(interrupt_and_resume("ppo_residual", root / "stopped", whole("ppo_residual", root), rng, 3)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(("script", "number"), list(zip(TRAINING, (40, 40, 30))))
def test_signals(root, script, number):
    rng, struck, chains = random.Random(script), [], 0
    while len(struck) < number:
        chains += 1
        folder, signals = root / f"{script}_stopped_{chains}", min(rng.randint(1, 6), number - len(struck))
        struck += interrupt_and_resume(script, folder, whole(script, root), rng, signals)
    longest = max(took for _, took in struck)
    print(f"\n{script}: {len(struck)} signals in {chains} runs: {dict(Counter(doing for doing, _ in struck))}")
    print(f"the longest took {longest:.2f} s")


@pytest.mark.slow
def test_signals_while_cloning_and_collecting(root):
    rng, struck = random.Random(5), []
    for attempt in range(40):
        name = f"halted_{attempt}"
        begin = survival.begin("bc_pretrain", root, name)
        line = begin if attempt % 2 else ["collect", "--dataset", name, "--episodes", "3", "--run-root", str(root)]
        hit = strike(Child("bc_pretrain", line, root / "halted.log"), rng, OF_CLONING if attempt % 2 else OF_COLLECTING)
        if hit is None:
            continue
        struck.append(hit[1:3])
        assert hit[2] < LIMIT, hit
        if (root / name).exists():
            assert_whole(root / name)
            assert json.loads((root / name / "summary.json").read_text())["status"] in ("interrupted", "completed")
        assert not list((root / "datasets").glob(f".{name}*"))
    print(f"\n{len(struck)} signals: {dict(Counter(doing for doing, _ in struck))}")
    print(f"the longest took {max(took for _, took in struck):.2f} s")


@pytest.fixture
def hears_ctrl_c():
    """A shell's background jobs, and what they start, ignore SIGINT until they ask for it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINING)
def test_real_processes(root, script, hears_ctrl_c):
    """Signals and kills from the first moment on, the imports included, which end without a word as any program's."""
    rng, folder, took = random.Random(script), root / f"{script}_real", []
    line, path = survival.begin(script, root, folder.name), os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL, signal.SIGTERM, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-c", survival.SMALL, script, *line], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
        )
        time.sleep(rng.uniform(0, 12))
        process.send_signal(signum)
        sent = time.monotonic()
        errors = process.communicate(timeout=LIMIT)[1]
        took.append(time.monotonic() - sent)
        assert process.returncode in (128 + signum, -signum) or completed(folder), errors
        assert "Traceback" not in errors or "KeyboardInterrupt" in errors
        if completed(folder):
            break
        line = next_line(script, folder)
    if not completed(folder):
        subprocess.run([sys.executable, "-c", survival.SMALL, script, *line], cwd=ROOT, env=env, check=True)
    same_runs(folder, whole(script, root))
    print(f"\n{script}: the longest took {max(took):.2f} s")


@pytest.mark.slow
def test_a_signal_while_a_compiler_works(tmp_path):
    """What g++ has begun it finishes, and begins no more."""
    cache, flags = tmp_path / "cache", ["--compile", "--dry-run", "--num-steps", "32", "--minibatch-size", "32"]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    line = [sys.executable, ppo_residual.__file__, *flags, "--run-root", str(tmp_path), "--run-name", "run"]
    process = subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True)
    while not list(cache.rglob("*.main.cpp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=2 * LIMIT)[1]
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert run.load_checkpoint(tmp_path / "run" / "interrupted.pt")["step"] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


@pytest.fixture
def quick_export(monkeypatch):
    monkeypatch.setattr(run, "export_onnx", survival.placeholder)


def send(signum, function):
    """The function, but that signal comes first."""

    def call(*args, **kwargs):
        os.kill(os.getpid(), signum)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_before_the_first_step_is_kept_until_something_can_be_saved(
    root, command, monkeypatch, quick_export, signum, status
):
    folder = root / f"early_{status}"
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "_begin", send(signum, run.Run._begin))
        assert command(" ".join(survival.begin("ppo_residual", root, folder.name)))[0] == status
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert run.load_checkpoint(folder / "interrupted.pt")["step"] == 0
    assert command(f"--resume {folder}")[0] == 0
    same_runs(folder, whole("ppo_residual", root))


def test_a_clone_does_not_wait_for_what_it_will_never_save(root, command, monkeypatch):
    monkeypatch.setattr(run.Run, "_begin", send(signal.SIGTERM, run.Run._begin))
    monkeypatch.setattr(bc_pretrain, "fit_epoch", None)
    assert command(" ".join(survival.begin("bc_pretrain", root, "early_clone")), bc_pretrain)[0] == 143
    assert json.loads((root / "early_clone" / "summary.json").read_text())["status"] == "interrupted"


class Swallows:
    """Its destructor is interrupted, which Python does not tell anybody."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def status_of(program):
    """What it ends with as a command, a function of a list in which it notes how far it came; and that list."""
    came = []
    with pytest.raises(SystemExit) as end:
        command_line()(program)(came)
    return end.value.code, came


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_was_swallowed_comes_again(monkeypatch):
    monkeypatch.setattr("envs.signals.AGAIN", 0.05)

    def program(came):
        gone = Swallows()
        del gone
        came.append("swallowed by Python")
        with contextlib.suppress(run.Interrupted):
            time.sleep(5)
        came.append("swallowed by a library")
        time.sleep(5)
        came.append("unheard")

    assert status_of(program) == (143, ["swallowed by Python", "swallowed by a library"])


def mistaken():
    raise UserError("a mistake")


def infinite():
    raise FloatingPointError("infinite")


@pytest.mark.parametrize(("program", "status"), [(int, 0), (mistaken, 2), (infinite, 1), (sys.exit, 0)])
def test_a_signal_at_any_call_around_a_program_ends_it_in_order(program, status, monkeypatch):
    """Python hears signals when a function begins or has returned. Wherever that is in the code that catches them,
    tells mistakes and lets go, the end is that of the program, that of the signal or, before and after, what signals do
    by themselves."""
    around, by_default = {module.__file__ for module in (commands, envs_signals, contextlib)}, []
    monkeypatch.setattr(signal, "SIG_DFL", lambda signum, frame: by_default.append(signum))

    def end_of(moment):
        """How it ends if the signal comes at this one of the calls and returns, and how many there were."""
        calls, code = 0, 0

        def profile(frame, event, arg):
            nonlocal calls
            if frame.f_code.co_filename in around:
                calls += 1
                if calls == moment:
                    sys.setprofile(None)
                    os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        guarded = command_line()(lambda: program())
        sys.setprofile(profile)
        try:
            guarded()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.setprofile(None)
        return code, calls

    before = [signal.getsignal(s) for s in SIGNALS]
    try:
        _, calls = end_of(0)
        codes = [end_of(moment)[0] for moment in range(1, calls + 1)]
    finally:
        for s, handler in zip(SIGNALS, before):
            signal.signal(s, handler)
    assert {*codes} == {status, 143}
    assert 0 < len(by_default) < calls


def test_a_second_signal_does_not_cut_short_what_the_first_one_began():
    def program(came):
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            came.append("cleaned")

    assert status_of(program) == (138, ["cleaned"])


def test_a_signal_that_a_library_turns_into_its_own_error(root, command, monkeypatch):
    def export(*args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise RuntimeError("failed to export") from error

    monkeypatch.setattr(run, "export_onnx", export)
    folder = root / "library"
    status, errors = command(" ".join(survival.begin("ppo_residual", root, folder.name)))
    assert status == 143, errors
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


def test_a_signal_that_a_library_turns_into_its_own_error_outside_a_run():
    def program(came):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException as error:
            raise RuntimeError("something else") from error

    assert status_of(program) == (130, [])


def test_a_signal_after_the_last_file_does_not_undo_the_end(root, command, monkeypatch, quick_export):
    monkeypatch.setattr(run, "write_json", after(signal.SIGTERM, run.write_json))
    folder = root / "late"
    assert command(" ".join(survival.begin("ppo_residual", root, folder.name)))[0] == 143
    assert completed(folder)
    assert not (folder / "interrupted.pt").exists()


def after(signum, function):
    """The function, but that signal comes once it has written summary.json."""

    def call(path, content):
        function(path, content)
        if path.name == "summary.json":
            os.kill(os.getpid(), signum)

    return call


# One directory, two processes


def test_two_runs_with_one_name_begun_at_the_same_moment(root):
    line = survival.begin("ppo_residual", root, "twice")
    children = [Child("ppo_residual", line, root / f"twice_{i}.log") for i in range(2)]
    status = [child.wait() for child in children]
    assert sorted(status) == [0, 2]
    assert_refused(2, children[status.index(2)].text(), "twice exists; choose another --run-name")
    same_runs(root / "twice", whole("ppo_residual", root))


def test_a_run_is_not_resumed_while_it_goes_on(root):
    folder = root / "busy"
    child = Child("ppo_residual", survival.begin("ppo_residual", root, folder.name), root / "busy.log")
    while not list(folder.glob("checkpoints/step_*.pt")):
        assert child.alive(), child.text()
        time.sleep(0.001)
    os.kill(child.process.pid, signal.SIGSTOP)
    try:
        other = Child("ppo_residual", ["--resume", str(folder)], root / "other.log")
        assert_refused(other.wait(), other.text(), "busy: another process is training in it; wait for its end")
    finally:
        os.kill(child.process.pid, signal.SIGCONT)
    assert child.wait() == 0, child.text()
    same_runs(folder, whole("ppo_residual", root))


def test_demonstrations_are_not_recorded_twice_at_once(root):
    line = ["collect", "--dataset", "busy", "--episodes", "3", "--run-root", str(root)]
    child = Child("bc_pretrain", line, root / "busy.log")
    while child.doing() != "playing":
        assert child.alive(), child.text()
        time.sleep(0.001)
    os.kill(child.process.pid, signal.SIGSTOP)
    try:
        other = Child("bc_pretrain", line, root / "other.log")
        assert_refused(other.wait(), other.text(), r"busy\.npz: another process is recording it; wait for its end")
    finally:
        os.kill(child.process.pid, signal.SIGCONT)
    assert child.wait() == 0, child.text()
    assert (root / "datasets/busy.npz").read_bytes() == (root / "datasets/demos.npz").read_bytes()


# Full disks


@pytest.fixture
def full(monkeypatch):
    """full(name): to write into files of that name fails as on a full disk, at the moment when it does there."""
    real = open

    def full_for(name):
        def fake(path, mode="r", *args, **kwargs):
            full = "r" not in mode and Path(path).match(name)
            return real("/dev/full" if full else path, mode, *args, **kwargs)

        for module in (files, demonstrations):
            monkeypatch.setattr(module, "open", fake, raising=False)

    return full_for


FILES = {  # of a run, and how it goes on with more space
    ".config.json.tmp": "begin",
    "events.out.tfevents.*": "begin",
    "first_evaluations.jsonl": "begin",
    "progress.csv": "begin",
    "episodes.jsonl": "begin",
    ".step_000000128.pt.tmp": "resume",
    ".best.pt.tmp": "resume",
    "evaluations.jsonl": "resume",
    ".final.pt.tmp": "resume",
    ".policy.onnx.tmp": "resume",
    ".summary.json.tmp": "resume",
}


@pytest.mark.parametrize("name", FILES)
def test_full_disk_in_a_run(root, command, full, monkeypatch, quick_export, name):
    folder = root / f"full_{[*FILES].index(name)}"
    begin = " ".join(survival.begin("ppo_residual", root, folder.name))
    full(name)
    status, errors = command(begin)
    full("nothing")
    file = name.removeprefix(".").removesuffix(".tmp").replace("*", ".*").replace("evaluations", ".*evaluations")
    how = f", then --resume {folder}$" if FILES[name] == "resume" else "$"
    says = rf"{file} could not be written \(No space left on device\); what was there is intact; free some space{how}"
    assert_refused(status, errors[-1:], says)
    assert not any("error" in line or "Traceback" in line for line in errors[:-1])
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    line = next_line("ppo_residual", folder)
    assert (line[0] == "--resume") == (FILES[name] == "resume")
    assert command(" ".join(line))[0] == 0
    same_runs(folder, whole("ppo_residual", root))
    assert scalars(folder) == scalars(whole("ppo_residual", root))


def test_full_disk_when_a_signal_comes(root, command, full, monkeypatch):
    monkeypatch.setattr(run.Run, "log", send(signal.SIGTERM, run.Run.log))
    full(".interrupted.pt.tmp")
    status, errors = command(" ".join(survival.begin("ppo_residual", root, "full_signal")))
    assert_refused(status, errors[-1:], r"interrupted\.pt could not be written \(No space left on device\)")


@pytest.mark.parametrize("name", ["reward", "obs", ".full.npz.tmp", ".full.json.tmp"])
def test_full_disk_while_collecting(root, command, full, name):
    line = f"collect --dataset full --episodes 3 --run-root {root}"
    full(name)
    status, errors = command(line, bc_pretrain)
    file = r"full\.json" if "json" in name else r"full\.npz"
    assert_refused(status, errors[-1:], rf"{file} could not be written \(No space left on device\);.*free some space")
    assert sorted(path.name for path in (root / "datasets").glob("*full*")) == ["full.npz"] * ("json" in name)
    (root / "datasets/full.npz").unlink(missing_ok=True)


@pytest.mark.parametrize("stops", [None, OSError(28, "No space left on device"), run.Interrupted(signal.SIGTERM)])
def test_a_video_is_written_whole_or_not_at_all(tmp_path, monkeypatch, stops):
    class Clip:
        def __init__(self, frames, fps):
            pass

        def write_videofile(self, path, logger):
            assert path.endswith(".mp4")  # which says what it is
            Path(path).write_bytes(b"half")
            if stops is not None:
                raise stops

    class Drawn:
        metadata = {"render_fps": 10}  # noqa: RUF012

    monkeypatch.setitem(sys.modules, "moviepy", types.SimpleNamespace(ImageSequenceClip=Clip))
    film, one = rollout.Film(Drawn(), tmp_path / "videos" / "step.mp4"), np.ones(1)
    refused = pytest.raises((run.WriteError, run.Interrupted), match=r"step\.mp4 could not.*free some space|SIGTERM")
    with contextlib.nullcontext() if stops is None else refused:
        film(np.zeros(1, int), one, one > 0, one > 0)
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["step.mp4"] * (stops is None)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kilobytes): a file system of that size, or the one that there is with another size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def resize(kilobytes):
        nonlocal mounted
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode:
            pytest.skip("only root can make a small disk")
        mounted = True
        return place

    yield resize
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINING)
def test_disks_that_fill_up_anywhere(root, small_disk, script):
    """Fifteen sizes; the fuller disk ends the run with one line, and with more space it goes on as if nothing had
    been."""
    reference = whole(script, root)
    used = sum(file.stat().st_size for file in reference.rglob("*")) // 1024
    rng, place, ends = random.Random(script), None, Counter()
    for attempt in range(15):
        place = small_disk(rng.randint(16, int(used * 1.3)))
        folder = place / f"run_{attempt}"
        child = Child(script, survival.begin(script, place, folder.name), root / "disk.log")
        status, errors = child.wait(), child.text()
        if status:
            assert_refused(status, errors[-1:], r"could not be written \(No space left|cannot be made|No space left")
            assert not any("Traceback" in line or "error" in line for line in errors[:-1]), errors
            ends[errors[-1].split(" could not")[0].split("/")[-1]] += 1
            small_disk(64 * 1024)
            child = Child(script, next_line(script, folder), root / "disk.log")
            assert child.wait() == 0, child.text()
        same_runs(folder, reference)
        shutil.rmtree(folder)
    print(f"\n{script}: {dict(ends)}")


# Directories that disappear


@pytest.mark.parametrize("moment", ["log", "save", "export_onnx"])
def test_a_run_root_that_is_removed(tmp_path, command, monkeypatch, quick_export, moment):
    place = tmp_path / "gone"
    place.mkdir()
    line = " ".join(survival.begin("ppo_residual", place, "run"))
    owner = run if moment == "export_onnx" else run.Run

    def removed(*args):
        shutil.rmtree(place, ignore_errors=True)
        return function(*args)

    function = getattr(owner, moment)
    monkeypatch.setattr(owner, moment, removed)
    status, errors = command(line)
    says = r"could not be written \(No such file or directory\).*its folder was removed: put it back, or start anew"
    assert_refused(status, errors[-1:], says)
    assert not any("error" in line or "Traceback" in line for line in errors[:-1])
    assert not place.exists()
