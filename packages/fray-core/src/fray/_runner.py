"""The runner: what every backend runs a job's command under, and what makes the contract true where engines do not.

A program, never imported: one file, no `fray` import, for any Python >= 3.8, started as

    python -I -S _runner.py [OPTION VALUE]... -- COMMAND

It runs `/bin/sh -c -- COMMAND` in a session of its own, hands its output on byte by byte, retries it, limits its time,
stops its whole process tree, and writes what happened to a journal of JSON lines. Its tests are black-box, so that a
runner in another language can take its place. It inherits the command's environment and adds `FRAY_ATTEMPT`.

| option | value |
| --- | --- |
| `--journal` | where events go: a path, or `fd:N` (may be preallocated with NULs: the journal ends at the first) |
| `--output` | where the output is appended: a path, `fd:N`, or a directory (it ends in `/`) of files of 4 MiB each |
| `--copy` | where the output goes a second time, as far as it can be written there: a path, or `fd:N` |
| `--directory` | the command's working directory, absolute |
| `--permit` | a path: once it is gone the job is to stop, or not to start; SIGTERM and SIGINT ask for the same |
| `--grace` | seconds between SIGTERM and SIGKILL (10) |
| `--timeout` | seconds that all attempts may take, from the first command's start |
| `--retries` | how many more attempts a failing command gets (0) |
| `--retry-delay` | seconds before the second attempt, doubling to 60 (1) |
| `--not-before` | the submission time, in seconds since the epoch: a clock stepped back reports no earlier time |
| `--handover` | `stdin`: read secrets from there, then wait for its end, at which the job may start (below) |
| `--handover-timeout` | seconds that this may take |
| `--hold` | a file descriptor kept open until the last of the tree is gone (a lock, say) |
| `--leash` | a file descriptor, the read end of a pipe: once nobody holds the other end the whole job is killed |
| `--detach` | `yes`: outlive the caller, under a guard that cleans up if the runner itself is killed |

The handover is the count of bytes, a newline, and NAME=VALUE pairs each ended by a NUL.

Events, each with `time`: `supervised` (`pid`, `guard`), `started` (`attempt`, `pid`, `offset`), `exited` (`attempt`,
`exit_code`, `reason`, `retry_in` where another attempt follows), `stopping`, `ended` (`reason`, `exit_code`,
`log_size`, `dropped_bytes`, `message`). `ended` is the last; what is not there by then did not happen.
"""

# Imports are what a runner costs: `os` and `signal` would double its start. These are what those two wrap.
import _signal as signal  # type: ignore[import-not-found]
import posix as os
import select
import sys
import time

LINUX = sys.platform == "linux"
CHUNK = 1 << 20
# An output directory's files are of this size: whoever reads a range of the output reads few of them.
SEGMENT = 1 << 22
LONGEST_RETRY_DELAY = 60.0
# No single wait is longer, for poll counts milliseconds in 32 bits: whoever waits looks again.
LONGEST_WAIT = 86400.0
# An end that cannot be written (no space, a read-only disk) is tried again for this long before it is given up.
JOURNAL_PATIENCE = 3600.0


class Options:
    """The command line, checked."""

    def __init__(self, arguments: "list[str]") -> None:
        self.journal = self.output = self.command = ""
        self.copy: "str | None" = None
        self.leash: "int | None" = None
        self.directory: "str | None" = None
        self.permit: "str | None" = None
        self.handover: "str | None" = None
        self.handover_timeout: "float | None" = None
        self.grace, self.retry_delay, self.not_before = 10.0, 1.0, 0.0
        self.timeout: "float | None" = None
        self.retries = 0
        self.hold: "list[int]" = []
        self.detach = False
        arguments = list(arguments)
        while arguments and arguments[0] != "--":
            if len(arguments) < 2:
                raise ValueError("no value for " + arguments[0])
            name, value = arguments[0], arguments[1]
            del arguments[:2]
            if name in ("--journal", "--output", "--copy", "--directory", "--permit", "--handover"):
                setattr(self, name[2:], value)
            elif name in ("--grace", "--timeout", "--retry-delay", "--not-before", "--handover-timeout"):
                setattr(self, name[2:].replace("-", "_"), float(value))
            elif name in ("--retries", "--leash"):
                setattr(self, name[2:], int(value))
            elif name == "--hold":
                self.hold.append(int(value))
            elif name == "--detach":
                if value not in ("yes", "no"):
                    raise ValueError("--detach is yes or no")
                self.detach = value == "yes"
            else:
                raise ValueError("unknown option " + name)
        if self.handover not in (None, "stdin"):
            raise ValueError("--handover is from stdin")
        if len(arguments) != 2 or not self.journal or not self.output:
            raise ValueError("usage: --journal TO --output TO [OPTION VALUE]... -- COMMAND")
        self.command = arguments[1]


