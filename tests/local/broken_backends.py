"""The local backend, broken on purpose: each class breaks one thing, and names the check that must see it.

`BROKEN` is the table, check to breakage; test_suite_catches.py runs it. Fresh processes and nested jobs load these
classes by their entry points, so that nothing here may need pytest.
"""

from __future__ import annotations

import json
import os
import py_compile
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from fray.backend.local import SubprocessClusterContext
from fray.backend.local._launch import _compiled_runner
from fray.backend.local._store import Store
from fray.cluster import Capabilities, ClusterContext, JobPlan, JobRequest
from fray.errors import JobExistsError, JobNotFoundError, SubmissionError, WaitTimeoutError
from fray.supervision import read_journal, runner_source
from fray.types import JobInfo, JobStatus, Resource, TerminationReason


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    parameters: dict[str, Any]
    broken: type[Local]
    bare_python: bool


BROKEN: list[Row] = []


def caught_by(check: str, *, bare_python: bool = False, **parameters: Any) -> Callable[[type[Local]], type[Local]]:
    """Enter a class into the table.

    Args:
        check: The check that catches it.
        bare_python: Whether the jobs' Python is one in which Fray is not installed.
        parameters: Which case of a parametrised check does; some of its arguments suffice.
    """

    def register(broken: type[Local]) -> type[Local]:
        BROKEN.append(Row(check, parameters, broken, bare_python))
        return broken

    return register


class Local(SubprocessClusterContext):
    """The sound backend under the name of its class, with places where a subclass can go wrong."""

    runner_edits: ClassVar[dict[str, str]] = {}

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.runner_edits:
            source = runner_source().read_text()
            for old, new in self.runner_edits.items():
                if old not in source:  # and no AssertionError, which would pass for a catch
                    raise LookupError(f"the runner has changed: {old!r} is not in it")
                source = source.replace(old, new)
            edited = self._store.paths.runners / f"edited-{os.getpid()}.py"
            edited.write_text(source)
            # In the place of the sound one, of which every store has a compiled copy of its own.
            py_compile.compile(str(edited), _compiled_runner(self._store.paths.runners), doraise=True)

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__

    def _asked(self, request: JobRequest) -> JobRequest:
        """What is made of a request."""
        return request

    def _begun_with(self, request: JobRequest, commands: str) -> JobRequest:
        """A request whose command finds what some other commands did to its environment."""
        return replace(request, entrypoint=f"{commands}\n{request.entrypoint}")

    def _told(self, info: JobInfo) -> JobInfo:
        """What is made of a record."""
        return info

    def _plan(self, request):
        return super()._plan(self._asked(request))

    def _get(self, job_id):
        return self._told(super()._get(job_id))

    def _list(self, status, limit):
        return [self._told(info) for info in super()._list(status, limit)]

    def _wait(self, job_id, deadline):
        return self._told(super()._wait(job_id, deadline))


class Sound(Local):
    """The control: nothing is broken."""


# 1: acceptance


@caught_by("test_an_accepted_job_has_the_id_that_was_returned")
class LetsTheEngineNameTheJob(Local):
    def _submit(self, plan):
        super()._submit(replace(plan, request=replace(plan.request, job_id=f"{plan.request.job_id}-0001")))


@caught_by("test_an_accepted_job_is_seen_by_others_at_once")
class AcceptsInTheBackground(Local):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._threads: list[threading.Thread] = []

    def _submit(self, plan):
        self._threads.append(threading.Timer(0.2, super()._submit, (plan,)))
        self._threads[-1].start()

    def close(self):
        for thread in self._threads:
            thread.join()
        super().close()


@caught_by("test_what_the_caller_changes_after_submitting_changes_nothing")
class KeepsTheQueueInTheClient(Local):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._queue: list[JobPlan] = []

    def _submit(self, plan):
        if plan.request.env.minimum_resources == [Resource("CPU", 1)]:
            self._queue.append(plan)
        else:
            super()._submit(plan)

    def _wait(self, job_id, deadline):
        for plan in self._queue:
            super()._submit(plan)
        self._queue.clear()
        return super()._wait(job_id, deadline)


