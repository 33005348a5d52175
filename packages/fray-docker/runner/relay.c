#include "relay.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "system.h"
#include "text.h"

/* With its newline: what a log driver takes as one line. */
#define LONGEST_LINE 16384
#define SIGN_OF_LIFE "\x1e"
#define RELEASED "\x1e{\"event\":\"released\""
#define ENDED "\x1e{\"event\":\"ended\""

#define CLIENT_LEFT "the process that prepared the job went away"

struct relay {
    struct clock clock;
    int signals;
    struct text input; /* what has been read and not been dealt with */
    bool has_received;
    bool is_at_end;
};

static bool write_all(const char *bytes, size_t length)
{
    while (length) {
        ssize_t written = write(1, bytes, length);
        if (written < 0 && errno == EAGAIN)
            wait_for_fd(1, POLLOUT, NEVER);
        else if (written < 0 && errno != EINTR)
            return false;
        if (written > 0) {
            bytes += written;
            length -= (size_t)written;
        }
    }
    return true;
}

/* Write the end, which the preparation did not; return the exit code. */
static int end(const struct relay *relay, const char *reason, const char *message, bool is_abandoned)
{
    struct text line = {0};
    text_add_string(&line, ENDED ",\"time\":");
    text_add_seconds(&line, clock_now(&relay->clock));
    text_add_string(&line, ",\"reason\":");
    text_add_quoted(&line, reason);
    if (message) {
        text_add_string(&line, ",\"message\":");
        text_add_quoted(&line, message);
    }
    text_add_string(&line, is_abandoned ? ",\"abandoned\":true}\n" : "}\n");
    write_all(line.bytes, line.length);
    return 1;
}

static int end_lost(const struct relay *relay)
{
    return end(relay, "LOST", CLIENT_LEFT, !relay->has_received);
}

/* The signal that asks for the end, 0 where there is none. */
static int heard_stop(const struct relay *relay)
{
    for (int number; (number = next_signal(relay->signals));) {
        if (number != SIGCHLD)
            return number;
    }
    return 0;
}

static int end_stopped(const struct relay *relay, int number)
{
    if (number == SIGPWR)
        return end(relay, "LOST", ENGINE_STOPPED, false);
    return end(relay, "STOPPED_BY_USER", NULL, false);
}

/* Wait for more input, or for a signal; false where nothing came in time. */
static bool wait_for_more(const struct relay *relay, microseconds until)
{
    struct pollfd both[] = {{0, POLLIN, 0}, {relay->signals, POLLIN, 0}};
    microseconds left = until - monotonic();
    if (left > 24 * 3600 * SECOND)
        left = 24 * 3600 * SECOND;
    return left > 0 && (poll(both, 2, (int)(left / MILLISECOND) + 1) != 0 || monotonic() < until);
}

static void read_more(struct relay *relay)
{
    struct pollfd one = {0, POLLIN, 0};
    if (poll(&one, 1, 0) <= 0)
        return;
    ssize_t count = read(0, text_reserve(&relay->input, LONGEST_LINE), LONGEST_LINE);
    if (count > 0)
        relay->input.length += (size_t)count;
    else if (count == 0 || (errno != EINTR && errno != EAGAIN))
        relay->is_at_end = true;
}

static bool begins_with(const char *line, size_t length, const char *beginning)
{
    return length >= strlen(beginning) && !memcmp(line, beginning, strlen(beginning));
}

/* Copy a line, its newline included in the length; return the exit code where it is the last, else -1. */
static int take_line(const char *line, size_t length)
{
    if (length == sizeof SIGN_OF_LIFE && begins_with(line, length, SIGN_OF_LIFE))
        return -1;
    if (!write_all(line, length))
        return 1;
    if (begins_with(line, length, RELEASED))
        return 0;
    return begins_with(line, length, ENDED) ? 1 : -1;
}

int relay(microseconds patience)
{
    struct relay relay = {.clock = clock_start(0), .signals = open_signals()};
    signal(SIGCHLD, SIG_IGN); /* as PID 1 it inherits orphans, which nobody asks about */
    microseconds until = monotonic() + patience;
    for (;;) {
        int stop = heard_stop(&relay);
        if (stop)
            return end_stopped(&relay, stop);
        struct text *input = &relay.input;
        const char *newline = input->length ? memchr(input->bytes, '\n', input->length) : NULL;
        size_t length = newline ? (size_t)(newline - input->bytes) + 1 : input->length;
        if (length > LONGEST_LINE || (!newline && length == LONGEST_LINE))
            return end(&relay, "LOST", "a line of the preparation is longer than 16 KiB", false);
        if (newline) {
            int code = take_line(input->bytes, length);
            if (code >= 0)
                return code;
            text_remove(input, length);
            relay.has_received = true;
            until = monotonic() + patience;
        } else if (relay.is_at_end || !wait_for_more(&relay, until)) {
            return end_lost(&relay);
        } else {
            read_more(&relay);
        }
    }
}
