/* One job: its attempts, and its end. */

#ifndef FRAY_RUNNER_H
#define FRAY_RUNNER_H

#include "journal.h"
#include "options.h"

/* Run it under `guard`, if there is one, and return the process's exit code. */
int run(const struct options *options, pid_t guard);

#endif
