#include "detach.h"

#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "system.h"
#include "tree.h"

static pid_t checked_fork(void)
{
    pid_t pid = fork();
    if (pid < 0)
        die(EXIT_INTERNAL, "cannot start a process for the runner");
    return pid;
}

/* Hand requests to stop on to the runner until it is over; return its wait status. */
static int guard_runner(pid_t runner, int signals)
{
    int status;
    while (!reap(runner, &status)) {
        wait_for_fd(signals, POLLIN, NEVER);
        for (int number; (number = next_signal(signals));)
            if (number != SIGCHLD)
                kill(runner, number);
    }
    return status;
}

static void kill_what_is_left(const struct tree *tree)
{
    while (!tree_is_gone(tree)) {
        tree_signal(tree, SIGKILL);
        if (tree_only_others_left(tree))
            break;
        usleep(10 * MILLISECOND);
    }
}

pid_t detach(void)
{
    if (checked_fork())
        _exit(0);
    if (chdir("/") < 0) /* or a disk could not be unmounted while the job runs */
        die(EXIT_INTERNAL, "cannot leave the caller's directory");
    pid_t guard = getpid();
    int signals = open_signals();
    struct tree tree = tree_open(NULL);
    pid_t runner = checked_fork();
    if (!runner) {
        close(signals);
        return guard;
    }
    close_standard_input();
    if (guard_runner(runner, signals))
        kill_what_is_left(&tree);
    _exit(0);
}
