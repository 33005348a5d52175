#include "environment.h"

#include <stdlib.h>
#include <string.h>

#include "system.h"

static void append(struct environment *environment, char *entry)
{
    char **more = realloc(environment->entries, (environment->count + 2) * sizeof *more);
    if (!more)
        die(EXIT_INTERNAL, "out of memory");
    more[environment->count++] = entry;
    more[environment->count] = NULL;
    environment->entries = more;
}

struct environment environment_copy(char **environ)
{
    struct environment environment = {0};
    for (char **entry = environ; *entry; entry++)
        append(&environment, *entry);
    return environment;
}

void environment_set(struct environment *environment, char *entry)
{
    size_t length = (size_t)(strchr(entry, '=') - entry) + 1;
    for (size_t i = 0; i < environment->count; i++) {
        if (!strncmp(environment->entries[i], entry, length)) {
            environment->entries[i] = entry;
            return;
        }
    }
    append(environment, entry);
}
