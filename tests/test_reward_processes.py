"""Users' reward functions run apart: hangs are cut, errors shown, results keep their order, processes end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lightning_vlm.rewards import RewardError, Rewards

from .test_rewards import asked, group, scored, values, write


@pytest.fixture
def written(tmp_path):
    """Writes a file of functions and gives the setting for one of them."""
    return partial(write, tmp_path)


# --- hangs ------------------------------------------------------------------------------------------------------------

HANGS = """
import time

def for_group(completions, **kwargs):
    if any(c[0]["content"] == "hang" for c in completions):
        time.sleep(60)
    return [float(c[0]["content"]) for c in completions]

def for_one(solution_str, ground_truth):
    while solution_str == "hang":
        pass
    return float(solution_str)

def children(solution_str, ground_truth):
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    open(ground_truth, "w").write(str(child.pid))
    child.wait()
"""


@pytest.mark.parametrize("name", ["for_group", "for_one"])
def test_only_what_hangs_is_cut_off(written, name):
    reward = written(HANGS, name, seconds=0.5, on_timeout=-3.0)
    with Rewards({"part": reward}) as rewards:
        table = rewards.score([group("1", "hang", "2"), group("3", "4"), group("hang")])
        assert table.values[:, 0].tolist() == [1, -3, 2, 3, 4, -3]
        assert table.timed_out == {"part": 2}
        again = rewards.score([group("7")])
    assert again.values.tolist() == [[7]] and again.timed_out == {"part": 0}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_what_a_hanging_function_started_is_killed_with_it(written, tmp_path):
    pid = tmp_path / "pid"
    table = scored(written(HANGS, "children", seconds=1.0), group("x", sample=asked(answer=str(pid))))
    assert table.timed_out == {"part": 1} and table.values.tolist() == [[0]]
    assert wait_for(lambda: not alive(int(pid.read_text())))


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = """
import os, sys

BAD = {"raise": lambda: 1 / 0, "nan": lambda: float("nan"), "inf": lambda: float("inf"), "text": lambda: "1.0",
       "list": lambda: [1.0], "exit": lambda: sys.exit(3), "die": lambda: os._exit(7)}

def for_one(solution_str, ground_truth):
    return BAD[solution_str]() if solution_str in BAD else 1.0

def for_group(completions, **kwargs):
    return [for_one(c[0]["content"], None) for c in completions]

def too_few(completions, **kwargs):
    return [1.0] * (len(completions) - 1)

def together(completions, **kwargs):
    if len(completions) > 1:
        raise RuntimeError("only one, please")
    return [1.0]

def none(completions):
    return None

def no_overall(predict, ground_truth):
    return {"accuracy": 1.0}
"""


@pytest.mark.parametrize("name", ["for_one", "for_group"])
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("raise", "raised ZeroDivisionError: division by zero"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("text", "returned '1.0', which is no number"),
        ("list", r"returned \[1.0\], which is no number"),
        ("exit", "raised SystemExit: 3"),
        ("die", "ended its process with exit code 7"),
    ],
)
def test_what_is_no_reward_stops_the_run_and_shows_whose(written, name, bad, problem):
    reward = written(WRONG, name)
    with pytest.raises(RewardError, match=problem) as error:
        scored(reward, group("fine"), group("good", bad, "more", sample=asked("s2")), workers=2)
    shown = str(error.value)
    assert shown.startswith(f"model.rewards.part: function {reward.function}: ")
    for part in ("s2", "'What is 2 + 3?'", f"completion: {bad!r}", "answer:     '5'"):
        assert part in shown
    if bad == "raise":
        assert 'BAD = {"raise": lambda: 1 / 0' in shown and "serving.py" not in shown


def test_other_results_that_are_none(written):
    for name, texts, refused in [
        ("too_few", "ab", "returned 0 results for 1 completions"),
        ("together", "abc", r"only one, please \(for the group of 3 together; for none of them alone\)"),
        ("none", "a", "returned None; expected a list of 1"),
        ("no_overall", "a", "a dict without 'overall'"),
    ]:
        with pytest.raises(RewardError, match=refused):
            values(written(WRONG, name), group(*texts))


def test_after_an_error_scoring_can_go_on(written):
    with Rewards({"part": written(WRONG, "for_one")}) as rewards:
        with pytest.raises(RewardError, match="nan"):
            rewards.score([group("nan")])
        assert rewards.score([group("fine")]).totals.tolist() == [1]


def test_long_texts_are_shortened(written):
    with pytest.raises(RewardError) as error:
        values(written(WRONG, "none"), group("x" * 10_000))
    assert "[9400 characters]" in str(error.value) and len(str(error.value)) < 2000


# --- processes --------------------------------------------------------------------------------------------------------

BUSY = """
import os, sys, time

