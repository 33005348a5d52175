#include "utf8.h"

#include <stdint.h>
#include <string.h>

/* The second byte's range depends on the first: this is what rules out surrogates and overlong forms. */
static bool is_second(unsigned char first, unsigned char second)
{
    switch (first) {
    case 0xE0:
        return second >= 0xA0 && second <= 0xBF;
    case 0xED:
        return second >= 0x80 && second <= 0x9F;
    case 0xF0:
        return second >= 0x90 && second <= 0xBF;
    case 0xF4:
        return second >= 0x80 && second <= 0x8F;
    default:
        return second >= 0x80 && second <= 0xBF;
    }
}

static size_t length_by_first(unsigned char first)
{
    if (first < 0x80)
        return 1;
    if (first < 0xC2 || first > 0xF4)
        return 0;
    return first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

size_t utf8_character(const char *bytes, size_t length)
{
    const unsigned char *at = (const unsigned char *)bytes;
    size_t needed = length ? length_by_first(at[0]) : 0;
    if (needed < 2)
        return needed;
    if (length < needed || !is_second(at[0], at[1]))
        return 0;
    for (size_t i = 2; i < needed; i++)
        if ((at[i] & 0xC0) != 0x80)
            return 0;
    return needed;
}

size_t utf8_unfinished(const char *bytes, size_t length)
{
    const unsigned char *end = (const unsigned char *)bytes + length;
    for (size_t count = 1; count <= 3 && count <= length; count++) {
        const unsigned char *first = end - count;
        if ((*first & 0xC0) == 0x80)
            continue;
        bool is_unfinished = length_by_first(*first) > count && (count < 2 || is_second(first[0], first[1]));
        return is_unfinished ? count : 0;
    }
    return 0;
}

bool utf8_is_valid(const char *bytes, size_t length)
{
    const uint64_t high_bits = 0x8080808080808080;
    while (length) {
        /* Output is ASCII for the most part: eight characters at a time. */
        for (uint64_t word; length >= sizeof word; bytes += sizeof word, length -= sizeof word) {
            memcpy(&word, bytes, sizeof word);
            if (word & high_bits)
                break;
        }
        /* Either fewer than eight are left, or one of the next eight is not ASCII. */
        for (int i = 0; i < 8 && length; i++) {
            size_t taken = utf8_character(bytes, length);
            if (!taken)
                return false;
            bytes += taken;
            length -= taken;
        }
    }
    return true;
}
