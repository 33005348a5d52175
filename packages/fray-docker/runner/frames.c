#include "frames.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "system.h"
#include "utf8.h"

#define RS '\x1e'
/* With its newline. Under the 16 KiB at which a log driver cuts, by a margin for what it puts around a line. */
#define LONGEST_LINE 15872
/* How long a line waits for its newline. */
#define PATIENCE (30 * MILLISECOND)
/* How far apart events are at most. */
#define MARK_FRAMES 1024
#define MARK_BYTES (256 * 1024)
/* No more output is taken while this much waits: framed, the next chunk makes four times its size at most, and so
 * less than 256 KiB in all. */
#define ENOUGH (64 * 1024)
#define MOST_AT_ONCE (64 * 1024)

bool frames_open(struct frames *frames, int fd)
{
    *frames = (struct frames){.to = move_high(fd), .line_due = NEVER};
    if (frames->to < 0)
        return false;
    if (fd > 2)
        close(fd);
    make_non_blocking(frames->to);
    return true;
}

static void begin_frame(struct frames *frames)
{
    if (frames->frames_since_event >= MARK_FRAMES || frames->bytes_since_event >= MARK_BYTES)
        frames->mark(frames->subject);
}

static void count_frame(struct frames *frames, size_t length)
{
    frames->frames_since_event++;
    frames->bytes_since_event += (int64_t)length;
    frames->offset += (int64_t)length;
}

static bool is_plain(const char *line, size_t length)
{
    return length < LONGEST_LINE && (!length || line[0] != RS) && utf8_is_valid(line, length);
}

/* Frame a line as it is, its newline included in the length. */
static void put_plain(struct frames *frames, const char *line, size_t length)
{
    begin_frame(frames);
    text_add(&frames->queue, line, length);
    count_frame(frames, length);
}

/* Escape one character, or one byte that is part of none; return how many bytes of `data` it took. */
static size_t escape_one(const char *data, size_t length, char *into, size_t *escaped)
{
    static const char HEX[] = "0123456789abcdef";
    size_t taken = utf8_character(data, length);
    unsigned char first = (unsigned char)*data;
    if (!taken) {
        memcpy(into, (char[]){'\\', 'x', HEX[first >> 4], HEX[first & 15]}, 4);
        *escaped = 4;
        return 1;
    }
    if (first == '\\') {
        memcpy(into, "\\\\", 2);
        *escaped = 2;
        return 1;
    }
    memcpy(into, data, taken);
    *escaped = taken;
    return taken;
}

/* Escape as many whole characters as fit into one line; return how many bytes of `data` these are. */
static size_t escape(struct text *into, const char *data, size_t length)
{
    size_t room = LONGEST_LINE - 3, taken = 0; /* RS, the sign, and the newline */
    char *out = text_reserve(into, room), *end = out + room;
    while (taken < length) {
        char one[4];
        size_t escaped, bytes = escape_one(data + taken, length - taken, one, &escaped);
        if ((size_t)(end - out) < escaped)
            break;
        memcpy(out, one, escaped);
        out += escaped;
        taken += bytes;
    }
    into->length = (size_t)(out - into->bytes);
    return taken;
}

/* Frame the beginning of `data`, escaped, as one piece, whose sign is `last` if that is all of it. */
static size_t put_piece(struct frames *frames, const char *data, size_t length, char last)
{
    begin_frame(frames);
    size_t start = frames->queue.length;
    text_add(&frames->queue, (char[]){RS, '-'}, 2);
    size_t taken = escape(&frames->queue, data, length);
    if (taken == length)
        frames->queue.bytes[start + 1] = last;
    text_add(&frames->queue, "\n", 1);
    count_frame(frames, taken + (taken == length && last == '+'));
    return taken;
}

static void put_pieces(struct frames *frames, const char *data, size_t length, char last)
{
    while (length) {
        size_t taken = put_piece(frames, data, length, last);
        data += taken;
        length -= taken;
    }
}

/* Frame the beginning of a line that is too long for one frame, until the rest of it may fit. */
static void cut_line(struct frames *frames)
{
    size_t cut = 0;
    /* More follows than fits: what is at the cut is a whole character, or no character at all. */
    while (frames->line.length - cut >= LONGEST_LINE)
        cut += put_piece(frames, frames->line.bytes + cut, frames->line.length - cut, '-');
    text_remove(&frames->line, cut);
}

/* Frame what is held of a line whose newline has come. */
static void put_line(struct frames *frames)
{
    struct text *line = &frames->line;
    if (is_plain(line->bytes, line->length)) {
        text_add(line, "\n", 1);
        put_plain(frames, line->bytes, line->length);
    } else {
        put_pieces(frames, line->bytes, line->length, '+');
    }
    line->length = 0;
}

void frames_take(struct frames *frames, const char *data, size_t length)
{
    while (length) {
        const char *newline = memchr(data, '\n', length);
        size_t part = newline ? (size_t)(newline - data) : length;
        if (newline && !frames->line.length && is_plain(data, part)) {
            put_plain(frames, data, part + 1); /* by far the most */
        } else {
            text_add(&frames->line, data, part);
            cut_line(frames);
            if (newline)
                put_line(frames);
        }
        part += newline != NULL;
        data += part;
        length -= part;
    }
    frames->line_due = frames->line.length ? monotonic() + PATIENCE : NEVER;
}

bool frames_has_room(const struct frames *frames)
{
    return frames->queue.length - frames->sent < ENOUGH;
}

void frames_end_line(struct frames *frames)
{
    put_pieces(frames, frames->line.bytes, frames->line.length, '-');
    frames->line.length = 0;
    frames->line_due = NEVER;
}

void frames_end_due_line(struct frames *frames)
{
    struct text *line = &frames->line;
    if (monotonic() < frames->line_due)
        return;
    size_t whole = line->length - utf8_unfinished(line->bytes, line->length);
    put_pieces(frames, line->bytes, whole, '-');
    text_remove(line, whole);
    frames->line_due = NEVER;
}

void frames_put_event(struct frames *frames, const struct text *json)
{
    text_add(&frames->queue, (char[]){RS}, 1);
    text_add(&frames->queue, json->bytes, json->length);
    frames->frames_since_event = frames->bytes_since_event = 0;
}

static void forget_queue(struct frames *frames)
{
    frames->queue.length = frames->sent = 0;
}

static void lose_reader(struct frames *frames)
{
    complain("nobody takes the job's output any more", NULL, strerror(errno));
    frames->is_gone = true;
    forget_queue(frames);
}

void frames_send(struct frames *frames)
{
    struct text *queue = &frames->queue;
    while (!frames->is_gone && frames->sent < queue->length) {
        size_t left = queue->length - frames->sent;
        ssize_t sent = write(frames->to, queue->bytes + frames->sent, left < MOST_AT_ONCE ? left : MOST_AT_ONCE);
        if (sent >= 0)
            frames->sent += (size_t)sent;
        else if (errno == EAGAIN)
            break;
        else if (errno != EINTR)
            lose_reader(frames);
    }
    if (frames->is_gone || frames->sent == queue->length) {
        forget_queue(frames);
        if (!frames->is_gone)
            frames->safe = frames->offset;
    } else if (frames->sent >= ENOUGH) {
        text_remove(queue, frames->sent);
        frames->sent = 0;
    }
}

bool frames_is_waiting(const struct frames *frames)
{
    return frames->sent < frames->queue.length;
}

int64_t frames_dropped(const struct frames *frames)
{
    return frames->is_gone ? frames->offset - frames->safe : 0;
}
