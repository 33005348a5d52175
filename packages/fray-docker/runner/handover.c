#include "handover.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "system.h"

#define CHUNK (64 * 1024)

/* Read the head, once it is there. */
static void read_head(struct handover *handover)
{
    char *newline = handover->data.length ? memchr(handover->data.bytes, '\n', handover->data.length) : NULL;
    if (!newline)
        return;
    *newline = '\0';
    size_t length = (size_t)(newline - handover->data.bytes);
    handover->is_malformed = strspn(handover->data.bytes, "0123456789") != length ||
                             !parse_number(handover->data.bytes, &handover->size);
    text_remove(&handover->data, length + 1);
    if (handover->is_malformed)
        handover->size = 0;
}

bool handover_read(struct handover *handover, int from)
{
    ssize_t count = read(from, text_reserve(&handover->data, CHUNK), CHUNK);
    if (count < 0)
        return errno == EINTR || errno == EAGAIN;
    handover->data.length += (size_t)count;
    if (handover->size < 0)
        read_head(handover);
    return count > 0;
}

bool handover_is_whole(const struct handover *handover)
{
    return !handover->is_malformed && handover->size >= 0 && handover->data.length == (size_t)handover->size;
}

bool handover_take(struct handover *handover, struct environment *environment)
{
    struct text *data = &handover->data;
    if (!data->length)
        return true;
    char *entry = data->bytes, *end = data->bytes + data->length, *nul;
    for (; entry < end && (nul = memchr(entry, '\0', (size_t)(end - entry))); entry = nul + 1) {
        if (!strchr(entry, '='))
            return false;
        environment_set(environment, entry);
    }
    return true; /* what is behind the last NUL is no pair */
}
