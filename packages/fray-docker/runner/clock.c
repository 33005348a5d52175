#include "clock.h"

#include <ctype.h>
#include <stdlib.h>
#include <time.h>

/* Some three thousand years, in seconds. */
#define LONGEST 1e11

static microseconds read_clock(clockid_t which)
{
    struct timespec now;
    clock_gettime(which, &now);
    return now.tv_sec * SECOND + now.tv_nsec / 1000;
}

microseconds monotonic(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

struct clock clock_start(microseconds not_before)
{
    microseconds now = read_clock(CLOCK_REALTIME);
    return (struct clock){monotonic(), now > not_before ? now : not_before};
}

microseconds clock_now(const struct clock *clock)
{
    return clock->epoch + monotonic() - clock->started;
}

bool parse_seconds(const char *text, microseconds *into)
{
    char *end;
    double seconds = strtod(text, &end);
    if (end == text || *end || isspace((unsigned char)*text) || seconds != seconds)
        return false;
    if (seconds > LONGEST)
        seconds = LONGEST;
    if (seconds < -LONGEST)
        seconds = -LONGEST;
    *into = (microseconds)(seconds * 1e6 + (seconds < 0 ? -0.5 : 0.5));
    return true;
}
