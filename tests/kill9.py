"""Run commands in children that are killed with kill -9, and start them again until they end.

A program, not a module of tests: it imports everything once and forks a child per attempt, because
importing torch takes longer than the tiny study. Nothing is computed before a fork, so the children
inherit no threads.

    python kill9.py moments STUDY FOLDER KILLS      killed after a random part of the time
    python kill9.py made-up FOLDER                  killed at every change of the disk, with stages
                                                    that compute nothing
    python kill9.py real STUDY FOLDER STEP          at every so many changes, with the real ones
    python kill9.py memory STUDY FOLDER TIMES       not killed: a random part of the memory that they need

Each compares nothing: it leaves ``FOLDER/whole``, of an attempt that nobody stopped, beside the
others, and prints how often it stopped one.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], None]
CHANGES = ("mkdir", "unlink", "rmdir")


def attempt(work: Work, *, seconds: float | None = None, call: int | None = None, deadly: tuple[int, ...] = ()) -> bool:
    """Do the work in a child that is killed after some seconds or dies at its n-th call, or of a signal that may be.

    True when it came to its end first.
    """
    child = os.fork()
    if child == 0:
        _in_child(work, call)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if done:
            break
        if end is not None and time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = None
        time.sleep(0.002)
    if -os.waitstatus_to_exitcode(status) in (signal.SIGKILL, *deadly):
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit("the child failed by itself: see above")
    return True


def _in_child(work: Work, call: int | None) -> None:
    """Never returns: the child must not go on with its parent's program."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if call is not None:
            die_at(call)
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def die_at(call: int) -> None:
    """Kill this process at its n-th change of the disk.

    Within a write (half is written), before and after a replacement, before files and folders are
    made and deleted. A sync is no change: what a process wrote outlives it, synced or not. So none
    is made either, which saves time.
    """
    from taught.run import files

    left = [call]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying(io.BufferedWriter):
        def write(self, data) -> int:
            if due():
                super().write(bytes(data)[: len(data) // 2])
                self.flush()
                die()
            return super().write(data)

    def before(name: str) -> None:
        real = getattr(os, name)

        def call_it(path, *args, **options):
            if (name != "unlink" or options or os.path.exists(path)) and due():
                die()
            return real(path, *args, **options)

        setattr(os, name, call_it)

    real_replace = os.replace

    def replace(*args) -> None:
        if due():
            die()
        real_replace(*args)
        if due():
            die()

    os.replace = replace
    os.fsync = lambda _handle: None
    for name in CHANGES:
        before(name)
    files.open = lambda path, mode: (Dying if mode == "wb" else io.BufferedReader)(io.FileIO(path, mode))


def at_every_call(works: list[Work], check: Callable[[], None], step: int = 1) -> int:
    """Do the works in turn, each killed at its first call, a later one, ... until it ends."""
    kills = 0
    for work in works:
        call = 1
        while not attempt(work, call=call):
            check()
            call += step
            kills += 1
    return kills


def commands(study: str, folder: Path) -> list[Work]:
    """The command line's steps."""
    from taught.cli.app import run_command

    sys.argv = ["taught", "some", "command"]  # stands in the manifest
    lines = [
        ["run", study, "--run", str(folder), "--to", "policy", "-q"],
        ["run", study, "--run", str(folder), "-q"],
        ["curate", str(folder)],
        ["report", str(folder)],
    ]

    def run(line: list[str]) -> None:
        if run_command(line) != 0:
            raise SystemExit(1)

    return [lambda line=line: run(line) for line in lines]


def in_turn(works: list[Work]) -> Work:
    def work() -> None:
        for each in works:
            each()

    return work


def stand_ins(folder: Path) -> list[Work]:
    """Stages with made-up numbers: the run folder's part of the work, in milliseconds."""
    import numpy as np
    import pyarrow as pa

    import synthetic_run as made_up
    from taught.run.fingerprint import stage_code
    from taught.run.folder import RunFolder
    from taught.stages import STAGES
    from taught.study.schema import Study

    for each in STAGES:
        stage_code(each, Study())  # once, not in every child

    class InParts(RunFolder):
        def write_table(self, name: str, table: pa.Table) -> None:
            if name != "scores":
                super().write_table(name, table)
                return
            with self.table_writer(name, table.schema) as write:
                part = -(-table.num_rows // 4)
                for start in range(0, table.num_rows, part):
                    write(table.slice(start, part))

    study = made_up.synthetic_study(folder.with_name("run"))
    size = made_up.Size(prompts=12, features=3, examples=6)

    def stage(name: str, write: Callable, kind: type[RunFolder]) -> None:
        run = kind(folder)
        with run.stage(name, study, {"model.weights": "5af571cb"}) as active:
            if active.done:
                return
            for key in ("one", "two"):
                if active.partial.load(key) is None:
                    active.partial.save(key, {"x": np.arange(3.0)})
            made = made_up._Made(size, False, np.random.default_rng(0))
            made.sae, made.concepts, made.extra = True, False, ()
            write(run, made)

    def report() -> None:
        run = RunFolder.open(folder)
        with run.stage("report", run.study):
            run.verify()
            run.write_text("report.html", str(sorted(run.finished_tables())))

    return [
        lambda: stage("readings", made_up._write_readings, RunFolder),
        lambda: stage("policy", made_up._write_policy, RunFolder),
        lambda: stage("attribute", made_up._write_attribute, InParts),
        lambda: stage("curate", made_up._write_curate, RunFolder),
        report,
    ]


def checked(folder: Path) -> Callable[[], None]:
    """After every kill: the folder opens and what it calls finished is whole."""
    from taught.run.folder import RunFolder

    return lambda: RunFolder(folder).verify()


def moments(study: str, folder: Path, kills: int) -> int:
    """Kill after random parts of the time that a whole run takes; finished runs begin anew."""
    start = time.monotonic()
    attempt(in_turn(commands(study, folder / "whole")))
    seconds = time.monotonic() - start
    rng, killed, run = random.Random(0), 0, 0
    while killed < kills:
        again = folder / f"killed-{run}"
        done = attempt(in_turn(commands(study, again)), seconds=rng.random() * seconds)
        checked(again)()
        killed, run = killed + (not done), run + done
    attempt(in_turn(commands(study, folder / f"killed-{run}")))
    return killed


def memory(study: str, folder: Path, times: int) -> int:
    """Allow the address space of now and a random part of what a whole run adds; what ends for want of it says so."""
    import resource

    from taught.cli import app, console

    def size() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    before = size()
    said = folder / "added"

    def whole() -> None:
        in_turn(commands(study, folder / "whole"))()
        said.write_text(str(size() - before))

    attempt(whole)
    added, rng, stopped = int(said.read_text()), random.Random(0), 0
    console.complain = app.complain = lambda text, fix=None: said.write_text(text)
    run = 0

    def limited(extra: int) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (before + extra, before + extra))
        said.write_text("")
        try:
            in_turn(commands(study, folder / f"killed-{run}"))()
        except SystemExit:
            if "memory" not in said.read_text():
                raise
            os.kill(os.getpid(), signal.SIGKILL)  # as the others end

    while stopped < times:  # the C library may abort, or end with 127, where it gets none
        done = attempt(lambda: limited(int(rng.random() * added)), deadly=(signal.SIGABRT, signal.SIGSEGV, -127))
        print(
            "ended:", "all done" if done else said.read_text().partition("\n")[0] or "by the C library", file=sys.stderr
        )
        checked(folder / f"killed-{run}")()
        stopped, run = stopped + (not done), run + done
    attempt(in_turn(commands(study, folder / f"killed-{run}")))
    return stopped


def import_all() -> None:
    """What the commands need, so that no child spends its time with imports."""
    import scipy.stats
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

    import taught.report.html
    from taught.run.fingerprint import stage_code
    from taught.stages import STAGES
    from taught.study.schema import Study

    assert all((AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, scipy.stats, taught.report.html))
    torch.set_num_threads(1)
    for stage in STAGES:
        if not stage.trains:
            importlib.import_module(stage.module)
        stage_code(stage, Study())  # once, not in every child


def main(mode: str, *args: str) -> None:
    if mode == "made-up":
        (folder,) = map(Path, args)
        attempt(in_turn(stand_ins(folder / "whole")))
        again = folder / "killed-0"
        kills = at_every_call(stand_ins(again), checked(again))
    else:
        import_all()
        study, folder = args[0], Path(args[1])
        if mode == "moments":
            kills = moments(study, folder, int(args[2]))
        elif mode == "memory":
            kills = memory(study, folder, int(args[2]))
        else:
            attempt(in_turn(commands(study, folder / "whole")))
            again = folder / "killed-0"
            kills = at_every_call(commands(study, again), checked(again), int(args[2]))
    print(json.dumps({"kills": kills}))


if __name__ == "__main__":
    main(*sys.argv[1:])
