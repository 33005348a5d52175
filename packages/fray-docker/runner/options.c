#include "options.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "system.h"

static const char USAGE[] = "usage: --journal TO --output TO [OPTION VALUE]... -- COMMAND, "
                            "or --output frames:FD [OPTION VALUE]... -- COMMAND, or relay SECONDS";

static _Noreturn void refuse(const char *what, const char *of_what)
{
    complain(what, of_what, NULL);
    _exit(EXIT_USAGE);
}

static microseconds seconds_of(const char *name, const char *value)
{
    microseconds seconds;
    if (!parse_seconds(value, &seconds))
        refuse("not a number of seconds:", name);
    return seconds;
}

static int64_t number_of(const char *name, const char *value)
{
    int64_t number;
    if (!parse_number(value, &number))
        refuse("not a whole number:", name);
    return number;
}

static int fd_of(const char *name, const char *value)
{
    int64_t fd = number_of(name, value);
    if (fd < 0 || fd > INT32_MAX)
        refuse("not a file descriptor:", name);
    return (int)fd;
}

static void hold(struct options *options, int fd)
{
    int *more = realloc(options->hold, (options->hold_count + 1) * sizeof *more);
    if (!more)
        die(EXIT_INTERNAL, "out of memory");
    more[options->hold_count++] = fd;
    options->hold = more;
}

static void set(struct options *options, const char *name, const char *value)
{
    const struct {
        const char *name;
        const char **text;
        microseconds *seconds;
    } plain[] = {
        {"--journal", &options->journal, NULL},
        {"--output", &options->output, NULL},
        {"--copy", &options->copy, NULL},
        {"--directory", &options->directory, NULL},
        {"--permit", &options->permit, NULL},
        {"--handover", &options->handover, NULL},
        {"--outputs", &options->outputs, NULL},
        {"--grace", NULL, &options->grace},
        {"--timeout", NULL, &options->timeout},
        {"--retry-delay", NULL, &options->retry_delay},
        {"--not-before", NULL, &options->not_before},
        {"--handover-timeout", NULL, &options->handover_timeout},
    };
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        if (strcmp(name, plain[i].name))
            continue;
        if (plain[i].text)
            *plain[i].text = value;
        else
            *plain[i].seconds = seconds_of(name, value);
        return;
    }
    if (!strcmp(name, "--retries")) {
        options->retries = number_of(name, value);
    } else if (!strcmp(name, "--leash")) {
        options->leash = fd_of(name, value);
    } else if (!strcmp(name, "--hold")) {
        hold(options, fd_of(name, value));
    } else if (!strcmp(name, "--detach")) {
        options->detach = !strcmp(value, "yes");
        if (!options->detach && strcmp(value, "no"))
            refuse("--detach is yes or no", NULL);
    } else {
        refuse("unknown option", name);
    }
}

static void check(struct options *options)
{
    if (options->handover && strcmp(options->handover, "stdin") && strcmp(options->handover, "counted"))
        refuse("--handover is stdin or counted", NULL);
    if (!options->output || !*options->output)
        refuse(USAGE, NULL);
    if (!strncmp(options->output, "frames:", 7)) {
        options->frames = fd_of("--output", options->output + 7);
        if (options->journal || options->copy)
            refuse("framed output has the events in it, and no copy: --journal and --copy do not go with it", NULL);
    } else if (!options->journal || !*options->journal) {
        refuse(USAGE, NULL);
    }
}

struct options options_parse(int count, char **arguments)
{
    struct options options = {
        .frames = -1,
        .leash = -1,
        .grace = 10 * SECOND,
        .retry_delay = SECOND,
        .timeout = NEVER,
        .handover_timeout = NEVER,
    };
    int at = 0;
    for (; at < count && strcmp(arguments[at], "--"); at += 2) {
        if (at + 1 == count)
            refuse("no value for", arguments[at]);
        set(&options, arguments[at], arguments[at + 1]);
    }
    if (count - at != 2)
        refuse(USAGE, NULL);
    options.command = arguments[at + 1];
    check(&options);
    return options;
}
