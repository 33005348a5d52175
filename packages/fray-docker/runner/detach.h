/* Outliving the caller. */

#ifndef FRAY_DETACH_H
#define FRAY_DETACH_H

#include <sys/types.h>

/* Leave the caller behind, and put a guard above the runner; return the guard's process id, in the runner.
 *
 * The guard does nothing until the runner dies without having ended its job: then, as the next subreaper up, it
 * inherits what is left of the tree and kills it. It holds the same descriptors, so that a lock held by the job is free
 * only when all of the job is gone. */
pid_t detach(void);

#endif
