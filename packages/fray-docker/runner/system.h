/* What the system is asked for in more than one place: files, descriptors, and a last word on standard error. */

#ifndef FRAY_SYSTEM_H
#define FRAY_SYSTEM_H

#include <stdbool.h>
#include <stdint.h>

#include "clock.h"
#include "text.h"

/* How the process itself may end. */
#define EXIT_USAGE 64
#define EXIT_INTERNAL 70

/* What an engine is taken to have done, in the words of every `ended` event that says so. */
#define ENGINE_STOPPED "the engine stopped the container (docker stop, or the engine was shut down)"

/* Say something on the runner's own standard error. */
void complain(const char *what, const char *of_what, const char *why);

/* Say why, and end the process. */
_Noreturn void die(int exit_code, const char *why);

/* Move a descriptor to where nothing is by number, kept from the command. */
int move_high(int fd);

/* Move the runner's own standard error out of the way; what is behind descriptor 2 from now on is somebody else's. */
void move_standard_error(void);

/* Have something behind the descriptors 0, 1 and 2, which a caller may have closed: no journal is to get these. */
void occupy_standard_descriptors(void);

/* Make standard input empty. */
void close_standard_input(void);

/* Open a path, or take the descriptor that `fd:N` names; -1 and errno where that is not possible. */
int open_fd(const char *where, int flags);

/* Keep a descriptor from the command. */
bool keep_to_oneself(int fd);

void make_non_blocking(int fd);

/* Wait until a moment has come, or `fd` is ready for `events`. */
void wait_for_fd(int fd, short events, microseconds until);

/* Read a whole file in place of what `into` held; false where it cannot be read. */
bool read_file(const char *path, struct text *into);

bool parse_number(const char *text, int64_t *into);

/* Hear TERM, INT, PWR and CHLD through a descriptor, be deaf to HUP, and survive writing where nobody reads. */
int open_signals(void);

/* The next signal that has come; 0 where there is none. */
int next_signal(int signals);

#endif
