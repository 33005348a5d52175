#include "text.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "system.h"
#include "utf8.h"

/* Two such strings and twenty attempts make less than a line of an engine's log. */
#define LONGEST_QUOTED 6000

char *text_reserve(struct text *text, size_t more)
{
    if (text->room - text->length < more) {
        size_t room = text->room ? text->room : 256;
        while (room - text->length < more)
            room *= 2;
        char *bytes = realloc(text->bytes, room);
        if (!bytes)
            die(EXIT_INTERNAL, "out of memory");
        text->bytes = bytes;
        text->room = room;
    }
    return text->bytes + text->length;
}

void text_add(struct text *text, const void *bytes, size_t length)
{
    if (length) {
        memcpy(text_reserve(text, length), bytes, length);
        text->length += length;
    }
}

void text_add_string(struct text *text, const char *string)
{
    text_add(text, string, strlen(string));
}

/* Add at least `width` digits. */
static void add_digits(struct text *text, uint64_t number, int width)
{
    char digits[20];
    int count = 0;
    for (; number || count < width; number /= 10)
        digits[count++] = (char)('0' + number % 10);
    while (count)
        text_add(text, &digits[--count], 1);
}

void text_add_number(struct text *text, int64_t number)
{
    if (number < 0)
        text_add(text, "-", 1);
    add_digits(text, number < 0 ? -(uint64_t)number : (uint64_t)number, 1);
}

void text_add_seconds(struct text *text, int64_t microseconds)
{
    if (microseconds < 0) {
        text_add(text, "-", 1);
        microseconds = -microseconds;
    }
    add_digits(text, (uint64_t)microseconds / 1000000, 1);
    text_add(text, ".", 1);
    add_digits(text, (uint64_t)microseconds % 1000000, 6);
}

/* Add one character of a JSON string; return how many bytes of `string` it took. */
static size_t add_quoted_character(struct text *text, const char *string, size_t left)
{
    static const char HEX[] = "0123456789abcdef";
    unsigned char first = (unsigned char)*string;
    size_t length = utf8_character(string, left);
    if (!length) {
        text_add_string(text, "\\ufffd");
        return 1;
    }
    if (first == '"' || first == '\\') {
        text_add(text, "\\", 1);
    } else if (first < 0x20) {
        char escaped[6] = {'\\', 'u', '0', '0', HEX[first >> 4], HEX[first & 15]};
        text_add(text, escaped, sizeof escaped);
        return 1;
    }
    text_add(text, string, length);
    return length;
}

void text_add_quoted(struct text *text, const char *string)
{
    size_t left = strlen(string), start = text->length;
    text_add(text, "\"", 1);
    while (left && text->length - start < LONGEST_QUOTED) {
        size_t taken = add_quoted_character(text, string, left);
        string += taken;
        left -= taken;
    }
    text_add_string(text, left ? "...\"" : "\"");
}

const char *text_string(struct text *text)
{
    *text_reserve(text, 1) = '\0';
    return text->bytes;
}

void text_remove(struct text *text, size_t count)
{
    text->length -= count;
    if (count && text->length)
        memmove(text->bytes, text->bytes + count, text->length);
}

void text_free(struct text *text)
{
    free(text->bytes);
    *text = (struct text){0};
}
