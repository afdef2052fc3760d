/* SPDX-License-Identifier: GPL-2.0-only */
/* Joining of neighbouring page ranges; also compiled in userspace, by a test. */
#ifndef VBW_RANGES_H
#define VBW_RANGES_H

#include <linux/types.h>

/**
 * struct vbw_range - the pages [pfn, pfn + num); num 0 is no range
 * @pfn: first page frame number
 * @num: number of pages
 */
struct vbw_range {
	__u64 pfn;
	__u64 num;
};

int vbw_range_join(struct vbw_range *range, __u64 pfn, __u64 num);

#endif /* VBW_RANGES_H */
