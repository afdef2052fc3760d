// SPDX-License-Identifier: GPL-2.0-only
/* The free list that walk.c reads in userspace, and what others may do to it between slices. */
#include "kernel.h"

#define PAGES_MAX 65536

struct pglist_data node;
struct page pages[PAGES_MAX];

static struct list_head *head(void)
{
	return &node.node_zones[0].free_area[0].free_list[0];
}

void list_make_empty(void)
{
	node = (struct pglist_data){};
	head()->next = head();
	head()->prev = head();
}

void add_front(unsigned long pfn)
{
	list_insert(&pages[pfn].buddy_list, head());
	node.node_zones[0].free_area[0].nr_free++;
}

void add_tail(unsigned long pfn)
{
	list_insert(&pages[pfn].buddy_list, head()->prev);
	node.node_zones[0].free_area[0].nr_free++;
}

void take(unsigned long pfn)
{
	list_del(&pages[pfn].buddy_list);
	node.node_zones[0].free_area[0].nr_free--;
}

/* What an allocation gets. */
unsigned long front(void)
{
	return (unsigned long)(list_page(head()->next) - pages);
}

void rotate(unsigned long pfn)
{
	list_rotate_to_front(&pages[pfn].buddy_list, head());
}

int lock_depth(void)
{
	return node.node_zones[0].lock;
}