@caught_by("test_a_failed_set_up_is_the_jobs_failure")
class RaisesOnAFailedSetUp(Local):
    def _submit(self, plan):
        super()._submit(plan)
        if plan.request.env.package_requirements:
            info = self._wait(plan.request.job_id, time.monotonic() + 60)
            if info.reason is TerminationReason.SETUP_FAILED:
                raise SubmissionError(info.message)


@caught_by("test_a_failed_set_up_is_the_jobs_failure")
class KeepsTheSetUpsOutputToItself(Local):
    def _read_logs(self, job_id, offset, follow):
        if self._get(job_id).reason is not TerminationReason.SETUP_FAILED:
            yield from super()._read_logs(job_id, offset, follow)


@caught_by("test_planning_has_no_effect")
class SubmitsWhatItPlans(Local):
    def _plan(self, request):
        plan = super()._plan(request)
        super()._submit(plan)
        return plan

    def _submit(self, plan):
        pass


# 2: what a command does is the job's outcome


@caught_by("test_the_exit_code_is_the_commands", code=3)
class KnowsTwoExitCodes(Local):
    def _told(self, info):
        return replace(info, exit_code=1) if info.exit_code else info


@caught_by("test_the_exit_code_is_the_commands", code=1)
class CallsAnyEndASuccess(Local):
    def _told(self, info):
        return replace(info, status=JobStatus.SUCCEEDED, reason=None) if info.status.is_terminal else info


@caught_by("test_a_missing_command_is_a_failed_job")
class LooksForTheCommandFirst(Local):
    def _plan(self, request):
        program = shlex.split(request.entrypoint)[0]
        if shutil.which(program) is None:
            raise SubmissionError(f"there is no {program}")
        return super()._plan(request)


@caught_by("test_a_signal_is_told_from_an_exit", name="KILL")
class CallsASignalAnExit(Local):
    def _told(self, info):
        return replace(info, reason=TerminationReason.EXITED) if info.reason is TerminationReason.KILLED else info


@caught_by("test_the_command_reaches_the_shell_unchanged", output="one\ntwo\nthree\n")
@caught_by("test_the_command_reaches_the_shell_unchanged", output="$HOME|tick|%d|*|")
class SplitsTheCommand(Local):
    def _submit(self, plan):
        words = shlex.join(shlex.split(plan.request.entrypoint))
        super()._submit(replace(plan, request=replace(plan.request, entrypoint=words)))


@caught_by("test_the_command_reaches_the_shell_unchanged", output="10\n")
@caught_by("test_the_command_reaches_the_shell_unchanged", output="  $not expanded\n")
class QuotesTheCommandOnceMore(Local):
    def _asked(self, request):
        return replace(request, entrypoint=f'sh -c "{request.entrypoint}"')


@caught_by("test_the_command_reaches_the_shell_unchanged", output="dash\n")
class LetsTheCommandBeAnOption(Local):
    runner_edits: ClassVar = {'"-c", "--", ': '"-c", '}


# 3: the end is final


@caught_by("test_nothing_changes_a_finished_job")
class RewritesTheEndOnDelete(Local):
    def _stop(self, job_id):
        self._store.paths.job(job_id).outputs.joinpath("deleted").touch()
        super()._stop(job_id)

    def _told(self, info):
        if not self._store.paths.job(info.id).outputs.joinpath("deleted").exists():
            return info
        return replace(info, status=JobStatus.STOPPED, reason=TerminationReason.STOPPED_BY_USER)


@caught_by("test_nothing_changes_a_finished_job")
class TakesTheLookForTheEnd(Local):
    def _told(self, info):
        return replace(info, end_time=time.time()) if info.status.is_terminal else info


@caught_by("test_times_are_in_order_and_real")
class CountsMilliseconds(Local):
    def _told(self, info):
        times = ("submission_time", "start_time", "end_time")
        return replace(info, **{name: info[name] and info[name] * 1000 for name in times})


