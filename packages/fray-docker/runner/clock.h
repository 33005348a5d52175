/* Time, in whole microseconds: it is compared, added up and printed without rounding. */

#ifndef FRAY_CLOCK_H
#define FRAY_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

typedef int64_t microseconds;

#define SECOND ((microseconds)1000000)
#define MILLISECOND ((microseconds)1000)

/* A moment that does not come. */
#define NEVER INT64_MAX

/* Wall-clock times that only go forward, whatever is done to the machine's clock. */
struct clock {
    microseconds started, epoch;
};

/* Start a clock that shows no time before `not_before`. */
struct clock clock_start(microseconds not_before);

/* The time since the epoch. */
microseconds clock_now(const struct clock *clock);

/* The time that durations and deadlines are measured by. */
microseconds monotonic(void);

/* Read a number of seconds; false where the text is none. No number overflows when it is added to a time. */
bool parse_seconds(const char *text, microseconds *into);

#endif
