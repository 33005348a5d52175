"""What happens to local jobs when processes die, disks fill up, files are changed by hand and clocks step back."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import fray
from fray.backend.local import SubprocessClusterContext
from fray.errors import JobExistsError, WaitTimeoutError
from fray.types import JobStatus, Resource, RuntimeEnv, TerminationReason
from tests.local.local_harness import LocalHarness
from tests.requirements import faketime_library, run_in_mount_namespace

SOAK = bool(os.environ.get("FRAY_SOAK"))

# A client that submits and waits, and is killed at the Nth thing that it asks of the operating system.
DOOMED_CLIENT = """
import os, signal, sys
import fray
spec, ran, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
cluster = fray.connect(spec)
cluster.wait(cluster.create_job("true"))
seen = 0
def hook(event, arguments):
    global seen
    if event.startswith(("open", "os.", "subprocess", "fcntl", "shutil", "socket")):
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
for number in range(3):
    job_id = f"job-{number}"
    cluster.create_job(f"echo {job_id} >> {ran}", fray.RuntimeEnv(secrets={"S": "x" * 100}), job_id=job_id)
    print(job_id, flush=True)
    cluster.wait(job_id)
print("events", seen, flush=True)
"""


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any job."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _change_journal(directory: Path, **changes: int) -> None:
    """Give a job's `supervised` event other process ids."""
    journal = directory / "journal"
    lines = []
    for line in journal.read_bytes().rstrip(b"\0").splitlines():
        event = json.loads(line)
        if event["event"] == "supervised":
            event.update(changes)
        lines.append(json.dumps(event).encode())
    journal.write_bytes(b"\n".join(lines) + b"\n")


