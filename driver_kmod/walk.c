// SPDX-License-Identifier: GPL-2.0-only
/*
 * The walk over the page allocator's free blocks.
 *
 * Blocks are read under zone->lock and nothing is changed, neither the blocks
 * nor the order of the lists. A hold of the lock is a "slice", bounded in time and
 * in blocks; between slices the lock is dropped and the CPU offered to others.
 *
 * A free list that is short is read from its tail to its end within one slice. A
 * longer one cannot be resumed: blocks come, go and come back, page
 * reporting and compaction rotate lists, and what a later slice sees does not show
 * which blocks an earlier one has read. So the zone is read by page number
 * instead, at the numbers at which a block of the order may begin. A page number
 * is a position that nobody can move, so a block that stays free is found, whatever
 * happens to others meanwhile.
 *
 * Reading by page number costs one look for each 1 << order pages of the zone
 * that are not part of a larger free block. Pages in use are passed over without
 * the lock: a page that is not free at that moment did not stay free.
 */
#include <linux/export.h>
#include <linux/list.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/page-flags.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/spinlock.h>

#include "compat.h"
#include "hotplug.h"
#include "params.h"
#include "walk.h"

/*
 * Work in a slice. Reading the clock costs as much as reporting a block or as
 * looking at eight pages in use, so it is not read at each. The maximum holds
 * whatever the clock says: a clock that ticks with the timer's interrupt does
 * not advance while interrupts are off.
 */
#define WORK_PER_LOOK 1
#define WORK_PER_BLOCK 8
#define WORK_PER_CLOCK (8 * WORK_PER_BLOCK)
#define WORK_MAX (2048 * WORK_PER_BLOCK)

/* A longer list may take more than a slice, and what was read of it is read again. */
#define LIST_BLOCKS_MAX 128

/* Looking at a page number costs at most a quarter of following a list to a block. */
#define LOOKS_PER_BLOCK 4

/* Pages to pass over without the lock before the pace is asked again. */
#define SKIP_PAGES 32768

/* After this many pages in use in a row the rest is passed over without the lock. */
#define USED_PAGES_MAX 128

/**
 * struct walker - one walk
 * @opaque: for the callbacks
 * @report: the callback for each free block
 * @walk: pace and results
 */
struct walker {
	void *opaque;
	int (*report)(void *opaque, unsigned long pfn, unsigned long num);
	struct free_walk *walk;
};

/**
 * struct slice - one hold of a zone's lock
 * @started: when
 * @room: how many more blocks may be reported
 * @work: done so far
 * @next_clock: the work at which the clock is read again
 * @expired: the time is over
 */
struct slice {
	u64 started;
	unsigned int room;
	unsigned int work;
	unsigned int next_clock;
	bool expired;
};

/**
 * struct scan - reading a zone by page number
 * @zone: the zone
 * @order: of the blocks that are reported
 * @pfn: the page number to look at next
 * @end: the page number after the last one
 * @page: the page structure of @pfn, or NULL if it has to be looked up
 */
struct scan {
	struct zone *zone;
	unsigned int order;
	unsigned long pfn;
	unsigned long end;
	struct page *page;
};

/* Offers the CPU to others. Returns 0 or what stops the walk. */
static int relax(const struct walker *walker, unsigned int *room)
{
	int ret = INT_MAX;

	if (walker->walk->relax)
		ret = walker->walk->relax(walker->opaque);
	else
		cond_resched();
	*room = max(ret, 1);
	return min(ret, 0);
}

static void slice_begin(struct slice *slice, unsigned int room)
{
	*slice = (struct slice){
		.started = local_clock(),
		.room = room,
		.next_clock = WORK_PER_CLOCK,
	};
}

static void slice_end(const struct slice *slice, struct free_walk *walk)
{
	u64 held = local_clock() - slice->started;

	walk->slices++;
	walk->overlong += held > 2ull * walk->slice_ns;
	walk->longest_hold_ns = max_t(u64, walk->longest_hold_ns, min_t(u64, held, U32_MAX));
}

static bool slice_is_over(struct slice *slice, const struct free_walk *walk)
{
	if (slice->work >= slice->next_clock) {
		slice->next_clock = slice->work + WORK_PER_CLOCK;
		slice->expired = local_clock() - slice->started >= walk->slice_ns;
	}
	return slice->expired || !slice->room || slice->work >= WORK_MAX;
}

