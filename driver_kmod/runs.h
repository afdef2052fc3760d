/* SPDX-License-Identifier: GPL-2.0-only */
/* Where the page structures of this kernel are. */
#ifndef VBW_RUNS_H
#define VBW_RUNS_H

#include <linux/types.h>

#include "vballoon_walk_wire.h"

/**
 * struct vbw_runs - pages of one node and zone whose structures are contiguous
 * @run: the runs
 * @nr: how many
 * @max: room in @run
 * @partial: some memory is in no run
 */
struct vbw_runs {
	struct vballoon_walk_memmap_run *run;
	unsigned int nr;
	unsigned int max;
	bool partial;
};

u64 vbw_runs_base(void);
bool vbw_runs_possible(void);
int vbw_runs_collect(struct vbw_runs *runs);
void vbw_runs_free(struct vbw_runs *runs);

#endif /* VBW_RUNS_H */
