/* A stand-in while a job is being prepared: it copies lines from standard input to standard output, the engine's log,
 * and decides on its own, in one place, whether the job was released to run or has ended before that. */

#ifndef FRAY_RELAY_H
#define FRAY_RELAY_H

#include "clock.h"

/* Relay until the end, and return the process's exit code: 0 where the job was released. A preparation that gives no
 * sign of life for so long counts as gone. */
int relay(microseconds patience);

#endif