@caught_by("test_times_are_in_order_and_real")
class StartsTheClockAtTheSubmission(Local):
    def _told(self, info):
        return replace(info, start_time=info.submission_time)


@caught_by("test_a_job_is_not_over_before_its_processes_are")
class EndsWithTheShell(Local):
    def _told(self, info):
        with suppress(JobNotFoundError):
            exited = read_journal(self._store.paths.job(info.id).journal.read_bytes()).last_exit
            if exited and not info.status.is_terminal:
                status = exited.reason.status if exited.reason else JobStatus.SUCCEEDED
                end = {"exit_code": exited.exit_code, "reason": exited.reason, "end_time": exited.time}
                return replace(info, status=status, **end)
        return info

    def _wait(self, job_id, deadline):
        return ClusterContext._wait(self, job_id, deadline)


# 4: stopping


@caught_by("test_a_deleted_job_is_stopped_and_keeps_its_record")
class CallsAStopAFailure(Local):
    def _told(self, info):
        if info.status is not JobStatus.STOPPED:
            return info
        return replace(info, status=JobStatus.FAILED, reason=TerminationReason.KILLED)


@caught_by("test_a_deleted_job_is_stopped_and_keeps_its_record")
class ForgetsDeletedJobs(Local):
    def _told(self, info):
        if info.status is JobStatus.STOPPED:
            raise JobNotFoundError(f"there is no job {info.id!r}")
        return info


@caught_by("test_a_deleted_job_is_stopped_and_keeps_its_record")
class KillsWithoutAWord(Local):
    runner_edits: ClassVar = {"self.tree.signal(signal.SIGTERM)": "self.tree.signal(signal.SIGKILL)"}


@caught_by("test_the_whole_tree_dies_with_its_job")
class KillsTheProcessGroupOnly(Local):
    runner_edits: ClassVar = {
        "self.tree.signal(": "send(-self.tree.group, ",
        "self.tree.is_gone()": "True",
    }


@caught_by("test_the_whole_tree_dies_with_its_job")
class WaitsForTheDeath(Local):
    def _stop(self, job_id):
        super()._stop(job_id)
        super()._wait(job_id, time.monotonic() + 60)


@caught_by("test_the_shells_death_does_not_cut_the_others_grace_short")
class KillsTheRestWhenTheShellIsDead(Local):
    runner_edits: ClassVar = {"elif now >= kill_at:": "elif now >= kill_at or status is not None:"}


@caught_by("test_a_deleted_pending_job_never_runs")
class StopsOnlyWhatRuns(Local):
    def _stop(self, job_id):
        if super()._get(job_id).status is not JobStatus.PENDING:
            super()._stop(job_id)


@caught_by("test_a_deleted_pending_job_never_runs")
class GivesAStartToWhatNeverRan(Local):
    def _told(self, info):
        if info.status is JobStatus.STOPPED and info.start_time is None:
            return replace(info, start_time=info.end_time)
        return info


@caught_by("test_a_job_deleted_at_once_is_stopped")
class RefusesASecondStop(Local):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._stopped: set[str] = set()

    def _stop(self, job_id):
        if job_id in self._stopped:
            raise SubmissionError(f"job {job_id} is being stopped already")
        self._stopped.add(job_id)
        super()._stop(job_id)


@caught_by("test_an_unknown_job_is_not_found")
class DeletesWhatIsNotThere(Local):
    def _stop(self, job_id):
        with suppress(JobNotFoundError):
            super()._stop(job_id)


@caught_by("test_an_unknown_job_is_not_found")
class HasAnEmptyLogForEveryId(Local):
    def _read_logs(self, job_id, offset, follow):
        with suppress(JobNotFoundError):
            yield from super()._read_logs(job_id, offset, follow)


# 5: logs


@caught_by("test_the_log_is_the_exact_output")
class KeepsTextOnly(Local):
    def _read_logs(self, job_id, offset, follow):
        for chunk in super()._read_logs(job_id, offset, follow):
            yield chunk.decode(errors="replace").encode()


