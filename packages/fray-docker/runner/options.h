/* The command line, checked. */

#ifndef FRAY_OPTIONS_H
#define FRAY_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "clock.h"

struct options {
    const char *journal, *output, *copy, *directory, *permit, *handover, *outputs, *command;
    int frames; /* the descriptor of `--output frames:N`, else -1 */
    microseconds grace, timeout, retry_delay, not_before, handover_timeout;
    int64_t retries;
    int leash; /* -1: none */
    int *hold;
    size_t hold_count;
    bool detach;
};

/* Read the arguments behind the program's name; end the process where they cannot be what is meant. */
struct options options_parse(int count, char **arguments);

#endif
