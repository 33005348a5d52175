/* The one stream of the command's output, from a pipe to where it is kept. */

#ifndef FRAY_OUTPUT_H
#define FRAY_OUTPUT_H

#include <stdbool.h>
#include <stdint.h>

#include "frames.h"

struct output {
    int read_end, write_end;
    struct frames *frames; /* NULL: what follows */
    int to, copy;          /* -1: no copy */
    const char *directory; /* "" where the output is one file */
    int64_t number;        /* of the file in the directory */
    int64_t offset, dropped;
};

/* Keep output in a file or a directory of them; where it cannot be opened return false and say so in `problem`. */
bool output_open(struct output *output, const char *where, const char *copy, struct text *problem);

/* Frame the output. From here on the runner's own descriptors 1 and 2 are a part of it, so that what is written to
 * /proc/1/fd/1 in a container, as is the habit there, is found in the job's log. */
bool output_open_framed(struct output *output, struct frames *frames);

/* Hand on one chunk of what is there; return whether there was any. */
bool output_pump(struct output *output);

/* Whether more would be handed on now. */
bool output_has_room(const struct output *output);

/* How much output there has been, and how much of it could not be kept. */
int64_t output_size(const struct output *output);
int64_t output_dropped(const struct output *output);

#endif