@caught_by("test_the_log_is_the_exact_output")
class TurnsNewlinesIntoItsOwn(Local):
    def _read_logs(self, job_id, offset, follow):
        for chunk in super()._read_logs(job_id, offset, follow):
            yield chunk.replace(b"\r\n", b"\n")


@caught_by("test_stdout_and_stderr_are_one_stream_in_order")
class PutsErrorsLast(Local):
    def _asked(self, request):
        errors = '"$FRAY_OUTPUT_DIR/errors"'
        command = f"sh -c {shlex.quote(request.entrypoint)} 2>{errors}; code=$?; cat {errors}; exit $code"
        return replace(request, entrypoint=command)


@caught_by("test_stdout_and_stderr_are_one_stream_in_order")
class BeginsWithABanner(Local):
    def _asked(self, request):
        return replace(request, entrypoint=f"echo starting job {request.job_id}; {request.entrypoint}")


@caught_by("test_reopening_stderr_loses_nothing")
class OpensTheLogWithoutAppending(Local):
    def _asked(self, request):
        log = '"$FRAY_OUTPUT_DIR/log"'
        command = f"sh -c {shlex.quote(request.entrypoint)} >{log} 2>&1; code=$?; cat {log}; exit $code"
        return replace(request, entrypoint=command)


@caught_by("test_lines_are_whole_and_the_last_needs_no_newline")
class SplitsAtCarriageReturns(Local):
    def _lines(self, job_id, offset, follow):
        for line in super()._lines(job_id, offset, follow):
            yield from line.splitlines() or [""]


@caught_by("test_lines_are_whole_and_the_last_needs_no_newline")
class WaitsForTheLastNewline(Local):
    def _read_logs(self, job_id, offset, follow):
        log = b"".join(super()._read_logs(job_id, offset, follow))
        yield log[: log.rfind(b"\n") + 1]


@caught_by("test_lines_are_whole_and_the_last_needs_no_newline")
class FollowsForEver(Local):
    def _read_logs(self, job_id, offset, follow):
        yield from super()._read_logs(job_id, offset, follow)
        while follow and self._store.paths.job(job_id).directory.exists():
            time.sleep(0.05)


@caught_by("test_a_followed_log_comes_live_and_to_its_last_byte")
class ShowsTheLogAtTheEnd(Local):
    def _read_logs(self, job_id, offset, follow):
        if follow:
            super()._wait(job_id, None)
        yield from super()._read_logs(job_id, offset, follow)


@caught_by("test_a_followed_log_comes_live_and_to_its_last_byte")
class EndsTheStreamEarly(Local):
    def _read_logs(self, job_id, offset, follow):
        while follow and not self._get(job_id).status.is_terminal and self._log_size(job_id) <= offset:
            time.sleep(0.02)
        yield from super()._read_logs(job_id, offset, False)


@caught_by("test_a_followed_log_survives_its_engine")
class BeginsAgainAfterAnInterruption(Local):
    def _read_logs(self, job_id, offset, follow):
        for number, chunk in enumerate(super()._read_logs(job_id, offset, follow)):
            yield chunk
            if number == 2:
                break
        else:
            return
        yield from super()._read_logs(job_id, 0, follow)


@caught_by("test_a_very_long_line_is_one_line")
class TakesAChunkForLines(Local):
    def _lines(self, job_id, offset, follow):
        for chunk in self._chunks(job_id, offset, follow):
            yield from chunk.decode(errors="replace").splitlines()


@caught_by("test_a_large_log_is_whole")
class KeepsTheLastMegabyte(Local):
    def _read_logs(self, job_id, offset, follow):
        yield from super()._read_logs(job_id, max(offset, self._log_size(job_id) - 2**20), follow)


# 6: waiting


@caught_by("test_a_wait_ends_with_the_job_or_with_its_own_time")
class ReturnsAtItsTimeout(Local):
    def wait(self, job_id, timeout=None, *, check=False):
        with suppress(WaitTimeoutError):
            return super().wait(job_id, timeout, check=check)
        return self.get_job(job_id)


