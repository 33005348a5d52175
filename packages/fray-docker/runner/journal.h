/* The journal: what happened, as JSON lines, appended to a file or between the frames of output. */

#ifndef FRAY_JOURNAL_H
#define FRAY_JOURNAL_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "clock.h"
#include "frames.h"
#include "text.h"

/* A number that there is none of: no exit code, no log size, no process. */
#define NONE (-1)

#define ATTEMPTS_TOLD 20

struct attempt {
    int64_t number, offset;
    microseconds started, ended; /* NEVER until it has */
    int exit_code;
    const char *reason;
};

struct journal {
    struct clock clock;
    struct frames *frames; /* NULL: the journal is a file */
    int fd;
    off_t end; /* where the next event goes; NONE for a pipe */
    struct text line;
    /* What a mark tells, for whoever no longer has the events before it. */
    const char *outputs;
    bool is_stopping;
    struct attempt attempts[ATTEMPTS_TOLD];
    int attempt_count;
};

/* How a job ended. */
struct end {
    const char *reason, *message; /* NULL: none */
    int exit_code;
    int64_t log_size, dropped_bytes;
    bool is_abandoned; /* whoever was to hand over its environment left it */
};

/* Open a journal behind what is there already; end the process where that is not possible. */
void journal_open(struct journal *journal, const char *where, struct clock clock);

/* Write the events between frames. */
void journal_open_framed(struct journal *journal, struct frames *frames, struct clock clock);

void journal_supervised(struct journal *journal, pid_t guard);
void journal_started(struct journal *journal, int64_t attempt, pid_t pid, int64_t offset);
/* `retry_in` is NEVER where no attempt follows. */
void journal_exited(struct journal *journal, int64_t attempt, int exit_code, const char *reason, microseconds retry_in);
void journal_stopping(struct journal *journal, const char *reason);
/* The one event that must be there: it is tried again where there is no space for it. */
void journal_ended(struct journal *journal, const struct end *end);

#endif
