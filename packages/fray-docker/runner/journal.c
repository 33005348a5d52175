#include "journal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "system.h"

/* An end that cannot be written (no space, a read-only disk) is tried again for this long before it is given up. */
#define JOURNAL_PATIENCE (3600 * SECOND)

/* Where a journal goes on: behind the last whole line. Past it are NULs, or what a predecessor could not finish. */
static off_t find_end(int fd)
{
    char chunk[4096];
    off_t end = 0, at = 0;
    ssize_t count;
    if (lseek(fd, 0, SEEK_CUR) < 0)
        return NONE;
    while ((count = pread(fd, chunk, sizeof chunk, at)) > 0) {
        for (ssize_t i = 0; i < count; i++) {
            if (!chunk[i])
                return end;
            if (chunk[i] == '\n')
                end = at + i + 1;
        }
        at += count;
    }
    return end;
}

void journal_open(struct journal *journal, const char *where, struct clock clock)
{
    *journal = (struct journal){.clock = clock, .fd = open_fd(where, O_RDWR | O_CREAT)};
    if (journal->fd < 0) {
        complain("cannot open the journal", where, strerror(errno));
        _exit(1);
    }
    journal->end = find_end(journal->fd);
}

static void mark(void *journal);

void journal_open_framed(struct journal *journal, struct frames *frames, struct clock clock)
{
    *journal = (struct journal){.clock = clock, .fd = -1, .frames = frames};
    frames->mark = mark;
    frames->subject = journal;
}

/* An event is begun, given its fields, and written. Its name and all names of fields are JSON as they stand. */

static void add_name(struct journal *journal, const char *name)
{
    text_add_string(&journal->line, ",\"");
    text_add_string(&journal->line, name);
    text_add_string(&journal->line, "\":");
}

static void add_number(struct journal *journal, const char *name, int64_t number)
{
    if (number != NONE) {
        add_name(journal, name);
        text_add_number(&journal->line, number);
    }
}

static void add_seconds(struct journal *journal, const char *name, microseconds seconds)
{
    add_name(journal, name);
    text_add_seconds(&journal->line, seconds);
}

static void add_string(struct journal *journal, const char *name, const char *string)
{
    if (string) {
        add_name(journal, name);
        text_add_quoted(&journal->line, string);
    }
}

static void add_flag(struct journal *journal, const char *name, bool is_set)
{
    if (is_set) {
        add_name(journal, name);
        text_add_string(&journal->line, "true");
    }
}

/* Begin an event; return its time. */
static microseconds begin_event(struct journal *journal, const char *event)
{
    microseconds now = clock_now(&journal->clock);
    journal->line.length = 0;
    text_add_string(&journal->line, "{\"event\":\"");
    text_add_string(&journal->line, event);
    text_add_string(&journal->line, "\"");
    add_seconds(journal, "time", now);
    if (journal->frames)
        add_number(journal, "offset", journal->frames->offset);
    return now;
}

/* Begin an event that comes behind all output so far. */
static microseconds begin(struct journal *journal, const char *event)
{
    if (journal->frames)
        frames_end_line(journal->frames);
    return begin_event(journal, event);
}

/* Append the line by one write, so that a reader sees a whole line or none; false and errno where that failed. */
static bool append(struct journal *journal)
{
    const struct text *line = &journal->line;
    if (journal->end == NONE)
        return write(journal->fd, line->bytes, line->length) >= 0;
    ssize_t written = pwrite(journal->fd, line->bytes, line->length, journal->end);
    if (written == (ssize_t)line->length) {
        journal->end += written;
        return true;
    }
    if (written >= 0)
        errno = ENOSPC;
    return false;
}

/* Write the event that was begun; one that must be there is tried again. */
static void finish(struct journal *journal, bool must)
{
    text_add_string(&journal->line, "}\n");
    if (journal->frames) {
        frames_put_event(journal->frames, &journal->line);
        frames_send(journal->frames);
        return;
    }
    microseconds give_up = monotonic() + (must ? JOURNAL_PATIENCE : 0);
    while (!append(journal)) {
        if (errno == EPIPE || monotonic() >= give_up) {
            complain("cannot write to the journal", NULL, strerror(errno));
            return;
        }
        sleep(1);
    }
    if (must)
        fsync(journal->fd);
}

