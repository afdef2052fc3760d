// SPDX-License-Identifier: GPL-2.0-only
/*
 * The walk over the page allocator's free lists.
 *
 * The lists are read under zone->lock and nothing is taken off them. A hold of
 * the lock is a "slice", bounded in time and in blocks; between slices the lock
 * is dropped and the CPU offered to others.
 *
 * Resuming a list. A list is read from its tail. When a slice ends, the list is
 * rotated, as page reporting does it, so that the block that comes next is the
 * tail: allocations take from the other end, where the blocks are that have
 * been read. Nobody reorders a free list but by rotating it (page reporting,
 * compaction); blocks come and go at either end or are taken from the middle. So
 * two blocks are enough to know where the walk stands: the one that is next
 * (@resume) and the one that was read first (@first). What stays in the list
 * lies on the circle either between @resume and @first, still to be read, or
 * between @first and @resume, read already. The walk of the list is over when,
 * within one slice, @first follows @resume, or when the slice has read the list
 * to its end.
 *
 * A slice that ends before it came to @resume has begun anywhere: somebody has
 * rotated the list, or @resume is gone and much was added. All that is known to
 * be read then is what this slice has read, so its beginning becomes @first.
 * @limit bounds how often that can happen. (One case is left: @resume left the
 * list and came back at its tail, and the list was rotated too, both between two
 * slices. Then a part of the list can be passed over.)
 */
#include <linux/export.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/spinlock.h>

#include "compat.h"
#include "vbw.h"
#include "walk.h"

/* Reading the clock costs as much as a block; so not at each. */
#define BLOCKS_PER_CLOCK 8

/*
 * Most blocks in a slice, whatever the clock says: a clock that ticks with the
 * timer's interrupt stands still while interrupts are off.
 */
#define SLICE_BLOCKS_MAX 2048

/**
 * struct list_position - where the walk of one free list stands
 * @first: the block that was read first
 * @resume: the block that comes next after a slice; NULL in the first slice
 * @passed: @resume has been seen in this slice
 * @seen: blocks read so far, repetitions included
 * @limit: of @seen, so that a list that keeps changing cannot hold the walk
 * @more: the slice ended before the list did
 */
struct list_position {
	const struct page *first;
	const struct page *resume;
	bool passed;
	unsigned long seen;
	unsigned long limit;
	bool more;
};

static unsigned int slice_room(void *opaque, struct free_walk *walk, int *err)
{
	int room = INT_MAX;

	if (walk->relax)
		room = walk->relax(opaque);
	else
		cond_resched();
	*err = min(room, 0);
	return clamp(room, 1, SLICE_BLOCKS_MAX);
}

/* True when @page closes the circle (see the top of this file). */
static bool list_is_read(struct list_position *pos, const struct page *page)
{
	if (!pos->resume)
		return false;
	if (page == pos->resume)
		pos->passed = true;
	return page == pos->first && pos->passed;
}

static bool slice_is_over(u64 started, unsigned int blocks, unsigned int room,
			  unsigned int slice_ns)
{
	if (blocks >= room)
		return true;
	if (!blocks || blocks % BLOCKS_PER_CLOCK)
		return false;
	return local_clock() - started >= slice_ns;
}

/* Ends the slice before @page, which is where the next one begins. */
static void stop_before(struct list_position *pos, struct list_head *list, struct page *page,
			const struct page *begun_with)
{
	if (pos->resume && !pos->passed)
		pos->first = begun_with;
	if (!list_is_last(&page->buddy_list, list))
		list_rotate_to_front(page->buddy_list.next, list);
	pos->resume = page;
	pos->more = true;
}

static void note_hold(struct free_walk *walk, u64 started)
{
	u64 held = local_clock() - started;

	walk->slices++;
	walk->overlong += held > 2ull * walk->slice_ns;
	walk->longest_hold_ns = max_t(u64, walk->longest_hold_ns, min_t(u64, held, U32_MAX));
}

