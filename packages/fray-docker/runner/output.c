#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "system.h"

#define CHUNK (32 * 1024)
/* An output directory's files are of this size: whoever reads a range of the output reads few of them. */
#define SEGMENT (4 * 1024 * 1024)
#define TO_APPEND (O_WRONLY | O_CREAT | O_APPEND)

static bool open_pipe(struct output *output)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return false;
    output->read_end = ends[0];
    output->write_end = ends[1];
    make_non_blocking(output->read_end);
    return true;
}

static int open_segment(const char *directory, int64_t number)
{
    struct text path = {0};
    text_add_string(&path, directory);
    for (int64_t least = 10000000; least > 1 && number < least; least /= 10)
        text_add_string(&path, "0");
    text_add_number(&path, number);
    int fd = open_fd(text_string(&path), TO_APPEND);
    text_free(&path);
    return fd;
}

bool output_open(struct output *output, const char *where, const char *copy, struct text *problem)
{
    bool is_directory = where[strlen(where) - 1] == '/';
    *output = (struct output){.directory = is_directory ? where : "", .copy = -1};
    const char *failed = where;
    output->to = is_directory ? open_segment(where, 0) : open_fd(where, TO_APPEND);
    if (output->to >= 0 && copy) {
        failed = copy;
        output->copy = open_fd(copy, TO_APPEND);
    }
    if (output->to < 0 || (copy && output->copy < 0) || !open_pipe(output)) {
        text_add_string(problem, "cannot open the output ");
        text_add_string(problem, failed);
        text_add_string(problem, ": ");
        text_add_string(problem, strerror(errno));
        return false;
    }
    struct stat status;
    if (fstat(output->to, &status) == 0)
        output->offset = status.st_size;
    return true;
}

bool output_open_framed(struct output *output, struct frames *frames)
{
    *output = (struct output){.frames = frames, .directory = "", .to = -1, .copy = -1};
    if (!open_pipe(output) || dup2(output->write_end, 1) < 0 || dup2(output->write_end, 2) < 0)
        return false;
    close(output->write_end);
    output->write_end = 1;
    return true;
}

static void turn_to(struct output *output, int64_t number)
{
    if (number == output->number)
        return;
    int following = open_segment(output->directory, number);
    if (following >= 0) {
        close(output->to);
        output->to = following;
        output->number = number;
    }
}

/* Write into the directory's file that the offset falls into. */
static ssize_t write_segment(struct output *output, const char *data, size_t length)
{
    int64_t number = output->offset / SEGMENT;
    size_t left = SEGMENT - (size_t)(output->offset % SEGMENT);
    turn_to(output, number);
    if (output->number != number)
        return -1;
    ssize_t written = write(output->to, data, length < left ? length : left);
    if (written == (ssize_t)left)
        turn_to(output, number + 1); /* at once: whoever has read this file looks for the next */
    return written;
}

static void keep(struct output *output, const char *data, size_t length)
{
    if (output->copy >= 0 && write(output->copy, data, length) < 0) {
        /* The one that counts is the other. */
    }
    while (length) {
        ssize_t written =
            *output->directory ? write_segment(output, data, length) : write(output->to, data, length);
        if (written >= 0) {
            output->offset += written;
            data += written;
            length -= (size_t)written;
        } else if (errno == EAGAIN) {
            wait_for_fd(output->to, POLLOUT, NEVER);
        } else if (errno != EINTR) {
            /* A full disk must neither block nor kill the job: what is lost is counted, and reported. */
            output->dropped += (int64_t)length;
            return;
        }
    }
}

bool output_pump(struct output *output)
{
    static char chunk[CHUNK];
    if (!output_has_room(output))
        return false;
    ssize_t count = read(output->read_end, chunk, sizeof chunk);
    if (count <= 0)
        return false;
    if (output->frames)
        frames_take(output->frames, chunk, (size_t)count);
    else
        keep(output, chunk, (size_t)count);
    return true;
}

bool output_has_room(const struct output *output)
{
    return !output->frames || frames_has_room(output->frames);
}

int64_t output_size(const struct output *output)
{
    if (output->frames)
        return output->frames->offset + (int64_t)output->frames->line.length;
    return output->offset;
}

int64_t output_dropped(const struct output *output)
{
    return output->frames ? frames_dropped(output->frames) : output->dropped;
}