static int report_block(const struct walker *walker, struct slice *slice,
			const struct page *page, unsigned int order)
{
	struct free_walk *walk = walker->walk;

	walk->blocks++;
	walk->pages += 1ull << order;
	slice->room--;
	slice->work += WORK_PER_BLOCK;
	return walker->report(walker->opaque, page_to_pfn(page), 1UL << order);
}

/* Reads one list as far as the slice goes; *@whole is cleared if that is not to its end. */
static int read_list(const struct walker *walker, struct slice *slice, struct list_head *list,
		     unsigned int order, bool *whole)
{
	struct page *page;
	int ret;

	list_for_each_entry_reverse(page, list, buddy_list) {
		if (slice_is_over(slice, walker->walk)) {
			*whole = false;
			return 0;
		}
		ret = report_block(walker, slice, page, order);
		if (ret)
			return ret;
	}
	return 0;
}

/* Reads the lists of an order within one slice; *@whole says whether they fit. */
static int read_lists(const struct walker *walker, struct zone *zone, unsigned int order,
		      bool *whole)
{
	struct free_area *area = &zone->free_area[order];
	struct slice slice;
	unsigned long flags;
	unsigned int room;
	int mt, ret;

	ret = relax(walker, &room);
	if (ret)
		return ret;
	spin_lock_irqsave(&zone->lock, flags);
	slice_begin(&slice, room);
	*whole = area->nr_free <= room;
	for (mt = 0; mt < MIGRATE_TYPES && *whole && !ret; mt++)
		ret = read_list(walker, &slice, &area->free_list[mt], order, whole);
	slice_end(&slice, walker->walk);
	spin_unlock_irqrestore(&zone->lock, flags);
	return ret;
}

/*
 * Finds the page structure of scan->pfn, or of the next page number that has one,
 * or returns NULL at @end. Memory goes online and offline by whole pageblocks.
 */
static struct page *scan_page(struct scan *scan, unsigned long end)
{
	const unsigned long unit = max(pageblock_nr_pages, 1UL << scan->order);

	while (scan->pfn < end) {
		if (scan->page && scan->pfn % pageblock_nr_pages)
			return scan->page;
		scan->page = NULL;
		if (!vbw_hotplug_leaving(scan->pfn))
			scan->page = pfn_to_online_page(scan->pfn);
		if (scan->page)
			return scan->page;
		scan->pfn = ALIGN(scan->pfn + 1, unit);
	}
	return NULL;
}

static void scan_advance(struct scan *scan, unsigned long pages)
{
	scan->pfn += pages;
	scan->page += pages;
}

/*
 * Passes over pages in use, without the lock and for a bounded number of pages.
 * Returns whether the page that it has come to is a free one.
 */
static bool skip_used(struct scan *scan)
{
	const unsigned long end = min(scan->end, scan->pfn + SKIP_PAGES);
	struct page *page;

	for (;;) {
		page = scan_page(scan, end);
		if (!page)
			return false;
		if (PageBuddy(page))
			return true;
		scan_advance(scan, 1UL << scan->order);
	}
}

/*
 * Looks at one page under the lock and advances to the next. A page's order may
 * be believed only under its own zone's lock.
 */
static int scan_block(const struct walker *walker, struct slice *slice, struct scan *scan,
		      struct page *page, unsigned int *used)
{
	unsigned int order = scan->order;
	int ret = 0;

	slice->work += WORK_PER_LOOK;
	++*used;
	if (PageBuddy(page) && page_zone(page) == scan->zone) {
		order = max_t(unsigned int, page_private(page), scan->order);
		*used = 0;
		if (page_private(page) == scan->order)
			ret = report_block(walker, slice, page, order);
	}
	scan_advance(scan, 1UL << order);
	return ret;
}

static int scan_slice(const struct walker *walker, struct scan *scan, unsigned int room)
{
	struct slice slice;
	unsigned int used = 0;
	unsigned long flags;
	struct page *page;
	int ret = 0;

	spin_lock_irqsave(&scan->zone->lock, flags);
	slice_begin(&slice, room);
	while (!ret && used < USED_PAGES_MAX && !slice_is_over(&slice, walker->walk)) {
		page = scan_page(scan, scan->end);
		if (!page)
			break;
		ret = scan_block(walker, &slice, scan, page, &used);
	}
	slice_end(&slice, walker->walk);
	spin_unlock_irqrestore(&scan->zone->lock, flags);
	return ret;
}