class Clock:
    """Wall-clock times that only go forward, whatever is done to the machine's clock."""

    def __init__(self, not_before: float) -> None:
        self._started = time.monotonic()
        self._epoch = max(time.time(), not_before)

    def now(self) -> float:
        return self._epoch + time.monotonic() - self._started


class Journal:
    """Appends events, each by one write, so that a reader sees a whole line or none."""

    def __init__(self, where: str, clock: Clock) -> None:
        self._clock = clock
        self._fd = open_fd(where, os.O_RDWR | os.O_CREAT)
        self._end: "int | None" = None  # a pipe has none
        try:
            content = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
            # Behind the last whole line: past it are NULs, or what a predecessor could not finish.
            self._end = content.split(b"\0", 1)[0].rfind(b"\n") + 1
        except OSError:
            pass

    def write(self, event: str, must: bool = False, **fields: "str | float | None") -> None:
        """Append one event; one that `must` be there is tried again where there is no space for it."""
        line = '{"event":"%s","time":%.6f' % (event, self._clock.now())
        for name, value in fields.items():
            if value is not None:
                line += ',"%s":%s' % (name, quote(value) if isinstance(value, str) else value)
        data = (line + "}\n").encode("ascii")
        give_up = time.monotonic() + (JOURNAL_PATIENCE if must else 0)
        while True:
            try:
                if self._end is None:
                    os.write(self._fd, data)
                elif os.pwrite(self._fd, data, self._end) == len(data):
                    self._end += len(data)
                else:
                    raise OSError("no space left")
                if event == "ended":
                    sync(self._fd)
                return
            except OSError as error:
                if isinstance(error, BrokenPipeError) or time.monotonic() >= give_up:
                    complain("cannot write to the journal: %s" % error)
                    return
                time.sleep(1)