static void remember_attempt(struct journal *journal, struct attempt attempt)
{
    if (journal->attempt_count == ATTEMPTS_TOLD) {
        journal->attempt_count--;
        memmove(journal->attempts, journal->attempts + 1, journal->attempt_count * sizeof attempt);
    }
    journal->attempts[journal->attempt_count++] = attempt;
}

static void add_attempt(struct text *line, const struct attempt *attempt)
{
    text_add_string(line, "[");
    text_add_number(line, attempt->number);
    text_add_string(line, ",");
    text_add_seconds(line, attempt->started);
    text_add_string(line, ",");
    if (attempt->ended == NEVER) {
        text_add_string(line, "null,null,null");
    } else {
        text_add_seconds(line, attempt->ended);
        text_add_string(line, ",");
        text_add_number(line, attempt->exit_code);
        text_add_string(line, ",");
        if (attempt->reason)
            text_add_quoted(line, attempt->reason);
        else
            text_add_string(line, "null");
    }
    text_add_string(line, ",");
    text_add_number(line, attempt->offset);
    text_add_string(line, "]");
}

/* Add what is known of the job by now, where the events before may be lost. */
static void add_state(struct journal *journal)
{
    add_string(journal, "outputs", journal->outputs);
    add_name(journal, "attempts");
    for (int i = 0; i < journal->attempt_count; i++) {
        text_add_string(&journal->line, i ? "," : "[");
        add_attempt(&journal->line, &journal->attempts[i]);
    }
    text_add_string(&journal->line, journal->attempt_count ? "]" : "[]");
}

/* Write a mark, in the midst of output. */
static void mark(void *subject)
{
    struct journal *journal = subject;
    begin_event(journal, "mark");
    add_state(journal);
    add_flag(journal, "stopping", journal->is_stopping);
    text_add_string(&journal->line, "}\n");
    frames_put_event(journal->frames, &journal->line);
}

void journal_supervised(struct journal *journal, pid_t guard)
{
    begin(journal, "supervised");
    add_number(journal, "pid", getpid());
    add_number(journal, "guard", guard);
    add_string(journal, "outputs", journal->outputs);
    finish(journal, false);
}

void journal_started(struct journal *journal, int64_t attempt, pid_t pid, int64_t offset)
{
    microseconds now = begin(journal, "started");
    add_number(journal, "attempt", attempt);
    add_number(journal, "pid", pid);
    if (!journal->frames)
        add_number(journal, "offset", offset);
    remember_attempt(journal, (struct attempt){attempt, offset, now, NEVER, NONE, NULL});
    finish(journal, false);
}

void journal_exited(struct journal *journal, int64_t attempt, int exit_code, const char *reason, microseconds retry_in)
{
    microseconds now = begin(journal, "exited");
    add_number(journal, "attempt", attempt);
    add_number(journal, "exit_code", exit_code);
    add_string(journal, "reason", reason);
    if (retry_in != NEVER)
        add_seconds(journal, "retry_in", retry_in);
    struct attempt *last = &journal->attempts[journal->attempt_count - 1];
    last->ended = now;
    last->exit_code = exit_code;
    last->reason = reason;
    journal->is_stopping = retry_in == NEVER;
    /* Not at all costs: while it waited for space nobody would look after the job, and `ended` says it again. */
    finish(journal, false);
}

void journal_stopping(struct journal *journal, const char *reason)
{
    begin(journal, "stopping");
    add_string(journal, "reason", reason);
    journal->is_stopping = true;
    finish(journal, false);
}

void journal_ended(struct journal *journal, const struct end *end)
{
    begin(journal, "ended");
    add_string(journal, "reason", end->reason);
    add_number(journal, "exit_code", end->exit_code);
    add_number(journal, "log_size", end->log_size);
    add_number(journal, "dropped_bytes", end->dropped_bytes ? end->dropped_bytes : NONE);
    add_string(journal, "message", end->message);
    if (journal->frames) {
        add_flag(journal, "abandoned", end->is_abandoned);
        add_state(journal);
    }
    finish(journal, true);
}
