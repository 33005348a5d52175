#include "oom.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "system.h"

/* Read the counter `oom_kill` from a file of lines "NAME NUMBER"; false where it has none. */
static bool read_counter(const char *path, int64_t *count)
{
    struct text content = {0};
    bool is_found = false;
    if (read_file(path, &content)) {
        const char *line = text_string(&content);
        while (line && !is_found) {
            is_found = !strncmp(line, "oom_kill ", 9);
            if (is_found)
                *count = strtoll(line + 9, NULL, 10);
            line = strchr(line, '\n');
            line += line != NULL;
        }
    }
    text_free(&content);
    return is_found;
}

static bool read_counter_of(const char *hierarchy, const char *cgroup, const char *file, int64_t *count)
{
    struct text path = {0};
    text_add_string(&path, hierarchy);
    text_add_string(&path, strcmp(cgroup, "/") ? cgroup : "");
    text_add_string(&path, file);
    bool is_found = read_counter(text_string(&path), count);
    text_free(&path);
    return is_found;
}

static bool has_controller(const char *controllers, const char *wanted)
{
    size_t length = strlen(wanted);
    for (const char *at = controllers; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, wanted, length) && (!at[length] || at[length] == ','))
            return true;
    return false;
}

/* Read the counter of the cgroup that one line of /proc/self/cgroup names: "NUMBER:CONTROLLERS:PATH". */
static bool read_counter_by_line(char *line, int64_t *count)
{
    char *controllers = strchr(line, ':');
    char *cgroup = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!cgroup)
        return false;
    *controllers++ = *cgroup++ = '\0';
    if (!strcmp(line, "0"))
        return read_counter_of("/sys/fs/cgroup", cgroup, "/memory.events", count);
    if (has_controller(controllers, "memory"))
        return read_counter_of("/sys/fs/cgroup/memory", cgroup, "/memory.oom_control", count);
    return false;
}

static bool read_counter_of_own_cgroup(int64_t *count)
{
    struct text content = {0};
    bool is_found = false;
    if (read_file("/proc/self/cgroup", &content)) {
        text_string(&content);
        for (char *line = content.bytes, *next; line && !is_found; line = next) {
            next = strchr(line, '\n');
            if (next)
                *next++ = '\0';
            is_found = read_counter_by_line(line, count);
        }
    }
    text_free(&content);
    return is_found;
}

/* In a container its own cgroup is what is mounted, whatever path it has outside. */
static bool read_counter_of_container(int64_t *count)
{
    return getpid() == 1 && (read_counter("/sys/fs/cgroup/memory.events", count) ||
                             read_counter("/sys/fs/cgroup/memory/memory.oom_control", count));
}

int64_t count_oom_kills(void)
{
    int64_t count = 0;
    if (!read_counter_of_own_cgroup(&count) && !read_counter_of_container(&count))
        read_counter("/proc/vmstat", &count);
    return count;
}
