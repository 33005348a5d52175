#include "runner.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "command.h"
#include "environment.h"
#include "frames.h"
#include "handover.h"
#include "oom.h"
#include "output.h"
#include "system.h"
#include "tree.h"

#define LONGEST_RETRY_DELAY (60 * SECOND)
/* How often the tree is looked at: while it is being asked to end, and while it is being killed. */
#define LOOK_AGAIN (250 * MILLISECOND)
#define LOOK_AGAIN_SOON (20 * MILLISECOND)
/* How long processes that cannot be signalled are waited for. */
#define PATIENCE_WITH_OTHERS (5 * SECOND)

#define CLIENT_LEFT "the submitting client went away before it had handed over the job's environment"

extern char **environ;

/* Who asked for the end: the first one counts. */
enum asked { NOBODY, USER, ENGINE };

struct runner {
    const struct options *options;
    struct journal journal;
    struct frames frames;
    struct output output;
    bool has_output;
    struct environment environment;
    struct tree tree;
    int signals;
    bool is_woken; /* by a signal since the last wait began: it may tell of a child that nobody has looked after yet */
    enum asked asked;
    microseconds deadline;
    const char *outputs;
    int64_t oom_kills;
    int exit_code;
};

/* One attempt, while it is being watched. */
struct attempt_watch {
    int64_t number;
    pid_t pid;
    bool has_exited;
    microseconds retry_in; /* NEVER: it is the last */
    const char *reason;
    bool is_decided, is_asking, is_killing; /* how far its end has come */
    microseconds kill_at;
    struct text leftover;
};

static void hear_signals(struct runner *runner)
{
    for (int number; (number = next_signal(runner->signals));) {
        runner->is_woken = true;
        if (number != SIGCHLD && runner->asked == NOBODY)
            runner->asked = number == SIGPWR ? ENGINE : USER;
    }
}

static bool is_asked_to_stop(struct runner *runner)
{
    struct stat status;
    hear_signals(runner);
    /* Another error, of a disk in trouble, is no request to stop. */
    if (!runner->asked && runner->options->permit && stat(runner->options->permit, &status) < 0 && errno == ENOENT)
        runner->asked = USER;
    return runner->asked;
}

static const char *stop_reason(const struct runner *runner)
{
    return runner->asked == ENGINE ? "LOST" : "STOPPED_BY_USER";
}

/* The loss of the leash is the end of this process, and so, by its guard, of all of the job. */
static _Noreturn void lose_leash(struct runner *runner)
{
    tree_signal(&runner->tree, SIGKILL);
    _exit(EXIT_INTERNAL);
}

/* Frame what output is there, as far as there is room for it, so that the next event comes behind it. */
static void settle_output(struct runner *runner)
{
    if (runner->options->frames >= 0)
        while (output_pump(&runner->output))
            ;
}

static void send_frames(struct runner *runner)
{
    frames_end_due_line(&runner->frames);
    frames_send(&runner->frames);
}

/* Wait until a moment has come, a signal, or something to read from `fd` (-1: none), and hand on output meanwhile.
 * Return whether `fd` can be read (or is closed). */
static bool wait_for(struct runner *runner, int fd, microseconds until)
{
    bool is_framed = runner->options->frames >= 0;
    if (is_framed && until > runner->frames.line_due)
        until = runner->frames.line_due;
    if (runner->is_woken)
        until = 0;
    bool has_room = runner->has_output && output_has_room(&runner->output);
    struct pollfd fds[] = {
        {runner->signals, POLLIN, 0},
        {runner->options->leash, POLLIN, 0},
        {fd, POLLIN, 0},
        {has_room ? runner->output.read_end : -1, POLLIN, 0},
        {is_framed && frames_is_waiting(&runner->frames) ? runner->frames.to : -1, POLLOUT, 0},
    };
    microseconds left = until - monotonic();
    struct timespec time = {left / SECOND, left % SECOND * 1000};
    if (left < 0)
        time = (struct timespec){0, 0};
    if (ppoll(fds, sizeof fds / sizeof *fds, until == NEVER ? NULL : &time, NULL) < 0)
        return false;
    if (fds[0].revents)
        hear_signals(runner);
    runner->is_woken = false; /* whoever waits looks at everything again */
    if (fds[1].revents)
        lose_leash(runner);
    if (fds[3].revents)
        output_pump(&runner->output);
    if (is_framed && fds[3].revents)
        settle_output(runner);
    if (is_framed)
        send_frames(runner);
    return fds[2].revents;
}

