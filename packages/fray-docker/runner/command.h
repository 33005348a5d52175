/* Starting the command: `/bin/sh -c -- COMMAND` in a session of its own, with nothing of the runner's about it. */

#ifndef FRAY_COMMAND_H
#define FRAY_COMMAND_H

#include <stdbool.h>
#include <sys/types.h>

#include "text.h"

struct command {
    const char *line, *directory; /* NULL: where the runner is */
    char **environment;
    int output;
};

/* Start it, without waiting for that; 0 where there can be no process, which `problem` then says.
 * `report` is what `command_problem` is to be asked with. */
pid_t command_start(const struct command *command, int *report, struct text *problem);

/* Wait until the command runs; where it could not be started say so in `problem`. */
void command_await(pid_t pid, int report, struct text *problem);

/* Make a directory for the command's files, the first of `candidates` (separated by colons) that can be made. Return
 * its path, or NULL and say so in `problem`. */
const char *make_outputs(const char *candidates, struct text *problem);

/* Whether this is the first time that a job with this directory is started: a container may be started again by hand. */
bool is_first_start(const char *outputs);

#endif
