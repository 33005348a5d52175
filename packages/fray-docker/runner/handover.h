/* The handover: a job's secrets, sent to the runner's standard input. They are the count of bytes, a newline, and
 * NAME=VALUE pairs each ended by a NUL. */

#ifndef FRAY_HANDOVER_H
#define FRAY_HANDOVER_H

#include <stdbool.h>
#include <stdint.h>

#include "environment.h"
#include "text.h"

struct handover {
    struct text data; /* behind the head, once that is there */
    int64_t size;     /* as announced; NONE before */
    bool is_malformed;
};

/* Read a part; false at the end of it. */
bool handover_read(struct handover *handover, int from);

/* Whether all that was announced is there, and nothing more. */
bool handover_is_whole(const struct handover *handover);

/* Set the secrets in the environment, which then refers to the handover's memory; false where they are malformed. */
bool handover_take(struct handover *handover, struct environment *environment);

#endif
