// SPDX-License-Identifier: GPL-2.0-only
/* The free lists that walk.c reads in userspace, and what others may do to them between slices. */
#include "kernel.h"

#define PAGES_MAX 512

struct pglist_data node;
struct page pages[PAGES_MAX];

static u64 clock_now;
static u64 clock_step;
static int hotplug_depth;
static unsigned long hotplug_period;
static unsigned long lookup_period[PAGES_MAX / pageblock_nr_pages];
static void (*unlocked)(void);

static struct zone *zone(void)
{
	return &node.node_zones[0];
}

static struct list_head *head(unsigned int order, unsigned int mt)
{
	return &zone()->free_area[order].free_list[mt];
}

static void list_insert(struct list_head *entry, struct list_head *after)
{
	entry->prev = after;
	entry->next = after->next;
	after->next->prev = entry;
	after->next = entry;
}

static void list_remove(struct list_head *entry)
{
	entry->prev->next = entry->next;
	entry->next->prev = entry->prev;
}

/* Makes an empty zone. @callback is called where a page is looked up without the lock. */
void zone_make(unsigned long start, unsigned long end, u64 step, void (*callback)(void))
{
	unsigned int order, mt, i;

	node = (struct pglist_data){};
	for (i = 0; i < PAGES_MAX; i++)
		pages[i] = (struct page){};
	zone()->zone_start_pfn = start;
	zone()->spanned_pages = end - start;
	for (order = 0; order <= VBW_MAX_ORDER; order++) {
		for (mt = 0; mt < MIGRATE_TYPES; mt++) {
			head(order, mt)->next = head(order, mt);
			head(order, mt)->prev = head(order, mt);
		}
	}
	clock_now = 0;
	clock_step = step;
	hotplug_depth = 0;
	hotplug_period++;
	unlocked = callback;
}

/* A page that looks like a free block of the largest order in another zone. */
void page_elsewhere(unsigned long pfn)
{
	pages[pfn].other_zone = true;
	pages[pfn].buddy = true;
	pages[pfn].private = VBW_MAX_ORDER;
}

void page_offline(unsigned long pfn)
{
	pages[pfn].offline = true;
}

void add(unsigned long pfn, unsigned int order, unsigned int mt, bool tail)
{
	struct page *page = &pages[pfn];

	page->buddy = true;
	page->private = order;
	list_insert(&page->buddy_list, tail ? head(order, mt)->prev : head(order, mt));
	zone()->free_area[order].nr_free++;
}

/* Whoever takes a block may use its fields for something else. */
void take(unsigned long pfn, unsigned long private)
{
	list_remove(&pages[pfn].buddy_list);
	zone()->free_area[pages[pfn].private].nr_free--;
	pages[pfn].buddy = false;
	pages[pfn].private = private;
}

/* Moves the head of a block's list to just after the block. */
void rotate(unsigned long pfn, unsigned int mt)
{
	struct list_head *list = head(pages[pfn].private, mt);

	list_remove(list);
	list_insert(list, &pages[pfn].buddy_list);
}

int lock_depth(void)
{
	return zone()->lock;
}

int hotplug_lock_depth(void)
{
	return hotplug_depth;
}

u64 local_clock(void)
{
	clock_now += clock_step;
	return clock_now;
}

/* Page structures are kept only while memory cannot go offline. */
struct page *looked_up(struct page *page)
{
	if (!hotplug_depth || lookup_period[(page - pages) / pageblock_nr_pages] != hotplug_period)
		__builtin_trap();
	return page;
}

struct page *pfn_to_online_page(unsigned long pfn)
{
	if (!hotplug_depth)
		__builtin_trap();
	if (!zone()->lock)
		unlocked();
	lookup_period[pfn / pageblock_nr_pages] = hotplug_period;
	return pages[pfn].offline ? NULL : &pages[pfn];
}

void vbw_hotplug_read_lock(void)
{
	hotplug_depth++;
	hotplug_period++;
}

void vbw_hotplug_read_unlock(void)
{
	hotplug_depth--;
}

bool vbw_hotplug_leaving(unsigned long pfn)
{
	return pages[pfn].offline && pfn % 16 < 8;
}