/* Hand on all output there is, however long the log takes for it. */
static void drain_output(struct runner *runner)
{
    for (;;) {
        if (!output_has_room(&runner->output))
            wait_for(runner, -1, NEVER); /* for the log to take some */
        else if (!output_pump(&runner->output))
            return;
    }
}

/* Record the end, wait until a framed log has it, and return the process's exit code. */
static int end(struct runner *runner, const char *reason, const char *message, bool is_abandoned)
{
    if (runner->has_output)
        drain_output(runner);
    struct end end = {
        .reason = reason,
        .message = message && *message ? message : NULL,
        .exit_code = runner->exit_code,
        .log_size = runner->has_output ? output_size(&runner->output) : NONE,
        .dropped_bytes = runner->has_output ? output_dropped(&runner->output) : 0,
        .is_abandoned = is_abandoned,
    };
    journal_ended(&runner->journal, &end);
    if (runner->options->frames < 0)
        return 0;
    runner->has_output = false; /* nothing comes behind the end */
    while (frames_is_waiting(&runner->frames))
        wait_for(runner, -1, NEVER);
    if (runner->exit_code > 0)
        return runner->exit_code;
    return reason != NULL;
}

static int end_stopped(struct runner *runner)
{
    return end(runner, stop_reason(runner), runner->asked == ENGINE ? ENGINE_STOPPED : NULL, false);
}

/* Read the secrets and wait for the word to start; false where the client vanished before. */
static bool take_over(struct runner *runner)
{
    /* Not freed: the environment refers to it. */
    static struct handover handover = {.size = NONE};
    bool is_counted = !strcmp(runner->options->handover, "counted"), is_more = true;
    microseconds until = NEVER;
    if (runner->options->handover_timeout != NEVER)
        until = monotonic() + runner->options->handover_timeout;
    while (is_more && !(is_counted && handover_is_whole(&handover))) {
        /* Only a signal counts here: the permit may not be there before the client is done. */
        hear_signals(runner);
        if (runner->asked || monotonic() >= until)
            return false;
        if (wait_for(runner, 0, until))
            is_more = handover_read(&handover, 0);
    }
    close_standard_input();
    return handover_is_whole(&handover) && handover_take(&handover, &runner->environment);
}

/* Give the command a directory for its files, if it is to have one. */
static void set_outputs(struct runner *runner)
{
    static struct text entry; /* not freed: the environment refers to it */
    if (!runner->outputs)
        return;
    text_add_string(&entry, "FRAY_OUTPUT_DIR=");
    text_add_string(&entry, runner->outputs);
    text_string(&entry);
    environment_set(&runner->environment, entry.bytes);
}

/* Start the command; return its process id, or say what went wrong. */
static pid_t spawn(struct runner *runner, int64_t attempt, struct text *problem)
{
    static struct text entry; /* not freed: the environment refers to it */
    entry.length = 0;
    text_add_string(&entry, "FRAY_ATTEMPT=");
    text_add_number(&entry, attempt);
    text_string(&entry);
    environment_set(&runner->environment, entry.bytes);
    struct command command = {
        .line = runner->options->command,
        .directory = runner->options->directory,
        .environment = runner->environment.entries,
        .output = runner->output.write_end,
    };
    int report;
    pid_t pid = command_start(&command, &report, problem);
    if (!pid)
        return 0;
    runner->oom_kills = count_oom_kills(); /* while the child is on its way */
    command_await(pid, report, problem);
    return pid;
}

