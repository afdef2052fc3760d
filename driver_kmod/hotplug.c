// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory that goes offline while page structures are being read.
 *
 * pfn_to_online_page() alone does not keep the page structures that it returns:
 * the memory may go offline and its page structures be freed right after. A
 * module cannot take the memory hotplug lock. Instead, the notifier that runs
 * before memory goes offline waits for the readers, and from then on they leave
 * that memory out. Its blocks are isolated anyway.
 */
#include <linux/memory.h>
#include <linux/rwsem.h>

#include "hotplug.h"

static DECLARE_RWSEM(hotplug_lock);

/* The pages that go offline; one request at a time, the kernel sees to that. */
static unsigned long leaving_start;
static unsigned long leaving_end;

/**
 * vbw_hotplug_read_lock - keep the page structures of online memory
 *
 * Context: may sleep. Memory cannot go offline until
 * vbw_hotplug_read_unlock(), so hold it for no longer than a slice.
 */
void vbw_hotplug_read_lock(void)
{
	down_read(&hotplug_lock);
}

/**
 * vbw_hotplug_read_unlock - undo vbw_hotplug_read_lock()
 */
void vbw_hotplug_read_unlock(void)
{
	up_read(&hotplug_lock);
}

/**
 * vbw_hotplug_leaving - whether a page is in memory that goes offline
 * @pfn: the page frame number
 *
 * Context: between vbw_hotplug_read_lock() and vbw_hotplug_read_unlock().
 * Return: true if the page structure must not be used.
 */
bool vbw_hotplug_leaving(unsigned long pfn)
{
	return pfn >= leaving_start && pfn < leaving_end;
}

static int memory_changed(struct notifier_block *nb, unsigned long action, void *arg)
{
	const struct memory_notify *memory = arg;

	switch (action) {
	case MEM_GOING_OFFLINE:
		down_write(&hotplug_lock);
		leaving_start = memory->start_pfn;
		leaving_end = memory->start_pfn + memory->nr_pages;
		up_write(&hotplug_lock);
		break;
	case MEM_CANCEL_OFFLINE:
	case MEM_OFFLINE:
		down_write(&hotplug_lock);
		leaving_start = 0;
		leaving_end = 0;
		up_write(&hotplug_lock);
		break;
	}
	return NOTIFY_OK;
}

static struct notifier_block memory_notifier = {
	.notifier_call = memory_changed,
};

/**
 * vbw_hotplug_init - watch memory; once, when the module is loaded
 *
 * Return: 0 or a negative error number.
 */
int vbw_hotplug_init(void)
{
	return register_memory_notifier(&memory_notifier);
}

/**
 * vbw_hotplug_exit - undo vbw_hotplug_init()
 */
void vbw_hotplug_exit(void)
{
	unregister_memory_notifier(&memory_notifier);
}
