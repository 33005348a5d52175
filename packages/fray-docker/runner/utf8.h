/* Strict UTF-8: no surrogates, no overlong forms, nothing past U+10FFFF. */

#ifndef FRAY_UTF8_H
#define FRAY_UTF8_H

#include <stdbool.h>
#include <stddef.h>

/* The length of the character that `bytes` begin with; 0 where they begin with none. */
size_t utf8_character(const char *bytes, size_t length);

/* How many bytes at the end are the beginning of a character whose rest has not come. */
size_t utf8_unfinished(const char *bytes, size_t length);

bool utf8_is_valid(const char *bytes, size_t length);

#endif