static int exit_code_of(int status)
{
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static const char *reason_of(const struct runner *runner, int status)
{
    int code = exit_code_of(status);
    if (code == 0)
        return NULL;
    if (code == 137 && count_oom_kills() > runner->oom_kills)
        return "OUT_OF_MEMORY";
    return WIFSIGNALED(status) ? "KILLED" : "EXITED";
}

static bool may_retry(const char *reason, int exit_code)
{
    if (!reason)
        return false;
    if (!strcmp(reason, "EXITED"))
        return exit_code != 126 && exit_code != 127;
    return !strcmp(reason, "KILLED") || !strcmp(reason, "OUT_OF_MEMORY");
}

static void write_exit(struct runner *runner, const struct attempt_watch *watch, microseconds retry_in)
{
    settle_output(runner);
    journal_exited(&runner->journal, watch->number, runner->exit_code, watch->reason, retry_in);
}

/* Look whether the command has exited; its exit decides unless something else has before. */
static void look_for_exit(struct runner *runner, struct attempt_watch *watch)
{
    int status;
    if (watch->has_exited || !reap(watch->pid, &status))
        return;
    watch->has_exited = true;
    runner->exit_code = exit_code_of(status);
    if (watch->is_decided) {
        write_exit(runner, watch, NEVER);
    } else if (!is_asked_to_stop(runner)) {
        watch->is_decided = true;
        watch->reason = reason_of(runner, status);
        write_exit(runner, watch, may_retry(watch->reason, runner->exit_code) ? watch->retry_in : NEVER);
    }
}

/* Look whether the command has to end. */
static void look_for_stop(struct runner *runner, struct attempt_watch *watch)
{
    if (watch->is_decided)
        return;
    if (is_asked_to_stop(runner))
        watch->reason = stop_reason(runner);
    else if (monotonic() >= runner->deadline)
        watch->reason = "TIMED_OUT";
    else
        return;
    watch->is_decided = true;
    settle_output(runner);
    journal_stopping(&runner->journal, watch->reason);
    if (watch->has_exited)
        write_exit(runner, watch, NEVER);
}

static void describe_others(const struct runner *runner, struct text *into)
{
    struct pids others = tree_members(&runner->tree);
    text_add_string(into, "processes of another user are left: [");
    for (size_t i = 0; i < others.count; i++) {
        text_add_string(into, i ? ", " : "");
        text_add_number(into, others.items[i]);
    }
    text_add_string(into, "]");
    free(others.items);
}

/* Have the whole tree end; return whether that is done, or as far as it can be. */
static bool end_tree(struct runner *runner, struct attempt_watch *watch)
{
    if (watch->has_exited && tree_is_gone(&runner->tree))
        return true;
    microseconds now = monotonic();
    if (!watch->is_asking) {
        watch->is_asking = true;
        tree_signal(&runner->tree, SIGTERM);
        watch->kill_at = now + runner->options->grace;
    } else if (now >= watch->kill_at) {
        tree_signal(&runner->tree, SIGKILL);
        if (watch->is_killing && watch->has_exited && now >= watch->kill_at + PATIENCE_WITH_OTHERS &&
            tree_only_others_left(&runner->tree)) {
            describe_others(runner, &watch->leftover);
            return true;
        }
        watch->is_killing = true;
    }
    return false;
}

/* When the tree is to be looked at though nothing was heard of it. */
static microseconds next_look(const struct runner *runner, const struct attempt_watch *watch)
{
    if (!watch->is_decided)
        return runner->deadline;
    microseconds now = monotonic();
    if (watch->is_killing)
        return now + LOOK_AGAIN_SOON;
    return watch->kill_at < now + LOOK_AGAIN ? watch->kill_at : now + LOOK_AGAIN;
}

/* Follow one attempt until all of it is gone. */
static void follow(struct runner *runner, struct attempt_watch *watch)
{
    for (;;) {
        look_for_exit(runner, watch);
        look_for_stop(runner, watch);
        if (watch->is_decided && end_tree(runner, watch))
            break;
        wait_for(runner, -1, next_look(runner, watch));
    }
    drain_output(runner);
}

/* Wait between attempts; a stop or the time limit cuts it short. */
static void rest(struct runner *runner, microseconds delay)
{
    microseconds until = monotonic() + delay;
    if (until > runner->deadline)
        until = runner->deadline;
    while (!is_asked_to_stop(runner) && monotonic() < until)
        wait_for(runner, -1, until);
}

static int end_attempts(struct runner *runner, const struct attempt_watch *watch)
{
    struct text message = {0};
    if (watch->reason && !strcmp(watch->reason, "LOST"))
        text_add_string(&message, ENGINE_STOPPED);
    if (message.length && watch->leftover.length)
        text_add_string(&message, "; ");
    text_add(&message, watch->leftover.bytes, watch->leftover.length);
    return end(runner, watch->reason, text_string(&message), false);
}

static int run_attempts(struct runner *runner)
{
    microseconds delay = runner->options->retry_delay;
    for (int64_t attempt = 1;; attempt++) {
        if (is_asked_to_stop(runner))
            return end_stopped(runner);
        if (monotonic() >= runner->deadline)
            return end(runner, "TIMED_OUT", NULL, false);
        struct text problem = {0};
        pid_t pid = spawn(runner, attempt, &problem);
        if (problem.length)
            return end(runner, "SETUP_FAILED", text_string(&problem), false);
        journal_started(&runner->journal, attempt, pid, output_size(&runner->output));
        if (runner->deadline == NEVER && runner->options->timeout != NEVER)
            runner->deadline = monotonic() + runner->options->timeout;
        bool is_last = attempt > runner->options->retries;
        struct attempt_watch watch = {.number = attempt, .pid = pid, .retry_in = is_last ? NEVER : delay};
        follow(runner, &watch);
        if (watch.leftover.length || is_last || !may_retry(watch.reason, runner->exit_code))
            return end_attempts(runner, &watch);
        rest(runner, delay);
        delay = delay * 2 < LONGEST_RETRY_DELAY ? delay * 2 : LONGEST_RETRY_DELAY;
    }
}

/* Open the journal where framed output is the journal: before all else, for all is written there. */
static void open_framed(struct runner *runner, struct clock clock)
{
    move_standard_error();
    if (!frames_open(&runner->frames, runner->options->frames) ||
        !output_open_framed(&runner->output, &runner->frames)) {
        complain("cannot frame the output", NULL, strerror(errno));
        _exit(1);
    }
    runner->has_output = true;
    journal_open_framed(&runner->journal, &runner->frames, clock);
}

int run(const struct options *options, pid_t guard)
{
    struct runner runner = {.options = options, .deadline = NEVER, .exit_code = NONE};
    struct clock clock = clock_start(options->not_before);
    if (options->frames >= 0)
        open_framed(&runner, clock);
    else
        journal_open(&runner.journal, options->journal, clock);
    runner.signals = open_signals();
    runner.environment = environment_copy(environ);
    struct text problem = {0};
    if (options->outputs)
        runner.outputs = runner.journal.outputs = make_outputs(options->outputs, &problem);
    /* What has ended stays as it ended: `docker start` changes neither the log nor anything else. */
    if (getpid() == 1 && options->frames >= 0 && runner.outputs && !is_first_start(runner.outputs))
        _exit(EXIT_INTERNAL);
    runner.tree = tree_open(runner.outputs);
    /* Written before the permit is looked at: whoever takes the permit away afterwards finds whom to signal. */
    journal_supervised(&runner.journal, guard);
    if (problem.length)
        return end(&runner, "SETUP_FAILED", text_string(&problem), false);
    if (options->handover && !take_over(&runner)) {
        if (is_asked_to_stop(&runner))
            return end_stopped(&runner);
        return end(&runner, "LOST", CLIENT_LEFT, true);
    }
    set_outputs(&runner);
    if (options->frames < 0) {
        runner.has_output = output_open(&runner.output, options->output, options->copy, &problem);
        if (!runner.has_output)
            return end(&runner, "SETUP_FAILED", text_string(&problem), false);
    }
    return run_attempts(&runner);
}
