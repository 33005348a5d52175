/* The command's environment, secrets included: the runner's own never has these, for anyone may look into that. */

#ifndef FRAY_ENVIRONMENT_H
#define FRAY_ENVIRONMENT_H

#include <stddef.h>

struct environment {
    char **entries; /* ends with a NULL */
    size_t count;
};

/* Begin with what the runner itself was given. */
struct environment environment_copy(char **environ);

/* Set "NAME=VALUE", which is kept as it is and not copied. */
void environment_set(struct environment *environment, char *entry);

#endif