@caught_by("test_a_wait_ends_with_the_job_or_with_its_own_time")
class WaitsWithoutATimeout(Local):
    def _wait(self, job_id, deadline):
        return super()._wait(job_id, None)


@caught_by("test_a_wait_ends_with_the_job_or_with_its_own_time")
class RaisesSomeTimeout(Local):
    def wait(self, job_id, timeout=None, *, check=False):
        try:
            return super().wait(job_id, timeout, check=check)
        except WaitTimeoutError as error:
            raise TimeoutError(str(error)) from None


@caught_by("test_a_wait_ends_with_the_job_or_with_its_own_time")
class StopsWhatIsWaitedForTooLong(Local):
    def _wait(self, job_id, deadline):
        info = super()._wait(job_id, deadline)
        if not info.status.is_terminal:
            self._stop(job_id)
        return info


@caught_by("test_a_wait_returns_the_final_record")
class DoesNotCheck(Local):
    def wait(self, job_id, timeout=None, *, check=False):
        return super().wait(job_id, timeout)


@caught_by("test_a_wait_returns_the_final_record")
class ReturnsAnEarlierRecord(Local):
    def _wait(self, job_id, deadline):
        return replace(super()._wait(job_id, deadline), end_time=None)


@caught_by("test_many_wait_for_one")
class WakesOneWaiter(Local):
    woken: ClassVar[set[str]] = set()

    def _wait(self, job_id, deadline):
        info = super()._wait(job_id, deadline)
        if job_id not in self.woken:
            self.woken.add(job_id)
            return info
        return replace(info, status=JobStatus.RUNNING)


# 7: jobs outlive clients


@caught_by("test_a_job_outlives_the_client_that_made_it")
class DiesWithItsClient(Local):
    def _asked(self, request):
        watch = f"while kill -0 {os.getpid()} 2>/dev/null; do sleep 0.02; done; kill -KILL $$"
        return replace(request, entrypoint=f"({watch}) & {request.entrypoint}")


@caught_by("test_any_process_can_do_all_to_a_job")
class ListsItsOwnJobsOnly(Local):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._own: set[str] = set()

    def _submit(self, plan):
        self._own.add(plan.request.job_id)
        super()._submit(plan)

    def _list(self, status, limit):
        return [info for info in super()._list(status, limit) if info.id in self._own]


@caught_by("test_jobs_are_listed_newest_first")
class ListsTheOldestFirst(Local):
    def _list(self, status, limit):
        return super()._list(status, limit)[::-1]


@caught_by("test_jobs_are_listed_newest_first")
class LimitsBeforeItFilters(Local):
    def _list(self, status, limit):
        return [info for info in super()._list(None, limit) if status in (None, info.status)]


@caught_by("test_what_the_caller_attached_stays_with_the_job")
class LosesMetadata(Local):
    def _asked(self, request):
        return replace(request, metadata={})


@caught_by("test_a_purged_job_leaves_nothing")
class KeepsTheLogsOfPurgedJobs(Local):
    def _purge(self, job_id):
        shutil.copy(self._store.paths.job(job_id).log, self._store.paths.root / f"{job_id}.old")
        super()._purge(job_id)


@caught_by("test_a_purged_job_leaves_nothing")
class PurgesWhatStillRuns(Local):
    def purge_job(self, job_id):
        self.delete_job(job_id)
        self.wait(job_id)
        self._purge(job_id)


# 8: lost jobs


@caught_by("test_a_job_whose_supervision_dies_is_lost")
class BelievesTheLastWord(Local):
    def _told(self, info):
        if info.reason is not TerminationReason.LOST:
            return info
        return replace(info, status=JobStatus.RUNNING, reason=None, end_time=None)


class StoreThatKillsNothing(Store):
    def _settle(self, paths, record):
        outcome = read_journal(paths.journal.read_bytes())
        lost = {"status": JobStatus.FAILED, "reason": TerminationReason.LOST, "message": "its runner is gone"}
        return replace(outcome, end_time=outcome.start_time, **lost)


