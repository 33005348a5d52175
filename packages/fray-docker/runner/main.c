/* The runner for containers whose image has no Python: what a job's command runs under there, as PID 1.
 *
 * It takes the options of `fray._runner`, which explains them, and does what that does; what it has beyond that is in
 * this folder's README. Both pass the same tests. */

#include <string.h>
#include <unistd.h>

#include "detach.h"
#include "options.h"
#include "relay.h"
#include "runner.h"
#include "system.h"

static microseconds patience_of(const char *seconds)
{
    microseconds patience;
    if (!parse_seconds(seconds, &patience) || patience <= 0)
        die(EXIT_USAGE, "usage: relay SECONDS");
    return patience;
}

static void keep_held_to_oneself(const struct options *options)
{
    bool is_done = options->leash < 0 || keep_to_oneself(options->leash);
    for (size_t i = 0; i < options->hold_count; i++)
        is_done = keep_to_oneself(options->hold[i]) && is_done;
    if (!is_done)
        die(EXIT_USAGE, "a descriptor that is to be held is not open");
}

int main(int count, char **arguments)
{
    /* Either way there is nothing to tidy at the end: whoever waits for this process waits no longer than needed. */
    occupy_standard_descriptors();
    if (count == 3 && !strcmp(arguments[1], "relay"))
        _exit(relay(patience_of(arguments[2])));
    struct options options = options_parse(count - 1, arguments + 1);
    keep_held_to_oneself(&options);
    pid_t guard = options.detach ? detach() : NONE;
    _exit(run(&options, guard));
}