/* Reports the blocks of one order by reading the zone by page number. */
static int scan_zone(const struct walker *walker, struct zone *zone, unsigned int order)
{
	struct scan scan = {
		.zone = zone,
		.order = order,
		.pfn = ALIGN(zone->zone_start_pfn, 1UL << order),
		.end = zone_end_pfn(zone),
	};
	unsigned int room;
	int ret;

	while (scan.pfn < scan.end) {
		ret = relax(walker, &room);
		if (ret)
			return ret;
		vbw_hotplug_read_lock();
		scan.page = NULL; /* it was not kept while the lock was not held */
		if (skip_used(&scan))
			ret = scan_slice(walker, &scan, room);
		vbw_hotplug_read_unlock();
		if (ret)
			return ret;
	}
	return 0;
}

/* Whether the lists of an order are cheap to read, and likely to fit into a slice. */
static bool lists_are_short(const struct zone *zone, unsigned int order)
{
	const unsigned long blocks = READ_ONCE(zone->free_area[order].nr_free);

	return blocks <= LIST_BLOCKS_MAX &&
	       blocks * LOOKS_PER_BLOCK < zone->spanned_pages >> order;
}

static int walk_order(const struct walker *walker, struct zone *zone, unsigned int order)
{
	bool whole;
	int ret;

	/* A block that stays free is counted at any moment. */
	if (!READ_ONCE(zone->free_area[order].nr_free))
		return 0;
	if (lists_are_short(zone, order)) {
		ret = read_lists(walker, zone, order, &whole);
		if (ret || whole)
			return ret;
	}
	return scan_zone(walker, zone, order);
}

static int walk_zone(const struct walker *walker, struct zone *zone, int min_order)
{
	int order, ret;

	for (order = VBW_MAX_ORDER; order >= min_order; order--) {
		ret = walk_order(walker, zone, order);
		if (ret)
			return ret;
	}
	return 0;
}

/**
 * walk_free_mem_block_paced - report the free blocks of the system, at a pace
 * @opaque: for the callback
 * @min_order: smallest order to report; values below 0 count as 0
 * @report_pfn_range: as for walk_free_mem_block()
 * @walk: the pace, and what came of the walk (also when it was stopped)
 *
 * Return: as walk_free_mem_block(), or the negative error number with which
 * @walk->relax stopped the walk.
 */
int walk_free_mem_block_paced(void *opaque, int min_order,
			      int (*report_pfn_range)(void *opaque,
						      unsigned long pfn,
						      unsigned long num),
			      struct free_walk *walk)
{
	const struct walker walker = {
		.opaque = opaque,
		.report = report_pfn_range,
		.walk = walk,
	};
	struct zone *zone;
	int nid, i, ret;

	might_sleep();
	if (!walk->slice_ns)
		walk->slice_ns = vbw_slice_ns();
	min_order = max(min_order, 0);
	for_each_online_node(nid) {
		for (i = 0; i < MAX_NR_ZONES; i++) {
			zone = &NODE_DATA(nid)->node_zones[i];
			if (!populated_zone(zone))
				continue;
			walk->zones++;
			ret = walk_zone(&walker, zone, min_order);
			if (ret)
				return ret;
		}
	}
	return 0;
}
EXPORT_SYMBOL_GPL(walk_free_mem_block_paced);

/**
 * walk_free_mem_block - report the free blocks of the system
 * @opaque: for the callback
 * @min_order: smallest order to report
 * @report_pfn_range: called for each free block with its first page frame
 *	number and the number of pages in it
 *
 * Visits every populated zone, in it every order from the largest down to
 * @min_order, in it every migrate type. Sleeps between slices, so it must not be
 * called from atomic context.
 *
 * The callback is called under zone->lock with interrupts off. It must not
 * sleep, must not allocate memory (not even atomically) and should do as little
 * as it can; heavy work is for later. If it returns anything but 0, the walk
 * stops.
 *
 * A block that stays in its free list for the whole walk is reported. A block may
 * be reported more than once, and may stop being free as soon as the lock is
 * dropped: whoever uses the report has to detect or to prevent the use of these
 * pages. Detecting means to track writes from before the walk began, and to
 * treat a page that was written since as not free. Low orders are volatile; large
 * blocks come first.
 *
 * Return: 0 if the walk was complete, else what the callback returned.
 */
int walk_free_mem_block(void *opaque, int min_order,
			int (*report_pfn_range)(void *opaque,
						unsigned long pfn,
						unsigned long num))
{
	struct free_walk walk = {};

	return walk_free_mem_block_paced(opaque, min_order, report_pfn_range, &walk);
}
EXPORT_SYMBOL_GPL(walk_free_mem_block);
