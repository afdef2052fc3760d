/* SPDX-License-Identifier: GPL-2.0-only */
/* The walk over the page allocator's free lists. */
#ifndef VBW_WALK_H
#define VBW_WALK_H

#include <linux/types.h>

/**
 * struct free_walk - how a walk is paced, and what came of it
 * @slice_ns: longest time to hold a zone's lock; 0 takes the module's default
 * @relax: called with no lock held before every slice; may sleep. Returns the
 *	number of blocks that the slice may report (at least 1), or a negative
 *	error number that stops the walk. May be NULL.
 * @blocks: out: blocks reported
 * @pages: out: pages in these blocks
 * @slices: out: how often a zone's lock was taken
 * @longest_hold_ns: out: longest time for which a zone's lock was held
 * @zones: out: populated zones visited
 * @overlong: out: of @slices, held for more than twice @slice_ns
 */
struct free_walk {
	unsigned int slice_ns;
	int (*relax)(void *opaque);

	u64 blocks;
	u64 pages;
	u32 slices;
	u32 longest_hold_ns;
	u32 zones;
	u32 overlong;
};

int walk_free_mem_block(void *opaque, int min_order,
			int (*report_pfn_range)(void *opaque,
						unsigned long pfn,
						unsigned long num));
int walk_free_mem_block_paced(void *opaque, int min_order,
			      int (*report_pfn_range)(void *opaque,
						      unsigned long pfn,
						      unsigned long num),
			      struct free_walk *walk);

#endif /* VBW_WALK_H */
