// SPDX-License-Identifier: GPL-2.0-only
/* Joining of neighbouring page ranges; also compiled in userspace, by a test. */
#include "ranges.h"

/**
 * vbw_range_join - join pages to a range if they touch it on either side
 * @range: the range; an empty one takes any pages
 * @pfn: first page frame number of the pages
 * @num: number of the pages, at least 1
 *
 * Return: 1 if @range now holds the pages too, 0 if it was left as it is.
 */
int vbw_range_join(struct vbw_range *range, __u64 pfn, __u64 num)
{
	if (!range->num) {
		range->pfn = pfn;
		range->num = num;
		return 1;
	}
	if (pfn == range->pfn + range->num) {
		range->num += num;
		return 1;
	}
	if (pfn + num == range->pfn) {
		range->pfn = pfn;
		range->num += num;
		return 1;
	}
	return 0;
}