@caught_by("test_a_job_whose_supervision_dies_is_lost")
class LetsTheRestOfALostJobRunOn(Local):
    runner_edits: ClassVar = {"while status and not tree.is_gone():": "while False:"}

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._store = StoreThatKillsNothing(self._store.paths.root)


# 9: one job for one id


@caught_by("test_an_id_is_used_once")
class ReplacesTheJobOfTheSameId(Local):
    def _submit(self, plan):
        with suppress(JobNotFoundError):
            self._stop(plan.request.job_id)
            super()._wait(plan.request.job_id, None)
            self._purge(plan.request.job_id)
        super()._submit(plan)


@caught_by("test_the_same_request_is_adopted_in_any_state")
class AdoptsWithoutComparing(Local):
    def create_job(self, entrypoint, env=None, *, job_id=None, if_exists="error", **options):
        try:
            return super().create_job(entrypoint, env, job_id=job_id, if_exists=if_exists, **options)
        except JobExistsError:
            if if_exists != "adopt":
                raise
            return job_id


@caught_by("test_the_same_request_is_adopted_in_any_state")
class AdoptsOnlyWhatStillRuns(Local):
    def _fingerprint(self, job_id):
        return "" if self._get(job_id).status.is_terminal else super()._fingerprint(job_id)


@caught_by("test_the_same_request_is_adopted_in_any_state")
class ComparesTheSecrets(Local):
    def _fingerprint(self, job_id):
        known = json.loads((self._store.paths.root / f"{job_id}.secrets").read_text())
        return super()._fingerprint(job_id) if known == self._secrets else ""

    def _submit(self, plan):
        self._secrets = dict(plan.request.env.secrets)
        super()._submit(plan)
        (self._store.paths.root / f"{plan.request.job_id}.secrets").write_text(json.dumps(self._secrets))


@caught_by("test_of_racing_clients_one_wins")
class LooksBeforeItSubmits(Local):
    def _submit(self, plan):
        if self._store.paths.job(plan.request.job_id).directory.exists():
            raise JobExistsError(plan.request.job_id)
        with suppress(JobExistsError):
            super()._submit(plan)


# 10: the job's environment


@caught_by("test_a_job_sees_its_variables")
class LosesEmptyVariables(Local):
    def _asked(self, request):
        kept = {name: value for name, value in request.env.env.items() if value}
        return replace(request, env=replace(request.env, env=kept))


@caught_by("test_a_job_sees_its_variables")
class DoesNotCountAttempts(Local):
    def _asked(self, request):
        return self._begun_with(request, "unset FRAY_ATTEMPT")


@caught_by("test_a_job_sees_its_variables")
class WritesVariablesWithoutQuotes(Local):
    def _asked(self, request):
        exports = [f'export {name}="{value}"' for name, value in request.env.env.items()]
        return self._begun_with(request, "\n".join(exports))


@caught_by("test_a_job_sees_frays_own_variables")
class NamesNoJobContext(Local):
    def _asked(self, request):
        return self._begun_with(request, "unset FRAY_JOB_CONTEXT")


@caught_by("test_a_job_sees_frays_own_variables")
class NamesNoCluster(Local):
    def _asked(self, request):
        return self._begun_with(request, "unset FRAY_CLUSTER")


@caught_by("test_an_enclosing_jobs_variables_are_replaced")
class HandsOnTheOuterJobsVariables(Local):
    def _asked(self, request):
        outer = [f"{name}={shlex.quote(value)}" for name, value in os.environ.items() if name.startswith("FRAY_")]
        return self._begun_with(request, f"export {' '.join(outer)}")


@caught_by("test_a_job_reaches_its_cluster_or_is_told_why_not")
class NamesAnotherCluster(Local):
    def _asked(self, request):
        return self._begun_with(request, 'export FRAY_CLUSTER="$FRAY_CLUSTER/elsewhere"')


@caught_by("test_a_nested_job_outlives_the_job_that_made_it")
class TakesNestedJobsAlong(Local):
    runner_edits: ClassVar = {'read_file("/proc/%d/environ" % pid)': 'b""'}


# 11: secrets


