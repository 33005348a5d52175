#include "system.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

/* Descriptors that are moved out of the way go here, or to the next that is free. */
#define HIGH 100

static int standard_error = 2;

void complain(const char *what, const char *of_what, const char *why)
{
    struct text line = {0};
    text_add_string(&line, "fray runner: ");
    text_add_string(&line, what);
    if (of_what) {
        text_add_string(&line, " ");
        text_add_string(&line, of_what);
    }
    if (why) {
        text_add_string(&line, ": ");
        text_add_string(&line, why);
    }
    text_add_string(&line, "\n");
    if (write(standard_error, line.bytes, line.length) < 0) {
        /* There is nobody left to tell. */
    }
    text_free(&line);
}

void die(int exit_code, const char *why)
{
    /* Not by `complain`, which needs memory. */
    static const char NAME[] = "fray runner: ";
    if (write(standard_error, NAME, sizeof NAME - 1) < 0 || write(standard_error, why, strlen(why)) < 0 ||
        write(standard_error, "\n", 1) < 0)
        _exit(exit_code);
    _exit(exit_code);
}

int move_high(int fd)
{
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, HIGH);
    return moved < 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : moved; /* a low limit leaves no high ones */
}

void move_standard_error(void)
{
    standard_error = move_high(2);
}

void occupy_standard_descriptors(void)
{
    int fd;
    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= 2);
    if (fd > 2)
        close(fd);
}

void close_standard_input(void)
{
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null >= 0) {
        dup2(null, 0);
        close(null);
    }
}

int open_fd(const char *where, int flags)
{
    if (strncmp(where, "fd:", 3))
        return open(where, flags | O_CLOEXEC, 0600);
    int64_t fd;
    if (!parse_number(where + 3, &fd) || fd < 0 || fd > INT32_MAX) {
        errno = EBADF;
        return -1;
    }
    return keep_to_oneself((int)fd) ? (int)fd : -1;
}

bool keep_to_oneself(int fd)
{
    return fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

void make_non_blocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

void wait_for_fd(int fd, short events, microseconds until)
{
    struct pollfd one = {fd, events, 0};
    microseconds left = until - monotonic();
    struct timespec time = {left / SECOND, left % SECOND * 1000};
    if (left > 0)
        ppoll(&one, 1, until == NEVER ? NULL : &time, NULL);
}

bool read_file(const char *path, struct text *into)
{
    into->length = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t count;
    do {
        char *here = text_reserve(into, 4096);
        count = read(fd, here, into->room - into->length);
        if (count > 0)
            into->length += (size_t)count;
    } while (count > 0);
    close(fd);
    return count == 0;
}

bool parse_number(const char *text, int64_t *into)
{
    char *end;
    errno = 0;
    *into = strtoll(text, &end, 10);
    return end != text && !*end && !isspace((unsigned char)*text) && !errno;
}

int open_signals(void)
{
    for (const int *number = (const int[]){SIGHUP, SIGPIPE, SIGXFSZ, 0}; *number; number++)
        signal(*number, SIG_IGN);
    /* A caller may have it ignored, and then an ended child leaves nothing to wait for. */
    signal(SIGCHLD, SIG_DFL);
    sigset_t heard;
    sigemptyset(&heard);
    for (const int *number = (const int[]){SIGTERM, SIGINT, SIGPWR, SIGCHLD, 0}; *number; number++)
        sigaddset(&heard, *number);
    /* Blocked, they wait in the descriptor, even for a PID 1 and even if a caller had them ignored. */
    sigprocmask(SIG_BLOCK, &heard, NULL);
    int signals = signalfd(-1, &heard, SFD_NONBLOCK | SFD_CLOEXEC);
    if (signals < 0)
        die(EXIT_INTERNAL, "cannot hear signals");
    return signals;
}

int next_signal(int signals)
{
    struct signalfd_siginfo heard;
    return read(signals, &heard, sizeof heard) == sizeof heard ? (int)heard.ssi_signo : 0;
}
