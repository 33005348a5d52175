/* Output and events as one stream of lines, which an engine's log can keep.
 *
 * An engine's log driver replaces what is no UTF-8 and cuts lines at 16 KiB. So everything is a line of UTF-8 that is
 * shorter; RS is the byte 0x1E:
 *
 *     TEXT       a line of output as it is
 *     RS + TEXT  a line of output, escaped: `\\` is a backslash, `\xHH` a byte that is no UTF-8
 *     RS - TEXT  output that no newline stands behind, escaped: what follows continues it
 *     RS {...}   an event
 *
 * The log may block. Then output waits in the pipe, after a little here, while the runner goes on with all else. */

#ifndef FRAY_FRAMES_H
#define FRAY_FRAMES_H

#include <stdbool.h>
#include <stdint.h>

#include "clock.h"
#include "text.h"

struct frames {
    int to;             /* the engine's log; does not block */
    bool is_gone;       /* nobody reads there any more */
    struct text queue;  /* frames; those before `sent` have gone out */
    size_t sent;
    struct text line;   /* output behind the last newline, not framed yet */
    microseconds line_due; /* when it goes out though no newline came */
    int64_t offset;     /* how much output has been framed */
    int64_t safe;       /* how much of that is known to have gone out */
    int64_t frames_since_event, bytes_since_event;
    /* Asked for an event by `frames_put_event` from time to time, so that a log without its head can be understood. */
    void (*mark)(void *subject);
    void *subject;
};

/* Write to this descriptor, which is moved out of the way. */
bool frames_open(struct frames *frames, int fd);

/* Frame some output. */
void frames_take(struct frames *frames, const char *data, size_t length);

/* Whether more output should be taken: not while much of it waits for the log. */
bool frames_has_room(const struct frames *frames);

/* Frame what no newline has come for. */
void frames_end_line(struct frames *frames);

/* The same, once it has been waited for long enough; half a character is left. */
void frames_end_due_line(struct frames *frames);

/* Add an event, which comes behind all output that was framed before. */
void frames_put_event(struct frames *frames, const struct text *json);

/* Write as much as the log takes now. */
void frames_send(struct frames *frames);

bool frames_is_waiting(const struct frames *frames);

/* How much output was lost because nobody read it. */
int64_t frames_dropped(const struct frames *frames);

#endif