class TestDeadClients:
    @pytest.mark.parametrize("seed", range(200 if SOAK else 20))
    def test_a_client_killed_anywhere_leaves_no_job_lost_doubled_or_stuck(
        self, harness: LocalHarness, tmp_path: Path, seed: int
    ) -> None:
        ran = tmp_path / "ran"
        count = random.Random(seed).randrange(1, 170)
        done = subprocess.run(
            [sys.executable, "-c", DOOMED_CLIENT, harness.spec, str(ran), str(count)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        assert done.returncode in (0, -signal.SIGKILL)
        announced = [word for word in done.stdout.split() if word.startswith("job-")]
        listed = {info.id: harness.end(info.id) for info in harness.cluster.list_jobs()}
        assert set(announced) <= set(listed), "an accepted job is lost"
        accepted = sorted(name for name in listed if name.startswith("job-"))
        assert all(info.status is JobStatus.SUCCEEDED for info in listed.values()), listed
        lines = ran.read_text().split() if ran.exists() else []
        assert sorted(lines) == accepted, "each accepted job ran once, no other did"
        # The id of the submission that was cut off can be used: it was accepted, or it was not.
        retried = harness.cluster.create_job(
            f"echo job-2 >> {ran}", RuntimeEnv(secrets={"S": "y"}), job_id="job-2", if_exists="adopt"
        )
        assert harness.end(retried).status is JobStatus.SUCCEEDED
        assert ran.read_text().split().count("job-2") == 1

    def test_what_a_killed_client_left_half_made_is_swept(self, harness: LocalHarness) -> None:
        harness.cluster.list_jobs()
        left = harness.root / "staging" / "0123456789abcdef"
        left.mkdir()
        (left / "lock").touch()
        os.utime(left, (0, 0))
        harness.connect()
        assert not left.exists()


class TestDeadSupervisors:
    def test_runner_and_guard_killed_together(self, harness: LocalHarness) -> None:
        job_id = harness.cluster.create_job("setsid sh -c 'trap \"\" TERM; echo $$; sleep 600 & wait' & sleep 600")
        harness.until_logged(job_id, b"\n")
        deaf = int(harness.cluster.get_logs(job_id))
        runner, guard = harness.supervisors(job_id)
        os.kill(guard, signal.SIGSTOP)
        os.kill(runner, signal.SIGKILL)
        os.kill(guard, signal.SIGKILL)
        info = harness.end(job_id)
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)
        assert not _is_alive(deaf), "the next client found what was left, and killed it before it said LOST"

    def test_the_guard_cleans_up_without_any_client(self, harness: LocalHarness) -> None:
        job_id = harness.cluster.create_job("setsid sh -c 'trap \"\" TERM; echo $$; sleep 600 & wait' & sleep 600")
        harness.until_logged(job_id, b"\n")
        deaf = int(harness.cluster.get_logs(job_id))
        runner, guard = harness.supervisors(job_id)
        os.kill(runner, signal.SIGKILL)
        harness.until(lambda: not _is_alive(guard), "the guard to have done its work")
        assert not _is_alive(deaf)

    def test_a_killed_guard_costs_nothing(self, harness: LocalHarness) -> None:
        go = harness.root / "go"
        job_id = harness.cluster.create_job(f"echo ready; while ! [ -e {go} ]; do sleep 0.05; done; exit 3")
        harness.until_logged(job_id, b"ready")
        os.kill(harness.supervisors(job_id)[1], signal.SIGKILL)
        go.touch()
        assert harness.end(job_id).exit_code == 3

    def test_a_killed_preparation_is_a_lost_job(self, harness: LocalHarness) -> None:
        with harness.hold_pending() as held:
            job_id = harness.cluster.create_job("echo ran", held)
            harness.until(lambda: "waiting" in harness.cluster.get_job(job_id).message, "the job to wait")
            os.kill(harness._outcome(job_id).runner, signal.SIGKILL)
            info = harness.end(job_id)
        assert (info.status, info.reason, info.start_time) == (JobStatus.FAILED, TerminationReason.LOST, None)

    def test_an_end_that_was_recorded_outlives_its_runner(self, harness: LocalHarness) -> None:
        deaf = f"trap '' TERM; touch {harness.root}/deaf; while :; do sleep 0.05; done"
        job_id = harness.cluster.create_job(
            f'sh -c "{deaf}" & while ! [ -e {harness.root}/deaf ]; do sleep 0.05; done; exit 5'
        )
        harness.until(lambda: b'"exited"' in (harness.job_directory(job_id) / "journal").read_bytes(), "the exit")
        os.kill(harness.supervisors(job_id)[0], signal.SIGKILL)
        info = harness.end(job_id)
        assert (info.status, info.reason, info.exit_code) == (JobStatus.FAILED, TerminationReason.EXITED, 5)

    def test_a_stop_asked_for_before_the_runner_died_is_a_stop(self, harness: LocalHarness) -> None:
        job_id = harness.cluster.create_job("trap '' TERM; echo ready; while :; do sleep 0.05; done")
        harness.until_logged(job_id, b"ready")
        harness.cluster.delete_job(job_id)
        os.kill(harness.supervisors(job_id)[0], signal.SIGKILL)
        assert harness.end(job_id).status is JobStatus.STOPPED

    def test_a_restarted_machine_loses_its_jobs(self, harness: LocalHarness) -> None:
        job_id = harness.cluster.create_job("echo $$; exec sleep 600")
        harness.until_logged(job_id, b"\n")
        record = harness.job_directory(job_id) / "record.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "boot": "another"}))
        for pid in harness.supervisors(job_id)[::-1]:  # the guard first, which leaves with its runner
            os.kill(pid, signal.SIGKILL)
        os.kill(int(harness.cluster.get_logs(job_id)), signal.SIGKILL)  # which a restart does
        info = harness.end(job_id)
        assert info.reason is TerminationReason.LOST
        assert "restarted" in info.message

    def test_a_recycled_process_id_is_nobodys_runner(self, harness: LocalHarness) -> None:
        job_id = harness.cluster.create_job("echo ready; sleep 600")
        harness.until_logged(job_id, b"ready")
        runner, guard = harness.supervisors(job_id)
        with _bystander() as bystander:
            _change_journal(harness.job_directory(job_id), pid=bystander.pid, guard=bystander.pid)
            harness.cluster.delete_job(job_id)
            with pytest.raises(WaitTimeoutError):
                harness.cluster.wait(job_id, 0.1)
            for pid in (guard, runner):
                os.kill(pid, signal.SIGKILL)
            assert harness.end(job_id).status.is_terminal, "the lock tells, whoever has the process id now"
            assert bystander.poll() is None, "a process that is not the job's was signalled"


class TestDisks:
    def test_a_read_only_state_directory(self, tmp_path: Path) -> None:
        run_in_mount_namespace(
            """
            import subprocess, sys, fray
            root = sys.argv[1]
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root], check=True)
            cluster = fray.connect(f"local:{root}/state")
            done = cluster.create_job("echo done", job_id="done")
            cluster.wait(done, 30)
            subprocess.run(["mount", "-o", "remount,ro", root], check=True)
            reader = fray.connect(f"local:{root}/state")
            assert [info.id for info in reader.list_jobs()] == ["done"]
            assert reader.get_logs("done") == "done\\n"
            assert reader.wait("done", 5).status == "SUCCEEDED"
            for call in (lambda: reader.create_job("true"), lambda: reader.purge_job("done")):
                try:
                    call()
                except fray.PlatformError as error:
                    assert "read-only" in str(error) and "local:/PATH" in str(error), error
                else:
                    raise AssertionError("accepted on a read-only disk")
            """,
            tmp_path,
        )

    def test_a_full_disk(self, tmp_path: Path) -> None:
        run_in_mount_namespace(
            """
            import os, subprocess, sys, fray
            root = sys.argv[1]
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", root], check=True)
            cluster = fray.connect(f"local:{root}/state", grace_seconds=1)
            ending, stopped = [
                cluster.create_job(f"echo ready; while ! [ -e /proc/self/root{root}/go ]; do sleep 0.02; done; "
                                   "head -c 100000 /dev/zero; exit 7"),
                cluster.create_job("echo ready; sleep 600"),
            ]
            for job in (ending, stopped):
                assert next(cluster.stream_logs(job)) == "ready"
            open(f"{root}/go.later", "w").close()
            with open(f"{root}/filler", "wb", buffering=0) as filler:
                size = 65536
                while size:
                    try:
                        if not filler.write(b"x" * size): size //= 2
                    except OSError:
                        size //= 2
            before = sorted(os.listdir(f"{root}/state/jobs")), sorted(os.listdir(f"{root}/state/index"))
            try:
                cluster.create_job("true")
            except fray.PlatformError as error:
                assert "No space left" in str(error) and "purge" in str(error), error
            else:
                raise AssertionError("accepted on a full disk")
            assert before == (sorted(os.listdir(f"{root}/state/jobs")), sorted(os.listdir(f"{root}/state/index")))
            os.rename(f"{root}/go.later", f"{root}/go")
            info = cluster.wait(ending, 30)
            assert (info.status, info.exit_code) == ("FAILED", 7), info
            assert "the log lacks" in info.message, info
            cluster.delete_job(stopped)
            assert cluster.wait(stopped, 30).status == "STOPPED"
            assert len(fray.connect(f"local:{root}/state").list_jobs()) == 2
            os.unlink(f"{root}/filler")
            assert cluster.wait(cluster.create_job("true"), 30).status == "SUCCEEDED"
            """,
            tmp_path,
        )

    @pytest.mark.parametrize(
        "damage",
        ["record garbage", "record missing", "record of another", "journal garbage", "journal missing", "log missing",
         "lock missing", "directory empty"],
    )  # fmt: skip
    def test_files_changed_by_hand_break_no_other_job(self, harness: LocalHarness, damage: str) -> None:
        good, bad = harness.run("echo good").id, harness.run("echo bad", job_id="bad").id
        directory = harness.job_directory(bad)
        what, _, how = damage.partition(" ")
        target = directory / {"record": "record.json"}.get(what, what)
        if how == "garbage":
            target.write_bytes(b"\xff{not json\n" * 3)
        elif how == "missing":
            target.unlink()
        elif how == "of another":
            target.write_bytes((harness.job_directory(good) / "record.json").read_bytes())
        else:
            for path in directory.iterdir():
                path.rmdir() if path.is_dir() else path.unlink()
        cluster = harness.connect()
        assert {info.id for info in cluster.list_jobs()} == {good, bad}
        assert cluster.get_job(good).status is JobStatus.SUCCEEDED
        # Its supervisors have recorded the end and may still be leaving.
        harness.until(lambda: cluster.get_job(bad).status.is_terminal, "the lock to be free")
        info = cluster.get_job(bad)
        if what in ("record", "journal", "directory"):
            assert info.reason is TerminationReason.LOST
            assert "damaged" in info.message
        assert isinstance(cluster.read_logs(bad), bytes)
        cluster.delete_job(bad)
        cluster.purge_job(bad)
        assert {info.id for info in cluster.list_jobs()} == {good}

    def test_a_running_job_whose_record_is_damaged_says_so(self, harness: LocalHarness) -> None:
        job_id = harness.cluster.create_job("echo ready; sleep 600")
        harness.until_logged(job_id, b"ready")
        record = harness.job_directory(job_id) / "record.json"
        whole = record.read_text()
        record.write_text(whole[: len(whole) // 2])
        info = harness.cluster.get_job(job_id)
        assert info.status is JobStatus.RUNNING
        assert "damaged" in info.message
        with pytest.raises(fray.PlatformError, match="damaged"):
            harness.cluster.delete_job(job_id)
        record.write_text(whole)
        harness.cluster.delete_job(job_id)
        assert harness.end(job_id).status is JobStatus.STOPPED


class TestVolume:
    def test_a_hundred_megabytes_of_output(self, harness: LocalHarness) -> None:
        info = harness.run("head -c 100000000 /dev/zero | tr '\\0' 'a'; echo; echo end")
        assert info.status is JobStatus.SUCCEEDED
        log = harness.job_directory(info.id) / "log"
        assert log.stat().st_size == 100_000_005
        assert harness.cluster.get_logs(info.id, tail=1) == "end\n"
        assert sum(len(chunk) for chunk in harness.cluster._read_logs(info.id, 0, True)) == 100_000_005

    def test_a_line_of_ten_megabytes(self, harness: LocalHarness) -> None:
        info = harness.run("head -c 10000000 /dev/zero | tr '\\0' 'a'; echo; echo end")
        assert [len(line) for line in harness.cluster.stream_logs(info.id)] == [10_000_000, 3]

    def test_the_tail_of_a_gigabyte_reads_no_gigabyte(self, harness: LocalHarness) -> None:
        job_id = harness.run("true").id
        with (harness.job_directory(job_id) / "log").open("r+b") as log:
            log.truncate(1 << 30)
            log.seek(0, os.SEEK_END)
            log.write(b"\n" + b"".join(b"line %d\n" % number for number in range(500)))

        def bytes_read() -> int:
            return int(Path("/proc/self/io").read_text().split()[1])

        before = bytes_read()
        assert list(harness.cluster.stream_logs(job_id, tail=100)) == [f"line {number}" for number in range(400, 500)]
        assert harness.cluster.get_logs(job_id, tail=2) == "line 498\nline 499\n"
        assert bytes_read() - before < 1 << 20

    def test_two_hundred_jobs_at_once_from_four_processes(self, harness: LocalHarness, tmp_path: Path) -> None:
        program = """
import sys
ids = [cluster.create_job(f"echo {number} >> {sys.argv[1] if len(sys.argv) > 1 else ''}$OUT") for number in range(50)]
infos = [cluster.wait(job_id, 120) for job_id in ids]
assert all(info.status == "SUCCEEDED" for info in infos), infos
print(*ids)
"""
        results: list[str] = []
        out = {"OUT": str(tmp_path / "ran")}
        harness.deadline_seconds = 120
        threads = [
            threading.Thread(target=lambda: results.append(harness.in_fresh_process(program, variables=out)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(150)
        ids = " ".join(results).split()
        assert len(set(ids)) == 200
        assert {info.id for info in harness.cluster.list_jobs()} == set(ids)
        assert len((tmp_path / "ran").read_text().split()) == 200

    def test_processes_that_race_for_an_id(self, harness: LocalHarness, tmp_path: Path) -> None:
        program = """
won = 0
for number in range(20):
    try:
        cluster.create_job(f"echo {number} >> $OUT", job_id=f"race-{number}")
        won += 1
    except fray.JobExistsError:
        pass
for number in range(20):
    cluster.wait(f"race-{number}", 60)
print(won)
"""
        wins: list[int] = []
        out = {"OUT": str(tmp_path / "ran")}
        threads = [
            threading.Thread(target=lambda: wins.append(int(harness.in_fresh_process(program, variables=out))))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert sum(wins) == 20
        assert sorted(int(word) for word in (tmp_path / "ran").read_text().split()) == list(range(20))

    def test_clients_leave_no_zombies(self, harness: LocalHarness) -> None:
        before = set(psutil.Process().children())
        for _ in range(10):
            harness.run("true")
        harness.cluster.close()

        def zombies() -> list[psutil.Process]:
            new = set(psutil.Process().children()) - before
            return [each for each in new if each.status() == psutil.STATUS_ZOMBIE]

        harness.until(lambda: not zombies() or harness.cluster.close(), "no zombies")


class TestClocks:
    def test_a_clock_behind_the_submission(self, harness: LocalHarness) -> None:
        behind = {"LD_PRELOAD": faketime_library(), "FAKETIME": "-1d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        job_id = harness.cluster.create_job("sleep 0.2; exit 2", RuntimeEnv(env=behind), max_retries=0)
        info = harness.end(job_id)
        assert info.exit_code == 2
        assert info.start_time is not None
        assert info.end_time is not None
        assert info.submission_time <= info.start_time <= info.end_time
        assert info.end_time - info.start_time >= 0.15, "durations are measured, not read off a clock that was set"
        assert info.end_time - info.submission_time < 3600

    def test_a_clock_stepped_back_before_a_loss_is_noticed(self, harness: LocalHarness) -> None:
        job_id = harness.cluster.create_job("echo ready; sleep 600")
        harness.until_logged(job_id, b"ready")
        for pid in harness.supervisors(job_id)[::-1]:
            os.kill(pid, signal.SIGKILL)
        behind = {"LD_PRELOAD": faketime_library(), "FAKETIME": "-1d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        harness.in_fresh_process(f"print(cluster.get_job({job_id!r}))", variables=behind)
        info = harness.cluster.get_job(job_id)
        assert info.reason is TerminationReason.LOST
        assert info.start_time is not None
        assert info.end_time is not None
        assert info.submission_time <= info.start_time <= info.end_time

    def test_jobs_submitted_before_and_after_a_step_are_all_listed(self, harness: LocalHarness) -> None:
        behind = {"LD_PRELOAD": faketime_library(), "FAKETIME": "-1d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        first = harness.run("true").id
        second = harness.in_fresh_process("print(cluster.create_job('true'))", variables=behind)
        harness.end(second)
        infos = harness.cluster.list_jobs()
        assert {info.id for info in infos} == {first, second}
        assert [info.submission_time for info in infos] == sorted((i.submission_time for i in infos), reverse=True)


class TestAdmission:
    def test_first_come_first_served(self, harness: LocalHarness, tmp_path: Path) -> None:
        order = tmp_path / "order"
        with harness.hold_pending():
            ids = []
            for number in range(5):
                cores = 2 if number == 0 else 1
                cores = min(cores, os.cpu_count() or 1)
                env = RuntimeEnv([], [Resource("CPU", cores)])
                ids.append(harness.cluster.create_job(f"echo {number} >> {order}; sleep 0.1", env))
            harness.until(lambda: harness.cluster.get_job(ids[-1]).message, "the last to wait")
            assert f"behind job {ids[0]}" in harness.cluster.get_job(ids[-1]).message
            assert not order.exists()
        for job_id in ids:
            assert harness.end(job_id).status is JobStatus.SUCCEEDED
        starts = [harness.cluster.get_job(job_id).start_time or 0 for job_id in ids]
        assert starts[0] == min(starts), "the first needs most, and is not overtaken"

    def test_a_dead_waiter_holds_nobody_up(self, harness: LocalHarness) -> None:
        with harness.hold_pending() as held:
            dead, alive = harness.cluster.create_job("true", held), harness.cluster.create_job("echo ran", held)
            harness.until(lambda: harness.cluster.get_job(dead).message, "the first to wait")
            os.kill(harness._outcome(dead).runner, signal.SIGKILL)
        assert harness.end(alive).status is JobStatus.SUCCEEDED
        assert harness.end(dead).reason is TerminationReason.LOST

    def test_a_lost_job_gives_back_what_it_had(self, harness: LocalHarness) -> None:
        cores = len(os.sched_getaffinity(0))
        everything = RuntimeEnv([], [Resource("CPU", cores)])
        first = harness.cluster.create_job("echo ready; sleep 600", everything)
        harness.until_logged(first, b"ready")
        second = harness.cluster.create_job("echo ran", everything)
        for pid in harness.supervisors(first)[::-1]:
            os.kill(pid, signal.SIGKILL)
        assert harness.end(second).status is JobStatus.SUCCEEDED

    def test_too_much_is_infeasible_and_says_what_there_is(self, harness: LocalHarness) -> None:
        wanted = [Resource("CPU", 100_000), Resource("memory", 2**60)]
        info = harness.run("true", RuntimeEnv([], wanted))
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.INFEASIBLE)
        assert "100000 CPU asked for, this machine has" in info.message
        assert "GiB of memory" in info.message
        assert info.attempts == ()

    def test_without_resources_a_job_starts_at_once(self, harness: LocalHarness) -> None:
        with harness.hold_pending():
            assert harness.run("true").status is JobStatus.SUCCEEDED


def test_a_store_is_private_to_its_user(harness: LocalHarness) -> None:
    old = os.umask(0)
    try:
        info = harness.run("umask; touch made-by-the-job", RuntimeEnv(env={"X": "1"}, working_dir=str(harness.root)))
    finally:
        os.umask(old)
    assert harness.cluster.get_logs(info.id) == "0000\n", "the job's own files follow the caller's umask"
    job = harness.job_directory(info.id)
    for path in (harness.root, *job.rglob("*"), job):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_path_that_would_split_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fray.UsageError, match="splits PATH"):
        SubprocessClusterContext(tmp_path / "a:b")


def test_a_taken_id_is_refused_while_the_other_is_still_being_staged(harness: LocalHarness) -> None:
    harness.cluster.create_job("sleep 0.2", job_id="taken")
    with pytest.raises(JobExistsError):
        harness.cluster.create_job("sleep 0.2", job_id="taken")
    harness.until(lambda: not list((harness.root / "staging").iterdir()), "nothing left in staging")
    assert time.time() - harness.end("taken").submission_time < 60


class TestTwoStores:
    def test_a_job_of_the_same_id_elsewhere_is_another_job(self, harness: LocalHarness, tmp_path: Path) -> None:
        other = fray.connect(f"local:{tmp_path}/other", grace_seconds=1)
        program = f"import fray; fray.connect({other.spec!r}).create_job('sleep 0.5; exit 9', job_id='same')"
        outer = harness.run(f'python -c "{program}"', job_id="same")
        assert outer.status is JobStatus.SUCCEEDED, harness.cluster.get_logs("same")
        assert other.wait("same", 60).exit_code == 9

    def test_what_a_command_starts_with_another_output_directory_is_its_own(self, harness: LocalHarness) -> None:
        up = harness.root / "up"
        child = f"echo $$; touch {up}; sleep 600"
        command = f"FRAY_OUTPUT_DIR=/elsewhere setsid sh -c '{child}' & while ! [ -e {up} ]; do sleep 0.05; done"
        info = harness.run(command)
        assert info.status is JobStatus.SUCCEEDED
        assert not _is_alive(int(harness.cluster.get_logs(info.id)))

    def test_a_purge_that_comes_late_takes_no_running_job(self, harness: LocalHarness) -> None:
        harness.run("true", job_id="reused")
        harness.cluster.purge_job("reused")
        harness.cluster.create_job("sleep 600", job_id="reused")
        with pytest.raises(fray.UsageError, match="not over"):
            harness.cluster._purge("reused")  # another client's, decided on before
        assert not harness.cluster.get_job("reused").status.is_terminal


class TestNames:
    def test_a_directory_whose_name_is_no_utf8(self, harness: LocalHarness, tmp_path: Path) -> None:
        directory = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")
        os.mkdir(directory)
        info = harness.run("pwd", RuntimeEnv(working_dir=directory))
        assert info.status is JobStatus.SUCCEEDED, info
        assert harness.cluster.read_logs(info.id) == os.fsencode(directory) + b"\n"

    def test_a_python_named_without_its_directory(self, harness: LocalHarness) -> None:
        cluster = fray.connect(harness.spec, **{**harness.options, "python": "python3"})
        job_id = cluster.create_job("python -c 'print(1)'")
        assert harness.end(job_id).status is JobStatus.SUCCEEDED, cluster.get_logs(job_id)

    @pytest.mark.parametrize("grace", [-1, float("nan"), "3"])
    def test_a_grace_that_cannot_be_is_refused(self, harness: LocalHarness, grace: object) -> None:
        with pytest.raises(fray.UsageError, match="grace_seconds"):
            fray.connect(harness.spec, grace_seconds=grace)

    def test_the_address_can_be_an_option(self, tmp_path: Path) -> None:
        assert fray.connect("local", address=tmp_path / "s").spec == f"local:{tmp_path}/s"
        with pytest.raises(fray.UsageError, match="twice"):
            fray.connect(f"local:{tmp_path}/s", address=tmp_path)


def test_a_long_queue_leaves_room_for_the_end(harness: LocalHarness) -> None:
    with harness.hold_pending() as held:
        ids = [harness.cluster.create_job("true", held) for _ in range(12)]
        harness.until(lambda: "behind" in harness.cluster.get_job(ids[-1]).message, "the last to wait")
        for job_id in ids[:-1]:
            harness.cluster.delete_job(job_id)
            harness.end(job_id)
    assert harness.end(ids[-1]).status is JobStatus.SUCCEEDED
    journal = (harness.job_directory(ids[-1]) / "journal").read_bytes()
    assert journal.count(b'"pending"') == 1, "what it waited for is written over, not added"
