/* Whether the kernel killed for lack of memory. */

#ifndef FRAY_OOM_H
#define FRAY_OOM_H

#include <stdint.h>

/* How often it did: in this cgroup where it says, else on the machine. */
int64_t count_oom_kills(void);

#endif
