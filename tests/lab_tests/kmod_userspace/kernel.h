/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * As much of a kernel as walk.c needs: one zone whose start is not aligned, three
 * orders, two migrate types, pages of another zone and pages that are offline
 * between its own. The clock advances by a settable step whenever it is read.
 */
#ifndef KERNEL_H
#define KERNEL_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t u64;
typedef uint32_t u32;
#define U32_MAX UINT32_MAX

#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define min_t(type, a, b) min((type)(a), (type)(b))
#define max_t(type, a, b) max((type)(a), (type)(b))
#define ALIGN(x, a) (((x) + (a) - 1) / (a) * (a))
#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define EXPORT_SYMBOL_GPL(symbol) _Static_assert(sizeof(&(symbol)), "")
#define might_sleep() ((void)0)
#define cond_resched() ((void)0)

struct list_head {
	struct list_head *next, *prev;
};

struct page {
	struct list_head buddy_list;
	unsigned long private;
	bool buddy;
	bool other_zone;
	bool offline;
};

#define list_page(entry) ((struct page *)(entry))
#define list_for_each_entry_reverse(pos, head, member) \
	for (pos = list_page((head)->prev); &pos->member != (head); \
	     pos = list_page(pos->member.prev))

enum migratetype { MIGRATE_UNMOVABLE, MIGRATE_MOVABLE, MIGRATE_TYPES };

#define VBW_MAX_ORDER 2
#define pageblock_nr_pages 8ul

struct zone {
	int lock;
	unsigned long zone_start_pfn;
	unsigned long spanned_pages;
	struct free_area {
		struct list_head free_list[MIGRATE_TYPES];
		unsigned long nr_free;
	} free_area[VBW_MAX_ORDER + 1];
};

#define MAX_NR_ZONES 2

struct pglist_data {
	struct zone node_zones[MAX_NR_ZONES];
};

extern struct pglist_data node;
extern struct page pages[];

u64 local_clock(void);
struct page *pfn_to_online_page(unsigned long pfn);
struct page *looked_up(struct page *page);
void vbw_hotplug_read_lock(void);
void vbw_hotplug_read_unlock(void);
bool vbw_hotplug_leaving(unsigned long pfn);

#define NODE_DATA(nid) (&node)
#define for_each_online_node(nid) for ((nid) = 0; (nid) < 1; (nid)++)
#define populated_zone(zone) ((zone)->spanned_pages > 0)
#define zone_end_pfn(zone) ((zone)->zone_start_pfn + (zone)->spanned_pages)
#define page_to_pfn(page) ((unsigned long)((page) - pages))
#define page_private(page) ((page)->private)
#define page_zone(page) (&node.node_zones[(page)->other_zone])
#define PageBuddy(page) READ_ONCE(looked_up(page)->buddy)
#define spin_lock_irqsave(spinlock, flags) ((flags) = (unsigned long)++*(spinlock))
#define spin_unlock_irqrestore(spinlock, flags) ((void)(flags), --*(spinlock))

static inline unsigned int vbw_slice_ns(void)
{
	return 1000;
}

#endif /* KERNEL_H */
