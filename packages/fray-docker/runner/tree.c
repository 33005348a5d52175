#include "tree.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "system.h"

/* How often it is looked for survivors in one go: a tree that forks meanwhile is not missed. */
#define PASSES 20

static const char *const IDENTITY[IDENTITIES] = {"FRAY_JOB_ID", "FRAY_OUTPUT_DIR", "FRAY_CLUSTER"};

struct tree tree_open(const char *outputs)
{
    struct tree tree = {.is_init = getpid() == 1};
    for (int i = 0; i < IDENTITIES; i++)
        tree.mine[i] = getenv(IDENTITY[i]);
    if (outputs)
        tree.mine[1] = outputs;
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    return tree;
}

static void add_pid(struct pids *pids, pid_t pid)
{
    if (pids->count == pids->room) {
        pids->room = pids->room ? pids->room * 2 : 64;
        pids->items = realloc(pids->items, pids->room * sizeof pid);
        if (!pids->items)
            die(EXIT_INTERNAL, "out of memory");
    }
    pids->items[pids->count++] = pid;
}

static bool has_pid(const struct pids *pids, pid_t pid)
{
    for (size_t i = 0; i < pids->count; i++)
        if (pids->items[i] == pid)
            return true;
    return false;
}

static bool read_file_of(pid_t pid, const char *name, struct text *into)
{
    struct text path = {0};
    text_add_string(&path, "/proc/");
    text_add_number(&path, pid);
    text_add_string(&path, name);
    bool is_read = read_file(text_string(&path), into);
    text_free(&path);
    return is_read;
}

/* The start of a field of /proc/PID/stat, counted from the state on, which comes behind the program's name. */
static const char *field_of(const char *stat, int number)
{
    const char *at = strrchr(stat, ')');
    for (number++; at && number > 0; number--) {
        at = strchr(at, ' ');
        at += at != NULL;
    }
    return at;
}

/* A process's state, 0 where it has gone, and its parent. */
static char state_of(pid_t pid, pid_t *parent)
{
    struct text content = {0};
    char state = 0;
    *parent = 0;
    if (read_file_of(pid, "/stat", &content)) {
        const char *stat = text_string(&content), *threads = field_of(stat, 17);
        if (threads) {
            state = *field_of(stat, 0);
            *parent = atoi(field_of(stat, 1));
            if (state == 'Z' && atoi(threads) > 1)
                state = 'S'; /* only its first thread has ended: the others live on */
        }
    }
    text_free(&content);
    return state;
}

static const char *value_in(const struct text *environment, const char *name)
{
    size_t length = strlen(name);
    const char *end = environment->bytes + environment->length;
    for (const char *entry = environment->bytes; entry < end; entry += strlen(entry) + 1)
        if (!strncmp(entry, name, length) && entry[length] == '=')
            return entry + length + 1;
    return NULL;
}

static bool differs(const char *theirs, const char *mine)
{
    return theirs && (!mine || strcmp(theirs, mine));
}

/* Whether a process belongs to another job. */
static bool is_foreign(const struct tree *tree, pid_t pid)
{
    struct text environment = {0};
    bool is_found = false;
    if (read_file_of(pid, "/environ", &environment)) {
        text_string(&environment); /* the last entry may lack its NUL */
        const char *theirs[IDENTITIES];
        for (int i = 0; i < IDENTITIES; i++)
            theirs[i] = value_in(&environment, IDENTITY[i]);
        /* One id may be in use on two clusters; a command may well change one of these for what it starts. */
        is_found = differs(theirs[0], tree->mine[0]) ||
                   (theirs[0] && differs(theirs[1], tree->mine[1]) && differs(theirs[2], tree->mine[2]));
    }
    text_free(&environment);
    return is_found;
}

/* Every live process and, at the same place in `parents`, its parent.
 *
 * Return whether none of this one's children ended meanwhile: what it had started by then may be too new to be
 * listed. */
static bool list_processes(struct pids *all, struct pids *parents)
{
    bool surely_all = true;
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    while (proc && (entry = readdir(proc))) {
        if (!isdigit((unsigned char)*entry->d_name))
            continue;
        pid_t pid = atoi(entry->d_name), parent;
        char state = state_of(pid, &parent);
        if (state && state != 'Z' && state != 'X') {
            add_pid(all, pid);
            add_pid(parents, parent);
        } else if (!state || parent == getpid()) {
            surely_all = false;
        }
    }
    if (proc)
        closedir(proc);
    return surely_all;
}

/* Find the members; return whether that is surely all of them. */
static bool look(const struct tree *tree, struct pids *found)
{
    struct pids all = {0}, parents = {0};
    bool surely_all = list_processes(&all, &parents);
    pid_t me = getpid(), of = me;
    /* Those found so far are asked in turn for their children. */
    for (size_t asked = 0;; of = found->items[asked++]) {
        for (size_t i = 0; i < all.count; i++)
            if (parents.items[i] == of && all.items[i] != me && !is_foreign(tree, all.items[i]))
                add_pid(found, all.items[i]);
        if (asked == found->count)
            break;
    }
    free(all.items);
    free(parents.items);
    return surely_all;
}

struct pids tree_members(const struct tree *tree)
{
    struct pids found = {0};
    look(tree, &found);
    return found;
}

static void send_to(pid_t pid, int number)
{
    kill(pid, number);
    kill(pid, SIGCONT);
}

void tree_signal(const struct tree *tree, int number)
{
    if (tree->is_init) {
        send_to(-1, number);
        return;
    }
    /* Killing goes on until a pass finds nobody new. Asking does not: what is started in answer (to save some work,
     * say) is not to be asked to end. */
    struct pids done = {0};
    bool is_new = true;
    for (int pass = 0; is_new && pass < (number == SIGKILL ? PASSES : 1); pass++) {
        struct pids found = tree_members(tree);
        is_new = false;
        for (size_t i = 0; i < found.count; i++) {
            if (has_pid(&done, found.items[i]))
                continue;
            send_to(found.items[i], number);
            add_pid(&done, found.items[i]);
            is_new = true;
        }
        free(found.items);
    }
    free(done.items);
}

bool reap(pid_t pid, int *status)
{
    bool is_found = false;
    pid_t done;
    int its_status;
    while ((done = waitpid(-1, &its_status, WNOHANG)) > 0) {
        if (done == pid) {
            *status = its_status;
            is_found = true;
        }
    }
    return is_found;
}

static bool has_children(void)
{
    siginfo_t about;
    return waitid(P_ALL, 0, &about, WEXITED | WNOHANG | WNOWAIT) == 0;
}

bool tree_is_gone(const struct tree *tree)
{
    int status;
    reap(0, &status);
    if (!has_children())
        return true;
    if (tree->is_init)
        return false;
    /* There are children: of a job submitted from inside this one, or of this job's. */
    struct pids found = {0};
    bool surely_all = look(tree, &found);
    free(found.items);
    return surely_all && !found.count;
}

bool tree_only_others_left(const struct tree *tree)
{
    /* Setuid programs of an image whose user is not root leave such. kill(-1) cannot tell: refused by all, it succeeds. */
    struct pids found = tree_members(tree);
    bool only_others = found.count > 0;
    for (size_t i = 0; i < found.count; i++)
        if (kill(found.items[i], 0) == 0)
            only_others = false;
    free(found.items);
    return only_others;
}