@caught_by("test_a_secret_is_seen_by_the_job_alone")
class StoresSecrets(Local):
    def _submit(self, plan):
        super()._submit(plan)
        place = self._store.paths.job(plan.request.job_id).directory / "secrets.json"
        place.write_text(json.dumps(plan.request.env.secrets))


@caught_by("test_a_secret_is_seen_by_the_job_alone")
class ShowsSecretsInThePlan(Local):
    def _plan(self, request):
        plan = super()._plan(request)
        return replace(plan, native={**plan.native, "variables": {**request.env.env, **request.env.secrets}})


@caught_by("test_a_secret_is_seen_by_the_job_alone")
class HandsSecretsOverAsArguments(Local):
    def _asked(self, request):
        pairs = " ".join(f"{name}={shlex.quote(value)}" for name, value in request.env.secrets.items())
        return replace(request, entrypoint=f"env {pairs} sh -c {shlex.quote(request.entrypoint)}")


@caught_by("test_a_failing_job_tells_no_secret")
class TellsTheEnvironmentOfWhatFailed(Local):
    def _submit(self, plan):
        self._variables = {**plan.request.env.env, **plan.request.env.secrets}
        super()._submit(plan)

    def _told(self, info):
        if info.status is not JobStatus.FAILED:
            return info
        return replace(info, message=f"{info.message}; its environment: {self._variables}")


# 12: packages


@caught_by("test_packages_are_importable_in_their_job_alone")
class IgnoresPackages(Local):
    def _asked(self, request):
        return replace(request, env=replace(request.env, package_requirements=[]))


@caught_by("test_packages_are_importable_in_their_job_alone")
class GivesAllJobsTheSamePackages(Local):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._installed: set[str] = set()

    def _asked(self, request):
        self._installed.update(request.env.package_requirements)
        return replace(request, env=replace(request.env, package_requirements=sorted(self._installed)))


@caught_by("test_packages_are_importable_in_their_job_alone")
class InstallsForEachJobAnew(Local):
    def _plan(self, request):
        self._cache = self._store.paths.root / "environments" / request.job_id
        return super()._plan(request)


# 13: the working directory


@caught_by("test_the_command_runs_in_the_working_directory")
class IgnoresTheWorkingDirectory(Local):
    def _asked(self, request):
        return replace(request, directory=Path.cwd())


@caught_by("test_the_command_runs_in_the_working_directory")
class MakesAMissingDirectory(Local):
    def plan_job(self, entrypoint, env=None, **options):
        if env and env.working_dir:
            os.makedirs(env.working_dir, exist_ok=True)
        return super().plan_job(entrypoint, env, **options)


@caught_by("test_the_directorys_content_is_what_the_rule_says")
class RunsInACopy(Local):
    def _asked(self, request):
        copy = self._store.paths.root / "copies" / request.job_id
        if request.env.working_dir:
            shutil.copytree(request.directory, copy, dirs_exist_ok=True)
            return replace(request, directory=copy)
        return request


# 14: honoured or refused


@caught_by("test_retries_are_the_jobs_own")
class DropsRetries(Local):
    def _asked(self, request):
        return replace(request, max_retries=0)


class HasNothing(Local):
    capabilities = Capabilities()

    def _check_capabilities(self, request):
        pass


@caught_by("test_retries_are_the_jobs_own")
class IgnoresRetriesThatItDoesNotHave(HasNothing):
    pass


@caught_by("test_what_cannot_succeed_is_not_retried", command="exit 126")
class RetriesEverything(Local):
    runner_edits: ClassVar = {
        "exit_code not in (126, 127)": "True",
        "attempt, delay = 0, self.options.retry_delay": "attempt, delay = 0, 0.01",
    }


@caught_by("test_a_time_limit_ends_the_job")
class DropsTheTimeLimit(Local):
    def _asked(self, request):
        return replace(request, timeout_seconds=None)


@caught_by("test_a_time_limit_ends_the_job")
class CallsTheTimeLimitAStop(Local):
    def _told(self, info):
        if info.reason is not TerminationReason.TIMED_OUT:
            return info
        return replace(info, status=JobStatus.STOPPED, reason=TerminationReason.STOPPED_BY_USER)