class Output:
    """The one stream of the command's output, from a pipe to where it is kept."""

    def __init__(self, where: str, copy: "str | None") -> None:
        self._directory = where if where.endswith("/") else ""
        self._number = 0
        self._to = open_fd(where + "%08d" % 0 if self._directory else where, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._copy = None if copy is None else open_fd(copy, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            self.offset = os.fstat(self._to).st_size
        except OSError:
            self.offset = 0
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC) if LINUX else os.pipe()
        os.set_blocking(self.read_end, False)
        self.dropped = 0

    def pump(self, everything: bool = False) -> None:
        """Hand on what is there: one chunk, or all of it."""
        while True:
            try:
                data = os.read(self.read_end, CHUNK)
            except BlockingIOError:
                return
            if not data:
                return
            self._keep(data)
            if not everything:
                return

    def _keep(self, data: bytes) -> None:
        if self._copy is not None:
            try:
                os.write(self._copy, data)
            except OSError:
                pass  # the one that counts is the other
        while data:
            try:
                written = self._write(data)
            except BlockingIOError:
                select.select([], [self._to], [])
                continue
            except OSError:
                # A full disk must neither block nor kill the job: what is lost is counted, and reported.
                self.dropped += len(data)
                return
            self.offset += written
            data = data[written:]

    def _write(self, data: bytes) -> int:
        if not self._directory:
            return os.write(self._to, data)
        number, used = divmod(self.offset, SEGMENT)
        self._turn_to(number)
        written = os.write(self._to, data[: SEGMENT - used])
        if used + written == SEGMENT:
            try:
                self._turn_to(number + 1)  # at once: whoever has read this file looks for the next
            except OSError:
                pass  # tried again when there is more to write
        return written

    def _turn_to(self, number: int) -> None:
        if number != self._number:
            following = open_fd(self._directory + "%08d" % number, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.close(self._to)
            self._to, self._number = following, number


class Tree:
    """The processes that came of the command, found by descent, orphans included."""

    def __init__(self) -> None:
        self._mine = {name: os.environ.get(name) for name in (b"FRAY_JOB_ID", b"FRAY_OUTPUT_DIR", b"FRAY_CLUSTER")}
        self.is_init = os.getpid() == 1
        self.group = 0
        if LINUX:
            become_subreaper()

    def signal(self, number: int) -> None:
        """Send a signal to all of them."""
        if self.is_init:
            send(-1, number)
            send(-1, signal.SIGCONT)
            return
        if not LINUX:
            # No subreaper and no /proc there: the command's process group is the best there is.
            if self.group:
                send(-self.group, number)
                send(-self.group, signal.SIGCONT)
            return
        done = set()
        # Killing goes on until a pass finds nobody new: a tree that forks meanwhile is not missed. Asking does not:
        # what is started in answer (to save some work, say) is not to be asked to end.
        for _ in range(20 if number == signal.SIGKILL else 1):
            found = [pid for pid in self.members() if pid not in done]
            if not found:
                return
            for pid in found:
                send(pid, number)
                send(pid, signal.SIGCONT)
                done.add(pid)

    def members(self) -> "list[int]":
        """The live descendants, without those that belong to another job submitted from inside this one."""
        return self._look()[0]

    def is_gone(self) -> bool:
        """Reap what has ended, and say whether nothing is left."""
        reap()
        if not LINUX and not self.is_init:
            return not self.group or not send(-self.group, 0)
        if not has_children():
            return True
        if self.is_init:
            return False
        # There are children: of a job submitted from inside this one, or of this job's.
        found, surely_all = self._look()
        return surely_all and not found

    def only_others_left(self) -> bool:
        """Whether all that is left belongs to users whose processes this one may not signal."""
        if not LINUX or self.is_init:
            return False
        found = self.members()
        return bool(found) and not any(send(pid, 0) for pid in found)

    def _look(self) -> "tuple[list[int], bool]":
        """Return the members, and whether that is surely all of them.

        It is not when one of them ended during the look: what it had started by then may be too new to be listed.
        """
        me, surely_all = os.getpid(), True
        parents: "dict[int, list[int]]" = {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                state, parent = stat_of(name)
                if state not in ("Z", "X", ""):
                    parents.setdefault(parent, []).append(int(name))
                elif not state or parent == me:
                    surely_all = False
        found, queue = [], [me]
        while queue:
            for pid in parents.get(queue.pop(), ()):
                if pid != me and not self._is_foreign(pid):
                    found.append(pid)
                    queue.append(pid)
        return found, surely_all

    def _is_foreign(self, pid: int) -> bool:
        try:
            environment = read_file("/proc/%d/environ" % pid)
        except OSError:
            return False
        theirs = {}
        for entry in environment.split(b"\0"):
            if entry.startswith(b"FRAY_"):
                name, _, value = entry.partition(b"=")
                theirs[name] = value
        if theirs.get(b"FRAY_JOB_ID") in (None, self._mine[b"FRAY_JOB_ID"]):
            # One id may be in use on two clusters; a command may well change one of these for what it starts.
            others = (b"FRAY_OUTPUT_DIR", b"FRAY_CLUSTER")
            return b"FRAY_JOB_ID" in theirs and all(theirs.get(n) not in (None, self._mine[n]) for n in others)
        return True


class Runner:
    """One job: its attempts, and its end."""

    def __init__(self, options: Options, guard: "int | None") -> None:
        self.options = options
        self.clock = Clock(options.not_before)
        self.journal = Journal(options.journal, self.clock)
        self.wake, wake_end = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(wake_end, False)
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        # A caller may have blocked these until the handlers are there.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD))
        self.environment = dict(os.environ)
        self.tree = Tree()
        self.deadline: "float | None" = None
        self.exit_code: "int | None" = None
        # Written before the permit is looked at: whoever takes the permit away afterwards finds whom to signal.
        self.journal.write("supervised", pid=os.getpid(), guard=guard)

    def run(self) -> None:
        if self.options.handover and not self.take_over():
            if self.is_asked_to_stop():
                return self.end("STOPPED_BY_USER")
            return self.end("LOST", "the submitting client went away before it had handed over the job's environment")
        try:
            output = self.output = Output(self.options.output, self.options.copy)
        except OSError as error:
            return self.end("SETUP_FAILED", "cannot open the output: %s" % error)
        attempt, delay = 0, self.options.retry_delay
        while True:
            if self.is_asked_to_stop():
                return self.end("STOPPED_BY_USER")
            if self.deadline is not None and time.monotonic() >= self.deadline:
                return self.end("TIMED_OUT")
            attempt += 1
            pid, problem = self.spawn(attempt)
            if problem:
                return self.end("SETUP_FAILED", problem)
            self.tree.group = pid
            self.journal.write("started", attempt=attempt, pid=pid, offset=output.offset)
            if self.deadline is None and self.options.timeout is not None:
                self.deadline = time.monotonic() + self.options.timeout
            retries_left = attempt <= self.options.retries
            reason, leftover = self.watch(pid, attempt, delay if retries_left else None)
            if leftover or not (retries_left and may_retry(reason, self.exit_code)):
                return self.end(reason, leftover)
            self.sleep(delay)
            delay = min(delay * 2, LONGEST_RETRY_DELAY)

    def take_over(self) -> bool:
        """Read the secrets and wait for the word to start; False where the client vanished before."""
        data, size = b"", None
        until = None if self.options.handover_timeout is None else time.monotonic() + self.options.handover_timeout
        while True:
            left = None if until is None else until - time.monotonic()
            # Only a signal counts here: the permit may not be there before the client is done.
            if self.asked or (left is not None and left <= 0):
                return False
            self.wait_for([0, self.wake], left)
            self.clear_wake()
            if not poll([0], 0):
                continue
            chunk = os.read(0, CHUNK)
            data += chunk
            if size is None and b"\n" in data:
                head, data = data.split(b"\n", 1)
                size = int(head) if head.isdigit() else -1
            if not chunk:
                break
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        if null:
            os.close(null)
        if len(data) != size:
            return False
        for entry in data.split(b"\0")[:-1]:
            name, is_pair, value = entry.partition(b"=")
            if not is_pair:
                return False
            self.environment[name] = value
        return True

    def spawn(self, attempt: int) -> "tuple[int, str]":
        """Start the command; return its process id, or what went wrong."""
        environment = dict(self.environment)
        environment[b"FRAY_ATTEMPT"] = b"%d" % attempt
        report, report_end = os.pipe()
        supervisor = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(report)
            os.close(report_end)
            return 0, "cannot start a process for the command: %s" % error
        if pid == 0:
            step = "cannot start the command"
            try:
                os.setsid()
                if LINUX:
                    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                    if os.getppid() != supervisor:
                        os._exit(70)
                null = os.open("/dev/null", os.O_RDONLY)
                os.dup2(null, 0)
                os.dup2(self.output.write_end, 1)
                os.dup2(self.output.write_end, 2)
                # Python ignores some signals, a caller (nohup, a shell's background job) others: the command none.
                for number in range(1, signal.NSIG):
                    try:
                        signal.signal(number, signal.SIG_DFL)
                    except (OSError, ValueError):
                        pass  # one that cannot be set
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                if self.options.directory:
                    step = "cannot enter the working directory " + self.options.directory
                    os.chdir(self.options.directory)
                step = "cannot start /bin/sh"
                os.execve("/bin/sh", ["/bin/sh", "-c", "--", self.options.command], environment)
            except BaseException as error:  # nothing of the parent's may run in this child
                os.write(report_end, ("%s: %s" % (step, error)).encode("utf-8", "replace"))
            os._exit(70)
        os.close(report_end)
        self.oom_kills = count_oom_kills()  # while the child is on its way
        problem = os.read(report, 65536).decode("utf-8", "replace")
        os.close(report)
        if problem:
            os.waitpid(pid, 0)
        return pid, problem

    def watch(self, pid: int, attempt: int, retry_in: "float | None") -> "tuple[str | None, str]":
        """Follow one attempt until all of it is gone; return its reason, and what is to be said of it."""
        reason: "str | None" = None
        status: "int | None" = None
        kill_at = 0.0
        decided = asking = killing = False
        while True:
            if status is None:
                status = reap(pid)
                if status is not None:
                    self.exit_code = exit_code_of(status)
                    if not decided and not self.is_asked_to_stop():
                        decided = True
                        reason = self.reason_of(status)
                        again = retry_in is not None and may_retry(reason, self.exit_code)
                        self.write_exit(attempt, reason, retry_in if again else None)
                    elif decided:
                        self.write_exit(attempt, reason, None)
            now = time.monotonic()
            if not decided:
                if self.is_asked_to_stop():
                    decided, reason = True, "STOPPED_BY_USER"
                elif self.deadline is not None and now >= self.deadline:
                    decided, reason = True, "TIMED_OUT"
                if decided:
                    self.journal.write("stopping", reason=reason)
                    if status is not None:
                        self.write_exit(attempt, reason, None)
            if decided:
                if status is not None and self.tree.is_gone():
                    self.output.pump(everything=True)
                    return reason, ""
                if not asking:
                    asking = True
                    self.tree.signal(signal.SIGTERM)
                    kill_at = now + self.options.grace
                elif now >= kill_at:
                    self.tree.signal(signal.SIGKILL)
                    if killing and now >= kill_at + 5 and status is not None and self.tree.only_others_left():
                        self.output.pump(everything=True)
                        return reason, "processes of another user are left: %s" % self.tree.members()
                    killing = True
            wait = 0.02 if killing else None
            if decided and not killing:
                wait = max(0.0, min(kill_at - now, 0.25))
            elif not decided and self.deadline is not None:
                wait = max(0.0, self.deadline - now)
            ready = self.wait_for([self.wake, self.output.read_end], wait)
            if self.output.read_end in ready:
                self.output.pump()
            if self.wake in ready:
                self.clear_wake()

    def reason_of(self, status: int) -> "str | None":
        code = exit_code_of(status)
        if code == 0:
            return None
        if code == 137 and count_oom_kills() > self.oom_kills:
            return "OUT_OF_MEMORY"
        return "KILLED" if os.WIFSIGNALED(status) else "EXITED"

    def write_exit(self, attempt: int, reason: "str | None", retry_in: "float | None") -> None:
        # Not at all costs: while it waited for space nobody would look after the job, and `ended` says it again.
        self.journal.write(
            "exited",
            attempt=attempt,
            exit_code=self.exit_code,
            reason=reason,
            retry_in=retry_in,
        )

    def sleep(self, seconds: float) -> None:
        """Wait between attempts; a stop or the time limit cuts it short."""
        until = time.monotonic() + seconds
        if self.deadline is not None:
            until = min(until, self.deadline)
        while not self.is_asked_to_stop():
            left = until - time.monotonic()
            if left <= 0:
                return
            self.wait_for([self.wake], left)
            self.clear_wake()

    def wait_for(self, fds: "list[int]", seconds: "float | None") -> "list[int]":
        """Poll; the loss of the leash is the end of this process, and so, by its guard, of all of the job."""
        leash = self.options.leash
        ready = poll(fds if leash is None else [*fds, leash], seconds)
        if leash in ready:
            self.tree.signal(signal.SIGKILL)
            os._exit(70)
        return ready

    def end(self, reason: "str | None", message: str = "") -> None:
        output = getattr(self, "output", None)
        self.journal.write(
            "ended",
            must=True,
            reason=reason,
            exit_code=self.exit_code,
            log_size=output.offset if output else None,
            dropped_bytes=output.dropped or None if output else None,
            message=message or None,
        )

    def is_asked_to_stop(self) -> bool:
        if not self.asked and self.options.permit:
            try:
                os.stat(self.options.permit)
            except FileNotFoundError:
                self.asked = True
            except OSError:
                pass  # a disk in trouble is no request to stop
        return self.asked

    def clear_wake(self) -> None:
        try:
            while os.read(self.wake, 4096):
                pass
        except BlockingIOError:
            pass

    def _on_stop(self, number: int, frame: object) -> None:
        self.asked = True


def may_retry(reason: "str | None", exit_code: "int | None") -> bool:
    return reason in ("KILLED", "OUT_OF_MEMORY") or (reason == "EXITED" and exit_code not in (126, 127))


def exit_code_of(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def reap(pid: int = 0) -> "int | None":
    """Reap all that have ended, orphans too; return the wait status of `pid` if it is among them."""
    found = None
    try:
        while True:
            done, status = os.waitpid(-1, os.WNOHANG)
            if not done:
                return found
            if done == pid:
                found = status
    except ChildProcessError:
        return found


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def send(pid: int, number: int) -> bool:
    """Signal; return whether that could be done."""
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True


def poll(fds: "list[int]", seconds: "float | None") -> "list[int]":
    """Wait until one of `fds` can be read (or is closed); return those."""
    waiter = select.poll()
    for fd in fds:
        waiter.register(fd, select.POLLIN)
    return [fd for fd, _ in waiter.poll(None if seconds is None else int(min(seconds, LONGEST_WAIT) * 1000) + 1)]


def open_fd(where: str, flags: int) -> int:
    if where.startswith("fd:"):
        fd = int(where[3:])
        os.set_inheritable(fd, False)
        return fd
    return os.open(where, flags | os.O_CLOEXEC, 0o600)


def read_file(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = b""
        while True:
            chunk = os.read(fd, 65536)
            if not chunk:
                return content
            content += chunk
    finally:
        os.close(fd)


def stat_of(pid: str) -> "tuple[str, int]":
    """Return a process's state ("" where it has gone) and parent."""
    try:
        after_name = read_file("/proc/%s/stat" % pid).rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return "", 0
    state = after_name[0].decode()
    if state == "Z" and int(after_name[17]) > 1:
        state = "S"  # only its first thread has ended: the others live on
    return state, int(after_name[1])


def sync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError:
        pass  # a pipe, or a file system without it


def quote(text: str) -> str:
    """A JSON string, without the json module."""
    out = '"'
    for character in text:
        code = ord(character)
        if character in '"\\':
            out += "\\" + character
        elif 32 <= code < 127:
            out += character
        elif code < 0x10000:
            out += "\\u%04x" % code
        else:
            code -= 0x10000
            out += "\\u%04x\\u%04x" % (0xD800 + (code >> 10), 0xDC00 + (code & 0x3FF))
    return out + '"'


def prctl(option: int, value: int) -> None:
    try:
        import _ctypes

        function = _ctypes.dlsym(_ctypes.dlopen(None, 2), "prctl")  # type: ignore[arg-type]
        _ctypes.call_function(function, (option, value, 0, 0, 0))
    except (ImportError, AttributeError, OSError):
        import ctypes  # the documented way, at several times the cost

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def become_subreaper() -> None:
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def count_oom_kills() -> int:
    """How often the kernel killed for lack of memory: in this cgroup where it says, else on the machine."""
    if not LINUX:
        return 0
    for path, word in oom_counters():
        try:
            for line in read_file(path).split(b"\n"):
                if line.startswith(word + b" "):
                    return int(line.split()[1])
        except OSError:
            pass
    return 0


def oom_counters() -> "list[tuple[str, bytes]]":
    found = []
    try:
        for line in read_file("/proc/self/cgroup").decode("utf-8", "replace").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                found.append(("/sys/fs/cgroup%s/memory.events" % path.rstrip("/"), b"oom_kill"))
            elif "memory" in controllers.split(","):
                found.append(("/sys/fs/cgroup/memory%s/memory.oom_control" % path.rstrip("/"), b"oom_kill"))
    except (OSError, ValueError):
        pass
    found.append(("/proc/vmstat", b"oom_kill"))
    return found


def complain(text: str) -> None:
    try:
        os.write(2, ("fray runner: %s\n" % text).encode("utf-8", "replace"))
    except OSError:
        pass


def detach() -> int:
    """Leave the caller behind, and put a guard above the runner; return the guard's process id, in the runner.

    The guard does nothing until the runner dies without having ended its job: then, as the next subreaper up, it
    inherits what is left of the tree and kills it. It holds the same descriptors, so that a lock held by the job is
    free only when all of the job is gone.
    """
    if os.fork():
        os._exit(0)
    os.chdir("/")  # or a disk could not be unmounted while the job runs
    guard = os.getpid()
    signals = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as a caller may have it, it leaves nothing to wait for
    tree = Tree()
    runner = os.fork()
    if not runner:
        return guard
    for number in signals:
        signal.signal(number, lambda number, frame: send(runner, number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    os.close(0)
    status = os.waitpid(runner, 0)[1]
    while status and not tree.is_gone():
        tree.signal(signal.SIGKILL)
        if tree.only_others_left():
            break
        time.sleep(0.01)
    os._exit(0)


def main() -> None:
    try:
        options = Options(sys.argv[1:])
    except ValueError as error:
        complain(str(error))
        os._exit(64)
    for fd in options.hold if options.leash is None else [*options.hold, options.leash]:
        os.set_inheritable(fd, False)
    guard = detach() if options.detach else None
    Runner(options, guard).run()
    # Nothing to tidy: the process is over, and whoever waits for it waits no longer than needed.
    os._exit(0)


main()
