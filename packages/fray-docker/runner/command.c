#include "command.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "system.h"

static void add_error(struct text *problem, const char *what, const char *of_what)
{
    int error = errno;
    text_add_string(problem, what);
    text_add_string(problem, of_what);
    text_add_string(problem, ": ");
    text_add_string(problem, strerror(error));
}

/* A caller (nohup, a shell's background job) may ignore some signals, the runner itself others: the command none. */
static void reset_signals(void)
{
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* Turn the child into the command; what comes back is why it could not be. */
static void become(const struct command *command, struct text *problem)
{
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(command->output, 1) < 0 || dup2(command->output, 2) < 0) {
        add_error(problem, "cannot start the command", "");
        return;
    }
    reset_signals();
    if (command->directory && *command->directory && chdir(command->directory) < 0) {
        add_error(problem, "cannot enter the working directory ", command->directory);
        return;
    }
    execve("/bin/sh", (char *[]){"/bin/sh", "-c", "--", (char *)command->line, NULL}, command->environment);
    add_error(problem, "cannot start /bin/sh", "");
}

static _Noreturn void run_child(const struct command *command, pid_t supervisor, int report_end)
{
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (getppid() != supervisor)
        _exit(EXIT_INTERNAL); /* the runner died before it could be tied to it */
    struct text problem = {0};
    become(command, &problem);
    if (write(report_end, problem.bytes, problem.length) < 0)
        _exit(EXIT_INTERNAL);
    _exit(EXIT_INTERNAL);
}

pid_t command_start(const struct command *command, int *report, struct text *problem)
{
    int ends[2];
    pid_t supervisor = getpid(), pid = -1;
    if (pipe2(ends, O_CLOEXEC) == 0) {
        pid = fork();
        if (pid == 0)
            run_child(command, supervisor, ends[1]);
        close(ends[1]);
    }
    if (pid < 0) {
        add_error(problem, "cannot start a process for the command", "");
        return 0;
    }
    *report = ends[0];
    return pid;
}

void command_await(pid_t pid, int report, struct text *problem)
{
    /* The report closes by itself when the command takes the child's place. */
    ssize_t count;
    do {
        count = read(report, text_reserve(problem, 4096), 4096);
        if (count > 0)
            problem->length += (size_t)count;
    } while (count > 0 || (count < 0 && errno == EINTR));
    close(report);
    if (problem->length)
        waitpid(pid, NULL, 0);
}

/* Make a directory and those above it; whether it is there then, and can be written to. */
static bool make_directory(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0755);
        *slash = '/';
    }
    mkdir(path, 0755);
    struct stat status;
    return stat(path, &status) == 0 && S_ISDIR(status.st_mode) && access(path, W_OK | X_OK) == 0;
}

const char *make_outputs(const char *candidates, struct text *problem)
{
    struct text tried = {0};
    for (const char *end; *candidates; candidates = end + (*end == ':')) {
        end = strchrnul(candidates, ':');
        if (end == candidates)
            continue;
        char *path = strndup(candidates, (size_t)(end - candidates));
        if (!path)
            die(EXIT_INTERNAL, "out of memory");
        if (make_directory(path))
            return path;
        text_add_string(&tried, tried.length ? ", " : "");
        text_add_string(&tried, path);
        free(path);
    }
    text_add_string(problem, "no directory for $FRAY_OUTPUT_DIR can be made as user ");
    text_add_number(problem, geteuid());
    text_add_string(problem, " (tried ");
    text_add_string(problem, text_string(&tried));
    text_add_string(problem, ")");
    text_free(&tried);
    return NULL;
}

bool is_first_start(const char *outputs)
{
    struct text mark = {0};
    text_add_string(&mark, outputs);
    text_add_string(&mark, ".started");
    int fd = open(text_string(&mark), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    bool is_first = fd >= 0 || errno != EEXIST;
    if (fd >= 0)
        close(fd);
    text_free(&mark);
    return is_first;
}
