// SPDX-License-Identifier: GPL-2.0-only
/*
 * Another module that uses walk_free_mem_block() and logs the result when it is loaded.
 *
 * With holds=N it says instead what the machine does to N stretches of hold_us microseconds
 * with interrupts off in which nothing is done: what comes on top is not the walk's doing.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bitmap.h>
#include <linux/irqflags.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/spinlock.h>
#include <linux/vmalloc.h>

#include "walk.h"

static int min_order;
module_param(min_order, int, 0444);
static ulong stop_after;
module_param(stop_after, ulong, 0444);
static int stop_with;
module_param(stop_with, int, 0444);
static uint holds;
module_param(holds, uint, 0444);
static uint hold_us = 50;
module_param(hold_us, uint, 0444);

struct seen {
	struct zone *zone;	/* of the last block */
	unsigned long num;	/* of the last block */
	unsigned long blocks;
	unsigned long pages;	/* each counted once */
	unsigned long again;	/* blocks reported before */
	unsigned long *bits;	/* one for each page frame number */
	unsigned long least;
	unsigned long zones;
	unsigned long rises;	/* a larger block after a smaller one of the zone */
	unsigned long unlocked;	/* calls without the zone's lock, or with interrupts */
	unsigned long used;	/* blocks that are not free */
};

static int see(void *opaque, unsigned long pfn, unsigned long num)
{
	struct page *page = pfn_to_page(pfn);
	struct zone *zone = page_zone(page);
	struct seen *seen = opaque;

	seen->zones += zone != seen->zone;
	seen->rises += zone == seen->zone && num > seen->num;
	seen->unlocked += !irqs_disabled() || !spin_is_locked(&zone->lock);
	seen->used += !PageBuddy(page);
	seen->zone = zone;
	seen->num = num;
	if (test_bit(pfn, seen->bits))
		seen->again++;
	else
		seen->pages += num;
	bitmap_set(seen->bits, pfn, num);
	seen->least = min(seen->least, num);
	return ++seen->blocks == stop_after ? stop_with : 0;
}

static void control(void)
{
	const u64 bound = hold_us * 1000ull;
	u64 started, held, longest = 0;
	unsigned int i, overlong = 0;
	unsigned long flags;

	for (i = 0; i < holds; i++) {
		local_irq_save(flags);
		started = local_clock();
		do {
			held = local_clock() - started;
		} while (held < bound);
		local_irq_restore(flags);
		longest = max(longest, held);
		overlong += held > 2 * bound;
		cond_resched();
	}
	pr_info("control longest_hold_ns=%llu overlong=%u slices=%u\n", longest, overlong, holds);
}

static int __init caller_init(void)
{
	struct seen seen = { .least = ULONG_MAX };
	unsigned long end = 0;
	int nid, ret;

	if (holds) {
		control();
		return 0;
	}
	for_each_online_node(nid)
		end = max(end, node_end_pfn(nid));
	seen.bits = vzalloc(BITS_TO_LONGS(end) * sizeof(long));
	if (!seen.bits)
		return -ENOMEM;
	ret = walk_free_mem_block(&seen, min_order, see);
	pr_info("walk ret=%d blocks=%lu pages=%lu least=%lu zones=%lu rises=%lu unlocked=%lu used=%lu again=%lu\n",
		ret, seen.blocks, seen.pages, seen.least, seen.zones, seen.rises, seen.unlocked,
		seen.used, seen.again);
	vfree(seen.bits);
	return 0;
}
module_init(caller_init);

static void __exit caller_exit(void)
{
}
module_exit(caller_exit);

MODULE_DESCRIPTION("Caller of walk_free_mem_block()");
MODULE_LICENSE("GPL");
