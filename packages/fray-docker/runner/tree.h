/* The processes that came of the command, found by descent, orphans included. */

#ifndef FRAY_TREE_H
#define FRAY_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define IDENTITIES 3

struct tree {
    bool is_init;
    const char *mine[IDENTITIES]; /* what tells this job's processes from those of a job submitted from inside it */
};

struct pids {
    pid_t *items;
    size_t count, room;
};

/* Become who inherits the orphans. `outputs` is the command's $FRAY_OUTPUT_DIR, NULL for the one in the environment. */
struct tree tree_open(const char *outputs);

/* Send a signal to all of them. */
void tree_signal(const struct tree *tree, int number);

/* Reap what has ended, and say whether nothing is left. */
bool tree_is_gone(const struct tree *tree);

/* The live descendants, without those that belong to another job submitted from inside this one. */
struct pids tree_members(const struct tree *tree);

/* Whether all that is left belongs to users whose processes this one may not signal. */
bool tree_only_others_left(const struct tree *tree);

/* Reap all that have ended, orphans too; return whether `pid` is among them, and its wait status. */
bool reap(pid_t pid, int *status);

#endif
