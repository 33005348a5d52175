/* Bytes that grow as they are added to: nothing in the runner has a size that something could outgrow. */

#ifndef FRAY_TEXT_H
#define FRAY_TEXT_H

#include <stddef.h>
#include <stdint.h>

struct text {
    char *bytes;
    size_t length, room;
};

/* Make room for `more` bytes behind what is there, and return where they go. */
char *text_reserve(struct text *text, size_t more);

void text_add(struct text *text, const void *bytes, size_t length);
void text_add_string(struct text *text, const char *string);
void text_add_number(struct text *text, int64_t number);

/* Add a time or a duration as a decimal number of seconds. */
void text_add_seconds(struct text *text, int64_t microseconds);

/* Add a JSON string. What is no UTF-8 becomes U+FFFD; a very long string is cut, and its "..." says so, for an event
 * has to fit into one line of an engine's log. */
void text_add_quoted(struct text *text, const char *string);

/* The text as a C string, which holds until the next addition. */
const char *text_string(struct text *text);

/* Take away the first bytes. */
void text_remove(struct text *text, size_t count);

void text_free(struct text *text);

#endif