def ordered(completions, **kwargs):
    time.sleep(0.02 * (int(kwargs["id"][0]) % 3))
    return [float(c[0]["content"]) for c in completions]

def prints(completions, log_metric, **kwargs):
    print("said", *range(1000))
    sys.stdout.write("more")
    os.write(1, b"raw" * 10000)
    os.system("echo from a child")
    assert sys.stdin.read() == ""
    log_metric("pid", os.getpid())
    return [float(len(completions))] * len(completions)
"""


def test_results_keep_their_order_with_several_processes(written):
    groups = [group(*(f"{n}.{k}" for k in range(n % 4)), sample=asked(str(n))) for n in range(20)]
    wanted = [float(f"{n}.{k}") for n in range(20) for k in range(n % 4)]
    assert values(written(BUSY, "ordered"), *groups, workers=2) == wanted


def test_what_functions_print_does_not_mix_with_their_answers(written, capfd):
    found = scored(written(BUSY, "prints"), group("a", "b"), group("c"))
    assert found.values[:, 0].tolist() == [2, 2, 1]
    out, err = capfd.readouterr()
    assert out == "" and "said 0 1 2" in err and "from a child" in err


def test_closing_ends_the_processes_and_scoring_starts_them_again(written):
    with Rewards({"part": written(BUSY, "prints")}, workers=2) as rewards:
        pids = {int(pid) for pid in rewards.score([group("a")] * 8).details["part/pid"].tolist()}
        assert 1 <= len(pids) <= 2 and os.getpid() not in pids and all(map(alive, pids))
        rewards.close()
        assert not any(map(alive, pids))
        copy = pickle.loads(pickle.dumps(rewards))
        with copy:
            assert copy.score([group("a")]).totals.tolist() == rewards.score([group("a")]).totals.tolist() == [1]


def test_a_file_that_changes_while_the_run_goes_on_is_an_error(written):
    """A process that starts later would score by other code than the first."""
    reward = written("import os\ndef score(solution_str, ground_truth):\n    return float(solution_str)", "score")
    with Rewards({"part": reward}, workers=1) as rewards:
        assert rewards.score([group("4")]).totals.tolist() == [4]
        written("def score(solution_str, ground_truth):\n    return -float(solution_str)", "score")
        assert rewards.score([group("4")]).totals.tolist() == [4]
        os.kill(rewards._functions._workers[0]._process.pid, signal.SIGKILL)
        rewards._functions._workers[0]._process.wait()
        with pytest.raises(RewardError, match="changed while the run was going"):
            rewards.score([group("4")])


def test_a_forked_copy_does_not_talk_into_its_parents_pipes(written):
    with Rewards({"part": written(BUSY, "prints")}, workers=1) as rewards:
        mine = rewards.score([group("a")]).details["part/pid"].tolist()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            table = rewards.score([group("a", "b")])
            os.write(write, pickle.dumps((table.totals.tolist(), table.details["part/pid"].tolist())))
            rewards.close()
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            totals, pids = pickle.loads(pipe.read())
        os.waitpid(child, 0)
        assert totals == [2, 2] and pids != mine
        assert rewards.score([group("a")]).details["part/pid"].tolist() == mine


ORPHAN = """
import sys, threading
from lightning_vlm.rewards import Group, Reward, Rewards
from lightning_vlm.rollouts import Completion
from lightning_vlm.data.schema import Sample
rewards = Rewards({"part": Reward(kind="python", function=sys.argv[1], seconds=60)}, workers=1)
rewards.score([Group(Sample("s", [], answer=sys.argv[2]), [Completion([1], "x", True, [0.0], [0.0])])])
"""


def test_a_worker_ends_with_its_parent_even_in_a_call_that_hangs(written, tmp_path):
    code = """
    import os, time
    def score(solution_str, ground_truth):
        open(ground_truth, "w").write(str(os.getpid()))
        time.sleep(120)
    """
    place = tmp_path / "pid"
    command = [sys.executable, "-c", ORPHAN, written(code, "score").function, str(place)]
    parent = subprocess.Popen(command)
    try:
        assert wait_for(lambda: place.exists() and place.read_text(), seconds=90)
        assert alive(int(place.read_text()))
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: not alive(int(place.read_text())))
