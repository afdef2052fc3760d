/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * As much of a kernel as walk.c needs: one zone, one order, one migrate type. Time
 * stands still, so that a slice ends when its room is used up.
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
#define clamp(val, lo, hi) min(max(val, lo), hi)
#define EXPORT_SYMBOL_GPL(symbol) _Static_assert(sizeof(&(symbol)), "")
#define might_sleep() ((void)0)
#define cond_resched() ((void)0)
#define local_clock() 0ull

struct list_head {
	struct list_head *next, *prev;
};

static inline void list_insert(struct list_head *entry, struct list_head *after)
{
	entry->prev = after;
	entry->next = after->next;
	after->next->prev = entry;
	after->next = entry;
}

static inline void list_del(struct list_head *entry)
{
	entry->prev->next = entry->next;
	entry->next->prev = entry->prev;
}

static inline bool list_is_last(const struct list_head *entry, const struct list_head *head)
{
	return entry->next == head;
}

static inline void list_rotate_to_front(struct list_head *entry, struct list_head *head)
{
	list_del(head);
	list_insert(head, entry->prev);
}

struct page {
	struct list_head buddy_list;
};

#define list_page(entry) ((struct page *)(entry))
#define list_for_each_entry_reverse(pos, head, member) \
	for (pos = list_page((head)->prev); &pos->member != (head); \
	     pos = list_page(pos->member.prev))

enum migratetype { MIGRATE_MOVABLE, MIGRATE_TYPES };

struct zone {
	int lock;
	struct free_area {
		struct list_head free_list[MIGRATE_TYPES];
		unsigned long nr_free;
	} free_area[1];
};

struct pglist_data {
	struct zone node_zones[1];
};

extern struct pglist_data node;
extern struct page pages[];

#define MAX_NR_ZONES 1
#define VBW_MAX_ORDER 0
#define NODE_DATA(nid) (&node)
#define for_each_online_node(nid) for ((nid) = 0; (nid) < 1; (nid)++)
#define populated_zone(zone) true
#define page_to_pfn(page) ((unsigned long)((page) - pages))
#define spin_lock_irqsave(spinlock, flags) ((flags) = (unsigned long)++*(spinlock))
#define spin_unlock_irqrestore(spinlock, flags) ((void)(flags), --*(spinlock))

static inline unsigned int vbw_slice_ns(void)
{
	return 1000;
}

#endif /* KERNEL_H */