@caught_by("test_outputs_come_back")
class FlattensOutputs(Local):
    def _fetch_outputs(self, job_id, destination):
        source = self._store.paths.job(job_id).outputs
        destination.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(file, destination)) for file in source.rglob("*") if file.is_file()]


@caught_by("test_outputs_come_back")
class PromisesOutputsThatItDoesNotHave(HasNothing):
    def fetch_outputs(self, job_id, destination):
        return []


@caught_by("test_options_are_honoured_or_refused")
class TakesAnyOption(Local):
    def _check_capabilities(self, request):
        pass


@caught_by("test_options_are_honoured_or_refused")
class RefusesOnlyWhenItSubmits(Local):
    def _check_capabilities(self, request):
        pass

    def _submit(self, plan):
        super()._check_capabilities(plan.request)
        super()._submit(plan)


@caught_by("test_an_unknown_resource_is_refused")
class TakesAnyResource(Local):
    def _asked(self, request):
        known = [resource for resource in request.env.minimum_resources if resource.name in ("CPU", "memory", "GPU")]
        return replace(request, env=replace(request.env, minimum_resources=known))


@caught_by("test_a_pending_job_says_what_it_waits_for")
class DoesNotSayWhyItIsPending(Local):
    def _told(self, info):
        return replace(info, message="")


@caught_by("test_bad_input_is_refused_before_anything_happens", arguments={"timeout_seconds": 0})
class TakesNoTimeForNoLimit(Local):
    def plan_job(self, entrypoint, env=None, *, timeout_seconds=None, **options):
        return super().plan_job(entrypoint, env, timeout_seconds=timeout_seconds or None, **options)


@caught_by("test_bad_input_is_refused_before_anything_happens", arguments={"job_id": "a/b"})
class MendsJobIds(Local):
    def plan_job(self, entrypoint, env=None, *, job_id=None, **options):
        return super().plan_job(entrypoint, env, job_id=job_id and job_id.replace("/", "-"), **options)


@caught_by("test_bad_input_is_refused_before_anything_happens", arguments={"entrypoint": ["echo", "hi"]})
class TakesLists(Local):
    def plan_job(self, entrypoint, env=None, **options):
        command = shlex.join(entrypoint) if isinstance(entrypoint, list) else entrypoint
        return super().plan_job(command, env, **options)


# 15: Fray in the job


# Before the command sees it, the part of Fray that came with the job (first on its path) makes way for a copy.
COPY_FRAY = """
copy="$FRAY_OUTPUT_DIR/fray"
cp -R "${PYTHONPATH%%:*}" "$copy"
export PYTHONPATH="$copy:${PYTHONPATH#*:}"
"""


@caught_by("test_a_job_has_its_context", bare_python=True)
class LeavesFrayBehind(Local):
    def _asked(self, request):
        return self._begun_with(request, 'export PYTHONPATH="${PYTHONPATH#*:}"')


@caught_by("test_a_job_has_its_context", bare_python=True)
class ShipsNoDistInfo(Local):
    def _asked(self, request):
        return self._begun_with(request, f'{COPY_FRAY}rm -R "$copy"/*.dist-info')


@caught_by("test_a_job_has_its_context")
class ShipsAnotherVersionOfFray(Local):
    def _asked(self, request):
        return self._begun_with(request, f"{COPY_FRAY}sed -i 's/^Version: .*/Version: 0.0.1/' \"$copy\"/*/METADATA")


def write_distribution(directory: Path) -> None:
    """Write the metadata of an installed distribution whose entry points are the classes of this module."""
    classes = [Sound, *(row.broken for row in BROKEN)]
    info = directory / "fray_broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fray-broken\nVersion: 1.0\n")
    lines = [f"{cls.name} = {cls.__module__}:{cls.__name__}\n" for cls in dict.fromkeys(classes)]
    (info / "entry_points.txt").write_text("[fray.backends]\n" + "".join(lines))