/**
 * walk_free_list_slice - read a free list for as long as one slice lasts
 * @opaque: for the callback
 * @zone: the zone
 * @order: the order of the list
 * @mt: the migrate type of the list
 * @report_pfn_range: called for each free block, under zone->lock
 * @walk: pace and results
 * @pos: where the walk of this list stands
 * @room: how many blocks may be reported
 *
 * Return: 0, or what the callback returned if that was not 0.
 */
static int walk_free_list_slice(void *opaque, struct zone *zone, int order, int mt,
				int (*report_pfn_range)(void *, unsigned long, unsigned long),
				struct free_walk *walk, struct list_position *pos,
				unsigned int room)
{
	struct free_area *area = &zone->free_area[order];
	struct list_head *list = &area->free_list[mt];
	const struct page *begun_with = NULL;
	unsigned int blocks = 0;
	unsigned long flags;
	struct page *page;
	int ret = 0;
	u64 started;

	spin_lock_irqsave(&zone->lock, flags);
	started = local_clock();
	pos->more = false;
	pos->passed = false;
	pos->limit = max(pos->limit, 4 * area->nr_free + 1024);
	list_for_each_entry_reverse(page, list, buddy_list) {
		if (list_is_read(pos, page))
			break;
		if (slice_is_over(started, blocks, room, walk->slice_ns)) {
			stop_before(pos, list, page, begun_with);
			break;
		}
		if (!begun_with)
			begun_with = page;
		if (!pos->first)
			pos->first = page;
		blocks++;
		ret = report_pfn_range(opaque, page_to_pfn(page), 1UL << order);
		if (ret)
			break;
	}
	note_hold(walk, started);
	spin_unlock_irqrestore(&zone->lock, flags);

	pos->seen += blocks;
	walk->blocks += blocks;
	walk->pages += (u64)blocks << order;
	return ret;
}

/**
 * walk_free_page_list - report the blocks of one free list
 * @opaque: for the callback
 * @zone: the zone
 * @order: the order of the list
 * @mt: the migrate type of the list
 * @report_pfn_range: called for each free block, under zone->lock
 * @walk: pace and results
 *
 * Return: 0 when the list has been read, else what the callback returned, or
 * the negative error number of the pace's relax().
 */
static int walk_free_page_list(void *opaque, struct zone *zone, int order, enum migratetype mt,
			       int (*report_pfn_range)(void *, unsigned long, unsigned long),
			       struct free_walk *walk)
{
	struct list_position pos = {};
	unsigned int room;
	int ret;

	do {
		if (pos.limit && pos.seen >= pos.limit) {
			walk->cut = true;
			return 0;
		}
		room = slice_room(opaque, walk, &ret);
		if (ret)
			return ret;
		ret = walk_free_list_slice(opaque, zone, order, mt, report_pfn_range,
					   walk, &pos, room);
		if (ret)
			return ret;
	} while (pos.more);
	return 0;
}

static int walk_zone(void *opaque, struct zone *zone, int min_order,
		     int (*report_pfn_range)(void *, unsigned long, unsigned long),
		     struct free_walk *walk)
{
	int order, mt, ret;

	for (order = VBW_MAX_ORDER; order >= min_order; order--) {
		for (mt = 0; mt < MIGRATE_TYPES; mt++) {
			ret = walk_free_page_list(opaque, zone, order, mt,
						  report_pfn_range, walk);
			if (ret)
				return ret;
		}
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
			ret = walk_zone(opaque, zone, min_order, report_pfn_range, walk);
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
 * @min_order, in it every migrate type. May sleep between the lists, so it must
 * not be called from atomic context.
 *
 * The callback is called under zone->lock with interrupts off. It must not
 * sleep, must not allocate memory (not even atomically) and should do as little
 * as it can; heavy work is for later. If it returns anything but 0, the walk
 * stops.
 *
 * A block may be reported more than once, and may stop being free as soon as
 * the lock is dropped: whoever uses the report has to detect or to prevent the
 * use of these pages. Detecting means to track writes from before the walk
 * began, and to treat a page that was written since as not free. Low orders are
 * volatile; large blocks come first.
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
